"""On the real host: beside another plugin with our hook points, left out by ``SGLANG_PLUGINS``, and not installed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sglang_cachedit_plugin import hooks
from tests.e2e.conftest import PORTS, run_module
from tests.e2e.neighbour import CACHING

STEPS = 8
MASK = [1, 1, 0, 1, 0, 0, 1, 1]
IMAGE = {"width": 64, "height": 64, "num_inference_steps": STEPS, "prompt": "red apple", "seed": 1}
CACHED = {"enable_cache_dit": True, "cache_dit_params": {
    "steps_computation_mask": MASK, "scm_policy": "static", "max_warmup_steps": 0,
}}
REQUESTS = {"off": {}, "cached": CACHED, "off again": {"enable_cache_dit": False}}
BACKENDS = ("sglang", "diffusers")
ALONE = ("not installed", "left out", "neighbour alone")
ALTERED = {"sglang": "forward", "diffusers": "execute"}
GROUP = "[sglang.multimodal_gen.plugins]\n"
OWN = GROUP + "cachedit = sglang_cachedit_plugin.plugin:register\n"
NEIGHBOUR = GROUP + "neighbour = tests.e2e.neighbour:register\n"


def distribution(folder: Path, name: str, entry_points: str) -> str:
    """A folder for sys.path with an installed distribution; it hides others of that name further down."""
    info = folder / name / f"{name.replace('-', '_')}-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0\n")
    (info / "entry_points.txt").write_text(entry_points)
    return str(info.parent)


def requests_of(situation: str) -> list[str]:
    """Caching is asked for where the plugin is there."""
    return ["off"] if situation in ALONE else list(REQUESTS)


def jobs(model: Path, requests: list[str]) -> list[dict]:
    """The requests on both backends."""
    return [
        {
            "name": backend, "requests": [IMAGE | REQUESTS[name] for name in requests],
            "server": {"model_path": str(model), "backend": backend, "master_port": next(PORTS)},
        }
        for backend in BACKENDS
    ]


@pytest.fixture(scope="module")
def situations(models, tmp_path_factory):
    """What came of each situation; each is a process of its own."""
    folder = tmp_path_factory.mktemp("coexistence")
    ours = distribution(folder / "ours", "sglang-cachedit-plugin", OWN)
    hidden = distribution(folder / "hidden", "sglang-cachedit-plugin", "")
    neighbour = distribution(folder / "neighbour", "neighbour-plugin", NEIGHBOUR)
    asked = {
        "not installed": ([hidden], {}),
        "left out": ([ours], {"SGLANG_PLUGINS": "some_other_plugin"}),
        "neighbour alone": ([hidden, neighbour], {}),
        "neighbour first": ([neighbour, ours], {}),
        "neighbour last": ([ours, neighbour], {}),
        "neighbour in our place": ([ours, neighbour], {"NEIGHBOUR_REPLACES": "1"}),
    }
    written = {
        name: {"path": path, "environment": extra, "jobs": jobs(models["flux"], requests_of(name))}
        for name, (path, extra) in asked.items()
    }
    found = run_module("coexist_probe", written, folder)
    for name, each in found.items():
        each["jobs"] = {
            backend: dict(zip(requests_of(name), results, strict=True)) for backend, results in each["jobs"].items()
        }
    return found


def latents(situations, situation: str, backend: str, request: str) -> torch.Tensor:
    outcome = situations[situation]["jobs"][backend][request]
    assert outcome["error"] is None
    return outcome["latents"]


BESIDE = ("neighbour first", "neighbour last")
backends = pytest.mark.parametrize("backend", BACKENDS)


def test_left_out_the_host_is_as_if_the_plugin_were_not_installed(situations):
    out, absent = situations["left out"], situations["not installed"]
    for each in (out, absent):
        assert each["imported"] is False
        assert each["order"] == {} and set(each["patched"].values()) == {False}
        assert len(each["patched"]) == len(hooks.HOOK_POINTS)
    assert out["addresses"] == absent["addresses"] and out["metrics"] == absent["metrics"]
    assert out["refused"] == absent["refused"]
    assert set(situations["neighbour last"]["patched"].values()) == {True}


@backends
def test_left_out_its_pictures_are_those_of_the_host_alone(situations, backend):
    assert torch.equal(*(latents(situations, each, backend, "off") for each in ("left out", "not installed")))
    assert situations["left out"]["jobs"][backend]["off"]["report"] is None


@pytest.mark.parametrize("situation", BESIDE)
def test_hooks_were_registered_in_the_order_that_is_tested(situations, situation):
    both = [names for names in situations[situation]["order"].values() if len(names) == 2]
    expected = ["neighbour", "cachedit"] if situation == "neighbour first" else ["cachedit", "neighbour"]
    assert len(both) == 6 and all(names == expected for names in both)
    assert situations[situation]["out_of_place"] == []


@backends
@pytest.mark.parametrize("situation", BESIDE)
def test_uncached_pictures_beside_another_plugin_are_those_that_it_makes_alone(situations, situation, backend):
    alone = latents(situations, "neighbour alone", backend, "off")
    assert not torch.equal(alone, latents(situations, "not installed", backend, "off"))
    for request in ("off", "off again"):
        assert torch.equal(latents(situations, situation, backend, request), alone)


@backends
def test_cached_pictures_do_not_depend_on_who_came_first(situations, backend):
    first, last = (latents(situations, each, backend, "cached") for each in BESIDE)
    assert torch.equal(first, last)
    assert not torch.equal(first, latents(situations, "neighbour alone", backend, "off"))


@backends
@pytest.mark.parametrize("situation", BESIDE)
def test_both_act(situations, situation, backend):
    found = situations[situation]
    report = found["jobs"][backend]["cached"]["report"]
    cond = report["transformers"]["transformer"]["branches"]["cond"]
    assert cond["computed"] == [step for step, computed in enumerate(MASK) if computed]
    calls = found["jobs"][backend]["cached"]["calls"]
    assert calls["transformer.transformer_blocks.0"] == STEPS
    assert calls["transformer.single_transformer_blocks.7"] == sum(MASK)
    assert found["neighbour"][ALTERED[backend]] == len(REQUESTS)
    assert found["neighbour"]["caching"] >= len(REQUESTS) and found["neighbour"]["stage"] > len(REQUESTS)


@pytest.mark.parametrize("situation", BESIDE)
def test_nothing_of_either_is_lost_at_the_entrances(situations, situation):
    found = situations[situation]
    assert found["metrics"]["neighbour"] == "was here" and found["metrics"]["cache_dit"] == {"enabled": False}
    assert {"/neighbour", "/v1/cache_dit", "/cache_dit", "/generate"} <= set(found["addresses"])
    assert "did you mean 'max_warmup_steps'" in found["refused"]


def test_another_plugin_in_our_place_is_named_and_spoils_no_picture(situations):
    found = situations["neighbour in our place"]
    [problem] = found["out_of_place"]
    assert CACHING in problem and "'neighbour'" in problem
    alone = latents(situations, "neighbour alone", "sglang", "off")
    for request in REQUESTS:
        assert torch.equal(latents(situations, "neighbour in our place", "sglang", request), alone)
    cached = found["jobs"]["diffusers"]["cached"]["report"]
    assert cached["cached_steps"] == MASK.count(0)
