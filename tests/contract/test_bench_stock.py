"""What the benchmark asks of the stock integration is something that it takes."""

from __future__ import annotations

from sglang.multimodal_gen.runtime.cache.cache_dit_integration import resolve_cache_dit_request_overrides

from sglang_cachedit_plugin.bench.variants import changed, plan, steady


def test_stock_is_asked_for_a_change_in_names_that_it_knows():
    given = ["a:scm_preset=fast,scm_policy=static,max_warmup_steps=2,residual_diff_threshold=0.3,dmd_ridge=0.001"]
    variant = next(each for each in plan(stock=given) if each.kind == "stock")
    for settings in (changed(variant), steady(variant)):
        assert resolve_cache_dit_request_overrides(settings) == settings
        assert settings["scm_preset"] == "fast" and settings["scm_policy"] == "static"
    assert changed(variant)["residual_diff_threshold"] != steady(variant)["residual_diff_threshold"] == 0.3
