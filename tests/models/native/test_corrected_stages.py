"""The corrector and error control around CUDA graphs, where the picture grows, and over the clips of a video."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sglang_cachedit_plugin.cache.error_control import RESTART
from tests.models.native.harness import noise
from tests.models.native.test_steps import (
    CASES,
    CONTROL,
    STATIC,
    Model,
    N,
    denoised,
    distances,
    made_request,
    made_stage,
    nothing_left,  # noqa: F401
    stage_class,
)
from tests.unit.blocks import DIM

pytestmark = pytest.mark.usefixtures("hooked")
OUTPUT = STATIC | {"forecast": "output", "forecast_order": 1}


def stage_of(*bases: type, **methods: Any) -> Any:
    """The tiny stage as one of the host's other stages."""
    stage = made_stage()
    stage.__class__ = type("Stage", (stage_class(), *bases), methods)
    return stage


# Breakable CUDA graphs


class Runner:
    """Stands for the host's runner of captured graphs: each replay writes into the same memory."""

    def __init__(self, transformer: Any, device: torch.device):
        self.transformer, self.calls, self.output = transformer, 0, None

    def __call__(self, **kwargs: Any) -> torch.Tensor:
        self.calls += 1
        output = self.transformer(**kwargs)
        self.output = output.clone() if self.output is None else self.output.copy_(output)
        return self.output.clone()


@pytest.fixture
def graphed(monkeypatch) -> Any:
    from sglang.multimodal_gen.runtime.breakable_cuda_graph import runner
    from sglang.multimodal_gen.runtime.pipelines_core.stages.denoising import DenoisingStage

    monkeypatch.setattr(runner, "DiffusionBreakableCudaGraphRunner", Runner)
    stage = stage_of(_predict_noise=DenoisingStage._predict_noise)
    stage._bcg_runners, stage._mounted_quality, stage._extra_func_kwarg_names_cache = {}, "lossless", {}
    stage.server_args.enable_breakable_cuda_graph = True
    return stage


def replays(stage: Any) -> int:
    return sum(runner.calls for runner in stage._bcg_runners.values())


@pytest.mark.parametrize("knobs", [OUTPUT, CONTROL], ids=["schedule", "control"])
@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
def test_around_graphs_computed_steps_alone_are_replayed_and_the_others_corrected(graphed, knobs, fields):
    without, corrected, _ = distances(graphed, knobs, **fields)
    assert corrected < without
    before, forwards = replays(graphed), graphed.transformer.forwards
    latents, report = denoised(graphed, made_request(knobs | {"corrector": True}, **fields))
    computed = report["transformers"]["transformer"]["branches"]["cond"]["computed"]
    assert len(computed) < N and report["corrector"]["corrected_steps"] > 0
    # Once the gate has closed the host goes on without the unconditional branch.
    guided = N * fields.get("gate", 1.0) if "cfg" in fields else 0
    ran = sum(2 if step < guided else 1 for step in computed)
    assert replays(graphed) - before == graphed.transformer.forwards - forwards == ran
    # Without graphs the same request is the same picture.
    graphed.server_args.enable_breakable_cuda_graph = False
    assert torch.equal(denoised(graphed, made_request(knobs | {"corrector": True}, **fields))[0], latents)


@pytest.mark.parametrize("knobs", [{"error_tolerance": 0.0}, OUTPUT | {"steps_computation_mask": [1] * N}])
def test_around_graphs_all_steps_computed_is_the_hosts_own_picture(graphed, knobs):
    exact, _ = denoised(graphed, made_request(None, cfg=True))
    latents, report = denoised(graphed, made_request(knobs, cfg=True))
    assert report["enabled"] and torch.equal(latents, exact)
    assert replays(graphed) == 4 * N


# Progressive resolution

SIDE, GROWTH = 8, 7
BEFORE_GROWTH = OUTPUT | {"steps_computation_mask": [*[1] * (GROWTH - 2), 0, 0, *[1, 0, 0] * 4, 1]}


class Ramp(Model):
    """Its output is linear in the timestep, which any two outputs with their true positions show."""

    def forward(self, hidden_states, timestep=None, bias=0.0, guidance=None, **kwargs):
        self.forwards += 1
        return noise(5, *hidden_states.shape) * (timestep.flatten()[0] / 1000 - 0.3)


def growing(**methods: Any) -> Any:
    """The host's stage that starts with a quarter of the picture; one token is one place of the latents."""
    from sglang.multimodal_gen.runtime.pipelines_core.stages.progressive_resolution.denoising import (
        ProgressiveDenoisingStage,
    )

    def unpack(self, latent, height, width):
        return latent.view(1, height, width, DIM).permute(0, 3, 1, 2)

    def repack(self, spatial, height, width, batch, server_args):
        return spatial.permute(0, 2, 3, 1).reshape(1, height * width, DIM)

    def initial(self, batch, server_args, height, width, seed):
        return noise(1, 1, height * width, DIM)

    def grown(self, ctx, batch, server_args, height, width):
        assert ctx.scheduler.step_index == GROWTH
        self.grown.append(ctx.latents)

    stage = stage_of(ProgressiveDenoisingStage, **{
        "_latent_scale_factor": lambda self, server_args: 1, "_unpack_latent": unpack, "_repack_latent": repack,
        "_generate_initial_noise": initial, "_on_resolution_change": grown,
    } | methods)
    stage._spectrum_A, stage._spectrum_beta, stage._cache_dit_request_overrides, stage.grown = 1.0, 2.0, {}, []
    return stage


GROWING = {
    "progressive_mode": "dct_rewind", "progressive_levels": 1, "progressive_delta": 0.01, "height": SIDE,
    "width": SIDE, "batch_size": 1,
}


@pytest.mark.parametrize("knobs", [BEFORE_GROWTH, CONTROL], ids=["schedule", "control"])
def test_steps_of_a_picture_that_grows_are_corrected(knobs):
    without, corrected, report = distances(growing(), knobs, **GROWING)
    assert corrected < without
    assert report["corrector"]["corrected_steps"] > 0
    (branch,) = report["transformers"]["transformer"]["branches"].values()
    assert set(range(GROWTH, GROWTH + (RESTART if knobs is CONTROL else 1))) <= set(branch["computed"])


def test_cached_steps_before_a_growth_stay_as_they_were():
    stage = growing()
    for on in (False, True):
        _, report = denoised(stage, made_request(BEFORE_GROWTH | {"corrector": on}, **GROWING))
    assert torch.equal(*stage.grown)
    assert report["corrector"]["corrected_steps"] == BEFORE_GROWTH["steps_computation_mask"][GROWTH:].count(0)


def test_after_a_growth_the_corrector_knows_the_moved_step_and_nothing_of_the_small_picture():
    stage = growing()
    stage.transformer = Ramp()
    exact, _ = denoised(stage, made_request(None, **GROWING))
    latents, report = denoised(
        stage, made_request(BEFORE_GROWTH | {"corrector_order": 1, "corrector_carry": 0.0}, **GROWING)
    )
    assert report["corrector"]["corrected_steps"] > 0
    torch.testing.assert_close(latents, exact, rtol=0.0, atol=1e-5)


def test_after_a_growth_forecasts_know_the_moved_step():
    stage = growing()
    stage.transformer = Ramp()
    exact, _ = denoised(stage, made_request(None, **GROWING))
    mask = [*[1] * (GROWTH + 2), *[0, 0, 1] * 3, 0, 1]
    latents, report = denoised(
        stage, made_request(OUTPUT | {"steps_computation_mask": mask, "corrector": False}, **GROWING)
    )
    assert report["cached_steps"] == mask.count(0)
    torch.testing.assert_close(latents, exact, rtol=0.0, atol=1e-5)


# The clips of Wan-Animate 2


class Clips(Model):
    """Takes what Wan-Animate 2 gives its transformer: latents (channels, frames, height, width)."""

    batched = False

    def build_reference_kv(self, clip_cond):
        return None

    def prepare_context(self, prompt, image):
        return prompt

    def forward(self, hidden_states, timestep=None, projected_context=0.0, **kwargs):
        output = super().forward(hidden_states, bias=projected_context)
        return output[None] if self.batched else output


def animate() -> Any:
    from sglang.multimodal_gen.runtime.models.schedulers.scheduling_dpm_solver_multistep import (
        DPMSolverMultistepScheduler,
    )
    from sglang.multimodal_gen.runtime.pipelines_core.stages.model_specific_stages.wan_animate_2.denoising import (
        WanAnimate2DenoisingStage,
    )

    def forward(self, batch, server_args):
        """The host's clips, without what encodes and decodes them."""
        wanted = SimpleNamespace(
            prompt_embeddings=0.0, negative_prompt_embeddings=0.3, reference_image_embeddings=None,
            inputs=SimpleNamespace(num_inference_steps=N, guidance_scale=2.0 if batch.cfg else 1.0),
        )
        batch.latents = [
            self._denoise_single_clip(batch, server_args, wanted, SimpleNamespace(init_noise=start))
            for start in batch.latents
        ]
        return batch

    stage = made_stage()
    stage.__class__ = type("WanAnimate2DenoisingStage", (WanAnimate2DenoisingStage,), {
        "forward": forward, "begin_declared_component_use": lambda self, **kwargs: None,
        "_finish_active_component_use": lambda self: None, "step_profile": lambda self: None,
    })
    stage.transformer, stage.server_args.pipeline_config.flow_shift = Clips(), 3.0
    stage.scheduler = DPMSolverMultistepScheduler(
        num_train_timesteps=1000, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return stage


def animated(stage: Any, knobs: dict | None, *seeds: int, cfg: bool = False) -> tuple[list[torch.Tensor], dict]:
    """The clips of one request that start from the noise of these seeds, and its report."""
    stage.scheduler.set_timesteps(sigmas=np.linspace(1, 0, N + 1)[:N])
    starts = [noise(each, 3, 2, 5, DIM) for each in seeds]
    made = made_request(knobs, scheduler=None, timesteps=stage.scheduler.timesteps, latents=starts)
    made.cfg = cfg
    return denoised(stage, made)


@pytest.mark.parametrize("knobs", [STATIC, CONTROL], ids=["schedule", "control"])
@pytest.mark.parametrize("cfg", [False, True], ids=["no guidance", "guidance"])
def test_clips_whose_outputs_have_no_batch_dimension_are_corrected(knobs, cfg):
    stage = animate()
    (exact,), _ = animated(stage, None, 1, cfg=cfg)
    (plain,), _ = animated(stage, knobs | {"corrector": False}, 1, cfg=cfg)
    (corrected,), report = animated(stage, knobs | {"corrector": True}, 1, cfg=cfg)
    assert report["corrector"]["corrected_steps"] > 0
    assert corrected.shape == exact.shape
    assert (corrected - exact).norm() < (plain - exact).norm()


def test_the_error_of_an_output_without_batch_dimension_is_that_of_the_whole_sample():
    stage = animate()
    (clip,), report = animated(stage, CONTROL, 1)
    stage.transformer.batched = True
    (other,), expected = animated(stage, CONTROL, 1)
    assert report["error_control"] == expected["error_control"]
    assert torch.equal(clip, other)


ENDS_CACHED = STATIC | {"steps_computation_mask": [1, 1, 1, *[0, 0, 1] * 5, 0, 0]}


@pytest.mark.parametrize("knobs", [ENDS_CACHED, OUTPUT, CONTROL], ids=["ends cached", "forecast", "control"])
def test_each_clip_of_a_request_is_what_it_is_alone(knobs):
    stage = animate()
    asked = knobs | {"corrector": True}
    (alone,), one = animated(stage, asked, 2)
    (_, second), two = animated(stage, asked, 2, 2)
    assert torch.equal(second, alone)
    assert two["corrector"]["corrected_steps"] == 2 * one["corrector"]["corrected_steps"] > 0
