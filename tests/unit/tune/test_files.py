"""Files of a tuning run: evaluations on disk, options, the config file, the selection."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest
import yaml

from sglang_cachedit_plugin.cli import main
from sglang_cachedit_plugin.config.effective import Defaults
from sglang_cachedit_plugin.config.sources import read_file
from sglang_cachedit_plugin.errors import SettingError
from sglang_cachedit_plugin.tune import candidates, command, options, selection, write
from sglang_cachedit_plugin.tune.evaluate import Grid
from sglang_cachedit_plugin.tune.job import Result
from sglang_cachedit_plugin.tune.promise import Promise
from sglang_cachedit_plugin.tune.store import Store, fingerprint
from sglang_cachedit_plugin.tune.surrogate import Method

ROOT = Path(__file__).parents[3]


def test_a_result_comes_back_and_a_cut_one_does_not(tmp_path):
    store = Store(tmp_path, {"model": "a"})
    key = store.key({"prompt": "x"})
    assert store.get(key) is None
    store.put(key, {"psnr": 30.5}, {"picture": np.arange(6, dtype=np.uint8)})
    found = Store(tmp_path, {"model": "a"}).get(key)
    assert found["psnr"] == 30.5 and found["picture"].tolist() == [0, 1, 2, 3, 4, 5]
    assert Store(tmp_path, {"model": "b"}).key({"prompt": "x"}) != key
    assert store.key({"prompt": "y"}) != key
    path = tmp_path / f"{key}.npz"
    path.write_bytes(path.read_bytes()[:200])
    assert store.get(key) is None


def test_a_changed_model_has_another_fingerprint(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    first = fingerprint(str(tmp_path), sglang="1")
    assert first == fingerprint(str(tmp_path), sglang="1")
    assert first != fingerprint(str(tmp_path), sglang="2")
    (tmp_path / "config.json").write_text("[]")
    assert first != fingerprint(str(tmp_path), sglang="1")


def arguments(tmp_path, *more: str, steps: str = "8", size: str = "64x64"):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a\n\nb\nc\nd\n")
    parser = argparse.ArgumentParser()
    options.add_arguments(parser)
    if not {"--budget", "--speedup", "--min-psnr"} & set(more):
        more = (*more, "--budget", "4")
    return parser.parse_args([
        "--model-path", str(tmp_path), "--prompts", str(prompts), "--steps", steps, "--size", size,
        "--out", str(tmp_path / "out.yaml"), *more,
    ])


def test_options_become_a_plan(tmp_path):
    plan = command.prepare(arguments(tmp_path, steps="8,12", size="64x64,96x64x9"))
    assert [(grid.steps, grid.size) for grid in plan.grids] == [
        (8, (64, 64)), (8, (96, 64, 9)), (12, (64, 64)), (12, (96, 64, 9)),
    ]
    assert [prompt.text for prompt in plan.tune] == ["a", "b", "d"]
    assert [prompt.text for prompt in plan.heldout] == ["c"]
    assert len({prompt.seed for prompt in (*plan.tune, *plan.heldout)}) == 4
    assert plan.target == {"budget": 4}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--budget", "9"], "--budget = 9 .*from 1 to 8"),
        (["--speedup", "0.5"], "--speedup = 0.5 .*from 1 to 8"),
        (["--evaluations", "-1"], "--evaluations = -1 .*at least 0"),
        (["--heldout", "/nowhere/at/all"], "No such file"),
        (["--baselines", "tecache"], "--baselines = 'tecache' .*did you mean 'teacache'"),
        (["--baselines", "dpcahce"], "did you mean 'dpcache'"),
        (["--baselines", "fewer,dbcahe"], "--baselines = 'dbcahe' .*did you mean 'dbcache'"),
        (["--baselines", "plian"], "did you mean 'plain'"),
        (["--baselines", "plain,teacache"], "plain stands alone"),
        (["--baselines", "fewer,none"], "none stands alone"),
        (["--baselines", "fewer-9"], "--baselines = 'fewer-9' .*beginnings of names"),
        (["--baselines", ""], "--baselines = '' .*expected none, plain, all"),
        (["--baselines", "fewer,"], "--baselines = '' "),
        (["--share", "0.9"], "--share = 0.9 .*expected --min-psnr or --min-ssim"),
        (["--min-psnr", "35", "--share", "1"], r"--share = 1\.0 .*from 0\.5 to below 1"),
        (["--min-psnr", "35", "--share", "0.9", "--confidence", "90"], r"--confidence = 90\.0 "),
        (["--min-psnr", "35", "--share", "0.95"],
         r"--share = 0\.95 .*expected 45 prompts or more for this with confidence 0\.9, found 3 beside the held-out"),
    ],
)
def test_bad_options_are_refused_before_anything_starts(tmp_path, more, words):
    with pytest.raises((SettingError, OSError), match=words):
        command.prepare(arguments(tmp_path, *more))


def test_the_old_name_of_an_option_leads_to_the_new_one(tmp_path, capsys):
    with pytest.raises(SystemExit):
        arguments(tmp_path, "--peers", "all")
    assert "argument --peers: it is called --baselines" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "names"), [
    ("none", ()), ("plain", ("growing",)), ("all", ("",)),
    ("fewer-4, growing-output", ("fewer-4", "growing-output")),
    ("taylorseer-1-every-2,dbcache-0.4-long,spectrum-3", ("taylorseer-1-every-2", "dbcache-0.4-long", "spectrum-3")),
])
def test_peers_are_known_words_or_beginnings_of_names(tmp_path, text, names):
    assert command.prepare(arguments(tmp_path, "--baselines", text)).baselines == names


def test_all_prompts_calibrate_a_promise_and_twelve_a_search(tmp_path):
    calibration, held = tmp_path / "many.txt", tmp_path / "held.txt"
    calibration.write_text("\n".join(map(str, range(30))))
    held.write_text("x")
    more = ["--prompts", str(calibration), "--heldout", str(held)]
    found = command.prepare(arguments(tmp_path, *more, "--min-psnr", "35", "--share", "0.9"))
    assert len(found.tune) == 30 and found.promise == Promise(0.9, 0.9)
    assert len(command.prepare(arguments(tmp_path, *more, "--min-psnr", "35")).tune) == 12
    with pytest.raises(SettingError, match="one number of steps"):
        command.prepare(arguments(tmp_path, *more, "--min-psnr", "35", "--share", "0.9", steps="8,12"))


@pytest.mark.parametrize(
    ("steps", "size"), [("1", "64x64"), ("8,8", "64x64"), ("x", "64x64"), ("8", "64"), ("8", "0x1")]
)
def test_bad_grids_are_refused(tmp_path, steps, size):
    with pytest.raises(SettingError, match=r"--steps|--size"):
        command.prepare(arguments(tmp_path, steps=steps, size=size))


def test_the_command_leaves_with_status_2_and_one_line(tmp_path, capsys):
    (tmp_path / "p.txt").write_text("\n")
    status = main([
        "tune", "--model-path", str(tmp_path), "--prompts", str(tmp_path / "p.txt"), "--steps", "8", "--size", "8x8",
        "--budget", "4", "--out", str(tmp_path / "o.yaml"),
    ])
    assert status == 2
    assert capsys.readouterr().err.count("\n") == 1


def point(name: str, kind: str, computed: float, mean: float, **more) -> dict:
    return {
        "name": name, "kind": kind, "label": name, "family": more.pop("family", name), "computed": computed,
        "psnr": {"mean": mean, "p10": mean - 2, "min": mean - 5, "each": [mean]}, "settings": {}, **more,
    }


FEWER = [point(f"fewer-{n}", "fewer_steps", n, 20.0 + 2 * n, family="fewer") for n in (4, 6, 8)]


def test_the_rival_at_equal_quality_is_found_on_the_line_of_its_family():
    at, by = selection.needed([*FEWER, point("spectrum", "host", 7.5, 31.0)], 31.0)
    assert (at, by["name"]) == (pytest.approx(5.5), "fewer-6")
    assert selection.needed(FEWER, 40.0) is None
    assert selection.needed(FEWER, 10.0)[0] == 4


def test_the_selection_says_who_wins():
    tuned = point("tuned-5", "tuned", 5, 33.0)
    words = selection.describe([*FEWER, tuned], tuned)
    assert "best other at no more computed steps: fewer-4 (4.0 computed) 28.0 dB mean" in words
    assert "fewer-8 at 6.5 computed (23 % saved)" in words
    loser = point("tuned-6", "tuned", 6, 30.0)
    assert "It does not win: fewer-6" in selection.describe([*FEWER, loser], loser)
    assert selection.better([*FEWER, loser], loser)["name"] == "fewer-6"
    assert selection.better([*FEWER, tuned], tuned) is None


@pytest.mark.parametrize(
    ("target", "name", "remark"),
    [
        ({"min_psnr": 33.0}, "tuned-5", None), ({"min_psnr": 33.5}, "tuned-7", None),
        ({"min_psnr": 50.0}, "tuned-7", "PSNR 50"), ({"speedup": 2.0}, "tuned-5", None),
        ({"budget": 7}, "tuned-7", None), ({"budget": 2}, "tuned-3", "at most 2 steps"),
    ],
)
def test_the_target_chooses_the_fewest_steps_that_meet_it(target, name, remark):
    points = [
        *FEWER,
        *(point(f"tuned-{n}", "tuned", n, mean - 9.0, tuning={"psnr": mean})
          for n, mean in ((3, 25.0), (5, 33.0), (7, 36.0))),
    ]
    chosen, said = selection.choose(points, 10, target)
    assert chosen["name"] == name
    assert (said is None) == (remark is None) and (remark or "") in (said or "")


def test_error_control_beats_a_schedule_by_its_mean_or_its_tenth_percentile():
    tuned = point("tuned-5", "tuned", 5, 33.0)
    control = point("tolerance-0.01", "baseline", 5.4, 32.0, family=candidates.CONTROL)
    assert selection.better([tuned, control], tuned) is None
    control["psnr"]["p10"] = 31.5
    assert selection.better([tuned, control], tuned) is control
    assert "It does not win: tolerance-0.01 (5.4 computed) 32.0 dB mean, 31.5" in selection.describe(
        [tuned, control], tuned
    )
    # Another setting must be better in the mean, and neither may compute more.
    assert selection.better([tuned, {**control, "family": "DBCache", "computed": 5}], tuned) is None
    assert selection.better([tuned, {**control, "computed": 5.6}], tuned) is None


PROVENANCE = {
    "command": "sglang-cachedit tune ...", "date": "2026-11-21", "machine": "two CPU cores", "host": "0.5.23",
    "cache_dit": "1.5.1", "seed": 1, "prompts": {"tune": 2, "heldout": 2},
}
MODEL = {"name": "demo", "backend": "native"}


def tuned_result(steps: int, mean: float) -> Result:
    half = steps // 2
    mask = (1,) * half + (0,) * half
    places, weights = np.linspace(1000, 10, steps), [(0.123456789,)] * half
    row = candidates.row(steps, (64, 64), places, [mask], Method(fitted=1), weights)
    best = point(f"tuned-{half}", "tuned", half, mean)
    rival = point("growing", "growing_window", half, 30.0, settings={"forecast": "residual"})
    return Result(
        grid=Grid(steps, (64, 64)), points=[best, rival], rows={best["name"]: row},
        knobs={best["name"]: candidates.OUTPUT}, profiles={"tuned-50": best},
        chosen=best,
    )


def test_the_written_file_serves_every_grid(tmp_path):
    path = tmp_path / "deep" / "tuned.yaml"
    write.write(path, [tuned_result(8, 40.0), tuned_result(12, 41.0)], PROVENANCE, MODEL)
    text = path.read_text()
    assert text.startswith("# Schedules tuned for demo on the native backend, 8 and 12 steps.\n# Hardware: any.\n")
    assert "# 12 steps 64x64" in text and "tuned-6" in text
    defaults = Defaults(file=read_file(str(path)))
    for params in (None, {"profile": "tuned-50"}):
        found = defaults.decide(True, params).resolved.primary
        assert [(row.steps, sum(row.mask)) for row in found.schedules] == [(8, 4), (12, 6)]
        assert found.schedules[0].weights[0] == (0.12346,)
        assert (found.forecast, found.steps_computation_policy, found.max_warmup_steps) == ("output", "static", 0)
    assert "&" not in yaml.dump(yaml.safe_load(text)) or "*id" not in text


def test_a_file_in_the_checkout_names_the_schema():
    def first(path):
        return write.preamble(Path(path), [tuned_result(8, 40.0)], PROVENANCE, MODEL)[0]

    schema = first(ROOT / "configs" / "t.yaml").removeprefix("yaml-language-server: $schema=")
    assert (ROOT / "configs" / schema).is_file()
    assert first("/elsewhere/t.yaml").startswith("Schedules tuned")


def test_the_better_one_is_written_where_the_tuned_schedule_loses(tmp_path):
    path = tmp_path / "tuned.yaml"
    write.write(path, [tuned_result(8, 25.0)], PROVENANCE, MODEL)
    assert "growing was better (30.0 dB), it is in the file instead" in path.read_text()
    for params in (None, {"profile": "tuned-50"}):
        assert Defaults(file=read_file(str(path))).decide(True, params).resolved.primary.schedules is None


def test_a_schedule_and_a_tolerance_can_be_in_one_file(tmp_path):
    for better in ("chosen", "profile"):
        result = tuned_result(8, 40.0)
        # Error control beats one of the two schedules.
        other = point("tuned-3", "tuned", 3, 20.0)
        control = point("control", "baseline", 3, 30.0, family=candidates.CONTROL, settings={"error_tolerance": 0.02})
        result.points += [other, control]
        result.rows["tuned-3"], result.knobs["tuned-3"] = result.rows["tuned-4"], result.knobs["tuned-4"]
        if better == "chosen":
            result.chosen = other
        else:
            result.profiles["tuned-50"] = other
        path = tmp_path / f"{better}.yaml"
        write.write(path, [result], PROVENANCE, MODEL)
        defaults = Defaults(file=read_file(str(path)))
        plain, named = (defaults.decide(True, params).resolved.primary for params in (None, {"profile": "tuned-50"}))
        controlled, scheduled = (plain, named) if better == "chosen" else (named, plain)
        assert controlled.error_tolerance == 0.02
        assert scheduled.error_tolerance is None and len(scheduled.schedules) == 1


def test_spectrum_is_counted_as_the_host_counts():
    from sglang.multimodal_gen.configs.sample.spectrum import SpectrumParams
    from sglang.multimodal_gen.runtime.cache.spectrum import SpectrumContext, SpectrumMixin

    params = SpectrumParams(window_size=2.0, flex_window=0.75, warmup_steps=5)
    model = SpectrumMixin()
    model.prefix = "flux"
    model._init_spectrum_state()
    steps = iter(range(50))
    model._get_spectrum_context = lambda: SpectrumContext(
        current_step=next(steps), num_inference_steps=50, total_forward_steps=50, do_cfg=False,
        is_cfg_negative=False, spectrum_params=params, debug=False,
    )
    real = sum(model.begin_spectrum_step() for _ in range(50))
    assert candidates.spectrum_computed(50, 2.0, 0.75, 5) == real
