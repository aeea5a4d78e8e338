"""The native methods on the host's own DenoisingStage and forward context, with transformers whose blocks count."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from sglang.multimodal_gen.runtime.managers.forward_context import set_forward_context
from sglang.multimodal_gen.runtime.pipelines_core.stages.denoising import (
    DenoisingStage,
    DualTransformerExecutionMode,
)

from sglang_cachedit_plugin import denoising
from sglang_cachedit_plugin.denoising import CacheDitDenoisingMixin
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
    denoising._open.clear()


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
    (_, session), *_ = denoising._open
    report = session.close().as_dict()
    cached = [step for step, computed in enumerate(MASK) if not computed]
    assert report["transformers"]["transformer"]["branches"]["cond"]["cached"] == cached
    assert report["transformers"]["transformer_2"]["branches"]["uncond"]["cached"] == cached
    assert {t["steps"] for t in report["transformers"].values()} == {STEPS}


def test_outside_the_loop_the_original_runs(stage):
    plain = stage.transformer(torch.ones(1, TOKENS, DIM))
    CacheDitDenoisingMixin._maybe_enable_cache_dit(stage, STEPS, batch())
    assert torch.equal(stage.transformer(torch.ones(1, TOKENS, DIM)), plain)
    (_, session), *_ = denoising._open
    assert session.close().as_dict()["transformers"]["transformer"]["branches"] == {}


def test_breakable_cuda_graphs_are_named_as_the_reason(stage):
    stage.server_args.enable_breakable_cuda_graph = True
    CacheDitDenoisingMixin._maybe_enable_cache_dit(stage, STEPS, batch())
    (_, session), *_ = denoising._open
    report = session.close().as_dict()
    assert not report["enabled"]
    assert report["reason"] == "breakable CUDA graphs are on"


def test_a_model_nobody_describes_runs_uncached_with_the_reason_or_fails_with_strict(stage):
    stage.transformer_2 = torch.nn.Linear(2, 2)
    CacheDitDenoisingMixin._maybe_enable_cache_dit(stage, STEPS, batch())
    assert "Linear" in denoising._open[-1][1].close().as_dict()["reason"]
    with pytest.raises(Exception, match="Linear"):
        CacheDitDenoisingMixin._maybe_enable_cache_dit(stage, STEPS, batch(strict=True))
