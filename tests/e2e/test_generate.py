"""A real server: POST /generate, the client, and the page in a real browser."""

from __future__ import annotations

import base64
import io
import subprocess
from collections import Counter
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from PIL import Image

from benchmarks.soak.load import scrape
from sglang_cachedit_plugin.report import metrics
from tests.e2e.conftest import SCRIPT, client_of
from tests.processes import host_environment, run

STEPS = 12
BODY = {"prompt": "red apple", "width": 64, "height": 64, "num_inference_steps": STEPS}


def post(url: str, **fields) -> httpx.Response:
    return httpx.post(f"{url}/generate", json=BODY | fields, timeout=300)


def generate(url: str, **fields) -> dict:
    answer = post(url, **fields)
    assert answer.status_code == 200, answer.text
    return answer.json()


def picture(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


def totals(url: str) -> dict:
    return httpx.get(f"{url}/v1/cache_dit/requests", timeout=60).json()["totals"]


def test_a_picture_its_statistics_and_what_was_left_out(server):
    answer = generate(
        server, seed=1, enable_cache_dit=True, profile="fast", num_frames=9, image_path="/etc/passwd", sedd=3
    )
    assert picture(answer["images"][0]).size == (64, 64) and picture(answer["images"][0]).format == "PNG"
    stats = answer["cache_stats"]
    assert (stats["profile"], stats["computed_steps"] + stats["cached_steps"]) == ("fast", STEPS)
    assert stats["cached_steps"] > 0
    assert answer["time_cost"] >= answer["inference_time_s"] > 0 and answer["videos"] == []
    assert [note.split()[0] for note in answer["notes"]] == ["num_frames", "image_path", "sedd"]


def test_the_picture_is_that_of_the_other_endpoints(server):
    ours = generate(server, seed=3, enable_cache_dit=True, profile="balanced")["images"]
    theirs = client_of(server).images.generate(
        prompt="red apple", size="64x64", response_format="b64_json",
        extra_body={
            "num_inference_steps": STEPS, "seed": 3, "output_format": "png", "generator_device": "cpu",
            "enable_cache_dit": True, "cache_dit_params": {"profile": "balanced"},
        },
    )
    assert ours == [theirs.data[0].b64_json]


def test_a_seed_that_was_not_given_is_answered_and_gives_the_same_again(server):
    first, second = generate(server), generate(server)
    assert first["seed"] != second["seed"] and first["images"] != second["images"]
    assert generate(server, seed=first["seed"])["images"] == first["images"]


def distance(first: str, second: str) -> float:
    """Mean difference of two pictures' pixels, of 255."""
    pixels = [np.asarray(picture(each), dtype=float) for each in (first, second)]
    return float(np.abs(pixels[0] - pixels[1]).mean())


def test_several_outputs_count_their_seeds_up(server):
    first, second = generate(server, seed=5, n=2, enable_cache_dit=False)["images"]
    single = generate(server, seed=6, enable_cache_dit=False)["images"][0]
    # A batch of two rounds otherwise than one picture alone.
    assert distance(second, single) < 2 < distance(first, single)
    jpeg = generate(server, seed=6, enable_cache_dit=False, output_format="jpeg")["images"][0]
    assert picture(jpeg).format == "JPEG"


def test_guidance_reaches_the_model(server):
    branches = generate(server, seed=1, negative_prompt="cat", true_cfg_scale=2.0)["cache_stats"]["transformers"]
    assert set(branches["transformer"]["branches"]) == {"cond", "uncond"}


def test_a_warmup_answers_without_pictures_and_is_not_counted(server):
    before = totals(server)
    answer = generate(server, warmup=True, width=96, height=64)
    assert (answer["images"], answer["videos"], answer["width"]) == ([], [], 96)
    assert answer["cache_stats"]["computed_steps"] > 0
    assert totals(server) == before
    generate(server, enable_cache_dit=False)
    assert totals(server)["uncached_requests"] == before["uncached_requests"] + 1


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"width": 0}, "width = 0 (request)"),
        ({"num_inference_steps": "x"}, "num_inference_steps = 'x' (request)"),
        ({"cache_dit_params": {"max_warmup_stepz": 1}}, "did you mean 'max_warmup_steps'"),
        ({"profile": "drfat"}, "did you mean 'draft'"),
        ({"seed": -1}, "seed = -1"),
        ({"quality": "best"}, "quality must be one of"),
    ],
)
def test_what_cannot_be_used_is_400_in_one_line(server, fields, words):
    answer = post(server, **fields)
    assert answer.status_code == 400
    assert words in answer.json()["detail"] and len(answer.json()["detail"].splitlines()) == 1


@pytest.mark.parametrize(("params", "line"), [
    ({"Fn_compute_blocks": 99, "strict": True},
     "strict = True (cache_dit_params.strict): Fn_compute_blocks 99 + Bn_compute_blocks 0 exceed the 12 blocks of "
     "transformer"),
    ({"steps_computation_mask": [1, 0, 1]},
     f"steps_computation_mask = '3 entries' (cache_dit_params): expected {STEPS} entries, one a step"),
])
def test_what_only_the_worker_can_refuse_is_400_in_one_line_at_every_address(server, params, line):
    wanted = {"enable_cache_dit": True, "cache_dit_params": params}
    picture = {"prompt": "red apple", "size": "64x64", "num_inference_steps": STEPS}
    before = scrape(server)
    refused = [post(server, **wanted)]
    for count in (1, 2):
        body = picture | wanted | {"n": count}
        refused.append(httpx.post(f"{server}/v1/images/generations", json=body, timeout=120))
    for answer in refused:
        assert answer.status_code == 400, answer.text
        assert answer.json() == {"detail": line}
    grown = {key: number for key, number in (scrape(server) - before).items() if key[0] == metrics.REQUESTS}
    assert grown.keys() == {(metrics.REQUESTS, "refused")}
    assert generate(server, seed=1, enable_cache_dit=True)["cache_stats"]["enabled"] is True


def test_nothing_is_left_on_the_disk(server, tmp_path_factory):
    output = tmp_path_factory.getbasetemp() / "image-servercurrent" / "out"
    before = sorted(output.iterdir()) if output.exists() else []
    generate(server)
    assert (sorted(output.iterdir()) if output.exists() else []) == before


def test_openapi_describes_every_address(server):
    described = httpx.get(f"{server}/openapi.json", timeout=60).json()
    paths = {"/generate": "post", "/cache_dit": "get", "/v1/cache_dit": "get", "/v1/cache_dit/requests": "get"}
    for path, method in paths.items():
        assert described["paths"][path][method]["summary"]
    assert "text/html" in described["paths"]["/cache_dit"]["get"]["responses"]["200"]["content"]


def test_a_video(video_server):
    fields = {"num_frames": 9, "fps": 8, "seed": 1, "enable_cache_dit": True, "profile": "fast"}
    answer = generate(video_server, **fields, true_cfg_scale=2.0)
    [video] = answer["videos"]
    assert base64.b64decode(video)[4:8] == b"ftyp" and answer["images"] == []
    assert answer["cache_stats"]["cached_steps"] > 0
    assert answer["notes"] == ["true_cfg_scale was left out: the model's pipeline does not take it"]


def command(*arguments: str) -> subprocess.CompletedProcess:
    client = ["sglang-cachedit", "client", "--prompt", "red apple", *arguments]
    return run(client, env=host_environment(), timeout=300, cold=True)


def test_the_client_writes_pictures_and_prints_statistics(server, tmp_path):
    done = command(
        "--url", server, "--size", "64x64", "--steps", str(STEPS), "--seed", "1", "--cache", "--profile", "fast",
        "--repeat", "2", "--concurrency", "2", "--output", str(tmp_path / "a.png"),
    )
    assert (done.returncode, done.stderr) == (0, "")
    expected = [generate(server, seed=seed, enable_cache_dit=True, profile="fast") for seed in (1, 2)]
    for name, answer in zip(("a-000.png", "a-001.png"), expected, strict=True):
        assert (tmp_path / name).read_bytes() == base64.b64decode(answer["images"][0])
    stats = expected[0]["cache_stats"]
    row = next(line.split() for line in done.stdout.splitlines() if line.split()[:2] == ["transformer", "cond"])
    assert row[2:4] == [str(stats["computed_steps"]), str(stats["cached_steps"])]
    assert "2 answers in" in done.stdout


def test_the_client_fails_in_one_line(server):
    done = command("--url", server, "--profile", "drfat")
    assert done.returncode == 1
    assert done.stderr.startswith("sglang-cachedit client: error: 400: profile = 'drfat'")
    assert len(done.stderr.splitlines()) == 1


@pytest.fixture(scope="module")
def shown(server):
    """Reports that the page must show, newest last; prompt and profile try to become part of it."""
    fields = [
        {"profile": "fast", "prompt": SCRIPT},
        {"enable_cache_dit": False},
        {"cache_dit_params": {"residual_diff_threshold": 0.9}, "negative_prompt": "cat", "true_cfg_scale": 2.0},
        {"profile": SCRIPT},
    ]
    return [generate(server, seed=1, **({"enable_cache_dit": True} | each))["cache_stats"] for each in fields]


@pytest.fixture
def page(browser, server, shown):
    """The page on a phone, once it shows something; errors and addresses that it asks for are collected."""
    page = browser.new_page(viewport={"width": 375, "height": 800})
    page.errors, page.asked = [], []
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("console", lambda message: page.errors.append(message.text) if message.type == "error" else None)
    page.goto(f"{server}/cache_dit")
    page.wait_for_selector(".cell")
    yield page
    page.close()


def test_strips_show_each_step_of_each_branch(page, shown):
    cards = page.locator(".request")
    for index, report in enumerate(reversed(shown)):
        card = cards.nth(index)
        branches = [branch for t in report["transformers"].values() for branch in t["branches"].values()]
        strips = card.locator(".strip:not(.errors)")
        assert strips.count() == len(branches)
        assert card.locator(".errors").count() == bool((report["error_control"] or {}).get("errors"))
        for number, branch in enumerate(branches):
            kinds = Counter(strips.nth(number).locator(".cell").evaluate_all(
                "cells => cells.map(cell => cell.classList[1])"
            ))
            assert kinds == Counter(computed=len(branch["computed"]), cached=len(branch["cached"]))
    assert "not cached (request)" in cards.nth(len(shown) - 2).text_content()


def test_pointing_at_a_step_shows_its_difference_and_so_do_the_arrow_keys(page, shown):
    branch = shown[2]["transformers"]["transformer"]["branches"]["cond"]
    step = int(next(iter(branch["residual_diffs"])))
    kind = "cached" if step in branch["cached"] else "computed"
    expected = f"step {step}: {kind}, difference {branch['residual_diffs'][str(step)]:.4f}"
    strip = page.locator(".request").nth(len(shown) - 3).locator(".strip").first
    tip = page.locator("#tip")
    assert tip.is_hidden()
    strip.locator(".cell").nth(step).hover()
    assert tip.text_content() == expected and tip.is_visible()
    page.mouse.move(1, 1)
    assert tip.is_hidden()
    page.keyboard.press("Tab")
    strip.focus()
    for _ in range(step + (0 if tip.is_visible() else 1)):
        page.keyboard.press("ArrowRight")
    assert tip.text_content() == expected and tip.is_visible()
    page.keyboard.press("Escape")
    assert tip.is_hidden()


def test_it_fits_a_phone_with_settings_open(page):
    page.locator("summary").click()
    page.wait_for_selector("#config tr")
    assert page.evaluate("document.documentElement.scrollWidth") == 375
    row = page.locator("#config tr", has_text="max_warmup_steps").first.text_content()
    assert "3" in row and "cache.yaml" in row


def test_dark_and_light_differ(page):
    colours = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        colours.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert colours[0] != colours[1]


def test_new_requests_appear_and_totals_follow(page, server):
    first = page.locator(".request").first.text_content()
    count = page.locator(".request").count()
    generate(server, seed=1, enable_cache_dit=True, profile="quality")
    page.wait_for_function("first => document.querySelector('.request').textContent !== first", arg=first)
    assert "quality" in page.locator(".request").first.text_content()
    assert page.locator(".request").count() == min(count + 1, 50)
    counted = totals(server)
    tiles = page.locator(".tile b").all_text_contents()
    assert tiles[0] == str(counted["cached_requests"] + counted["uncached_requests"])
    assert tiles[1] == str(counted["computed_steps"])


def test_nothing_foreign_runs_and_nothing_leaves_the_server(page, server):
    page.locator("summary").click()
    page.wait_for_selector("#config tr")
    assert SCRIPT in page.locator(".request").filter(has_text="<script>").first.text_content()
    assert page.evaluate("window.taken") is None
    assert page.locator("main img, main script").count() == 0
    assert "red apple" not in page.content() and page.errors == []
    assert {urlsplit(address).netloc for address in page.asked} == {urlsplit(server).netloc}
