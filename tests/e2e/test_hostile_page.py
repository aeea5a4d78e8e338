"""The live page in a real browser, given answers in which every text tries to become part of it."""

from __future__ import annotations

import json

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from sglang_cachedit_plugin.serving import page
from tests.e2e.conftest import SCRIPT

ADDRESS = "http://cachedit.test"
STEPS = {"computed": [0, 2], "cached": [1], "residual_diffs": {"1": 0.5}, "nan_diffs": 0}
REPORT = {
    "enabled": True, "reason": f"reason {SCRIPT}", "backend": f"backend {SCRIPT}", "profile": f"profile {SCRIPT}",
    "corrector": {
        "enabled": True, "reason": None, "corrected_steps": f"corrected {SCRIPT}", "largest_correction": 0.11,
    },
    "error_control": {"tolerance": f"tolerance {SCRIPT}", "errors": {"0": 0.01, "2": 0.04}, "passed_on": 0.002},
    "computed_steps": f"computed {SCRIPT}", "cached_steps": f"cached {SCRIPT}", "denoising_s": 1.0,
    "transformers": {f"transformer {SCRIPT}": {"steps": 3, "branches": {f"branch {SCRIPT}": STEPS}}},
}
OFF = REPORT | {
    "corrector": None, "error_control": None, "enabled": False, "reason": f"why not {SCRIPT}", "transformers": {},
}
NEWS = {
    "started": 1.0, "last": 2, "speed_up": 1.5,
    "totals": {"cached_requests": f"requests {SCRIPT}", "uncached_requests": 0, "computed_steps": f"steps {SCRIPT}",
               "cached_steps": 1},
    "requests": [
        {"n": n, "id": SCRIPT, "time": 1.0, "outputs": 2, "speed_up": 1.5, "report": report}
        for n, report in enumerate((REPORT, OFF), 1)
    ],
}
SETTINGS = {
    "enabled": {"value": True, "origin": f"file {SCRIPT}"}, "profiles": [f"name {SCRIPT}"],
    "config": {f"setting {SCRIPT}": {"value": f"value {SCRIPT}", "origin": f"origin {SCRIPT}"}},
}
WORDS = (
    "reason", "backend", "profile", "computed", "cached", "transformer", "branch", "why not", "requests", "steps",
    "corrected", "tolerance", "file", "name", "setting", "value", "origin",
)


@pytest.fixture(scope="module")
def shown(browser):
    """The page as the server gives it, with its policy, in a browser whose network is this test."""
    app = FastAPI()
    app.include_router(page.router)
    own = TestClient(app).get("/cache_dit")
    assert "content-security-policy" in own.headers

    def answer(route):
        path = route.request.url.removeprefix(ADDRESS).partition("?")[0]
        if path == "/cache_dit":
            route.fulfill(body=own.text, headers=dict(own.headers))
        elif path in ("/v1/cache_dit", "/v1/cache_dit/requests"):
            found = SETTINGS if path == "/v1/cache_dit" else NEWS
            route.fulfill(body=json.dumps(found), content_type="application/json")
        else:
            route.abort()

    opened = browser.new_page()
    opened.said, opened.asked = [], []
    opened.on("pageerror", lambda error: opened.said.append(str(error)))
    opened.on("console", lambda message: opened.said.append(message.text))
    opened.on("request", lambda request: opened.asked.append(request.url))
    opened.route("**/*", answer)
    opened.goto(f"{ADDRESS}/cache_dit")
    opened.wait_for_selector(".cell")
    opened.locator("summary").click()
    opened.wait_for_selector("#config tr")
    yield opened
    opened.close()


@pytest.mark.parametrize("word", WORDS)
def test_every_text_is_shown_as_text(shown, word):
    assert f"{word} {SCRIPT}" in shown.locator("main").text_content()


def test_texts_that_are_said_aloud_or_pointed_at_too(shown):
    strip = shown.locator(".strip").first
    assert SCRIPT in strip.get_attribute("aria-label")
    strip.locator(".cell").nth(1).hover()
    assert shown.locator("#tip").text_content() == "step 1: cached, difference 0.5000"


def test_errors_of_the_forecasts_are_drawn_below_their_steps(shown):
    bars, cells = (shown.locator(selector).first.locator(".cell") for selector in (".errors", ".strip:not(.errors)"))
    places = [[cell.bounding_box() for cell in each.all()] for each in (bars, cells)]
    assert [box["x"] for box in places[0]] == [box["x"] for box in places[1]]
    assert [round(box["height"]) for box in places[0]] == [5, 2, 20]
    bars.nth(2).hover()
    assert shown.locator("#tip").text_content() == "step 2: error 0.0400"
    assert "corrected corrected" in shown.locator(".facts").last.text_content()
    assert "largest 0.11" in shown.locator(".facts").last.text_content()


def test_nothing_of_it_runs_and_the_policy_stops_what_got_in_all_the_same(shown):
    assert shown.evaluate("window.taken") is None
    assert shown.locator("main img, main script").count() == 0
    assert shown.said == []
    asked = {url.partition("?")[0].removeprefix(ADDRESS) for url in shown.asked if not url.startswith("data:")}
    assert asked == {"/cache_dit", "/v1/cache_dit", "/v1/cache_dit/requests"}
    shown.evaluate("""() => {
        document.body.insertAdjacentHTML('beforeend', '<img src="data:," onerror="window.taken = 2">')
        const script = document.createElement('script')
        script.textContent = 'window.taken = 3'
        document.body.append(script)
    }""")
    shown.wait_for_timeout(200)
    assert shown.evaluate("window.taken") is None
    assert sum("Content Security Policy" in text for text in shown.said) >= 2
