"""The parts of cache-dit that contexts.py and mount.py rely on, as they expect them."""

from __future__ import annotations

import dataclasses
import inspect
from importlib.metadata import version

import cache_dit
import pytest
from cache_dit import BlockAdapter, BlockAdapterRegister, DBCacheConfig, ForwardPattern
from cache_dit.caching.cache_blocks import UnifiedBlocks
from cache_dit.caching.cache_blocks.pattern_3_4_5 import CachedBlocks_Pattern_3_4_5
from cache_dit.caching.cache_blocks.pattern_base import CachedBlocks_Pattern_Base
from cache_dit.caching.cache_contexts.cache_context import CachedContext
from cache_dit.caching.cache_contexts.cache_manager import CachedContextManager
from cache_dit.caching.cache_contexts.calibrators import Calibrator
from packaging.version import Version

from sglang_cachedit_plugin import adapters
from sglang_cachedit_plugin.cache.contexts import BranchContext, BranchContexts
from sglang_cachedit_plugin.config.settings import PRESETS, CacheSettings


def parameters(function) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)


def own_methods(cls: type) -> set[str]:
    return {name for name, value in vars(cls).items() if inspect.isfunction(value)}


def test_the_version_is_one_the_plugin_declares():
    assert Version("1.5.1") <= Version(version("cache-dit")) < Version("1.6")


OVERRIDDEN = (
    "set_context", "mark_step_begin", "can_cache", "similarity", "add_cached_step", "set_Fn_buffer", "set_Bn_buffer",
)


def test_every_method_that_replaces_one_of_the_managers_is_there_to_replace():
    assert own_methods(BranchContexts) & own_methods(CachedContextManager) == {*OVERRIDDEN, "__init__"}


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_an_override_takes_what_the_original_takes(name):
    ours, theirs = (parameters(getattr(cls, name)) for cls in (BranchContexts, CachedContextManager))
    assert list(ours)[: len(theirs)] == list(theirs) or set(theirs) <= set(ours)
    for parameter, own in ours.items():
        assert own.kind == theirs[parameter].kind, parameter
        if theirs[parameter].default is not inspect.Parameter.empty:
            assert own.default == theirs[parameter].default, parameter


@pytest.mark.parametrize(
    ("name", "takes"),
    [
        ("clear_contexts", ["self"]),
        ("get_Fn_buffer", ["self", "prefix"]),
        ("set_Fn_buffer", ["self", "buffer", "prefix"]),
        ("__init__", ["self", "name", "persistent_context"]),
    ],
)
def test_what_the_contexts_call_of_their_base(name, takes):
    assert list(parameters(getattr(CachedContextManager, name))) == takes


def test_the_managers_state_that_contexts_use():
    manager = CachedContextManager(name="m", persistent_context=True)
    assert manager._cached_context_manager == {}
    assert manager._current_context is None


def test_the_contexts_fields():
    fields = {field.name for field in dataclasses.fields(CachedContext)}
    assert fields >= {
        "name", "buffers", "cache_config", "calibrator_config", "calibrator", "encoder_calibrator",
        "executed_steps", "transformer_executed_steps", "accumulated_residual_diff",
    }
    added = {field.name for field in dataclasses.fields(BranchContext)} - fields
    assert added == {
        "blocks", "branch", "last_step", "last_diff", "has_reference", "absent", "residual_shape",
    }
    assert list(parameters(CachedContext.get_calibrators)) == ["self"]


def test_configs_take_the_knobs():
    names = {field.name for field in dataclasses.fields(DBCacheConfig)}
    ours = {field.name for field in dataclasses.fields(CacheSettings)}
    assert names & ours >= {
        "Fn_compute_blocks", "Bn_compute_blocks", "max_warmup_steps", "warmup_interval",
        "residual_diff_threshold", "max_accumulated_residual_diff_threshold", "max_cached_steps",
        "max_continuous_cached_steps", "num_inference_steps", "steps_computation_mask",
        "steps_computation_policy", "cfg_diff_compute_separate",
    }
    taylor = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=2)
    dmd = cache_dit.DMDCalibratorConfig(dmd_history=5, dmd_rank=1, dmd_ridge=0.1, dmd_svd_precision="low")
    for config in (taylor, dmd):
        assert config.enable_calibrator
        assert config.enable_encoder_calibrator
    assert (taylor.taylorseer_order, dmd.dmd_history, dmd.dmd_svd_precision) == (2, 5, "low")


@pytest.mark.parametrize("precision", ["low", "medium", "high"])
def test_dmd_keeps_named_states_that_can_be_told_the_step(precision):
    config = cache_dit.DMDCalibratorConfig(dmd_svd_precision=precision)
    calibrator = Calibrator(config)
    calibrator.maybe_init_state("hidden")
    state = calibrator.states["hidden"]
    assert state.current_step == -1
    assert state.snapshots == []
    for name in ("update", "approximate", "reset"):
        assert callable(getattr(state, name))


def test_the_cached_blocks_ask_the_manager_in_this_order():
    for cls in (CachedBlocks_Pattern_Base, CachedBlocks_Pattern_3_4_5):
        source = inspect.getsource(cls.forward)
        order = ["set_context(", "call_Fn_blocks(", "mark_step_begin(", "can_cache(", "add_cached_step(",
                 "apply_cache(", "set_Fn_buffer(", "call_Mn_blocks(", "set_Bn_buffer("]
        places = [source.index(name, source.index("set_context(")) for name in order]
        assert places == sorted(places)


def test_unified_blocks_take_what_mount_gives():
    given = {"transformer_blocks", "transformer", "forward_pattern", "check_forward_pattern",
             "check_num_outputs", "cache_prefix", "cache_context", "context_manager"}
    assert given <= set(parameters(UnifiedBlocks.__new__))


def test_block_adapters():
    fields = {field.name for field in dataclasses.fields(BlockAdapter)}
    assert fields >= {
        "transformer", "blocks", "blocks_name", "unique_blocks_name", "dummy_blocks_names",
        "forward_pattern", "check_forward_pattern", "check_num_outputs",
    }
    assert next(iter(parameters(BlockAdapter.normalize))) == "adapter"
    assert isinstance(inspect.getattr_static(BlockAdapter, "normalize"), staticmethod)
    for name in ("is_supported", "get_adapter"):
        assert callable(getattr(BlockAdapterRegister, name))


def test_the_patterns_of_the_table_exist():
    rows = [*adapters.NATIVE.items(), *adapters.DIFFUSERS.items()]
    for name, pattern in [(name, each.pattern) for name, row in rows for each in row.blocks]:
        assert pattern is None or getattr(ForwardPattern, f"Pattern_{pattern}").Supported, name


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
