"""Sections of a config file against the host's own server arguments, as they are when a server starts."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from sglang.multimodal_gen.runtime.server_args import ServerArgs

from sglang_cachedit_plugin.config import effective
from sglang_cachedit_plugin.config.effective import Defaults
from sglang_cachedit_plugin.integration import cache_dit_sections, startup


@pytest.fixture(autouse=True)
def own_defaults():
    before = effective.current()
    effective.install(Defaults())
    yield
    effective.install(before)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Model folders that hold an index alone: nothing of a model may be loaded."""
    found = {}
    for name, pipeline, transformer in (
        ("FLUX.1-dev", "FluxPipeline", "FluxTransformer2DModel"),
        ("Wan2.1-T2V-1.3B-Diffusers", "WanPipeline", "WanTransformer3DModel"),
        ("HiDream-I1-Full", "HiDreamImagePipeline", "HiDreamImageTransformer2DModel"),
    ):
        folder = tmp_path_factory.mktemp("models") / name
        folder.mkdir()
        index = {"_class_name": pipeline, "_diffusers_version": "0.37.0", "transformer": ["diffusers", transformer]}
        (folder / "model_index.json").write_text(json.dumps(index))
        found[pipeline] = folder
    return found


def launch(folder, config, *, num_gpus=2, **flags) -> ServerArgs:
    args = ServerArgs.from_kwargs(
        model_path=str(folder), model_id="FLUX.1-dev", backend="diffusers", num_gpus=num_gpus, cache_dit_config=config,
        warmup_mode="off", **flags,
    )
    startup.before_launch(args)
    return args


def launch_native(config) -> None:
    startup.before_launch(SimpleNamespace(
        backend="sglang", cache_dit_config=config, enable_breakable_cuda_graph=False
    ))


NATIVE = [
    (ULYSSES := {"parallelism_config": {"ulysses_size": "auto"}}, "use --ulysses-degree N"),
    ({"quantize_config": {"quant_type": "float8_per_row"}}, "use --quantization fp8"),
    ({"attention_backend": "native"}, "use --attention-backend torch_sdpa"),
]


@pytest.mark.parametrize(("config", "words"), NATIVE)
def test_native_pipelines_name_their_own_flags(capsys, config, words):
    with pytest.raises(SystemExit):
        launch_native(config)
    line = capsys.readouterr().err
    assert "only the diffusers backend takes this section" in line and words in line
    launch_native({"cache_config": {"max_warmup_steps": 2}, "secondary": {"max_warmup_steps": 1}})
    assert effective.current().file.source.secondary["max_warmup_steps"].value == 1


def refused(capsys, *arguments, **options) -> str:
    with pytest.raises(SystemExit) as caught:
        launch(*arguments, **options)
    assert caught.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("cache-dit: error: ")]
    assert len(lines) == 1
    return lines[0]


def parallel(**values):
    return {"parallelism_config": values}


BAD = [
    (parallel(ulysses_size="auto", tp_size=3), {"num_gpus": 4}, "ulysses_size auto x tp_size 3 does not divide 4"),
    (parallel(tp_size=2), {"num_gpus": 4}, "tp_size 2 makes 2 ranks, but --num-gpus is 4"),
    (parallel(ulysses_size=2), {"num_gpus": 4, "ulysses_degree": 4, "sp_degree": 4}, "contradicts --ulysses-degree 4"),
    (parallel(ulysses_size=2, tp_size=2), {"num_gpus": 4, "sp_degree": 4}, "contradicts --sp-degree 4"),
    (parallel(ulysses_size=2, attention_backend="native"), {"attention_backend": "flash"},
     "contradicts --attention-backend flash"),
    (parallel(ring_size=2), {}, "no log-sum-exp"),
    (parallel(ulysses_size=2, ulysses_float8=True), {}, "needs CUDA devices, this machine has cpu"),
    ({"quantize_config": {"quant_type": "float8"}}, {"num_gpus": 1}, "quant_type = 'float8_per_row'"),
    ({"attention_backend": "flash"}, {"num_gpus": 1}, "needs cuda devices"),
]


@pytest.mark.parametrize(("config", "options", "words"), BAD)
def test_one_line_before_weights_load(folders, capsys, config, options, words):
    assert words in refused(capsys, folders["FluxPipeline"], config, **options)


GOOD = [
    (ULYSSES, {}, {"ulysses_size": 2}),
    (ULYSSES, {"ulysses_degree": 2, "sp_degree": 2, "tp_size": 1}, {"ulysses_size": 2}),
    (parallel(ulysses_size="auto", tp_size=2), {"num_gpus": 4}, {"ulysses_size": 2, "tp_size": 2}),
    (parallel(tp_size="auto"), {}, {"tp_size": 2}),
    (parallel(ulysses_size=2, ulysses_async=True), {"attention_backend": "torch_sdpa"},
     {"ulysses_size": 2, "ulysses_async": True}),
]


@pytest.mark.parametrize(("config", "options", "expected"), GOOD)
def test_what_the_host_worked_out_for_itself_contradicts_nothing(folders, config, options, expected):
    launch(folders["FluxPipeline"], config, **options)
    assert effective.current().file.passed_on == {"parallelism_config": expected}


def test_a_family_that_cannot_be_split_so_is_refused_by_its_index(folders, capsys):
    line = refused(capsys, folders["WanPipeline"], parallel(ulysses_size=2, ulysses_async=True))
    assert "ulysses_async" in line and "WanTransformer3DModel" in line and "QwenImageTransformer2DModel" in line
    assert "tp_size = 2" in refused(capsys, folders["HiDreamImagePipeline"], parallel(tp_size=2))


def test_the_families_are_those_of_cache_dit():
    assert "FluxTransformer2DModel" in cache_dit_sections.splits("sequence")
    assert "QwenImageTransformer2DModel" in cache_dit_sections.splits("tensor")
    assert "FluxTransformer2DModel" in cache_dit_sections.splits("async")
    assert not any("Wan" in name for name in cache_dit_sections.splits("async"))
