"""Real pipelines of diffusers under a session: branches, steps, control residuals, a second transformer, a UNet."""

from __future__ import annotations

import inspect
from collections import Counter
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch

from sglang_cachedit_plugin.adapters import DIFFUSERS, ModelAdapter
from sglang_cachedit_plugin.config import effective
from sglang_cachedit_plugin.config.effective import Defaults
from sglang_cachedit_plugin.errors import MountError
from sglang_cachedit_plugin.integration import diffusers as diffusers_backend
from sglang_cachedit_plugin.integration import recording, sglang_api
from sglang_cachedit_plugin.integration.diffusers import PipelineCache
from sglang_cachedit_plugin.integration.request import Session
from tests.models.on_diffusers.pipelines import PIPELINES, unet_pipeline
from tests.models.on_diffusers.proof import CACHED, LARGE, MASK, SMALL
from tests.models.on_diffusers.zoo import STEPS

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
COMPUTED = [step for step in range(STEPS) if step not in CACHED]


@pytest.fixture(autouse=True)
def _quiet_diffusers():
    before = diffusers.logging.get_verbosity()
    diffusers.logging.set_verbosity_error()
    yield
    diffusers.logging.set_verbosity(before)


def call(pipe: Any, arguments: dict[str, Any], steps: int = STEPS) -> torch.Tensor:
    """One picture, as latents where the pipeline gives them."""
    takes = inspect.signature(type(pipe).__call__).parameters
    latents = {"output_type": "latent" if "height" in takes else "np"}
    torch.manual_seed(2)
    generator = torch.Generator().manual_seed(1)
    result = pipe(**{**latents, **arguments}, num_inference_steps=steps, generator=generator, return_dict=False)[0]
    return result[0] if isinstance(result, list) else torch.as_tensor(result)


def serve(
    cache: PipelineCache, arguments: dict[str, Any], mask: Any, steps: int = STEPS, **knobs: Any
) -> tuple[torch.Tensor, dict]:
    """A request with a static schedule, and its report."""
    wanted = {"steps_computation_mask": list(mask), "scm_policy": "static", "max_warmup_steps": 0, **knobs}
    session = Session("diffusers", Defaults().decide(True, wanted))
    try:
        with cache.request(session, steps):
            return call(cache.pipe, arguments, steps), session.stats.as_dict()
    finally:
        session.close()


def schedule(report: dict) -> dict[str, dict[str, tuple[list[int], list[int]]]]:
    """(computed, cached) by transformer and branch."""
    return {
        name: {branch: (each["computed"], each["cached"]) for branch, each in transformer["branches"].items()}
        for name, transformer in report["transformers"].items()
    }


def test_every_row_that_says_run_is_run_in_a_pipeline():
    assert {case.transformer for case in PIPELINES.values()} == {
        name for name, row in DIFFUSERS.items() if row.verified == "run" and not row.unsupported
    }


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_caches_and_is_its_own_otherwise(name):
    case = PIPELINES[name]
    pipe = case.build()
    assert type(pipe.transformer).__name__ == case.transformer
    plain = {side: call(pipe, case.call(side)) for side in (SMALL, LARGE)}
    cache = PipelineCache(pipe)
    computed, report = serve(cache, case.call(SMALL), [1] * STEPS)
    assert torch.equal(computed, plain[SMALL])
    assert report["cached_steps"] == 0
    assert report["computed_steps"] == STEPS - case.first
    for side in (SMALL, LARGE):
        cached, report = serve(cache, case.call(side), MASK)
        assert schedule(report) == case.schedule(COMPUTED, CACHED)
        assert report["reason"] is None
        assert cached.shape == plain[side].shape
        assert not torch.equal(cached, plain[side])
    assert torch.equal(call(pipe, case.call(SMALL)), plain[SMALL])


def test_no_bars_are_drawn_while_the_tuner_records(monkeypatch, tmp_path, capsys):
    case = PIPELINES["StableDiffusion3Pipeline"]
    pipe = case.build()
    pipe.set_progress_bar_config(disable=False)
    PipelineCache(pipe)
    call(pipe, case.call(SMALL))
    assert f"{STEPS}/{STEPS}" in capsys.readouterr().err
    monkeypatch.setenv(recording.VARIABLE, str(tmp_path))
    PipelineCache(pipe)
    call(pipe, case.call(SMALL))
    assert f"{STEPS}/{STEPS}" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["FluxControlNetPipeline", "StableDiffusion3ControlNetPipeline"])
def test_the_control_picture_reaches_a_cached_picture(name):
    case = PIPELINES[name]
    cache = PipelineCache(case.build())
    first, _ = serve(cache, case.call(SMALL), MASK)
    second, _ = serve(cache, {**case.call(SMALL), "controlnet_conditioning_scale": 0.0}, MASK)
    assert not torch.equal(first, second)


def test_skip_layer_guidance_is_computed_and_the_report_says_so():
    case = PIPELINES["StableDiffusion3Pipeline"]
    arguments = {
        **case.call(SMALL), "skip_guidance_layers": [1], "skip_layer_guidance_start": 0.0,
        "skip_layer_guidance_stop": 1.0,
    }
    pipe = case.build()
    plain = call(pipe, arguments)
    assert not torch.equal(plain, call(pipe, case.call(SMALL))), "the guidance does nothing"
    picture, report = serve(PipelineCache(pipe), arguments, MASK)
    assert torch.equal(picture, plain)
    assert report["cached_steps"] == 0
    assert "cannot be told apart" in report["reason"]


def test_a_new_round_of_the_loop_starts_anew():
    """FramePack and Helios run their schedule once for each section of a video."""
    case = PIPELINES["AuraFlowPipeline"]
    pipe = case.build()
    plain = [call(pipe, case.call(SMALL)) for _ in range(2)]
    session = Session("diffusers", Defaults().decide(True, {
        "steps_computation_mask": list(MASK), "scm_policy": "static", "max_warmup_steps": 0,
    }))
    with PipelineCache(pipe).request(session, STEPS):
        rounds = [call(pipe, case.call(SMALL)) for _ in range(2)]
    assert schedule(session.close().as_dict()) == {"transformer": {"cond": (COMPUTED * 2, CACHED * 2)}}
    assert torch.equal(*rounds), "the second section saw something of the first"
    assert not torch.equal(rounds[0], plain[0])


class Stage:
    """The host's side of one pipeline: loads it, and runs requests."""

    def __init__(self, pipe: Any, monkeypatch: pytest.MonkeyPatch, **settings: Any):
        self.diffusers_pipe, self.lines = pipe, []
        log = SimpleNamespace(info=self.lines.append, warning=lambda text, *a: self.lines.append(text % a))
        monkeypatch.setattr(sglang_api, "logger", lambda: log)
        monkeypatch.setattr(effective, "_current", Defaults(), raising=True)
        self.settings = settings

    def load(self) -> None:
        """As the host loads a pipeline."""
        arguments = SimpleNamespace(cache_dit_config=None, enable_torch_compile=True)
        diffusers_backend.load(None, SimpleNamespace(_cache_dit_enabled=False), self.diffusers_pipe, arguments)

    def run(self, arguments: dict[str, Any], **knobs: Any) -> tuple[torch.Tensor, dict]:
        """A request that wants caching."""
        batch = SimpleNamespace(
            sampling_params=SimpleNamespace(enable_cache_dit=True, cache_dit_params=knobs or None),
            num_inference_steps=STEPS, metrics=SimpleNamespace(), is_warmup=False,
        )
        picture = diffusers_backend.execute(
            lambda stage, batch, server_args: call(self.diffusers_pipe, arguments), self, batch, None
        )
        return picture, batch.metrics.cache_dit


def test_a_unet_is_refused_with_the_reason(monkeypatch):
    pipe, arguments = unet_pipeline()
    plain = call(pipe, arguments)
    stage = Stage(pipe, monkeypatch)
    stage.load()
    reason = "StableDiffusionPipeline denoises with a UNet, only transformers are cached"
    assert stage.lines == [f"cache-dit: off [model]: {reason}"]
    picture, report = stage.run(arguments)
    assert torch.equal(picture, plain)
    assert (report["enabled"], report["reason"]) == (False, reason)
    with pytest.raises(MountError, match="denoises with a UNet"):
        stage.run(arguments, strict=True)


def test_a_refused_class_goes_on_uncached(monkeypatch):
    row = ModelAdapter(family="AuraFlow", unsupported="its blocks are a secret")
    monkeypatch.setitem(DIFFUSERS, "AuraFlowTransformer2DModel", row)
    case = PIPELINES["AuraFlowPipeline"]
    pipe = case.build()
    plain = call(pipe, case.call(SMALL))
    stage = Stage(pipe, monkeypatch)
    stage.load()
    reason = "AuraFlowTransformer2DModel: its blocks are a secret"
    assert stage.lines == [f"cache-dit: off [model]: {reason}"]
    picture, report = stage.run(case.call(SMALL))
    assert torch.equal(picture, plain)
    assert (report["enabled"], report["reason"]) == (False, reason)
    with pytest.raises(MountError, match="a secret"):
        stage.run(case.call(SMALL), strict=True)


def test_calls_of_blocks_in_a_pipeline_are_those_of_the_schedule():
    case = PIPELINES["QwenImagePipeline"]
    pipe = case.build()
    calls: Counter[int] = Counter()
    for index, block in enumerate(pipe.transformer.transformer_blocks):
        block.register_forward_hook(lambda *_, index=index: calls.update([index]))
    serve(PipelineCache(pipe), case.call(SMALL), MASK)
    # Two branches; the first block runs at every step, the others at the computed ones.
    assert calls == {0: 2 * STEPS, **{index: 2 * len(COMPUTED) for index in (1, 2, 3)}}
