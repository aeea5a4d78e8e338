"""The native methods on the host's own DenoisingStage and forward context, with transformers whose blocks count."""

from __future__ import annotations

import contextlib
import re
from types import SimpleNamespace

import pytest
import torch
from sglang.multimodal_gen.runtime.breakable_cuda_graph import runner
from sglang.multimodal_gen.runtime.managers.forward_context import set_forward_context
from sglang.multimodal_gen.runtime.pipelines_core.stages.denoising import (
    DenoisingStage,
    DualTransformerExecutionMode,
)

from sglang_cachedit_plugin.config import effective
from sglang_cachedit_plugin.config.effective import Defaults
from sglang_cachedit_plugin.config.sources import Overrides, read_file, read_overrides
from sglang_cachedit_plugin.errors import RefusedError, refusal_in
from sglang_cachedit_plugin.integration import cuda_graphs, diffusers, native
from sglang_cachedit_plugin.integration.native import CacheDitDenoisingMixin
from sglang_cachedit_plugin.integration.request import WORKER
from sglang_cachedit_plugin.serving import validation
from tests.unit.blocks import DIM, TOKENS, TinyDiT, known_classes

STEPS = 6
MASK = [1, 1, 0, 1, 0, 1]


class PairedStage(DenoisingStage):
    """Runs both transformers on every step, as Ideogram 4 does."""

    def _dual_transformer_execution_mode(self):
        return DualTransformerExecutionMode.PAIRED_PER_STEP

    def _cache_dit_secondary_uses_primary_config(self):
        return True


@pytest.fixture
def stage():
    stage = PairedStage.__new__(PairedStage)
    stage.transformer, stage.transformer_2 = TinyDiT(), TinyDiT()
    stage.server_args = SimpleNamespace(
        enable_breakable_cuda_graph=False, enable_torch_compile=False, enable_cfg_parallel=False,
        cache_dit_config=None,
    )
    with known_classes():
        yield stage
    WORKER.active.sessions.clear()


def batch(**params) -> SimpleNamespace:
    knobs = {"steps_computation_mask": MASK, "scm_policy": "static", "max_warmup_steps": 0} | params
    return SimpleNamespace(
        sampling_params=SimpleNamespace(enable_cache_dit=True, cache_dit_params=knobs),
        timesteps=torch.linspace(1000, 100, STEPS), is_warmup=False, is_cfg_negative=False, metrics=None,
    )


def test_paired_transformers_have_the_same_steps_and_contexts_of_their_own(stage):
    request = batch(secondary={"Fn_compute_blocks": 3})
    CacheDitDenoisingMixin._maybe_enable_cache_dit(stage, STEPS, request)
    assert stage._cache_dit_enabled
    with torch.no_grad():
        for step in range(STEPS):
            for negative, module in ((False, stage.transformer), (True, stage.transformer_2)):
                request.is_cfg_negative = negative
                with set_forward_context(current_timestep=step, attn_metadata=None, forward_batch=request):
                    module(torch.full((1, TOKENS, DIM), float(step + 10 * negative)))
    session, *_ = WORKER.active.sessions
    report = session.close().as_dict()
    cached = [step for step, computed in enumerate(MASK) if not computed]
    assert report["transformers"]["transformer"]["branches"]["cond"]["cached"] == cached
    assert report["transformers"]["transformer_2"]["branches"]["uncond"]["cached"] == cached
    assert {t["steps"] for t in report["transformers"].values()} == {STEPS}


def test_outside_the_loop_the_original_runs(stage):
    plain = stage.transformer(torch.ones(1, TOKENS, DIM))
    CacheDitDenoisingMixin._maybe_enable_cache_dit(stage, STEPS, batch())
    assert torch.equal(stage.transformer(torch.ones(1, TOKENS, DIM)), plain)
    session, *_ = WORKER.active.sessions
    assert session.close().as_dict()["transformers"]["transformer"]["branches"] == {}


class Replayed:
    """Stands for a captured graph on a machine without one: the same forward on the static buffers."""

    def __init__(self, module, static):
        self.module, self.static, self.output, self.replays = module, static, module(**static), 0

    def replay(self):
        self.replays += 1
        self.output.copy_(self.module(**self.static))


@pytest.fixture
def graphed(stage, monkeypatch):
    """A stage with one transformer whose host runner "captures" in a warmup request."""
    own = DenoisingStage._maybe_get_bcg_runner

    def capture(self, kwargs, key):
        static = {name: value.clone() for name, value in kwargs.items()}
        graph = Replayed(self.transformer, static)
        return runner._CaptureEntry(
            graph=graph, static_kwargs=static, static_leaves=runner._flatten_kwargs(static), output=graph.output,
            num_segments=1,
        )

    monkeypatch.setattr(runner.BaseBreakableCudaGraphRunner, "_capture", capture)
    monkeypatch.setattr(torch.cpu, "graph_pool_handle", object, raising=False)
    monkeypatch.setattr(runner, "replay_token_scope", contextlib.nullcontext)
    monkeypatch.setattr(torch.cpu, "Stream", lambda device: None)
    monkeypatch.setattr("sglang.multimodal_gen.runtime.pipelines_core.stages.denoising.get_local_torch_device",
                        lambda: torch.device("cpu"))
    monkeypatch.setattr(DenoisingStage, "_maybe_get_bcg_runner", lambda *given: cuda_graphs.runner_of(own, *given))
    stage.transformer_2, stage._bcg_runners, stage._mounted_quality = None, {}, "lossless"
    monkeypatch.setattr(PairedStage, "_dual_transformer_execution_mode", lambda self: None)
    stage.server_args.enable_breakable_cuda_graph = True
    return stage


def denoised(stage, request) -> tuple[list[torch.Tensor], dict]:
    """Outputs of all steps of a request, and its report."""
    outputs = []

    def loop(stage, request, server_args):
        CacheDitDenoisingMixin._maybe_enable_cache_dit(stage, STEPS, request)
        for step in range(STEPS):
            with set_forward_context(current_timestep=step, attn_metadata=None, forward_batch=request):
                given = {"hidden_states": torch.full((1, TOKENS, DIM), 1.0 + 0.1 * step)}
                replayed = stage._maybe_get_bcg_runner(stage.transformer)
                outputs.append(
                    stage.transformer(**given) if replayed is None
                    else stage._bcg_run(replayed, given, stage.transformer)
                )

    request.extra = {}
    with torch.no_grad():
        native.run_stage(loop, stage, request, stage.server_args)
    return outputs, request.extra["cache_dit"]


OUTPUT = {"forecast": "output", "forecast_order": 1}


def test_a_static_schedule_of_the_output_is_cached_around_the_hosts_graphs(graphed):
    warmup = batch(**OUTPUT)
    warmup.is_warmup = True
    plain, report = denoised(graphed, warmup)
    assert not report["enabled"] and "captured by this warmup request" in report["reason"]
    (own,) = graphed._bcg_runners.values()
    (entry,) = own.entries.values()
    before = entry.graph.replays
    outputs, report = denoised(graphed, batch(**OUTPUT))
    cached = [step for step, computed in enumerate(MASK) if not computed]
    assert report["transformers"]["transformer"]["branches"]["cond"]["cached"] == cached
    assert entry.graph.replays - before == sum(MASK) and len(own.entries) == 1
    assert all(torch.equal(outputs[step], plain[step]) for step, computed in enumerate(MASK) if computed)
    # Without graphs the same request is the same picture.
    graphed.server_args.enable_breakable_cuda_graph = False
    eager, _ = denoised(graphed, batch(**OUTPUT))
    assert all(map(torch.equal, outputs, eager))
    graphed.server_args.enable_breakable_cuda_graph = True
    assert graphed._maybe_get_bcg_runner(graphed.transformer) is own


@pytest.mark.parametrize("params", [
    {}, {"forecast": "output", "scm_policy": "dynamic"}, {"forecast": "output", "steps_computation_mask": None},
])
def test_what_needs_a_decision_inside_a_graph_is_named_as_the_reason(graphed, params):
    _, report = denoised(graphed, batch(**params))
    assert not report["enabled"] and "breakable CUDA graphs are on" in report["reason"]


SHORT = {"profiles": {"short": {
    "forecast": "output", "steps_computation_mask": [1, 0, 1], "scm_policy": "static", "max_warmup_steps": 0,
}}}


def asking(params, **fields) -> SimpleNamespace:
    """A request with these ``cache_dit_params`` and nothing else."""
    request = batch()
    request.sampling_params.cache_dit_params = params
    vars(request).update(fields)
    return request


def test_a_mask_of_another_length_in_the_servers_settings_computes_every_step_around_graphs(graphed, monkeypatch):
    monkeypatch.setattr(effective, "_current", Defaults(file=read_file(SHORT)))
    _, report = denoised(graphed, asking({"profile": "short"}))
    assert report["computed_steps"] == STEPS and "the mask has 3 entries" in report["reason"]


def refusal_of(stage, request, steps=STEPS) -> str:
    """What the client of a request is told, by way of the worker's error as the host words it."""
    def loop(stage, request, server_args):
        CacheDitDenoisingMixin._maybe_enable_cache_dit(stage, steps, request)

    request.extra = vars(request).get("extra", {})
    with pytest.raises(RefusedError) as caught:
        native.run_stage(loop, stage, request, stage.server_args)
    return refusal_in(f"Model generation failed. Error from scheduler: Error executing request r1: {caught.value}")


@pytest.mark.parametrize(("params", "line"), [
    ({"steps_computation_mask": [1, 0, 1]},
     "steps_computation_mask = '3 entries' (cache_dit_params): expected 6 entries, one a step"),
    ({"scm_preset": [1] * 7}, "scm_preset = '7 entries' (cache_dit_params): expected 6 entries, one a step"),
])
def test_a_mask_of_another_length_in_a_request_is_refused(stage, params, line):
    stage.transformer_2 = None
    request = asking(params)
    assert refusal_of(stage, request) == line
    assert request.extra["cache_dit"]["reason"] == line
    assert not WORKER.active.sessions


@pytest.mark.parametrize(("params", "line"), [
    ({"steps_computation_mask": [1, 0, 1]},
     "steps_computation_mask = '3 entries' (cache_dit_params): expected 2 or 4 or 6 entries, one a step"),
    ({"secondary": {"steps_computation_mask": [1, 0]}},
     "steps_computation_mask = '2 entries' (cache_dit_params.secondary): expected 4 or 6 entries, one a step"),
])
def test_a_mask_that_fits_neither_expert_is_refused(stage, monkeypatch, params, line):
    experts(monkeypatch)
    assert refusal_of(stage, asking(params), (2, 4)) == line


@pytest.mark.parametrize("params", [
    {"steps_computation_mask": [1] * 6}, {"steps_computation_mask": [1, 0]}, {"steps_computation_mask": [1, 0, 1, 0]},
    {"steps_computation_mask": [1, 0], "secondary": {"steps_computation_mask": [1, 0, 1, 0]}},
    {"secondary": {"steps_computation_mask": [1] * 6}},
])
def test_a_mask_may_be_that_of_one_expert_or_of_both(stage, monkeypatch, params):
    experts(monkeypatch)
    CacheDitDenoisingMixin._maybe_enable_cache_dit(stage, (2, 4), asking(params))
    assert stage._cache_dit_enabled


def experts(monkeypatch) -> None:
    """High and low noise experts, as Wan 2.2 has them."""
    monkeypatch.setattr(PairedStage, "_dual_transformer_execution_mode",
                        lambda self: DualTransformerExecutionMode.BOUNDARY_EXPERTS)
    monkeypatch.setattr(PairedStage, "_cache_dit_secondary_uses_primary_config", lambda self: False)


@pytest.mark.parametrize("fields", [
    {"is_warmup": True}, {"extra": {"server_internal_prewarm": True}}, {"extra": {"cache_dit": {"enabled": True}}},
])
def test_the_hosts_own_requests_and_further_stages_take_a_mask_of_another_length(stage, fields):
    request = asking({"steps_computation_mask": [1, 0, 1]}, **fields)
    CacheDitDenoisingMixin._maybe_enable_cache_dit(stage, STEPS, request)
    session, *_ = WORKER.active.sessions
    assert "the mask has 3 entries" in session.stats.as_dict()["reason"]


def test_a_request_that_was_checked_under_an_earlier_change_is_refused(stage, monkeypatch):
    first = Defaults().with_overrides(read_overrides({"profiles": {"mine": {}}}))
    params = {"profile": "mine"}
    line = "profile = 'mine' (cache_dit_params): expected one of: balanced, fast, quality"
    monkeypatch.setattr(effective, "_current", first)
    validation.check("r1", cache_dit_params=params)
    monkeypatch.setattr(effective, "_current", first.with_overrides(Overrides()).with_overrides(Overrides()))
    assert refusal_of(stage, asking(params)) == line
    with pytest.raises(RefusedError, match=re.escape(line)):
        diffusers.execute(pytest.fail, SimpleNamespace(diffusers_pipe=stage), asking(params), None)


def test_a_model_nobody_describes_runs_uncached_with_the_reason_or_fails_with_strict(stage):
    stage.transformer_2 = torch.nn.Linear(2, 2)
    CacheDitDenoisingMixin._maybe_enable_cache_dit(stage, STEPS, batch())
    assert "Linear" in WORKER.active.sessions[-1].close().as_dict()["reason"]
    with pytest.raises(Exception, match="Linear"):
        CacheDitDenoisingMixin._maybe_enable_cache_dit(stage, STEPS, batch(strict=True))
