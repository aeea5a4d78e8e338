"""What cache-dit is told of a transformer that SGLang has spread, and what the host says of the sequence."""

from __future__ import annotations

from types import SimpleNamespace

import cache_dit
import pytest
import torch
from cache_dit import BlockAdapter
from cache_dit.caching.patch_functors import functor_base
from torch import nn

from sglang_cachedit_plugin.cache.parallel import ParallelLayout, tell_parallel
from sglang_cachedit_plugin.integration import ranks
from tests.unit.blocks import Rig, TinyDiT, known_classes


def test_cache_dit_sees_a_parallel_transformer_and_nothing_of_it_reaches_enable_cache(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("enable_cache was called")

    monkeypatch.setattr(cache_dit, "enable_cache", refuse)
    model = TinyDiT()
    tell_parallel(model, ParallelLayout(ulysses_size=2, tp_size=2))
    assert BlockAdapter.is_parallelized(model)
    assert functor_base.check_parallelized(model)
    assert model._parallelism_config.strify(True) == "Ulysses2_TP2"
    with known_classes():
        rig = Rig(model).begin(6, residual_diff_threshold=0.9)
        for step in range(6):
            rig.run("cond", step)
    assert rig.stats.branches["cond"].cached


def test_one_rank_is_told_nothing():
    model = nn.Linear(1, 1)
    tell_parallel(model, ParallelLayout())
    assert not BlockAdapter.is_parallelized(model)


def test_what_cache_dit_spread_itself_keeps_its_config():
    model, own = nn.Linear(1, 1), object()
    model._is_parallelized, model._parallelism_config = True, own
    tell_parallel(model, ParallelLayout(tp_size=2))
    assert model._parallelism_config is own


def test_a_layout_builds_no_device_mesh(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a device mesh was built")

    monkeypatch.setattr(torch.distributed.device_mesh, "init_device_mesh", refuse)
    assert ParallelLayout(ulysses_size=2, ring_size=2, tp_size=2).world_size == 8


@pytest.mark.parametrize(
    ("shape", "patch_size", "tokens"),
    [((1, 4095, 64), None, 4095), ((1, 16, 21, 90, 160), (1, 2, 2), 75600), ((1, 16, 3, 5, 4), [1, 1, 2], 30),
     ((1, 16, 90, 160), (2, 2), None), ((1, 16, 21, 90, 160), None, None), (None, (1, 2, 2), None)],
)
def test_tokens_of_the_latents(shape, patch_size, tokens):
    assert ranks._tokens(SimpleNamespace(raw_latent_shape=shape), patch_size) == tokens
