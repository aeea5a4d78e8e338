"""What the host's stages want, refuse and configure, and how they run: the real classes with tiny models."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_cachedit_plugin import defaults, denoising, host, metrics
from sglang_cachedit_plugin.defaults import Defaults
from sglang_cachedit_plugin.errors import RefusedError
from sglang_cachedit_plugin.sources import read_environment, read_file

from .harness import MASK, STEPS, batch, distance, noise, set_arguments
from .test_native_models import rig
from .test_own_loops import STATIC, on_host

pytestmark = pytest.mark.usefixtures("hooked")
SPECIFIC = "model_specific_stages"


@pytest.fixture(autouse=True)
def nothing_open(monkeypatch):
    monkeypatch.setattr(defaults, "_current", Defaults())
    yield
    left = [*denoising._open, *denoising._kept, *denoising._running]
    for leftover in (denoising._open, denoising._kept, denoising._running):
        leftover.clear()
    assert left == []


@pytest.fixture
def counted(monkeypatch) -> list[dict[str, Any]]:
    """What is counted on ``/metrics``: reports with the number of requests that each stands for."""
    found: list[dict[str, Any]] = []
    monkeypatch.setattr(host, "publishes_metrics", lambda: True)
    monkeypatch.setattr(metrics, "observe", lambda report, **how: found.append(report | how))
    return found


def install(monkeypatch, **variables: str) -> None:
    """Server defaults from environment variables without their prefix."""
    environment, _ = read_environment({f"SGLANG_CACHE_DIT_{name}": text for name, text in variables.items()})
    monkeypatch.setattr(defaults, "_current", Defaults(environment=environment))


def request(enable: bool | None = True, **knobs: Any) -> SimpleNamespace:
    made = batch(enable, knobs)
    made.metrics, made.num_inference_steps = SimpleNamespace(denoising_stages=set()), STEPS
    made.perf_dump_path = made.image_path = None
    return made


def looping(name: str, module: str, model: str, **fields: Any) -> Any:
    """A stage class of the host around a tiny model, whose loop runs its steps and nothing else."""
    each = rig(model)

    def forward(self, made, server_args):
        self._maybe_enable_cache_dit_and_torch_compile(self.steps, made)
        each.state = each.case.fresh(each.model)
        with torch.no_grad():
            self.outputs = [each.step(made, 0, step) for step in range(self.steps)]
        return made

    stage = on_host(name, f"{SPECIFIC}.{module}", forward, each.model)
    vars(stage).update({
        "transformer_2": None, "server_args": set_arguments(), "_cache_dit_enabled": False, "steps": STEPS,
        "_mounted_quality": "exact", "_skip_softmax_forced_fa": False, "_torch_compile_registry": None,
    } | fields)
    stage._maybe_override_attention_backend = stage._maybe_toggle_quality_fusions = lambda *args, **kwargs: None
    stage._reset_dit_cache_states = stage._maybe_torch_compile = lambda *args: None
    return stage


def run(stage: Any, made: Any) -> dict[str, Any]:
    """The report of a request that goes through one stage."""
    denoising.run_stage(type(stage).forward, stage, made, stage.server_args)
    return made.metrics.cache_dit


# MiniMax-H3


def h3(**fields: Any) -> Any:
    return looping("MiniMaxH3DenoisingStage", "minimax_h3.stages.denoising", "MiniMaxH3DiTModel", **fields)


def h3_request(quality: str | None = None, enable: bool | None = None, **knobs: Any) -> SimpleNamespace:
    made = request(enable, **knobs)
    made.sampling_params.quality = quality or "exact"
    made.sampling_params._explicit_fields = set() if quality is None else {"quality"}
    made.sampling_params.enable_spectrum, made.sampling_params.skip_softmax_params = False, None
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
    monkeypatch.setattr(defaults, "_current", Defaults())
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
    return looping("Flux3ImageDenoiseStage", "flux3_image", "Flux3ImageDiT", _sequential_cfg_active=False, **fields)


def flux3_request(**knobs: Any) -> SimpleNamespace:
    made = request(**knobs)
    made.sampling_params.skip_softmax_params = None
    return made


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
    report = run(stage, flux3_request(**STATIC))
    assert not report["enabled"]
    assert report["reason"].startswith("Flux3ImageDenoiseStage keeps this request uncached: its samples pass each")
    with pytest.raises(RefusedError, match="keeps this request uncached"):
        run(stage, flux3_request(strict=True, **STATIC))
    vars(stage).pop("_cache_dit_fits_parallelism", None)
    stage._sequential_cfg_active = False
    assert run(stage, flux3_request(**STATIC))["cached_steps"] == 2


def grouped(stages: list[Any], batches: list[Any], arguments: Any) -> list[Any]:
    """What the host's own executor makes of a group of requests."""
    from sglang.multimodal_gen.runtime.pipelines_core.executors.sync_executor import SyncExecutor

    executor = SyncExecutor(arguments)
    executor.component_residency_manager = NoResidency()
    with torch.no_grad():
        return executor.execute_group(stages, batches, arguments)


def alone(stages: list[Any], made: Any, arguments: Any) -> Any:
    """What the host's own executor makes of one request."""
    from sglang.multimodal_gen.runtime.pipelines_core.executors.sync_executor import SyncExecutor

    executor = SyncExecutor(arguments)
    executor.component_residency_manager = NoResidency()
    with torch.no_grad():
        return executor.execute(stages, made, arguments)


class NoResidency:
    """Every component lies where it is."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


def real_flux3(arguments: Any) -> Any:
    """The stage as the host makes it, around the tiny model."""
    from sglang.multimodal_gen.runtime.pipelines_core.stages.model_specific_stages.flux3_image import (
        Flux3ImageDenoiseStage,
    )

    package = SimpleNamespace(
        dit=SimpleNamespace(flow_map=False, in_channels={"image": 128, "image_cond": 128, "text": 16},
                            image_rope_scale=1.0),
        sampler=SimpleNamespace(size=(64, 64), alpha=1.0, steps=STEPS, guidance=4.0),
    )
    return Flux3ImageDenoiseStage(rig("Flux3ImageDiT").model, package)


def flux3_picture(seed: int, enable: bool = True, **knobs: Any) -> SimpleNamespace:
    made = flux3_request(**knobs)
    made.sampling_params.enable_cache_dit = enable
    made.seed, made.width, made.height, made.num_outputs_per_prompt, made.quality = seed, 64, 64, 1, "exact"
    text = (noise(3, 4, 16).bfloat16(), noise(6, 4, 4).abs())
    made.extra = {"flux3_text": [text, text], "flux3_condition": None}
    made.true_cfg_scale, made.suppress_logs = 4.0, True
    return made


def test_flux3_requests_that_are_denoised_in_one_go_end_with_one_report_each(counted):
    arguments = set_arguments()
    arguments.conditioning_cache_max_size_mb = 1
    stage = real_flux3(arguments)
    for _ in range(2):
        batches = grouped([stage], [flux3_picture(1, **STATIC), flux3_picture(2, **STATIC)], arguments)
        assert [made.metrics.cache_dit["cached_steps"] for made in batches] == [2, 2]
    assert [(each["requests"], each["cached_steps"], each["computed_steps"]) for each in counted] == [(2, 2, 4)] * 2
    assert denoising._stages[stage].backend.buffer_bytes() == 0
