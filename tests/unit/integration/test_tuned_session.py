"""A request under tuned schedules, and what the recorder writes of it."""

from __future__ import annotations

import torch
from safetensors.torch import load_file

from sglang_cachedit_plugin.config.effective import Defaults
from sglang_cachedit_plugin.integration.diffusers import PipelineCache
from sglang_cachedit_plugin.integration.recording import FILE, VARIABLE
from sglang_cachedit_plugin.integration.request import Session
from tests.unit.integration.test_diffusers_identity import STEPS, Pipe

KNOBS = {"forecast": "output", "scm_policy": "static", "max_warmup_steps": 0}


def serve(rows: list[dict], size=(64, 64), knobs=KNOBS):
    """Final latents and report of one request; enabled unless ``rows`` is empty."""
    params = {**KNOBS, **knobs, "schedules": rows} if rows else None
    session = Session("diffusers", Defaults().decide(bool(rows), params))
    pipe = Pipe()
    cache = PipelineCache(pipe)
    with cache.request(session, STEPS, size) if rows else cache.uncached(session):
        latents = pipe.run("embeddings")
    return latents, session.close().as_dict()


def branches(report: dict) -> dict[str, list[int]]:
    return {name: each["cached"] for name, each in report["transformers"]["transformer"]["branches"].items()}


def test_the_row_of_the_request_decides_for_each_branch():
    rows = [
        {"steps": STEPS, "size": "32x32", "mask": "100000"},
        {"steps": STEPS, "size": "64x64", "mask": "110101", "uncond_mask": "111001"},
    ]
    _, report = serve(rows)
    assert branches(report) == {"cond": [2, 4], "uncond": [3, 4]}
    assert report["reason"] is None
    assert report["config"]["schedules"]["value"] == ["6 steps 32x32", "6 steps 64x64"]


def test_weights_and_damping_of_the_row_are_used():
    row = {"steps": STEPS, "mask": "111010"}
    # The corrector would replace forecasts, and leaves those by fitted weights alone.
    plain = {"corrector": False}
    linear, _ = serve([row], knobs=plain)
    held, _ = serve([{**row, "damping": 0.0}], knobs=plain)
    by_weights, _ = serve([{**row, "weights": [[1.0], [1.0]]}], knobs=plain)
    assert torch.equal(held, by_weights)
    assert not torch.equal(held, linear)


def test_fitted_weights_are_corrected_only_where_it_is_asked_for():
    rows = [{"steps": STEPS, "mask": "111010", "weights": [[1.0], [1.0]]}]
    uncorrected, _ = serve(rows, knobs={"corrector": False})
    by_default, report = serve(rows)
    assert torch.equal(by_default, uncorrected)
    assert (report["corrector"]["enabled"], report["corrector"]["corrected_steps"]) == (False, 0)
    assert "fitted weights" in report["corrector"]["reason"]
    asked, report = serve(rows, knobs={"corrector": True})
    assert report["corrector"]["corrected_steps"] == 1, "nothing is computed after the last step"
    assert not torch.equal(asked, uncorrected)


def test_weights_hold_for_the_mask_that_they_were_fitted_to():
    row = {"steps": STEPS, "mask": "111010", "weights": [[1.0], [1.0]]}
    shared, _ = serve([row])
    same, _ = serve([{**row, "uncond_mask": "111010"}])
    assert torch.equal(shared, same)
    apart, _ = serve([{**row, "uncond_mask": "110101"}])
    cond_only, _ = serve([{"steps": STEPS, "mask": "111010", "damping": 0.0, "uncond_mask": "110101"}])
    assert not torch.equal(apart, cond_only)


def test_other_steps_are_resampled_and_the_report_says_so():
    _, report = serve([{"steps": 12, "size": "64x64", "mask": "111110001000"}])
    assert branches(report)["cond"] == [3, 4, 5]
    assert "12 steps 64x64 is resampled over the step number, 3 steps computed" in report["reason"]


def test_a_cached_request_is_written_down(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    latents, _ = serve([{"steps": STEPS, "mask": "110101"}])
    found = load_file(tmp_path / FILE)
    assert torch.equal(found["latents"], latents)
    outputs = {name.removeprefix("output/transformer/") for name in found if name.startswith("output/")}
    assert outputs == {f"{branch}/{step}" for branch in ("cond", "uncond") for step in (0, 1, 3, 5)}
    # Euler's step from the recorded parts is the step that was taken.
    sigmas = Pipe().scheduler
    sigmas.set_timesteps(STEPS)
    assert found["timesteps"].tolist() == sigmas.timesteps.tolist()
    change = sigmas.sigmas[1] - sigmas.sigmas[0]
    cond, uncond = (found[f"output/transformer/{branch}/0"] for branch in ("cond", "uncond"))
    second = found["input/transformer/cond/0"] + change * (uncond + 2.0 * (cond - uncond))
    torch.testing.assert_close(found["input/transformer/cond/1"], second)


def test_an_uncached_request_leaves_its_latents(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    latents, report = serve([])
    assert set(load_file(tmp_path / FILE)) == {"latents"}
    assert torch.equal(load_file(tmp_path / FILE)["latents"], latents)
    assert report["enabled"] is False


def test_nothing_is_written_unless_asked_for(tmp_path, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    serve([{"steps": STEPS, "mask": "110101"}])
    assert list(tmp_path.iterdir()) == []
