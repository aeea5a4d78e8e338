"""A real server of tiny Qwen-Image-Edit: POST /v1/images/edits, as a form and through the OpenAI client."""

from __future__ import annotations

import base64
import io
import json

import httpx
import openai
import pytest
from PIL import Image

from tests.e2e.conftest import client_of, path_with_cpu_ops, serving

MASK = [1, 1, 1, 0, 1, 0, 0, 1]
STEPS = len(MASK)
STATIC = {"steps_computation_mask": MASK, "steps_computation_policy": "static"}
FIELDS = {"num_inference_steps": STEPS, "seed": 1, "output_format": "png"}


def picture() -> tuple[str, bytes]:
    """A small picture to edit, as an upload."""
    file = io.BytesIO()
    Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(file, "png")
    return "in.png", file.getvalue()


def by_form(url: str, **fields) -> dict:
    answer = httpx.post(
        f"{url}/v1/images/edits", files={"image": picture()}, timeout=120,
        data={"prompt": "green apple", "size": "64x64"} | FIELDS | fields,
    )
    assert answer.status_code == 200, answer.text
    return answer.json()


def by_client(url: str, params: dict) -> dict:
    fields = FIELDS | {"enable_cache_dit": True, "cache_dit_params": json.dumps(params)}
    return client_of(url).images.edit(
        image=picture(), prompt="green apple", size="64x64", extra_body=fields
    ).model_dump()


@pytest.fixture(scope="module")
def edit_server(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("edit-server")
    with serving(models["qwen_edit"], folder, PYTHONPATH=path_with_cpu_ops(folder)) as url:
        yield url


@pytest.fixture(scope="module")
def edits(edit_server):
    """Answers by name; the uncached one comes after a cached one."""
    return {
        "static by form": by_form(edit_server, enable_cache_dit="true", cache_dit_params=json.dumps(STATIC)),
        "off": by_form(edit_server, enable_cache_dit="false", cache_dit_params=json.dumps(STATIC)),
        "static by client": by_client(edit_server, STATIC),
        "nothing cached": by_client(edit_server, {"max_warmup_steps": STEPS}),
    }


@pytest.mark.parametrize("name", ["static by form", "static by client"])
def test_a_static_mask_decides_which_steps_of_an_edit_are_cached(edits, name):
    report = edits[name]["cache_dit"]
    assert (report["enabled"], report["reason"], report["backend"]) == (True, None, "native")
    assert (report["computed_steps"], report["cached_steps"]) == (5, 3)
    for knob, value in STATIC.items():
        assert report["config"][knob] == {"value": value, "origin": f"cache_dit_params.{knob}"}
    branches = report["transformers"]["transformer"]["branches"]
    assert set(branches) == {"cond", "uncond"}
    for branch in branches.values():
        assert (branch["computed"], branch["cached"]) == ([0, 1, 2, 4, 7], [3, 5, 6])


def test_an_edit_without_caching_runs_all_steps(edits):
    off, computed = edits["off"]["cache_dit"], edits["nothing cached"]["cache_dit"]
    assert (off["enabled"], off["reason"], off["transformers"]) == (False, "request", {})
    assert (computed["computed_steps"], computed["cached_steps"]) == (STEPS, 0)
    pictures = {name: base64.b64decode(answer["data"][0]["b64_json"]) for name, answer in edits.items()}
    assert all(Image.open(io.BytesIO(each)).size == (64, 64) for each in pictures.values())
    assert pictures["off"] == pictures["nothing cached"]
    assert pictures["static by form"] == pictures["static by client"] != pictures["off"]


def test_a_bad_setting_of_an_edit_is_400_in_one_line(edit_server):
    with pytest.raises(openai.BadRequestError) as caught:
        by_client(edit_server, STATIC | {"steps_computation_policy": "statc"})
    detail = caught.value.body["detail"]
    assert "steps_computation_policy = 'statc' (cache_dit_params)" in detail and "did you mean 'static'?" in detail
    assert len(detail.splitlines()) == 1
