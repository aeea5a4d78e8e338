"""The benchmark without a host: what is compared, in which order, and what is made of the figures."""

from __future__ import annotations

import argparse
import json
import re

import numpy as np
import pytest
from PIL import Image

from sglang_cachedit_plugin.bench import chart, options, summary, variants
from sglang_cachedit_plugin.bench.command import prepare
from sglang_cachedit_plugin.bench.run import Work, requests_of, run
from sglang_cachedit_plugin.bench.variants import Variant, changed, parse_settings, plan
from sglang_cachedit_plugin.config.settings import CacheSettings
from sglang_cachedit_plugin.errors import SettingError
from sglang_cachedit_plugin.evaluation.host_process import HostError

STEPS = 10


def test_settings_are_yaml_and_commas_in_brackets_stay():
    text = "scm_preset=fast,steps_computation_mask=[1, 0],secondary={max_warmup_steps: 2, Fn_compute_blocks: 1},a=0.1"
    assert parse_settings(text, "--set") == {
        "scm_preset": "fast", "steps_computation_mask": [1, 0],
        "secondary": {"max_warmup_steps": 2, "Fn_compute_blocks": 1}, "a": 0.1,
    }


def test_without_options_the_defaults_of_both_are_compared():
    found = plan()
    assert [(variant.name, variant.kind, dict(variant.settings)) for variant in found] == [
        ("uncached", "uncached", {}), ("stock", "stock", {}), ("plugin", "plugin", {}),
    ]
    assert found[0].request() == {} and found[0].environment() == {}
    assert found[1].environment() == {"SGLANG_CACHE_DIT_ENABLED": "true"}
    assert found[2].request() == {"enable_cache_dit": True, "cache_dit_params": {}}


def test_stock_gets_what_it_has_and_the_rest_is_named():
    stock = plan(settings=["scm_preset=fast,forecast=output,enable_taylorseer=true,scm_compute_bins=[4, 2]"
                           ",scm_cache_bins=[2, 2]"], profile="fast", profiles=["fast"])[1]
    assert stock.left_out == ("forecast", "profile")
    assert stock.environment() == {
        "SGLANG_CACHE_DIT_ENABLED": "true", "SGLANG_CACHE_DIT_SCM_PRESET": "fast",
        "SGLANG_CACHE_DIT_TAYLORSEER": "true", "SGLANG_CACHE_DIT_SCM_COMPUTE_BINS": "4,2",
        "SGLANG_CACHE_DIT_SCM_CACHE_BINS": "2,2",
    }
    assert stock.stock_file()["cache_config"]["residual_diff_threshold"] == 0.24


def test_several_variants():
    found = plan(["a:residual_diff_threshold=0.1", "b:profile=fast"], ["s:taylorseer_order=2,enable_taylorseer=true"],
                 profiles=["fast"])
    assert [(variant.name, variant.kind) for variant in found] == [
        ("uncached", "uncached"), ("s", "stock"), ("a", "plugin"), ("b", "plugin"),
    ]
    assert [variant.name for variant in plan(["a:"], with_stock=False)] == ["uncached", "a"]


@pytest.mark.parametrize(("variants", "message"), [
    (["a:residual_diff_threshold=7"], "residual_diff_threshold = 7"), (["a:max_warmup_stepz=1"], "did you mean"),
    (["a:", "a:"], "two variants"), (["uncached:"], "two variants"), (["a:profile=none-such"], "profile"),
    (["a:b"], "expected name=value"), ([":x=1"], "expected name:setting=value"),
    (["a"], "a name alone is that of a profile"), (["fats"], "did you mean 'fast'?"),
])
def test_bad_variants_are_refused_before_anything_starts(variants, message):
    with pytest.raises(SettingError, match=re.escape(message)):
        plan(variants, profiles=["fast"])


def test_the_name_of_a_profile_alone_is_that_profile():
    assert dict(plan(["fast"], profiles=["fast"], with_stock=False)[1].settings) == {"profile": "fast"}


def test_more_than_the_ideal_is_warned_of():
    row = {**dict.fromkeys(("failed", "reason", "switch", "error", "requests")), "name": "a", "left_out": []}
    cells = dict.fromkeys((
        "seconds", "denoising_s", "computed", "speedup", "peak_memory_mb", "peak_rss_mb", "first_request_s",
        *summary.quality.METRICS,
    ))
    row |= cells | {"computed_is_estimated": False}
    for efficiency, warned in ((2.84, True), (1.0, False), (None, False)):
        assert ("warning: above 100 % of ideal" in summary.table([row | {"efficiency": efficiency}])) is warned


def test_a_variant_may_have_the_name_of_a_profile_where_it_says_what_it_is():
    found = plan(["fast:", "quality:profile=fast"], profiles=["fast", "quality"], with_stock=False)
    assert [dict(variant.settings) for variant in found] == [{}, {}, {"profile": "fast"}]


def test_a_changed_knob_differs_and_has_no_effect():
    plain = Variant(name="a", kind="plugin", settings={"scm_preset": "fast"})
    assert changed(plain) == {"scm_preset": "fast", "residual_diff_threshold": pytest.approx(0.24, rel=1e-5)}
    assert changed(plain)["residual_diff_threshold"] != CacheSettings().residual_diff_threshold
    for threshold in (0.0, 1.0):
        other = changed(Variant(name="a", kind="plugin", settings={"residual_diff_threshold": threshold}))
        assert 0.0 < other["residual_diff_threshold"] < 1.0


def test_stock_and_uncached_hosts_leave_this_plugin_out_and_keep_others(monkeypatch, tmp_path):
    monkeypatch.setenv("SGLANG_PLUGINS", "cachedit,other")
    monkeypatch.setenv("SGLANG_CACHE_DIT_RDT", "0.5")
    uncached, stock, plugin = (variants.environment(variant, tmp_path, sync=True) for variant in plan())
    assert uncached["SGLANG_PLUGINS"] == stock["SGLANG_PLUGINS"] == "other"
    assert plugin["SGLANG_PLUGINS"] == "cachedit,other"
    assert not any("SGLANG_CACHE_DIT_RDT" in env for env in (uncached, stock, plugin))
    assert stock["SGLANG_CACHE_DIT_ENABLED"] == "true" and "SGLANG_CACHE_DIT_ENABLED" not in plugin


def test_given_host_flags_outrank_our_own(tmp_path):
    variant = plan()[2]
    flags = variants.arguments(variant, "m", "sglang", 2, ["--warmup-mode", "server", "--port=7"], "c.yaml", tmp_path)
    assert flags.count("--warmup-mode") == 1 and "--port=7" in flags and "--port" not in flags
    assert flags[flags.index("--cache-dit-config") + 1] == "c.yaml"
    assert "--cache-dit-config" not in variants.arguments(plan()[0], "m", "diffusers", 1, [], "c.yaml", tmp_path)
    stock = variants.arguments(plan()[1], "m", "diffusers", 1, [], "c.yaml", tmp_path)
    assert stock[stock.index("--cache-dit-config") + 1] == str(tmp_path / "stock.yaml")


class FakeHost:
    """Answers with set times; writes down who was asked."""

    start_s = 1.5

    def __init__(self, variant, log, fail=()):
        self.variant, self.log, self.fail, self.count = variant, log, fail, 0

    def run(self, request, picture=None):
        self.count += 1
        self.log.append((self.variant.name, request["prompt"]))
        if self.count in self.fail:
            raise HostError("the host left with status 1: Killed")
        cached = {"uncached": 0, "stock": 4, "plugin": 5}[self.variant.kind]
        params = request.get("cache_dit_params") or {}
        if self.variant.kind == "stock" and "residual_diff_threshold" in params:
            return {"error": "AssertionError"}
        if picture is not None:
            picture.parent.mkdir(parents=True, exist_ok=True)
            np.save(picture, np.full((16, 16, 3), 100 + 2 * cached, np.uint8))
        steps = [100.0] * (STEPS - cached) + [2.0] * cached
        seconds = sum(steps) / 1000 + 0.1 + (2.0 if self.count == 1 else 0.0)
        report = {"enabled": True, "computed_steps": STEPS - cached, "cached_steps": cached, "reason": None}
        setup = 3.0 if "residual_diff_threshold" in params else 1.0
        metrics = {"stages": {"DenoisingStage": sum(steps) + setup, "Decoding": 5.0}, "steps": steps,
                   "denoising_stages": ["DenoisingStage"],
                   **({"cache_dit": report} if self.variant.kind == "plugin" else {})}
        return {"error": None, "seconds": seconds, "metrics": metrics, "peak_memory_mb": 100.0 + cached,
                "peak_rss_mb": None}

    def close(self):
        self.log.append((self.variant.name, "closed"))


def _work(tmp_path, **more):
    settings = dict(prompts=["x", "y"], request={}, seed=1, repeat=2, warmup=1, switches=1, pictures=tmp_path)
    return Work(**settings | more)


def _rows(tmp_path, **fails):
    log = []
    seats = run(plan(), _work(tmp_path), lambda variant: FakeHost(variant, log, fails.get(variant.name, ())))
    records = [record for seat in seats for record in seat.records]
    return summary.summarise([seat.variant for seat in seats], records, STEPS, tmp_path), records, log


def test_variants_take_turns(tmp_path):
    _, records, log = _rows(tmp_path)
    order = ["uncached", "stock", "plugin"]
    timed = [name for name, what in log if what in "xy"][6:18]
    assert timed == order * 4
    assert len(records) == requests_of(plan(), _work(tmp_path)) == 22
    assert [name for name, what in log if what == "closed"] == order[::-1]


def test_ratios(tmp_path):
    uncached, stock, plugin = _rows(tmp_path)[0]
    assert uncached["speedup"] == uncached["efficiency"] == 1.0
    assert plugin["computed"] == 5 and not plugin["computed_is_estimated"]
    # Seconds: 10 x 0.1 + 0.1 against 5 x 0.1 + 5 x 0.002 + 0.1; denoising has a millisecond outside the steps.
    assert plugin["speedup"] == pytest.approx(1.1 / 0.61)
    assert plugin["denoising_speedup"] == pytest.approx(1.001 / 0.511)
    assert plugin["efficiency"] == pytest.approx(0.5 * 1.001 / 0.511)
    assert plugin["first_request_s"] == pytest.approx(2.61) and plugin["first_over_later"] == pytest.approx(2.61 / 0.61)
    assert plugin["switch"]["cost_s"] == pytest.approx(0.0) and plugin["switch"]["error"] is None
    # Set up in 3 ms after the change and in 1 ms after the change back, where a steady request takes 1 ms.
    assert plugin["switch"]["setup_cost_s"] == pytest.approx(0.001)
    # Stock reports nothing: its steps are counted by their time.
    assert stock["computed"] == 6 and stock["computed_is_estimated"]
    assert stock["switch"]["error"] == "AssertionError" and stock["failed"] == 0
    assert [row["peak_memory_mb"] for row in (uncached, stock, plugin)] == [100, 104, 105]
    # Pictures of constant 110 against 100.
    assert plugin["psnr"]["mean"] == pytest.approx(20 * np.log10(255 / 10)) and uncached["psnr"] is None


def test_a_host_that_dies_is_reported_and_the_others_go_on(tmp_path):
    rows, _, log = _rows(tmp_path, stock=(3,))
    assert rows[1]["failed"] == 4 and rows[1]["seconds"] is None
    assert rows[1]["error"] == "the host left with status 1: Killed"
    assert rows[2]["speedup"] == pytest.approx(1.1 / 0.61) and rows[2]["failed"] == 0
    assert log.count(("stock", "x")) == 3
    text = summary.table(rows)
    assert "stock: 4 of 8 requests failed: the host left with status 1: Killed" in text


def test_a_host_that_does_not_start_is_reported(tmp_path):
    def start(variant):
        if variant.kind == "stock":
            raise HostError("no such model")
        return FakeHost(variant, [])

    seats = run(plan(), _work(tmp_path), start)
    rows = summary.summarise([seat.variant for seat in seats], [r for s in seats for r in s.records], STEPS, tmp_path)
    assert rows[1]["error"] == "no such model" and rows[1]["failed"] == 6
    assert "failed: no such model" in [chart.words(row) for row in rows]
    chart.write(rows, "title", STEPS, tmp_path / "chart.png")
    assert Image.open(tmp_path / "chart.png").width == 2 * 860


def test_hosts_can_be_shared_or_taken_one_by_one(tmp_path):
    log = []
    seats = run(plan(), _work(tmp_path), lambda variant: FakeHost(variant, log), hosts="shared")
    assert [seat.variant.name for seat in seats] == ["uncached", "plugin", "stock"]
    assert [record["phase"] for record in seats[1].records[:2]] == ["warmup", "warmup"]
    assert sum(what == "closed" for _, what in log) == 2
    log.clear()
    run(plan(), _work(tmp_path), lambda variant: FakeHost(variant, log), hosts="one")
    closed = [index for index, (_, what) in enumerate(log) if what == "closed"]
    assert len(closed) == 3 and {name for name, _ in log[: closed[0]]} == {"uncached"}


def test_the_table_lines_up(tmp_path):
    lines = summary.table(_rows(tmp_path)[0]).splitlines()
    assert len({len(line) for line in lines[:4]}) == 1
    assert lines[3].split()[:6] == ["plugin", "0.610", "0.511", "5.0", "1.80x", "97.9%"]
    assert lines[2].split()[3] == "~6.0"


def _options(*texts):
    parser = argparse.ArgumentParser()
    options.add_parser(parser.add_subparsers())
    return parser.parse_args(["bench", *texts])


def test_options_make_the_work(tmp_path):
    (tmp_path / "prompts.txt").write_text("one\n\ntwo\nthree\n")
    (tmp_path / "cache.yaml").write_text("profiles: {mine: {scm_preset: fast}}\n")
    args = _options(
        "--model-path", "m", "--prompts", str(tmp_path / "prompts.txt"), "--limit", "2", "--size", "64x32", "--frames",
        "9", "--request", "guidance_scale=4.0", "--profile", "mine", "--cache-dit-config", str(tmp_path / "cache.yaml"),
        "--", "--attention-backend", "torch_sdpa",
    )
    variants, work = prepare(args)
    assert args.host_flags == ["--attention-backend", "torch_sdpa"]
    assert work.prompts == ["one", "two"]
    assert work.request == {
        "width": 64, "height": 32, "num_inference_steps": 28, "num_frames": 9, "guidance_scale": 4.0,
    }
    assert [variant.name for variant in variants] == ["uncached", "stock", "mine"]


@pytest.mark.parametrize(("texts", "message"), [
    ([], "--model-path"), (["--model-path", "m", "--url", "u"], "--model-path"),
    (["--model-path", "m", "--size", "big"], "--size"), (["--model-path", "m", "--repeat", "0"], "--repeat"),
    (["--model-path", "m", "--", "--backend", "x"], "before the --"),
])
def test_bad_options_are_refused(texts, message):
    with pytest.raises(SettingError, match=message):
        prepare(_options(*texts))


def test_results_are_json(tmp_path):
    rows, records, _ = _rows(tmp_path)
    assert json.loads(json.dumps([rows, records], allow_nan=False))[0][2]["name"] == "plugin"
