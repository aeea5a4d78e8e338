"""The residual difference against the plain formula in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_cachedit_plugin.cache.similarity import residual_difference, residual_sums


def plain(reference: torch.Tensor, current: torch.Tensor) -> float:
    reference, current = reference.double(), current.double()
    return float((current - reference).abs().sum() / reference.abs().sum())


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(st.integers(1, 2), st.integers(1, 7), st.integers(1, 9)),
    scale=st.sampled_from([1e-4, 0.1, 1.0, 300.0]),
    change=st.sampled_from([1e-3, 0.1, 2.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_it_is_the_plain_formula(seed, shape, scale, change, dtype):
    generator = torch.Generator().manual_seed(seed)
    reference = scale * torch.randn(shape, generator=generator)
    current = reference + change * scale * torch.randn(shape, generator=generator) * torch.rand(
        (*shape[:2], 1), generator=generator
    )
    reference, current = reference.to(dtype), current.to(dtype)
    ours = residual_difference(reference, current)
    assert ours == pytest.approx(plain(reference, current), rel=1e-5, abs=1e-9)


def test_bf16_inputs_are_not_rounded_on_the_way():
    reference = torch.ones(1, 4096, 8, dtype=torch.bfloat16)
    current = reference.clone()
    current[:, ::3] = 1.2578125
    expected = plain(reference, current)
    assert residual_difference(reference, current) == pytest.approx(expected, rel=1e-6)
    rounded = float((current - reference).abs().mean() / reference.abs().mean())
    assert rounded != pytest.approx(expected, rel=1e-4), "the input must be one that bf16 means get wrong"


@pytest.mark.parametrize("which", ["reference", "current", "both"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_anywhere_is_nan_and_nothing_infinite_looks_similar(which, bad):
    reference, current = torch.ones(1, 3, 2), torch.full((1, 3, 2), 1.01)
    for name, tensor in (("reference", reference), ("current", current)):
        if which in (name, "both"):
            tensor[0, 1, 0] = bad
    diff = residual_difference(reference, current)
    assert not diff < 1.0
    if math.isnan(bad):
        assert math.isnan(diff)


def test_a_reference_of_zeros_has_no_difference():
    zeros = torch.zeros(1, 3, 2)
    assert math.isnan(residual_difference(zeros, torch.zeros(1, 3, 2)))
    assert math.isnan(residual_difference(zeros, torch.ones(1, 3, 2)))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), cut=st.integers(1, 6))
def test_sums_of_shards_add_up_to_those_of_the_whole(seed, cut):
    generator = torch.Generator().manual_seed(seed)
    reference, current = torch.randn(2, 1, 7, 4, generator=generator)
    parts = sum(
        residual_sums(r, c)
        for r, c in zip(reference.split([cut, 7 - cut], 1), current.split([cut, 7 - cut], 1), strict=True)
    )
    whole = residual_sums(reference, current)
    assert whole.shape == (2,)
    assert whole.dtype == torch.float32
    torch.testing.assert_close(parts, whole)
