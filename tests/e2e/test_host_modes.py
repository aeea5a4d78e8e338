"""What the host does to a transformer beside running it: compiling it, warming it up, moving and changing weights."""

from __future__ import annotations

import importlib.util

import pytest
import torch
import yaml
from safetensors.torch import save_file

from tests.e2e.conftest import ROOT, run_probe

BASE = {"width": 64, "height": 64, "num_inference_steps": 8, "prompt": "red apple", "seed": 1}
STATIC = {"steps_computation_mask": [1, 1, 0, 1, 0, 0, 1, 0], "scm_policy": "static", "max_warmup_steps": 0}
DYNAMIC = {"residual_diff_threshold": 0.9, "max_warmup_steps": 2}


def _request(params=None, **more):
    caching = {"enable_cache_dit": params is not None} | ({"cache_dit_params": params} if params is not None else {})
    return BASE | caching | more


KNOBS = {
    "off": _request(),
    "every step": _request({"steps_computation_mask": [1] * 8}),
    "static": _request(STATIC),
    "dynamic": _request(DYNAMIC),
    "two first, one last": _request(DYNAMIC | {"Fn_compute_blocks": 2, "Bn_compute_blocks": 1}),
    "taylorseer": _request(DYNAMIC | {"enable_taylorseer": True, "taylorseer_order": 2}),
    "dmd": _request(DYNAMIC | {"enable_dmd": True}),
    "output": _request(STATIC | {"forecast": "output"}),
    "off again": _request(),
    "dynamic again": _request(DYNAMIC, seed=5),
}
UNCACHED = ("off", "every step", "off again")
WARMUP = BASE | {"warmup": 1}
ADAPTER = {"lora_nickname": "tiny", "target": "all"}

FEW = ("off", "every step", "static", "dynamic", "output", "off again")
COMPILED = {
    "native": ({"backend": "sglang"}, tuple(KNOBS)),
    "native, whole model": ({"backend": "sglang", "regional_compile": False}, FEW),
    "diffusers": ({"backend": "diffusers"}, FEW),
}
"""Server arguments beside ``enable_torch_compile``, and the requests. Where nobody chose, the plugin compiles the
repeated blocks."""

PLAIN = {"off": _request(), "every step": KNOBS["every step"], "static": KNOBS["static"], "output": KNOBS["output"]}
RECIPE = ROOT / "configs" / "quantize_int8.yaml"
INT8 = {"backend": "diffusers", "cache_dit_config": yaml.safe_load(RECIPE.read_text())}
MODES = {
    "layerwise offload": {"backend": "sglang", "dit_layerwise_offload": True, "pin_cpu_memory": False},
    "attention": {"backend": "diffusers", "attention_backend": "_native_math"},
    **({"int8": INT8} if importlib.util.find_spec("torchao") else {}),
}
"""A file that was read holds for the whole process, so the last of them may have one."""


def _adapter(path) -> str:
    """A LoRA of rank 2 on the attention of two blocks, strong enough to change the picture."""
    generator = torch.Generator().manual_seed(3)
    weights = {}
    for index in (1, 3):
        name = f"transformer.transformer_blocks.{index}.attn.to_out.0"
        weights[f"{name}.lora_A.weight"] = torch.randn(2, 128, generator=generator) * 0.3
        weights[f"{name}.lora_B.weight"] = torch.randn(128, 2, generator=generator) * 0.3
    save_file(weights, path)
    return str(path)


def _apart(one, other) -> float:
    return float((one["latents"].float() - other["latents"].float()).abs().mean())


def _jobs(folder, model) -> list[dict]:
    """Every job of this file; they share a process."""
    given = ADAPTER | {"lora_path": _adapter(folder / "tiny.safetensors")}
    lora = [
        _request(DYNAMIC),
        *({"call": "set_lora", "merge_mode": "merge"} | given, _request(DYNAMIC), _request()),
        *({"call": "unmerge_lora_weights"}, _request(DYNAMIC)),
        *({"call": "set_lora", "merge_mode": "dynamic"} | given, _request(DYNAMIC)),
        _request(STATIC | {"forecast": "output"}),
    ]
    jobs = [{"name": "plain", "server": {"backend": "sglang"}, "requests": [WARMUP, *PLAIN.values(), *lora]}]
    for name, (flags, asked) in COMPILED.items():
        job = {"compile_backend": "eager", "server": {"regional_compile": True, **flags, "enable_torch_compile": True}}
        jobs.append(job | {
            "name": f"bare {name}", "bare": True, "requests": [_request()],
            "environment": {"SGLANG_CACHE_DIT_ENABLED": "false"},
        })
        server = {**flags, "enable_torch_compile": True}
        jobs.append(job | {"name": name, "server": server, "requests": [WARMUP, *(KNOBS[each] for each in asked)]})
    jobs += [
        {"name": name, "server": flags, "requests": [*PLAIN.values()], "device_with_streams": "layerwise" in name}
        for name, flags in MODES.items()
    ]
    for job in jobs:
        job["server"] = {"model_path": model, **job["server"]}
    return jobs


@pytest.fixture(scope="module")
def results(models, tmp_path_factory):
    """Results of all jobs by name."""
    folder = tmp_path_factory.mktemp("modes")
    return run_probe(_jobs(folder, str(models["flux"])), folder, SGLANG_CACHE_DIT_ENABLED="true")


@pytest.mark.parametrize("name", COMPILED)
def test_after_the_warmup_no_request_compiles_anything(results, name):
    warmup, *rest = results[name]
    assert warmup["error"] is None and warmup["graphs"] > 0
    for knobs, result in zip(COMPILED[name][1], rest, strict=True):
        assert result["error"] is None, knobs
        assert result["graphs"] == warmup["graphs"], knobs
        assert knobs in UNCACHED or result["report"]["cached_steps"] > 0, knobs


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_with_every_step_computed_is_the_compiled_host_bit_for_bit(results, name):
    outcomes = dict(zip(COMPILED[name][1], results[name][1:], strict=True))
    (bare,) = results[f"bare {name}"]
    assert bare["error"] is None and bare["report"] is None and bare["graphs"] > 0
    for knobs in UNCACHED:
        assert torch.equal(outcomes[knobs]["latents"], bare["latents"]), knobs
    assert outcomes["every step"]["report"]["computed_steps"] == 8
    for knobs in set(outcomes) - {*UNCACHED}:
        assert not torch.equal(outcomes[knobs]["latents"], bare["latents"]), knobs


def test_compiled_blocks_are_as_many_graphs_as_without_the_plugin(results):
    """Cached around or not. Not asked of SGLang's own blocks: what it makes in them when they first run cuts them."""
    assert results["diffusers"][0]["graphs"] == results["bare diffusers"][0]["graphs"]


def test_a_warmup_request_reports_its_own_steps_only(results):
    """Its blocks ran more often: in a computed forward more, and the first of them in a cached one too."""
    report = results["plain"][0]["report"]
    assert (report["computed_steps"], report["cached_steps"]) == (1, 0)
    assert set(results["plain"][0]["calls"].values()) == {2, 3}


def test_lora_layers_under_a_mount_are_seen_and_nothing_of_them_stays(results):
    lora = results["plain"][1 + len(PLAIN) :]
    before, _, merged, merged_off, _, after, _, dynamic, output = lora
    assert all(each["error"] is None for each in lora)
    assert torch.equal(after["latents"], before["latents"])
    # Merged weights are rounded, layers beside them are not.
    assert 2 * _apart(dynamic, merged) < _apart(merged, before)
    assert not torch.equal(merged["latents"], merged_off["latents"])
    for each in (before, merged, after, dynamic, output):
        assert each["report"]["enabled"] and each["report"]["cached_steps"] > 0


@pytest.mark.parametrize("name", MODES)
def test_weights_elsewhere_smaller_weights_and_other_attention(results, name):
    off, every, static, output = results[name]
    assert [each["error"] for each in results[name]] == [None] * 4
    assert torch.equal(every["latents"], off["latents"])
    for cached in (static, output):
        assert (cached["report"]["computed_steps"], cached["report"]["cached_steps"]) == (4, 4)
        assert not torch.equal(cached["latents"], off["latents"])
    assert not torch.equal(static["latents"], output["latents"])


def test_weights_that_come_layer_by_layer_change_no_picture(results):
    plain = results["plain"][1 : 1 + len(PLAIN)]
    for here, moved in zip(plain, results["layerwise offload"], strict=True):
        assert torch.equal(moved["latents"], here["latents"])
