"""Concurrent clients that send a mix of requests and changes to a server and check every answer."""

from __future__ import annotations

import base64
import io
import itertools
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.soak.requests import Change, Mix, Wish, expect
from sglang_cachedit_plugin.report import metrics

TIMEOUT_S = 300
LIMITS = httpx.Limits(keepalive_expiry=2)
"""The server closes connections after five idle seconds; one that it closes while a request goes out is lost."""


@dataclass
class Outcome:
    """What a run brought.

    Args:
        statuses: how often each HTTP status was answered, to whatever was sent.
    """

    answers: int = 0
    refused: int = 0
    changes: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    counted: Counter = field(default_factory=Counter)
    samples: list[tuple[Wish, dict[str, Any], list[str]]] = field(default_factory=list)
    seconds: float = 0.0


class Changes:
    """Which changes can have been in force while a request was under way."""

    def __init__(self, enabled: bool) -> None:
        self._lock = threading.Lock()
        self._times: list[tuple[float, float, Change]] = [(0.0, 0.0, Change(0, enabled=enabled))]

    def make(self, send: Callable[[], Change]) -> None:
        """Run ``send``, one at a time; answers that come meanwhile are judged when it is through."""
        with self._lock:
            began = time.monotonic()
            change = send()
            self._times.append((began, time.monotonic(), change))

    def possible(self, sent: float, answered: float) -> list[Change]:
        """Those that a request sent and answered at these times can have met."""
        with self._lock:
            settled = max((done, index) for index, (_, done, _) in enumerate(self._times) if done <= sent)[1]
            return [change for index, (began, _, change) in enumerate(self._times)
                    if index >= settled and began <= answered]


class Load:
    """Clients against one server.

    Args:
        url: address of the server.
        seed: of the mix.
        change_every: one action of so many is a change of the server.
    """

    def __init__(self, url: str, seed: int = 0, change_every: int = 9, keep: int = 5):
        self.url = url
        self.outcome = Outcome()
        start_up = httpx.delete(f"{url}/v1/cache_dit", timeout=TIMEOUT_S).raise_for_status().json()
        self.changes = Changes(start_up["enabled"]["value"])
        self._mix = Mix(seed)
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._change_every = change_every
        self._keep = keep

    def materialize(self) -> None:
        """One request of each kind: libraries allocate what they keep for a kind when it comes for the first time."""
        with httpx.Client(timeout=TIMEOUT_S, limits=LIMITS) as plain:
            for wish in self._mix.kinds():
                status, answer = ask_plain(plain, self.url, wish)
                self._judge(wish, status, answer, self.changes.possible(0.0, 0.0))

    def run(self, clients: int = 4, requests: int | None = None, seconds: float | None = None) -> Outcome:
        """Send until ``requests`` were answered or ``seconds`` have passed."""
        began = time.monotonic()
        numbers = itertools.count()

        def more() -> bool:
            return (requests is None or next(numbers) < requests) and (
                seconds is None or time.monotonic() - began < seconds
            )

        threads = [threading.Thread(target=self._client, args=(index, more)) for index in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        httpx.delete(f"{self.url}/v1/cache_dit", timeout=TIMEOUT_S).raise_for_status()
        self.outcome.seconds = time.monotonic() - began
        return self.outcome

    def _client(self, index: int, more: Callable[[], bool]) -> None:
        with httpx.Client(timeout=TIMEOUT_S, limits=LIMITS) as plain, openai.OpenAI(
            base_url=f"{self.url}/v1", api_key="none", max_retries=0,
            http_client=httpx.Client(timeout=TIMEOUT_S, limits=LIMITS),
        ) as client:
            while more():
                try:
                    self._act(client if index % 2 else None, plain)
                except Exception as error:
                    self._problem(f"{type(error).__name__}: {error}")

    def _act(self, client: openai.OpenAI | None, plain: httpx.Client) -> None:
        with self._lock:
            draw = self._random.random()
            wish = self._mix.wish()
        if draw < 1 / self._change_every:
            self.changes.make(lambda: self._change(plain))
        if draw < 0.05:
            shown = plain.get(f"{self.url}/v1/cache_dit")
            self._answered(shown.status_code)
            if shown.status_code != 200:
                self._problem(f"GET answered {shown.status_code}")
        sent = time.monotonic()
        status, answer = ask_openai(client, wish) if client else ask_plain(plain, self.url, wish)
        self._judge(wish, status, answer, self.changes.possible(sent, time.monotonic()))

    def _change(self, plain: httpx.Client) -> Change:
        address = f"{self.url}/v1/cache_dit"
        refused = plain.put(address, json={"max_warmup_stepz": 1}).status_code
        self._answered(refused)
        if refused != 400:
            self._problem("a bad change was not refused")
        with self._lock:
            change = self._mix.change()
        answer = plain.put(address, json=change.body)
        self._answered(answer.status_code)
        if answer.status_code != 200:
            raise RuntimeError(f"PUT answered {answer.status_code}: {answer.text[:200]}")
        state = answer.json()
        if state["control"] != change.body or not state["workers"]["consistent"]:
            self._problem(f"PUT answered {state}")
        with self._lock:
            self.outcome.changes += 1
        return change

    def _answered(self, status: int) -> None:
        with self._lock:
            self.outcome.statuses[status] += 1

    def _judge(self, wish: Wish, status: int, answer: dict[str, Any], possible: list[Change]) -> None:
        self._answered(status)
        if wish.bad or status != 200:
            if status != 400 or not wish.bad:
                self._problem(f"{status} for {wish.fields}: {str(answer)[:300]}")
            with self._lock:
                self.outcome.refused += status == 400
                self.outcome.counted[metrics.REQUESTS, "refused"] += status == 400
            return
        report = answer["cache_dit"]
        reports = report.get("outputs", [report])
        for each in reports:
            if (wrong := expect(wish, each, possible)) is not None:
                self._problem(f"{wrong}; asked {wish.fields}")
        pictures = [data["b64_json"] for data in answer["data"]]
        sizes = {"{}x{}".format(*Image.open(io.BytesIO(base64.b64decode(each))).size) for each in pictures}
        if sizes != {wish.fields["size"]} or len(pictures) != wish.fields.get("n", 1):
            self._problem(f"{len(pictures)} pictures of {sizes} for {wish.fields}")
        with self._lock:
            self.outcome.answers += 1
            for each in reports:
                count(each, self.outcome.counted)
            if len(self.outcome.samples) < self._keep and report["cached_steps"] and "n" not in wish.fields:
                self.outcome.samples.append((wish, report, pictures))

    def _problem(self, text: str) -> None:
        with self._lock:
            self.outcome.problems.append(text)


def ask_openai(client: openai.OpenAI, wish: Wish) -> tuple[int, dict[str, Any]]:
    own = {"prompt", "size", "response_format", "n"}
    named = {key: value for key, value in wish.fields.items() if key in own}
    extra = {key: value for key, value in wish.fields.items() if key not in own}
    try:
        answer = client.images.generate(**named, extra_body=extra)
    except openai.APIStatusError as error:
        return error.status_code, {"detail": str(error)}
    return 200, answer.model_dump()


def ask_plain(plain: httpx.Client, url: str, wish: Wish) -> tuple[int, dict[str, Any]]:
    answer = plain.post(f"{url}/v1/images/generations", json=wish.fields)
    return answer.status_code, answer.json() if answer.status_code == 200 else {"detail": answer.text}


def count(report: dict[str, Any], counted: Counter) -> None:
    """Add a report to the numbers that ``/metrics`` must show."""
    cached = any(b["cached"] for t in report["transformers"].values() for b in t["branches"].values())
    off = report["reason"] in ("request", "not configured")
    counted[metrics.REQUESTS, "cached" if cached else "off" if off else "unavailable"] += 1
    if report["enabled"]:
        counted[(metrics.CORRECTED,)] += report["corrector"]["corrected_steps"]
        profile = report["profile"] or metrics.NO_PROFILE
        counted[f"{metrics.COMPUTED}_count", profile] += 1
        counted[f"{metrics.COMPUTED}_sum", profile] += report["computed_steps"]
    for name, transformer in report["transformers"].items():
        for branch, steps in transformer["branches"].items():
            for kind in ("computed", "cached"):
                counted[metrics.STEPS, name, branch, kind] += len(steps[kind])
            counted[f"{metrics.DIFFS}_count", name, branch] += len(steps["residual_diffs"])
            counted[f"{metrics.DIFFS}_sum", name, branch] += sum(steps["residual_diffs"].values())
            counted[metrics.NANS, name, branch] += steps["nan_diffs"]


def scrape(url: str) -> Counter:
    """The plugin's numbers on ``/metrics``, keyed as ``count`` keys them."""
    found: Counter = Counter()
    for family in text_string_to_metric_families(httpx.get(f"{url}/metrics", timeout=30).text):
        for sample in family.samples:
            if sample.name.startswith("sglang_cache_dit") and not sample.name.endswith(("_bucket", "_created")):
                order = [key for key in ("outcome", "profile", "transformer", "branch", "kind") if key in sample.labels]
                found[(sample.name, *(sample.labels[key] for key in order))] += sample.value
    return found


def differences(before: Counter, after: Counter, counted: Counter) -> list[str]:
    """Where ``/metrics`` did not grow by what the reports say."""
    return [
        f"{key}: grew by {after[key] - before[key]}, the reports say {counted[key]}"
        for key in sorted({*after, *counted}, key=str)
        if abs(after[key] - before[key] - counted[key]) > 1e-6 * max(1, abs(counted[key]))
    ]
