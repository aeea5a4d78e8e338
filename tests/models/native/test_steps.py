"""The corrector and error control in the host's own denoising loop and step, around tiny models."""

from __future__ import annotations

import dataclasses
import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_cachedit_plugin.cache.error_control import BEGINNING, RESTART
from sglang_cachedit_plugin.config import effective
from sglang_cachedit_plugin.config.effective import Defaults
from sglang_cachedit_plugin.integration import native
from sglang_cachedit_plugin.integration.request import WORKER
from tests.models.native.harness import _Arguments, noise, set_arguments
from tests.unit.blocks import DIM, TOKENS, TinyDiT, known_classes

pytestmark = pytest.mark.usefixtures("hooked")
N, EDGE = 20, 8
STATIC = {
    "steps_computation_mask": [1, 1, 1, *[0, 0, 1] * 5, 0, 1], "scm_policy": "static", "max_warmup_steps": 0,
}
CONTROL = {"error_tolerance": 1.0}


@pytest.fixture(autouse=True)
def nothing_left(monkeypatch):
    monkeypatch.setattr(effective, "_current", Defaults())
    with known_classes():
        yield
    assert not WORKER.active.sessions and not WORKER.active.stages


class Model(TinyDiT):
    """A flow whose size is its own."""

    def __init__(self, size: float = 1.0):
        super().__init__()
        self.size, self.forwards, self.fails = size, 0, False

    def forward(self, hidden_states, timestep=None, bias=0.0, guidance=None, **kwargs):
        if self.fails:
            raise RuntimeError("model failed")
        self.forwards += 1
        return self.size * (super().forward(hidden_states) - hidden_states) + bias


@functools.cache
def stage_class() -> type:
    from sglang.multimodal_gen.runtime.distributed.cfg_policy import CFGPolicy
    from sglang.multimodal_gen.runtime.pipelines_core.stages import denoising as host_stage
    from sglang.multimodal_gen.runtime.pipelines_core.stages.model_specific_stages.wan_ti2v import (
        blend_wan_ti2v_latents,
    )

    class TinyStage(host_stage.DenoisingStage):
        """The host's loop, step, guidance and gate; what loads and shards models is left out."""

        def _prepare_denoising_loop(self, batch, server_args):
            steps = N if self.transformer_2 is None else (EDGE, N - EDGE)
            self._maybe_enable_cache_dit(steps, batch)
            fields = {each.name: None for each in dataclasses.fields(host_stage.DenoisingContext)}
            fields |= {name: [] for name in ("trajectory_timesteps", "trajectory_latents")}
            policy = CFGPolicy().build(batch, {}, {"bias": 0.0}, {"bias": 0.3})
            return host_stage.DenoisingContext(**fields | {
                "scheduler": batch.scheduler, "extra_step_kwargs": {}, "target_dtype": torch.float32,
                "autocast_enabled": False, "timesteps": batch.timesteps, "num_inference_steps": N,
                "num_warmup_steps": 0, "latents": batch.latents, "is_warmup": batch.is_warmup, "extra": {},
                "cfg_policy": policy, "z": batch.z, "reserved_frames_mask": batch.mask,
            })

        def _select_and_manage_model(self, t_int, **kwargs):
            low = self.transformer_2 is not None and t_int < int(self.edge)
            return (self.transformer_2 if low else self.transformer), 2.0

        def _predict_noise(self, current_model, latent_model_input, timestep, target_dtype, guidance, **kwargs):
            return current_model(latent_model_input, timestep=timestep, **kwargs)

        def _prepare_step_attn_metadata(self, **kwargs):
            return None

        def post_forward_for_ti2v_task(self, batch, server_args, mask, latents, z):
            return blend_wan_ti2v_latents(latents, mask, z)

        def _finalize_denoising_loop(self, ctx, batch, server_args):
            batch.latents = ctx.latents

        def _finish_active_component_use(self):
            pass

        def step_profile(self):
            pass

    return TinyStage


def made_stage(second: Any = None) -> Any:
    from sglang.multimodal_gen.runtime.pipelines_core.stages.base import PipelineStage

    stage = stage_class().__new__(stage_class())
    PipelineStage.__init__(stage)
    arguments = set_arguments()
    arguments.pipeline_config.get_classifier_free_guidance_scale = lambda batch, scale: scale
    arguments.pipeline_config.slice_noise_pred = lambda output, latents: output
    arguments.pipeline_config.postprocess_cfg_noise = lambda batch, output, cond: output
    vars(stage).update({
        "transformer": Model(), "transformer_2": second, "server_args": arguments, "pipeline": None,
        "_offloaded_dit_modules_for_compile": [], "_cache_dit_enabled": False,
    })
    return stage


def made_request(knobs: dict | None, *, cfg: bool = False, prompts: int = 1, **fields: Any) -> SimpleNamespace:
    from sglang.multimodal_gen.runtime.models.schedulers.scheduling_flow_match_euler_discrete import (
        FlowMatchEulerDiscreteScheduler,
    )

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(N)
    sampling = _Arguments(
        enable_cache_dit=knobs is not None, cache_dit_params=knobs or None, cfg_gate_step=fields.pop("gate", 1.0)
    )
    return _Arguments(**{
        "sampling_params": sampling, "scheduler": scheduler, "timesteps": scheduler.timesteps, "extra": {},
        "is_warmup": False, "is_cfg_negative": False, "do_classifier_free_guidance": cfg, "num_inference_steps": N,
        "latents": noise(1, prompts, TOKENS, DIM), "raw_latent_shape": (prompts, TOKENS, DIM),
        "guidance_rescale": 0.0, "enable_teacache": False,
        "enable_spectrum": False, **fields,
    })


def denoised(stage: Any, request: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    stage.edge = request.timesteps[EDGE - 1]
    with torch.no_grad():
        native.run_stage(type(stage).forward, stage, request, stage.server_args)
    return request.latents, request.extra["cache_dit"]


def distances(stage: Any, knobs: dict, **fields: Any) -> tuple[float, float, dict[str, Any]]:
    """How far the latents are from the uncached ones without and with the corrector; the report with it."""
    exact, _ = denoised(stage, made_request(None, **fields))
    found = [denoised(stage, made_request(knobs | {"corrector": on}, **fields)) for on in (False, True)]
    return *(float((latents - exact).norm()) for latents, _ in found), found[1][1]


CASES = {
    "no guidance": {}, "guidance": {"cfg": True}, "gate": {"cfg": True, "gate": 0.5},
    "several prompts": {"prompts": 3},
}


@pytest.mark.parametrize("knobs", [STATIC, CONTROL], ids=["schedule", "control"])
@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
def test_corrected_pictures_are_nearer_to_the_uncached_ones(knobs, fields):
    stage = made_stage()
    without, corrected, report = distances(stage, knobs, **fields)
    assert report["cached_steps"] > 0 and report["corrector"]["corrected_steps"] > 0, report["corrector"]
    assert corrected < without


@pytest.mark.parametrize("knobs", [{"error_tolerance": 0.0}, {"steps_computation_mask": [1] * N}])
@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
def test_all_steps_computed_is_the_hosts_own_picture(knobs, fields):
    stage = made_stage()
    exact, _ = denoised(stage, made_request(None, **fields))
    assert torch.equal(denoised(stage, made_request(knobs, **fields))[0], exact)


def test_a_step_that_the_tolerance_leaves_out_runs_no_branch():
    stage = made_stage()
    _, report = denoised(stage, made_request(CONTROL, cfg=True))
    branches = report["transformers"]["transformer"]["branches"]
    assert stage.transformer.forwards == sum(len(branch["computed"]) for branch in branches.values()) < 2 * N
    assert branches["cond"] == branches["uncond"]


def test_a_branch_whose_difference_the_host_reuses_is_not_reported():
    stage = made_stage()
    _, report = denoised(stage, made_request(CONTROL, cfg=True, gate=0.5))
    branches = report["transformers"]["transformer"]["branches"]
    assert stage.transformer.forwards == sum(len(branch["computed"]) for branch in branches.values())
    first = min(step for step in branches["cond"]["computed"] if step >= N // 2)
    assert any(step > first for step in branches["cond"]["cached"])
    for kind in ("computed", "cached"):
        assert branches["uncond"][kind] == [step for step in branches["cond"][kind] if step < first]


def test_the_second_expert_starts_without_history():
    """Its flow is the first one's turned around: an output from before the boundary would be far off."""
    stage = made_stage(Model(-1.0))
    for knobs in (STATIC, CONTROL):
        without, corrected, report = distances(stage, knobs)
        assert corrected < without
    second = report["transformers"]["transformer_2"]["branches"]["cond"]
    assert set(range(EDGE, EDGE + RESTART)) <= set(second["computed"])
    first = report["transformers"]["transformer"]["branches"]["cond"]
    assert set(range(BEGINNING)) <= set(first["computed"])


@pytest.mark.parametrize("knobs", [STATIC, CONTROL], ids=["schedule", "control"])
def test_reserved_frames_end_as_the_hosts_own(knobs):
    mask = torch.ones(1, TOKENS, DIM)
    mask[:, 0] = 0.0
    fields = {"mask": mask[0], "z": noise(7, 1, TOKENS, DIM)}
    latents, report = denoised(made_stage(), made_request(knobs, **fields))
    assert report["corrector"]["corrected_steps"] > 0
    assert torch.equal(latents[:, 0], fields["z"][:, 0])


@pytest.mark.parametrize("knobs", [STATIC, CONTROL], ids=["schedule", "control"])
def test_a_request_that_fails_leaves_the_scheduler_and_the_next_request_alone(knobs):
    stage = made_stage()
    good, report = denoised(stage, made_request(knobs))
    bad = made_request(knobs)
    stage.transformer.fails = True
    with pytest.raises(RuntimeError, match="model failed"):
        denoised(stage, bad)
    assert "step" not in vars(bad.scheduler) and "__getstate__" not in vars(bad.scheduler)
    stage.transformer.fails = False
    again, other = denoised(stage, made_request(knobs))
    assert torch.equal(again, good)
    assert other["transformers"] == report["transformers"]


def test_a_warmup_request_under_a_tolerance_runs():
    latents, report = denoised(made_stage(), made_request(CONTROL, is_warmup=True))
    assert bool(torch.isfinite(latents).all()) and report["enabled"]
