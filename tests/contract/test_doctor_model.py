"""The doctor on models: classes of the real host and of diffusers, no weights."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from diffusers import FluxTransformer2DModel, WanTransformer3DModel

from sglang_cachedit_plugin import cli
from sglang_cachedit_plugin.cache import block_lists
from sglang_cachedit_plugin.cache.branch_cache import BranchCache
from sglang_cachedit_plugin.demo import model_dir
from sglang_cachedit_plugin.doctor import model


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in [name for name in os.environ if name.startswith("SGLANG_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def flux(tmp_path) -> Path:
    """The demo model without any weights."""
    path = tmp_path / "FLUX.1-dev"
    shutil.copytree(model_dir(), path, ignore=shutil.ignore_patterns("*.safetensors"))
    return path


def write(path: Path, index: dict, **configs: dict) -> Path:
    path.mkdir(parents=True)
    (path / "model_index.json").write_text(json.dumps({"_diffusers_version": "0.37.0", **index}))
    for component, config in configs.items():
        (path / component).mkdir()
        (path / component / "config.json").write_text(json.dumps(config))
    return path


@pytest.fixture
def wan(tmp_path) -> Path:
    """Two experts, configurations only."""
    config = {"_class_name": WanTransformer3DModel.__name__, "num_layers": 3}
    entry = ["diffusers", WanTransformer3DModel.__name__]
    return write(
        tmp_path / "Wan2.2-T2V-A14B-Diffusers",
        {"_class_name": "WanPipeline", "transformer": entry, "transformer_2": entry, "vae": ["diffusers", "x"]},
        transformer=config, transformer_2=config, vae={},
    )


def run(capsys, path, *arguments: str) -> tuple[int, dict]:
    status = cli.main(["doctor", "--json", "--model-path", str(path), *arguments])
    return status, json.loads(capsys.readouterr().out)


def test_a_model_that_both_backends_cache(capsys, flux):
    status, found = run(capsys, flux)
    assert (status, found["problems"]) == (0, [])
    told = found["model"]
    assert told["pipeline"] == "FluxPipeline" and told["native"]["steps"] == 50
    assert list(told["transformers"]) == ["transformer"]
    transformer = told["transformers"]["transformer"]
    assert transformer["fewest_steps"] == 5
    native, diffusers = transformer["backends"]["native"], transformer["backends"]["diffusers"]
    assert native["class"].startswith("sglang.") and diffusers["class"].startswith("diffusers.")
    config = json.loads((flux / "transformer" / "config.json").read_text())
    counts = {each["name"]: each["count"] for each in native["blocks"]}
    assert counts == {
        "transformer_blocks": config["num_layers"], "single_transformer_blocks": config["num_single_layers"]
    }
    assert diffusers["blocks"] and sum(each["count"] for each in diffusers["blocks"]) == sum(counts.values())
    assert native["branches"][0] == "cond" and native["stops"] == diffusers["stops"] == []


def test_two_experts(capsys, wan, monkeypatch):
    monkeypatch.setenv("SGLANG_CACHE_DIT_WARMUP", "6")
    monkeypatch.setenv("SGLANG_CACHE_DIT_SECONDARY_WARMUP", "1")
    status, found = run(capsys, wan)
    assert (status, found["problems"]) == (0, [])
    transformers = found["model"]["transformers"]
    assert [each["fewest_steps"] for each in transformers.values()] == [7, 2]
    for transformer in transformers.values():
        native = transformer["backends"]["native"]
        assert native["branches"] == ["cond", "uncond"]
        assert [(each["name"], each["count"]) for each in native["blocks"]] == [("blocks", 3)]


@pytest.mark.parametrize(
    ("variables", "words", "code"),
    [
        ({"WARMUP": "50"}, "none of the 50 steps that are the default", "steps"),
        ({"RDT": "0"}, "none of the 50 steps that are the default", "steps"),
        ({"FN": "9", "BN": "9"}, "Fn_compute_blocks 9 + Bn_compute_blocks 9 exceed the", "block_count"),
    ],
)
def test_settings_that_cache_nothing_are_status_1(capsys, flux, monkeypatch, variables, words, code):
    for name, value in variables.items():
        monkeypatch.setenv(f"SGLANG_CACHE_DIT_{name}", value)
    status, found = run(capsys, flux)
    assert status == 1
    assert any(words in problem for problem in found["problems"])
    for backend in found["model"]["transformers"]["transformer"]["backends"].values():
        assert backend["codes"] == [code]


def test_the_doctor_counts_blocks_as_the_engine_does(capsys, flux, monkeypatch):
    config = json.loads((flux / "transformer" / "config.json").read_text())
    monkeypatch.setenv("SGLANG_CACHE_DIT_FN", "99")
    _, found = run(capsys, flux)
    empty = model._empty(FluxTransformer2DModel, config)
    [size] = block_lists.build(empty, BranchCache()).num_blocks
    for backend in found["model"]["transformers"]["transformer"]["backends"].values():
        assert backend["stops"] == [
            f"Fn_compute_blocks 99 + Bn_compute_blocks 0 exceed the {size} blocks of transformer"
        ]


def test_a_class_that_only_one_backend_knows_is_a_warning(capsys, flux):
    index = json.loads((flux / "model_index.json").read_text())
    (flux / "model_index.json").write_text(json.dumps(index | {"_class_name": "FluxControlPipeline"}))
    status, found = run(capsys, flux.rename(flux.with_name("some-model")))
    assert status == 0
    assert any("native backend" in each and "no pipeline of its own" in each for each in found["warnings"])


def test_a_class_that_nobody_knows_is_status_1(capsys, flux):
    config = json.loads((flux / "transformer" / "config.json").read_text())
    (flux / "transformer" / "config.json").write_text(json.dumps(config | {"_class_name": "NoSuchTransformer"}))
    status, found = run(capsys, flux)
    assert status == 1
    assert any("diffusers has no such class" in problem for problem in found["problems"])
    assert any("SGLang has no such class" in problem for problem in found["problems"])


@pytest.mark.parametrize(
    ("index", "words"),
    [
        (None, "nowhere"),
        ({"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}, "transformer"),
        ({"nothing": 1}, "some-model"),
    ],
)
def test_what_cannot_be_read_is_one_line_and_status_1(capsys, tmp_path, index, words):
    path = tmp_path / "nowhere"
    if index is not None:
        path = write(tmp_path / "some-model", index, unet={}, transformer={}, vae={})
    status, found = run(capsys, path)
    assert status == 1 and found["model"] is None
    assert len(found["problems"]) == 1 and words in found["problems"][0]
    assert len(found["problems"][0].splitlines()) == 1


def test_the_text_names_blocks_and_branches(capsys, flux):
    assert cli.main(["doctor", "--model-path", str(flux)]) == 0
    text = capsys.readouterr().out
    for part in ("FluxPipeline, 50 steps by default", "single_transformer_blocks", "branches cond", "5 steps or more"):
        assert part in text
