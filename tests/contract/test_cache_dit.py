"""The parts of cache-dit that the plugin relies on, as it expects them."""

from __future__ import annotations

import dataclasses
import inspect
from importlib.metadata import version

import cache_dit
import pytest
from cache_dit import BlockAdapter, BlockAdapterRegister, DBCacheConfig, ForwardPattern
from packaging.version import Version

from sglang_cachedit_plugin.config.knobs import PRESETS
from sglang_cachedit_plugin.config.settings import CacheSettings


def parameters(function) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)


def test_the_version_is_one_the_plugin_declares():
    assert Version("1.5.1") <= Version(version("cache-dit")) < Version("1.6")


def test_configs_take_the_knobs():
    names = {field.name for field in dataclasses.fields(DBCacheConfig)}
    ours = {field.name for field in dataclasses.fields(CacheSettings)}
    assert names & ours >= {
        "Fn_compute_blocks", "Bn_compute_blocks", "max_warmup_steps", "warmup_interval",
        "residual_diff_threshold", "max_accumulated_residual_diff_threshold", "max_cached_steps",
        "max_continuous_cached_steps", "num_inference_steps", "steps_computation_mask",
        "steps_computation_policy", "cfg_diff_compute_separate",
    }


def test_block_adapters_can_be_read_without_being_applied():
    fields = {field.name for field in dataclasses.fields(BlockAdapter)}
    assert fields >= {"transformer", "blocks", "forward_pattern", "patch_functor", "skip_post_init"}
    assert list(parameters(BlockAdapter.normalize)) == ["adapter", "unique"]
    assert isinstance(inspect.getattr_static(BlockAdapter, "normalize"), staticmethod)
    assert list(parameters(BlockAdapterRegister.is_supported)) == ["pipe_or_module"]
    # The factory is given what else ``get_adapter`` is given; cache-dit itself asks for unapplied adapters so.
    assert list(parameters(BlockAdapterRegister.get_adapter)) == ["pipe_or_module", "kwargs"]
    assert "skip_post_init=True" in inspect.getsource(BlockAdapterRegister.has_separate_cfg)


def test_the_forward_patterns():
    hidden, encoder = "hidden_states", "encoder_hidden_states"
    assert {pattern.name: (pattern.In, pattern.Out) for pattern in ForwardPattern.supported_patterns()} == {
        "Pattern_0": ((hidden, encoder), (hidden, encoder)), "Pattern_1": ((hidden, encoder), (encoder, hidden)),
        "Pattern_2": ((hidden, encoder), (hidden,)), "Pattern_3": ((hidden,), (hidden,)),
        "Pattern_4": ((hidden,), (hidden, encoder)), "Pattern_5": ((hidden,), (encoder, hidden)),
    }


@pytest.mark.parametrize("preset", [preset for preset in PRESETS if preset != "none"])
def test_steps_mask_knows_the_presets(preset):
    mask = cache_dit.steps_mask(mask_policy=preset, total_steps=28)
    assert len(mask) == 28
    assert set(mask) == {0, 1}


def test_enable_cache_takes_the_sections_of_a_file():
    sections = {"parallelism_config": {"ulysses_size": 2}, "attention_backend": "native"}
    loaded = cache_dit.load_configs(sections)
    assert set(loaded) <= set(parameters(cache_dit.enable_cache))
    assert "parallelism_config" in loaded
