"""Sections for cache-dit: every key strictly, sizes against ranks, flags, machine and model."""

from __future__ import annotations

import pytest

from sglang_cachedit_plugin.config.diffusers_sections import (
    PARALLELISM,
    QUANTIZE,
    Machine,
    check_family,
    fit,
    native_flags,
    resolve_sizes,
)
from sglang_cachedit_plugin.config.sources import read_file
from sglang_cachedit_plugin.errors import SettingError

EVERYTHING = Machine(device="cuda", capability=(9, 0), has=lambda module: True, cache_dit="1.5.3")
CPU = Machine(device="cpu", has=lambda module: True, cache_dit="1.5.1")
ULYSSES = {"ulysses_size": 2}


def refused(read, *words: str) -> SettingError:
    with pytest.raises(SettingError) as caught:
        read()
    line = str(caught.value)
    assert len(line.splitlines()) == 1
    for word in words:
        assert word in line
    return caught.value


GOOD = [
    ({"parallelism_config": {"ulysses_size": "auto", "tp_size": 2, "attention_backend": "native"}}, None),
    ({"parallelism_config": {"ulysses": 2, "ring": 2, "tp": 2}},
     {"parallelism_config": {"ulysses_size": 2, "ring_size": 2, "tp_size": 2}}),
    ({"parallelism_config": {"ulysses_size": 2, "experimental_ulysses_anything": True}},
     {"parallelism_config": {"ulysses_size": 2, "ulysses_anything": True}}),
    ({"parallelism_config": {"ulysses_size": 2, "ring_size": None, "extra_parallel_modules": ["vae"]}},
     {"parallelism_config": {"ulysses_size": 2, "extra_parallel_modules": ["vae"]}}),
    ({"attention_backend": "_flash_3", "parallelism_config": {"ring_size": 2}}, None),
    ({"attention_backend": "sage", "parallelism_config": {"tp_size": 2, "attention_backend": "sage"}}, None),
    ({"quantize_config": {"quant_type": "INT8_Weight_Only", "exclude_layers": [], "verbose": True}},
     {"quantize_config": {"quant_type": "int8_weight_only", "exclude_layers": [], "verbose": True}}),
    ({"quantize_config": {"quant_type": "svdq_int4_r32_dq", "svdq_kwargs": {"streaming": True}}}, None),
    ({"quantize_config": {"quant_type": "float8_per_row", "components_to_quantize": {
        "transformer": {"quant_type": "float8_per_tensor"}, "text_encoder": {"quant_type": "float8"}}}},
     {"quantize_config": {"quant_type": "float8_per_row", "components_to_quantize": {
        "transformer": {"quant_type": "float8_per_tensor"}, "text_encoder": {"quant_type": "float8_per_row"}}}}),
    ({"quantize_config": {"quant_type": "int8_per_row", "precision_plan": {"to_q": "FLOAT8_PER_ROW"}}},
     {"quantize_config": {"quant_type": "int8_per_row", "precision_plan": {"to_q": "float8_per_row"}}}),
]


@pytest.mark.parametrize(("raw", "expected"), GOOD)
def test_what_is_read(raw, expected):
    file = read_file(raw)
    assert file.passed_on == (raw if expected is None else expected)
    assert file.source.enabled is None, "these sections alone do not switch caching on"


def parallel(**values):
    return {"parallelism_config": values}


def quantize(**values):
    return {"quantize_config": values}


BAD = [
    (parallel(ulises_size=2), "ulises_size", "cache_dit_config parallelism_config", "did you mean 'ulysses_size'?"),
    (parallel(ulysses_size="all"), "ulysses_size = 'all'", "a whole number of at least 1, or auto"),
    (parallel(ulysses_size=0), "ulysses_size = 0", "at least 1, or auto"),
    (parallel(ulysses_size=True), "ulysses_size = True", "at least 1, or auto"),
    (parallel(ulysses_size=2.0), "ulysses_size = 2.0", "a whole number"),
    (parallel(ulysses_size="auto", tp_size="auto"), "tp_size", "ulysses_size is auto already"),
    (parallel(ulysses_size=2, ulysses=2), "ulysses_size", "given twice"),
    (parallel(attention_backend="native"), "parallelism_config", "ulysses_size, ring_size, tp_size above 1"),
    (parallel(ulysses_size=1), "parallelism_config", "above 1"),
    (parallel(tp_size=2, ulysses_anything=True), "ulysses_anything", "ulysses_size of at least 2"),
    (parallel(ulysses_size=2, ring_size=2, ulysses_anything=True), "ulysses_anything", "ring_size 2"),
    (parallel(ulysses_size=2, ulysses_async=1), "ulysses_async = 1", "true or false"),
    (parallel(ulysses_size=2, attention_backend="flsh"), "attention_backend", "did you mean 'flash'?"),
    (parallel(ulysses_size=2, attention_backend="xformers"), "attention_backend", "does not split sequences", "native"),
    (parallel(ring_size=2, attention_backend="_sdpa_cudnn"), "attention_backend", "no ring kernel", "flash"),
    (parallel(ring_size=2, ring_rotate_method="allgather"), "ring_rotate_method", "one of p2p"),
    (parallel(ulysses_size=2, extra_parallel_modules="vae"), "extra_parallel_modules", "a list of names"),
    (parallel(ulysses_size=2, extra_parallel_modules=[1]), "extra_parallel_modules", "a list of names"),
    (parallel(ulysses_size=2, cp_plan={}), "cp_plan", "a file cannot hold"),
    (parallel(ulysses_size=2, use_ray=True), "use_ray", "SGLang starts the ranks itself"),
    ({"parallelism_config": [2]}, "parallelism_config", "expected a mapping"),
    ({"attention_backend": "sdpa"}, "attention_backend = 'sdpa'", "expected one of native, flash"),
    ({"attention_backend": ["native"]}, "attention_backend", "expected one of"),
    ({"attention_backend": "flash", **parallel(ulysses_size=2, attention_backend="native")},
     "attention_backend = 'flash'", "contradicts attention_backend native of parallelism_config"),
    ({"attention_backend": "flex", **parallel(ulysses_size=2)}, "attention_backend", "does not split sequences"),
    (quantize(quant_type="flaot8_per_row"), "quant_type", "did you mean 'float8_per_row'?"),
    (quantize(exclude_layers=[]), "quant_type", "is missing"),
    (quantize(quant_typ="float8"), "quant_typ", "did you mean 'quant_type'?"),
    (quantize(quant_type="int8_weight_only", exclude_layers="embed"), "exclude_layers", "a list of names"),
    (quantize(quant_type="int8_weight_only", filter_fn="x"), "filter_fn", "a file cannot hold"),
    (quantize(quant_type="int8_weight_only", svdq_kwargs={}), "svdq_kwargs", "svdq types only"),
    (quantize(quant_type="svdq_int4_r32"), "quant_type", "svdq_int4_rN_dq"),
    (quantize(quant_type="svdq_int4_r0_dq"), "quant_type", "svdq_int4_rN_dq"),
    (quantize(quant_type="svdq_int4_r8_dq", precision_plan={"a": "nvfp4"}), "precision_plan", "do not take it"),
    (quantize(quant_type="nvfp4", precision_plan={"to_q": "int3"}), "precision_plan", "a mapping of layer"),
    (quantize(quant_type="nvfp4", components_to_quantize={"vae": {"quant_typ": "nvfp4"}}),
     "quant_typ", "components_to_quantize.vae", "did you mean 'quant_type'?"),
    (quantize(quant_type="nvfp4", components_to_quantize={"vae": "nvfp4"}), "quantize_config", "vae", "a mapping"),
]


@pytest.mark.parametrize(("raw", "words"), [(raw, words) for raw, *words in BAD], ids=[row[1] for row in BAD])
def test_what_is_refused(raw, words):
    refused(lambda: read_file(raw), *words)


def test_names_of_the_documentation_that_cache_dit_no_longer_takes_are_read_with_a_warning():
    for old, new in [("float8", "float8_per_row"), ("int8", "int8_per_row"), ("Float8_Blockwise", "float8_per_block")]:
        file = read_file(quantize(quant_type=old))
        assert file.passed_on["quantize_config"]["quant_type"] == new
        assert len(file.warnings) == 1 and old in file.warnings[0] and new in file.warnings[0]


def test_the_older_parallel_kwargs_are_checked_like_the_rest():
    raw = {"parallelism_config": {"ulysses_size": 2, "parallel_kwargs": {"attention_backend": "native"}}}
    file = read_file(raw)
    assert file.passed_on["parallelism_config"] == {"ulysses_size": 2, "attention_backend": "native"}
    assert len(file.warnings) == 1
    raw["parallelism_config"]["parallel_kwargs"] = {"attention_backnd": "native"}
    refused(lambda: read_file(raw), "attention_backnd", "did you mean 'attention_backend'?")


SIZES = [
    ({"ulysses_size": "auto"}, 4, {"ulysses_size": 4}),
    ({"ulysses_size": "auto", "tp_size": 2}, 4, {"ulysses_size": 2, "tp_size": 2}),
    ({"ulysses_size": "auto", "tp_size": 4}, 4, {"tp_size": 4}),
    ({"ulysses_size": 2, "ring_size": "auto", "tp_size": 2}, 8, {"ulysses_size": 2, "ring_size": 2, "tp_size": 2}),
    ({"ulysses_size": 2, "ring_size": 1}, 2, {"ulysses_size": 2}),
]


@pytest.mark.parametrize(("given", "world", "resolved"), SIZES)
def test_sizes_make_the_ranks(given, world, resolved):
    assert resolve_sizes(given, world, "file") == resolved
    kept = {"attention_backend": "native"}
    assert resolve_sizes(given | kept, world, "file") == resolved | kept


ARITHMETIC = [
    ({"ulysses_size": "auto", "tp_size": 3}, 4, "ulysses_size auto x tp_size 3 does not divide 4"),
    ({"ulysses_size": "auto", "ring_size": 2, "tp_size": 4}, 4, "ulysses_size auto x ring_size 2 x tp_size 4 does not"),
    ({"ulysses_size": 2, "ring_size": 2, "tp_size": 2}, 4,
     "ulysses_size 2 x ring_size 2 x tp_size 2 makes 8 ranks, but --num-gpus is 4"),
    ({"ulysses_size": 2}, 4, "ulysses_size 2 makes 2 ranks, but --num-gpus is 4"),
    ({"ulysses_size": "auto"}, 1, "--num-gpus of at least 2"),
    ({"ulysses_size": "auto", "tp_size": 2, "ulysses_async": True}, 2, "ulysses_size is 1"),
]


@pytest.mark.parametrize(("given", "world", "words"), ARITHMETIC)
def test_sizes_that_do_not_make_the_ranks_are_refused_with_the_arithmetic(given, world, words):
    refused(lambda: resolve_sizes(given, world, "file"), words)


FLAGS = [
    (ULYSSES, {"ulysses_degree": 4}, "ulysses_size = 2", "contradicts --ulysses-degree 4"),
    (ULYSSES, {"tp_size": 2}, "tp_size = 1", "contradicts --tp-size 2"),
    ({"tp_size": 2}, {"sp_degree": 2}, "ulysses_size 1 x ring_size 1 contradicts --sp-degree 2"),
    ({"ring_size": 2}, {"ring_degree": 1}, "contradicts --ring-degree 1"),
    ({"ulysses_size": "auto"}, {"ulysses_degree": 1}, "ulysses_size = 2", "contradicts --ulysses-degree 1"),
    (ULYSSES, {"dp_size": 2}, "contradicts --dp-size 2"),
    (ULYSSES, {"kv_gather_degree": 2}, "contradicts --kv-gather-degree 2"),
    (ULYSSES | {"attention_backend": "native"}, {"attention_backend": "fa"}, "contradicts --attention-backend fa"),
]


@pytest.mark.parametrize(("values", "flags", "words"), [(v, f, w) for v, f, *w in FLAGS])
def test_flags_that_contradict_the_file_are_named(values, flags, words):
    refused(lambda: fit(parallel(**values), 2, EVERYTHING, "file", flags), *words)


def test_flags_that_say_the_same_are_welcome():
    flags = {"ulysses_degree": 2, "sp_degree": 2, "tp_size": 1, "dp_size": 1, "attention_backend": "torch_sdpa"}
    sections = parallel(ulysses_size="auto", attention_backend="native")
    fitted = fit(sections, 2, EVERYTHING, "file", flags)
    assert fitted == parallel(ulysses_size=2, attention_backend="native")
    assert sections["parallelism_config"]["ulysses_size"] == "auto", "the file's own sections stay as they are"


def lacking(*modules: str, **options) -> Machine:
    return Machine(
        device="cuda", capability=(9, 0), has=lambda module: module not in modules, cache_dit="1.5.1", **options
    )


MACHINES = [
    (quantize(quant_type="float8_per_row"), CPU, "quant_type", "needs CUDA devices", "use int8_weight_only"),
    (quantize(quant_type="int8_weight_only", precision_plan={"to_q": "nvfp4"}), CPU, "precision_plan", "CUDA"),
    (quantize(quant_type="int8_weight_only", components_to_quantize={"vae": {"quant_type": "int8_per_row"}}), CPU,
     "components_to_quantize", "int8_per_row"),
    (quantize(quant_type="int8_weight_only"), lacking("torchao"), "needs torchao, which is not installed"),
    (quantize(quant_type="float8_weight_only"), Machine(device="cuda", capability=(8, 0), has=bool), "8.9", "8.0"),
    (quantize(quant_type="nvfp4"), EVERYTHING, "needs compute capability 10.0, this device has 9.0"),
    (parallel(ulysses_size=2, ulysses_float8=True), CPU, "ulysses_float8", "needs CUDA devices"),
    (parallel(ulysses_size=2, ulysses_float8=True), lacking("triton"), "needs triton"),
    (parallel(tp_size=2), lacking("einops"), "needs einops"),
    (parallel(ring_size=2), CPU, "ring_size", "no log-sum-exp"),
    (parallel(ulysses_size=2, extra_parallel_kwargs={"a": 1}), lacking(), "needs cache-dit 1.5.3, 1.5.1 is installed"),
    ({"attention_backend": "flash"}, CPU, "attention_backend", "needs cuda devices, this machine has cpu"),
    ({"attention_backend": "_flash_3"}, lacking("flash_attn_interface"), "needs flash_attn_interface"),
    ({"attention_backend": "_native_npu"}, EVERYTHING, "needs npu devices"),
]


@pytest.mark.parametrize(("raw", "machine", "words"), [(r, m, w) for r, m, *w in MACHINES])
def test_what_the_machine_cannot_do_is_one_line(raw, machine, words):
    refused(lambda: fit(read_file(raw).passed_on, 2, machine, "file"), *words)


def test_what_the_machine_can_do_passes():
    for raw in (quantize(quant_type="int8_weight_only"), parallel(ulysses_size=2), {"attention_backend": "native"}):
        assert fit(read_file(raw).passed_on, 2, CPU, "file") == raw
    for raw, *_ in MACHINES:
        # Nobody looked for devices: only libraries count.
        if "nvfp4" not in str(raw) and "extra" not in str(raw):
            fit(read_file(raw).passed_on, 2, Machine(has=bool), "file")


def test_a_family_that_cache_dit_cannot_split_so_is_refused():
    flux, wan = "FluxTransformer", "WanTransformer3D"
    known = {"sequence": [flux, wan], "tensor": [wan], "async": [flux]}
    check_family({"ulysses_size": 2, "tp_size": 2}, "WanTransformer3DModel", known.get, "file")
    check_family({"ulysses_size": 2, "ulysses_async": True}, "FluxTransformer2DModel", known.get, "file")
    check_family({"tp_size": 1, "ulysses_size": 2, "ulysses_async": False}, "FluxTransformer2DModel", known.get, "file")
    line = refused(
        lambda: check_family({"ulysses_size": 2, "ulysses_async": True}, "WanTransformer3DModel", known.get, "file"),
        "ulysses_async", "WanTransformer3DModel", "only for FluxTransformer",
    )
    assert line.origin == "file"
    refused(lambda: check_family({"tp_size": 2}, "FluxTransformer2DModel", known.get, "file"), "tp_size = 2")


NATIVE = [
    (parallel(ulysses_size=2, ring_size=2, tp_size=2, attention_backend="native"),
     "--ulysses-degree 2 --ring-degree 2 --tp-size 2 --attention-backend torch_sdpa"),
    (parallel(ulysses_size="auto", extra_parallel_modules=["text_encoder"]), "--ulysses-degree N --encoder-parallel"),
    (quantize(quant_type="float8_per_row", exclude_layers=["embed", "mod"]),
     "--quantization fp8 --quantization-ignored-layers embed mod"),
    (quantize(quant_type="int8_weight_only"), "--quantization convrot_int8"),
    (quantize(quant_type="nvfp4"), "a quantised checkpoint"),
    ({"attention_backend": "_flash_3"}, "--attention-backend fa"),
    ({"attention_backend": "sage"}, "--attention-backend sage_attn"),
]


@pytest.mark.parametrize(("raw", "flags"), NATIVE)
def test_native_pipelines_have_flags_of_their_own(raw, flags):
    section, value = next(iter(raw.items()))
    assert flags in native_flags(section, value)


def test_every_key_says_what_it_is():
    assert all(knob.doc for knob in (*PARALLELISM.values(), *QUANTIZE.values()))
