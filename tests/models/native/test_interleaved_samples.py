"""FLUX.3 under sequence parallelism runs every sample of a block before the next block."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.models.native.cases import CASES
from tests.models.native.harness import MASK, STEPS, Rig, distance, drift, noise
from tests.models.native.test_native_models import ROUNDING, STATIC

TOKENS, CLOSE = 12, ROUNDING[torch.bfloat16]


def inputs(size: int, step: int, moving: int, only: int | None) -> dict[str, Any]:
    """Two samples of which one moves with the step and one rests; or only one of them."""
    from sglang.multimodal_gen.runtime.models.dits.flux3_image import TEXT, pack

    samples = [
        {
            "image": (drift(1 + sample, 4 * step * (sample == moving), TOKENS, 128), noise(4, TOKENS, 4).abs() * 8),
            "image_cond": None,
            TEXT: (noise(3 + sample, 3 + sample, 16), noise(6, 3 + sample, 4).abs()),
        }
        for sample in range(2)
    ]
    samples = [{mode: each and (each[0].bfloat16(), each[1]) for mode, each in sample.items()} for sample in samples]
    packed = pack(samples, {"image": 128, "image_cond": 128, TEXT: 16})
    return {"packed": packed if only is None else packed.sample(only)}


@pytest.fixture
def rig(monkeypatch) -> Rig:
    from sglang.multimodal_gen.runtime.models.dits import flux3_image

    # The loop is chosen by the number of ranks; with the streams left whole, one rank can run it.
    monkeypatch.setattr(flux3_image, "get_sp_world_size", lambda: 2)
    return Rig(replace(CASES["Flux3ImageDiT"], inputs=inputs))


def request(rig: Rig, moving: int, only: int | None = None, **knobs: Any) -> tuple[list[torch.Tensor], dict]:
    """The picture of each step, by sample where there are two, and the report."""
    rig.case = replace(rig.case, fresh=lambda model: {"moving": moving, "only": only})
    outputs, report = rig.request(**knobs)
    return [output for (output,) in outputs], report


@pytest.mark.parametrize("moving", [0, 1])
@pytest.mark.parametrize("knobs", [
    {"residual_diff_threshold": 0.1, "max_warmup_steps": 1}, {"steps_computation_mask": MASK, **STATIC},
])
def test_each_sample_of_flux_3_is_cached_as_if_it_were_alone(rig, moving, knobs):
    both, report = request(rig, moving, **knobs)
    assert report["reason"] is None
    for sample in range(2):
        alone, of_one = request(rig, moving, sample, **knobs)
        assert (sample == moving or "steps_computation_mask" in knobs) or of_one["cached_steps"] > 0
        for step in range(STEPS):
            assert distance([both[step].chunk(2)[sample]], [alone[step]]) < CLOSE, (sample, step)


@pytest.mark.parametrize("moving", [0, 1])
def test_a_sample_of_flux_3_that_moves_is_computed_while_the_other_rests(rig, moving):
    both, report = request(rig, moving, residual_diff_threshold=0.02, max_warmup_steps=1)
    assert report["cached_steps"] == 0
    right = [output for (output,) in rig.plain()]
    assert all(distance([a.chunk(2)[moving]], [b.chunk(2)[moving]]) < CLOSE for a, b in zip(both, right, strict=True))
    assert distance([right[-1].chunk(2)[moving]], [right[0].chunk(2)[moving]]) > 0.2
