"""What the host's stages want, refuse and configure, and how they run: the real classes with tiny models."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sglang_cachedit_plugin.config import effective
from sglang_cachedit_plugin.config.effective import Defaults
from sglang_cachedit_plugin.config.sources import read_environment
from sglang_cachedit_plugin.errors import RefusedError
from sglang_cachedit_plugin.integration import native, recording, sglang_api
from sglang_cachedit_plugin.integration.request import WORKER
from sglang_cachedit_plugin.report import metrics
from tests.models.native.harness import MASK, STEPS, Case, Rig, _Arguments, batch, noise, set_arguments
from tests.models.native.test_native_models import rig
from tests.models.native.test_own_loops import STATIC, on_host
from tests.models.native.video_more import minimax_h3

pytestmark = pytest.mark.usefixtures("hooked")
SPECIFIC = "model_specific_stages"


@pytest.fixture(autouse=True)
def nothing_open(monkeypatch):
    monkeypatch.setattr(effective, "_current", Defaults())
    yield
    left = [*WORKER.active.sessions, *WORKER.kept, *WORKER.active.stages]
    for leftover in (WORKER.active.sessions, WORKER.kept, WORKER.active.stages):
        leftover.clear()
    assert left == []


@pytest.fixture
def counted(monkeypatch) -> list[dict[str, Any]]:
    """What is counted on ``/metrics``: reports with the number of requests that each stands for."""
    found: list[dict[str, Any]] = []
    monkeypatch.setattr(sglang_api, "publishes_metrics", lambda: True)
    monkeypatch.setattr(metrics, "observe", lambda report, **how: found.append(report | how))
    return found


def install(monkeypatch, **variables: str) -> None:
    """Server defaults from environment variables without their prefix."""
    environment, _ = read_environment({f"SGLANG_CACHE_DIT_{name}": text for name, text in variables.items()})
    monkeypatch.setattr(effective, "_current", Defaults(environment=environment))


def request(enable: bool | None = True, **knobs: Any) -> SimpleNamespace:
    made = batch(enable, knobs)
    made.sampling_params = _Arguments(**vars(made.sampling_params))
    made.metrics, made.num_inference_steps = SimpleNamespace(denoising_stages=set()), STEPS
    made.perf_dump_path = made.image_path = None
    return made


def looping(name: str, module: str, model: str, **fields: Any) -> Any:
    """A stage class of the host around a tiny model, whose loop runs its steps and nothing else."""
    from sglang.multimodal_gen.runtime.pipelines_core.stages.base import PipelineStage

    each = rig(model)

    def forward(self, made, server_args):
        self._maybe_enable_cache_dit_and_torch_compile(self.steps, made)
        each.state = each.case.fresh(each.model)
        with torch.no_grad():
            self.outputs = [each.step(made, 0, step) for step in range(self.steps)]
        return made

    stage = on_host(name, module, forward, each.model)
    PipelineStage.__init__(stage)
    vars(stage).update({
        "transformer_2": None, "pipeline": None, "server_args": set_arguments(), "_cache_dit_enabled": False,
        "steps": STEPS,
    } | fields)
    stage._maybe_override_attention_backend = stage._maybe_toggle_quality_fusions = lambda *args, **kwargs: None
    stage._reset_dit_cache_states = stage._maybe_torch_compile = lambda *args: None
    return stage


def run(stage: Any, made: Any) -> dict[str, Any]:
    """The report of a request that goes through one stage."""
    native.run_stage(type(stage).forward, stage, made, stage.server_args)
    return made.metrics.cache_dit


# MiniMax-H3


def h3(**fields: Any) -> Any:
    return looping("MiniMaxH3DenoisingStage", f"{SPECIFIC}.minimax_h3.stages.denoising", "MiniMaxH3DiTModel", **fields)


def h3_request(quality: str | None = None, enable: bool | None = None, **knobs: Any) -> SimpleNamespace:
    made = request(enable, **knobs)
    made.sampling_params.quality = quality or "exact"
    made.sampling_params._explicit_fields = set() if quality is None else {"quality"}
    return made


def test_minimax_high_quality_serves_the_stages_own_limits():
    report = run(h3(), h3_request("high"))
    own = {"origin": "stage MiniMaxH3DenoisingStage"}
    assert report["enabled"] and report["config"]["max_warmup_steps"] == own | {"value": 4}
    assert report["config"]["residual_diff_threshold"] == own | {"value": 0.04}
    assert report["config"]["max_continuous_cached_steps"] == own | {"value": 1}
    assert report["config"]["forecast"]["origin"] == "default"


def test_whatever_was_set_outranks_the_stages_own_limits(monkeypatch):
    install(monkeypatch, RDT="0.3")
    config = run(h3(), h3_request("high", max_warmup_steps=2))["config"]
    assert config["residual_diff_threshold"] == {"value": 0.3, "origin": "SGLANG_CACHE_DIT_RDT"}
    assert config["max_warmup_steps"]["value"] == 2
    assert config["max_continuous_cached_steps"] == {"value": 1, "origin": "stage MiniMaxH3DenoisingStage"}


def test_a_request_and_a_server_that_say_no_outrank_the_stages_wish(monkeypatch):
    assert run(h3(), h3_request("high", enable=False))["reason"] == "request"
    install(monkeypatch, ENABLED="false")
    assert not run(h3(), h3_request("high"))["enabled"]


def test_the_stage_without_a_quality_tier_has_no_settings_of_its_own(monkeypatch):
    install(monkeypatch, ENABLED="true", SCM_PRESET="fast")
    report = run(h3(), h3_request())
    assert report["enabled"] and report["config"]["residual_diff_threshold"]["origin"] == "default"


def test_a_stage_that_decides_before_it_is_asked_is_the_reason_in_the_report(monkeypatch):
    install(monkeypatch, ENABLED="true")
    report = run(h3(), h3_request("lossless"))
    assert not report["enabled"] and report["reason"] == "MiniMaxH3DenoisingStage keeps this request uncached"
    monkeypatch.setattr(effective, "_current", Defaults())
    assert run(h3(), h3_request("lossless"))["reason"] == "not configured"


def test_blocks_keep_their_input_again_after_an_uncached_request():
    stage = h3()
    kept = []
    for quality in ("high", None, "high"):
        run(stage, h3_request(quality))
        kept.append((stage._cache_dit_enabled, stage.transformer.blocks[0].preserve_input_for_cache_dit))
    assert kept == [(True, True), (False, False), (True, True)]


# FLUX.3


def flux3(**fields: Any) -> Any:
    return looping(
        "Flux3ImageDenoiseStage", f"{SPECIFIC}.flux3_image", "Flux3ImageDiT", _sequential_cfg_active=False, **fields
    )


@pytest.mark.parametrize("why", ["ulysses", "two forwards"])
def test_flux3_keeps_requests_uncached_whose_samples_pass_block_by_block(monkeypatch, why):
    from sglang.multimodal_gen.runtime.pipelines_core.stages.model_specific_stages import flux3_image

    stage = flux3()
    if why == "ulysses":
        ask = type(stage)._cache_dit_fits_parallelism

        def spread():
            with monkeypatch.context() as over:
                over.setattr(flux3_image, "get_sp_world_size", lambda: 2)
                return ask()

        stage._cache_dit_fits_parallelism = spread
    else:
        stage._sequential_cfg_active = True
    report = run(stage, request(**STATIC))
    assert not report["enabled"]
    assert report["reason"].startswith("Flux3ImageDenoiseStage keeps this request uncached: its samples pass each")
    with pytest.raises(RefusedError, match="keeps this request uncached"):
        run(stage, request(strict=True, **STATIC))
    vars(stage).pop("_cache_dit_fits_parallelism", None)
    stage._sequential_cfg_active = False
    assert run(stage, request(**STATIC))["cached_steps"] == 2


def executed(stages: list[Any], requests: list[Any], arguments: Any) -> None:
    """The host's own executor takes one request, or a group, through all stages."""
    from sglang.multimodal_gen.runtime.pipelines_core.executors.sync_executor import SyncExecutor

    arguments.conditioning_cache_max_size_mb, arguments.should_cpu_offload_component = 1, lambda name: False
    executor = SyncExecutor(arguments)
    executor.component_residency_manager = NoResidency()
    executor.component_residency_manager.server_args = arguments
    with torch.no_grad():
        if len(requests) == 1:
            executor.execute(stages, requests[0], arguments)
        else:
            executor.execute_group(stages, requests, arguments)


class NoResidency:
    """Every component lies where it is."""

    state = SimpleNamespace(stage_name=None)

    def use_component(self, use: Any, module: Any) -> Any:
        return contextlib.nullcontext(module)

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


def arguments_of(model: torch.nn.Module) -> Any:
    """Server arguments with which a stage can be made around a tiny model."""
    made = set_arguments()
    made.pipeline_config.dit_config = SimpleNamespace(hidden_size=32, num_attention_heads=2)
    return made


def real_flux3() -> Any:
    """The stage as the host makes it, around the tiny model."""
    from sglang.multimodal_gen.runtime.pipelines_core.stages.model_specific_stages.flux3_image import (
        TEXT,
        Flux3ImageDenoiseStage,
    )

    model = rig("Flux3ImageDiT").model
    arguments_of(model)
    package = SimpleNamespace(
        dit=SimpleNamespace(
            flow_map=False, in_channels={"image": 128, "image_cond": 128, TEXT: 16}, image_rope_scale=1.0
        ),
        sampler=SimpleNamespace(size=(64, 64), alpha=1.0, steps=STEPS, guidance=4.0),
    )
    return Flux3ImageDenoiseStage(model, package)


def flux3_picture(seed: int, **knobs: Any) -> SimpleNamespace:
    made = request(**knobs)
    made.seed, made.width, made.height, made.num_outputs_per_prompt, made.quality = seed, 64, 64, 1, "exact"
    made.sampling_params.quality = "exact"
    text = (noise(3, 4, 16).bfloat16(), noise(6, 4, 4).abs())
    made.extra = {"flux3_text": [text, text], "flux3_condition": None}
    made.true_cfg_scale, made.suppress_logs = 4.0, True
    return made


def test_flux3_requests_that_are_denoised_in_one_go_end_with_one_report_each(counted):
    stage = real_flux3()
    for _ in range(2):
        requests = [flux3_picture(1, **STATIC), flux3_picture(2, **STATIC)]
        executed([stage], requests, stage.server_args)
        assert [made.metrics.cache_dit["cached_steps"] for made in requests] == [2, 2]
    assert [(each["requests"], each["cached_steps"], each["computed_steps"]) for each in counted] == [(2, 2, 4)] * 2
    assert WORKER.models[stage].buffer_bytes() == 0


# LTX-2


def ltx2() -> list[Any]:
    """The stages of a two-stage pipeline: 6 steps, then 3 of the distilled refinement."""
    stages = [
        looping(
            name, f"{SPECIFIC}.ltx_2.denoising_av", "LTX2VideoTransformer3DModel", steps=steps,
            _disable_cache_dit_for_request=False,
        )
        for name, steps in (("LTX2AVDenoisingStage", STEPS), ("LTX2RefinementStage", 3))
    ]
    for stage in stages:
        stage.verify_input = stage.verify_output = lambda *args: SimpleNamespace(is_valid=lambda: True)
    return stages


def test_a_request_with_two_denoising_stages_has_one_report_and_is_counted_once(counted):
    made = request(max_warmup_steps=1, residual_diff_threshold=1.0)
    stages = ltx2()
    executed(stages, [made], stages[0].server_args)
    report = made.metrics.cache_dit
    assert {name: each["steps"] for name, each in report["transformers"].items()} == {
        "transformer": 6, "LTX2RefinementStage.transformer": 3,
    }
    assert (report["computed_steps"] + report["cached_steps"], report["cached_steps"]) == (9, 4 + 2)
    assert [(each["requests"], each["cached_steps"]) for each in counted] == [(1, 6)]


def test_tuned_schedules_are_those_of_the_first_stage_of_a_request(counted):
    row = {"steps": STEPS, "mask": MASK}
    made = request(
        schedules=[row], steps_computation_policy="static", max_warmup_steps=0, residual_diff_threshold=1.0
    )
    stages = ltx2()
    executed(stages, [made], stages[0].server_args)
    branches = {name: each["branches"]["cond"] for name, each in made.metrics.cache_dit["transformers"].items()}
    assert branches["transformer"]["cached"] == [2, 4]
    assert branches["LTX2RefinementStage.transformer"]["cached"] == []
    assert "the 3 steps are computed" in made.metrics.cache_dit["reason"]


def test_the_tuner_records_the_first_stage_of_a_request(monkeypatch, tmp_path):
    monkeypatch.setenv(recording.VARIABLE, str(tmp_path))
    stages = ltx2()
    executed(stages, [request(steps_computation_mask=[1] * STEPS)], stages[0].server_args)
    recorded = load_file(tmp_path / recording.FILE)
    assert {f"output/transformer/cond/{step}" for step in range(STEPS)} <= set(recorded)


def test_each_request_of_a_group_with_two_denoising_stages_is_counted_once(counted):
    stages = ltx2()
    requests = [request(**STATIC), request(False)]
    executed(stages, requests, stages[0].server_args)
    assert [(each["requests"], each["enabled"], len(each["transformers"])) for each in counted] == [
        (1, True, 2), (1, False, 0),
    ]


def test_ltx2_with_an_image_says_who_keeps_it_uncached():
    stage = ltx2()[0]
    stage._disable_cache_dit_for_request = True
    assert run(stage, request(**STATIC))["reason"] == (
        "LTX2AVDenoisingStage keeps this request uncached: it starts from an image"
    )


def test_a_denoising_stage_that_fails_counts_its_request_as_failed(counted):
    stages = ltx2()
    stages[1].steps = "three"
    with pytest.raises(ValueError, match="three"):
        executed(stages, [request(**STATIC)], stages[0].server_args)
    assert [(each["requests"], each["ended"]) for each in counted] == [(1, "failed")]


# Progressive resolution


def test_a_picture_that_grows_has_the_schedule_of_the_size_that_was_asked_for():
    rows = [
        {"steps": STEPS, "size": f"{size}x{size}", "mask": mask}
        for size, mask in ((512, [1, 0, 1, 1, 1, 1]), (1024, [1, 1, 1, 1, 0, 1]))
    ]
    stage = looping(
        "FluxProgressiveDenoisingStage", "progressive_resolution.flux", "FluxTransformer2DModel"
    )
    own = type(stage).forward

    def shrunk(self, made, server_args):
        # As the host does before it asks for caching.
        made.width = made.height = 512
        return own(self, made, server_args)

    made = request(schedules=rows, steps_computation_policy="static", max_warmup_steps=0)
    made.width = made.height = 1024
    native.run_stage(shrunk, stage, made, stage.server_args)
    assert made.metrics.cache_dit["transformers"]["transformer"]["branches"]["cond"]["cached"] == [4]


# MiniMax-H3 in ComfyUI


def comfy_step(sigmas: list[float], step: int, run_id: str, **knobs: Any) -> SimpleNamespace:
    made = h3_request(None, True, **knobs)
    made.latents, made.audio_latents = noise(1, 1, 24, 1, 4, 4) * sigmas[step], noise(2, 1, 32, 2, 3) * sigmas[step]
    made.prompt_embeds, made.sigmas = [noise(3, 1, 5, 12)], None
    made.timesteps = torch.tensor([sigmas[step] * 1000])
    made.enable_spectrum = False
    made.extra = {"comfyui_session_id": run_id, "h3_sample_sigmas": sigmas}
    return made


@pytest.fixture
def comfy():
    from sglang.multimodal_gen.runtime.pipelines_core import comfyui_mode
    from sglang.multimodal_gen.runtime.pipelines_core.stages.model_specific_stages.minimax_h3.stages.comfyui_step import (  # noqa: E501
        MiniMaxH3ComfyUIStepStage,
    )

    model = Rig(Case(build=lambda: minimax_h3(24, 32), inputs=dict, dtype=None)).model
    arguments_of(model)
    yield MiniMaxH3ComfyUIStepStage(model)
    comfyui_mode._RUNS.clear()
    comfyui_mode._SESSIONS.clear()


SIGMAS = [1.0, 0.8, 0.6, 0.4, 0.2, 0.1, 0.0]


def comfy_run(stage: Any, steps: range, run_id: str = "a:1", **knobs: Any) -> list[dict[str, Any]]:
    reports = []
    for step in steps:
        made = comfy_step(SIGMAS, step, run_id, **(knobs or STATIC))
        with torch.no_grad():
            native.run_stage(type(stage).forward, stage, made, stage.server_args)
        reports.append(made.metrics.__dict__.get("cache_dit"))
    return reports


def test_minimax_in_comfyui_caches_over_the_requests_of_a_run(comfy, counted):
    for _ in range(2):
        *during, last = comfy_run(comfy, range(6))
        assert last["transformers"]["transformer"]["branches"]["cond"]["cached"] == [2, 4]
        assert [report["computed_steps"] + report["cached_steps"] for report in during] == [1, 2, 3, 4, 5]
    assert [(each["requests"], each["cached_steps"]) for each in counted] == [(1, 2), (1, 2)]
    assert WORKER.models[comfy._cache_stage].buffer_bytes() == 0


def test_a_run_of_comfyui_that_is_given_up_ends_with_the_next(comfy, counted):
    comfy_run(comfy, range(3))
    last = comfy_run(comfy, range(6), "a:2")[-1]
    assert last["cached_steps"] == 2
    assert [(each["computed_steps"], each["cached_steps"]) for each in counted] == [(2, 1), (4, 2)]


def test_two_runs_of_comfyui_by_turns_do_not_meet(comfy, counted):
    comfy_run(comfy, range(1), "a:1")
    comfy_run(comfy, range(3), "b:1")
    assert comfy_run(comfy, range(1, 3), "a:1") == [None, None]
    assert comfy_run(comfy, range(3, 6), "b:1")[-1]["cached_steps"] == 2
    assert comfy_run(comfy, range(3, 6), "a:1") == [None] * 3
    assert [(each["computed_steps"], each["cached_steps"]) for each in counted] == [(1, 0), (4, 2)]


# Cosmos 3


@pytest.mark.parametrize(("rank", "own"), [(0, "cond"), (1, "uncond")])
def test_cosmos_3_steps_without_guidance_have_a_history_of_their_own_on_every_cfg_rank(monkeypatch, rank, own):
    each = rig("Cosmos3OmniTransformer")
    from sglang.multimodal_gen.runtime.pipelines_core.stages.model_specific_stages import cosmos3

    inputs = each.case.inputs(0, 0)
    each.case.fresh(each.model)
    monkeypatch.setattr(sglang_api, "runs_branches_apart", lambda: True, raising=False)
    monkeypatch.setattr(cosmos3, "cfg_model_parallel_all_reduce", lambda tensor: tensor)
    text = {"text_ids": inputs["text_ids"], "text_mask": inputs["text_mask"]}
    common = {"latents": inputs["hidden_states"], "timestep": inputs["timestep"], "video_shape": None, "fps": 24.0}
    guided = (2, 3, 4)

    def forward(self, made, server_args):
        for step in range(8):
            if step in guided:
                branches = [
                    text | {"cache_key": key, "text_seq_len": None, "control_latents": None, "coeff": 1.0}
                    for key in ("cond", "uncond")
                ]
                self._predict_noise_cfg(branches, cfg_rank=rank, cfg_world_size=2, current_timestep=step, **common)
            else:
                self._run_transformer(**text, **common, cache_key="cond", current_timestep=step)
        return made

    stage = on_host("Cosmos3DenoisingStage", f"{SPECIFIC}.cosmos3", forward, each.model)
    stage._extra_transformer_kwargs, stage.server_args = {}, set_arguments()
    made = request(steps_computation_mask=[1, 0, 0, 0, 1, 0, 0, 0], scm_policy="static", max_warmup_steps=0)
    made.timesteps, made.num_inference_steps = torch.linspace(900, 200, 8), 8
    with torch.no_grad():
        report = run(stage, made)
    branches = report["transformers"]["transformer"]["branches"]
    assert {name: (branch["computed"], branch["cached"]) for name, branch in branches.items()} == {
        "cond_only": ([0], [1]), own: ([2, 4], [3]), "cond_only_2": ([5], [6, 7]),
    }
    assert report["computed_steps"] + report["cached_steps"] == (8 if rank == 0 else 5)
