"""The client: what it asks for, what it prints and writes, and when it fails."""

from __future__ import annotations

import base64
import io
import json
import threading
import time

import pytest

from sglang_cachedit_plugin import cli, client
from sglang_cachedit_plugin.report import table


def report(**changes):
    branches = {
        "cond": {"computed": [0, 1, 3], "cached": [2, 4], "residual_diffs": {"2": 0.1, "3": 0.4}, "nan_diffs": 0},
        "uncond": {"computed": [0, 1, 2, 3, 4], "cached": [], "residual_diffs": {}, "nan_diffs": 0},
    }
    return {
        "enabled": True, "reason": None, "computed_steps": 3, "cached_steps": 2,
        "corrector": {"enabled": True, "reason": None, "corrected_steps": 0, "largest_correction": None},
        "transformers": {"transformer": {"steps": 5, "branches": branches}},
    } | changes


def answer(**changes):
    return {
        "images": [base64.b64encode(b"picture").decode()], "videos": [], "seed": 7, "time_cost": 1.5, "width": 64,
        "height": 96, "num_inference_steps": 5, "notes": ["fps was left out"], "cache_stats": report(),
    } | changes


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs the command in an empty folder against a function; returns status, bodies, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, reply=lambda body: answer()):
        bodies, lock = [], threading.Lock()

        def ask(url, body, **options):
            with lock:
                bodies.append((url, body, options))
            return reply(body)

        monkeypatch.setattr(client.run, "__defaults__", (ask,))
        status = cli.main(["client", "--prompt", "a cat", *arguments])
        out, err = capsys.readouterr()
        return status, bodies, out, err

    return run


def test_only_what_was_given_is_asked_for(run):
    _, [(url, body, options)], _, _ = run()
    assert url == "http://127.0.0.1:30000"
    assert body == {"prompt": "a cat"}
    assert options["key"] is None


def test_options_become_the_body(run):
    _, [(_, body, options)], _, _ = run(
        "--size", "640x480", "--steps", "9", "--seed", "0", "--profile", "fast", "--no-cache", "--api-key", "k",
        "--cache-param", "max_warmup_steps=2", "--cache-param", "scm_preset=fast",
        "--cache-param", "scm_compute_bins=[1]", "--output", "cat.webp",
    )
    assert body == {
        "prompt": "a cat", "width": 640, "height": 480, "num_inference_steps": 9, "seed": 0, "profile": "fast",
        "enable_cache_dit": False, "output_format": "webp",
        "cache_dit_params": {"max_warmup_steps": 2, "scm_preset": "fast", "scm_compute_bins": [1]},
    }
    assert options["key"] == "k"


def test_the_key_comes_from_the_environment(run, monkeypatch):
    monkeypatch.setenv("SGLANG_CACHE_DIT_CONTROL_KEY", "secret")
    assert run()[1][0][2]["key"] == "secret"


def test_seeds_of_repeats_count_up_and_a_warmup_comes_first(run):
    _, bodies, _, _ = run("--repeat", "3", "--seed", "5", "--warmup")
    assert [(body.get("warmup"), body["seed"]) for _, body, _ in bodies] == [(True, 5), (None, 5), (None, 6), (None, 7)]


def test_requests_run_at_the_same_time_up_to_the_limit(run):
    now, most, lock = 0, 0, threading.Lock()

    def reply(body):
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.05)
        with lock:
            now -= 1
        return answer()

    status, bodies, _, _ = run("--repeat", "8", "--concurrency", "3", reply=reply)
    assert (status, len(bodies), most) == (0, 8, 3)


def test_it_prints_the_table_and_a_summary(run):
    status, _, out, err = run("--repeat", "2")
    assert status == 0 and err == ""
    assert "request 1: 1.50 s, 64x96, 5 steps, seed 7" in out
    rows = [line.split() for line in out.splitlines() if line.startswith("  transformer ")]
    assert rows[0] == ["transformer", "branch", "computed", "cached", "P00", "P25", "P50", "P75", "P95", "max"]
    assert rows[1] == ["transformer", "cond", "3", "2", "0.100", "0.100", "0.100", "0.400", "0.400", "0.400"]
    assert rows[2] == ["transformer", "uncond", "5", "0", *"------"]
    assert "note: fps was left out" in out
    assert "2 answers in" in out and "median 1.50 s; 6 steps computed, 4 cached" in out


@pytest.mark.parametrize(
    ("stats", "words"),
    [
        (report(enabled=False, reason="request", transformers={}), "cache off: request"),
        (report(reason="4 warmup steps"), "cache limited: 4 warmup steps"),
        (None, "the server sent no cache statistics"),
    ],
)
def test_it_says_why_nothing_was_cached(run, stats, words):
    assert words in run(reply=lambda body: answer(cache_stats=stats))[2]


@pytest.mark.parametrize(
    ("repeat", "contents", "names"),
    [
        (1, {}, ["out.png"]),
        (2, {}, ["out-000.png", "out-001.png"]),
        (1, {"images": ["YQ==", "Yg=="]}, ["out-0.png", "out-1.png"]),
        (1, {"images": [], "videos": ["YQ=="]}, ["out.mp4"]),
    ],
)
def test_pictures_are_written(run, tmp_path, repeat, contents, names):
    target = tmp_path / "new" / "out.png"
    status, _, out, _ = run("--output", str(target), "--repeat", str(repeat), reply=lambda body: answer(**contents))
    assert status == 0
    assert sorted(path.name for path in target.parent.iterdir()) == names
    if not contents:
        assert all(path.read_bytes() == b"picture" for path in target.parent.iterdir())
    assert all(name in out for name in names)


def test_json_is_one_line_an_answer_without_pictures(run, tmp_path):
    _, _, out, _ = run("--json", "--repeat", "2", "--output", str(tmp_path / "a.png"))
    found = [json.loads(line) for line in out.splitlines()]
    assert len(found) == 2 and all(each["seed"] == 7 and len(each["files"]) == 1 for each in found)
    assert not any("images" in each for each in found)


def test_a_failure_is_one_line_and_status_1(run):
    def reply(body):
        if body["seed"] == 6:
            raise client.ClientError("400: width = 0\n(request)")
        return answer()

    status, bodies, out, err = run("--repeat", "3", "--seed", "5", reply=reply)
    assert status == 1 and len(bodies) == 3
    assert err == "sglang-cachedit client: error: 1 of 3 failed: 400: width = 0 (request)\n"
    assert "2 answers in" in out


def test_a_file_that_cannot_be_written_is_one_line(run, tmp_path):
    (tmp_path / "file").write_text("")
    status, _, _, err = run("--output", str(tmp_path / "file" / "out.png"))
    assert status == 1 and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments",
    [["--size", "x64"], ["--size", "0x64"], ["--output", "a.bmp"],
     ["--steps", "-1"], ["--cache-param", "x"], ["--repeat", "0"],
     ["--cache", "--no-cache"], ["--seed", "x"]],
)
def test_bad_options_are_status_2(run, arguments):
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    assert caught.value.code == 2


def test_a_progress_display_is_for_terminals_only(run, monkeypatch):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(client.sys, "stderr", screen)
    run("--repeat", "2")
    assert "0/2" in screen.getvalue()


def test_a_table_of_nothing_is_empty():
    assert table.lines([report(transformers={})]) == []


def test_a_table_ends_with_what_the_outputs_corrected():
    corrected = [
        report(corrector={"enabled": True, "reason": None, "corrected_steps": steps, "largest_correction": size})
        for steps, size in ((12, 0.1138), (6, 0.02))
    ]
    found = table.lines([*corrected, report(), report(enabled=False, corrector=None, transformers={})])
    assert found[-1] == "corrected 18 cached steps, largest 0.11"
    assert len(found) == 2 + 6 + 1


def test_columns_of_a_table_stand_under_each_other():
    found = table.lines([report(), report()])
    assert len(found) == 2 + 4 and found[2:4] == found[4:6]
    assert len({len(line) for line in found}) == 1
