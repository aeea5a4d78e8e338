"""Requests to ``POST /generate`` of a running server, with time and cache statistics; settings of running servers."""

from __future__ import annotations

import argparse
import base64
import json
import os
import queue
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import CacheDitError
from .report import table

KEY_VARIABLE = "SGLANG_CACHE_DIT_CONTROL_KEY"
URL = "http://127.0.0.1:30000"
FORMATS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}


class ClientError(CacheDitError):
    """A request that could not be made or was not answered with a picture; the message is one line."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The client's options."""
    parser.add_argument("--url", type=_url, default=URL, help="of the server")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--negative-prompt", metavar="TEXT")
    parser.add_argument("--size", type=_size, metavar="WxH", help="pixels: 1024x768, or 512 (default: the model's)")
    parser.add_argument("--steps", type=_positive, metavar="N", help="denoising steps (default: the model's)")
    parser.add_argument("--seed", type=_seed, metavar="N", help="of the first request; repeats count up from it")
    parser.add_argument("--guidance-scale", type=float, metavar="X")
    parser.add_argument("--true-cfg-scale", type=float, metavar="X")
    parser.add_argument("--num-frames", type=_positive, metavar="N", help="of a video")
    parser.add_argument("--fps", type=_positive, metavar="N", help="of a video")
    parser.add_argument("--repeat", type=_positive, default=1, metavar="N", help="requests to make")
    parser.add_argument("--concurrency", type=_positive, default=1, metavar="N", help="at the same time")
    parser.add_argument("--warmup", action="store_true", help="run the shape once before, without counting it")
    parser.add_argument("--output", type=_output, metavar="FILE", help="where to write; repeats are numbered")
    parser.add_argument("--profile", metavar="NAME", help="cache profile")
    parser.add_argument(
        "--cache-param", type=_pair, action="append", default=[], metavar="KEY=VALUE",
        help="a cache setting, the value as JSON or text; may be repeated",
    )
    switch = parser.add_mutually_exclusive_group()
    switch.add_argument("--cache", action="store_const", const=True, dest="cache", help="switch caching on")
    switch.add_argument("--no-cache", action="store_const", const=False, dest="cache", help="switch caching off")
    _add_connection(parser)


def _add_connection(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--api-key", metavar="KEY", default=os.environ.get(KEY_VARIABLE),
        help=f"sent as a bearer token (default: ${KEY_VARIABLE})",
    )
    parser.add_argument("--timeout", type=float, default=3600.0, metavar="S", help="seconds to wait for one answer")
    parser.add_argument("--json", action="store_true", help="print one JSON line for each answer, without pictures")


def add_control(commands: Any) -> None:
    """The subcommands ``status``, ``set`` and ``reset``."""
    for name, method, said in (
        ("status", "GET", "settings in force on running servers, and what differs from the defaults"),
        ("set", "PATCH", "change settings of running servers and keep the rest, e.g. enabled=false profile=fast"),
        ("reset", "DELETE", "return running servers to the settings of their start"),
    ):
        parser = commands.add_parser(name, help=said, description=said)
        if method == "PATCH":
            parser.add_argument("settings", type=_pair, nargs="+", metavar="KEY=VALUE",
                                help="the value as JSON or text; null takes a setting back; secondary.KEY too")
        parser.add_argument("--url", type=_url, action="append", help=f"of a server; repeatable (default: {URL})")
        _add_connection(parser)
        parser.set_defaults(run=control, command=name, method=method, **({} if method == "PATCH" else {"settings": []}))


def _url(text: str) -> str:
    """A server's address, however it is spelt: with or without http:// and the /v1 of OpenAI clients."""
    text = text if "://" in text else f"http://{text}"
    return text.rstrip("/").removesuffix("/v1")


def _size(text: str) -> tuple[int, int]:
    width, cross, height = text.lower().partition("x")
    return _positive(width), _positive(height if cross else width)


def _output(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() not in ("", ".mp4", *FORMATS):
        raise argparse.ArgumentTypeError(f"{path.suffix}: expected one of {', '.join(FORMATS)}, or .mp4 for a video")
    return path


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _seed(text: str) -> int:
    return 0 if text == "0" else _positive(text)


def _pair(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, got {text!r}")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def body_of(args: argparse.Namespace, index: int = 0) -> dict[str, Any]:
    """Body of request number ``index``; what was not given is left to the server."""
    width, height = args.size or (None, None)
    body = {
        "prompt": args.prompt, "negative_prompt": args.negative_prompt, "width": width, "height": height,
        "num_inference_steps": args.steps, "guidance_scale": args.guidance_scale,
        "true_cfg_scale": args.true_cfg_scale, "num_frames": args.num_frames, "fps": args.fps,
        "seed": None if args.seed is None else args.seed + index,
        "enable_cache_dit": args.cache, "profile": args.profile, "cache_dit_params": dict(args.cache_param) or None,
        "output_format": _format(args.output),
    }
    return {name: value for name, value in body.items() if value is not None}


def _format(output: Path | None) -> str | None:
    if output is None:
        return None
    return FORMATS.get(output.suffix.lower(), "png")


def ask(url: str, body: dict[str, Any], *, key: str | None, timeout: float) -> dict[str, Any]:
    """The server's answer, with ``round_trip_s``: seconds until it was here.

    Raises:
        ClientError: no answer, or one that is not 200.
    """
    started = time.perf_counter()
    found = _call("POST", f"{url}/generate", body, key=key, timeout=timeout)
    if not {"seed", "time_cost"} <= found.keys():
        raise ClientError(f"{url}: what answers there has no POST /generate of this plugin")
    return found | {"round_trip_s": round(time.perf_counter() - started, 4)}


def _call(method: str, url: str, body: Any, *, key: str | None, timeout: float) -> dict[str, Any]:
    import httpx

    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        answer = httpx.request(method, url, json=body, headers=headers, timeout=timeout)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ClientError(f"{url}: {error or type(error).__name__}") from None
    try:
        found = answer.json()
    except ValueError:
        found = None
    if answer.status_code != 200 or not isinstance(found, dict):
        detail = found.get("detail") if isinstance(found, dict) else None
        raise ClientError(f"{answer.status_code}: {detail or answer.text[:200] or answer.reason_phrase}")
    return found


def control(args: argparse.Namespace) -> int:
    """Show or change the settings of each server; returns the exit status, 1 where one failed."""
    failed = 0
    for url in args.url or [URL]:
        try:
            body = _nested(args.settings) if args.settings else None
            found = _call(args.method, f"{url}/v1/cache_dit", body, key=args.api_key, timeout=args.timeout)
            if "config" not in found:
                raise ClientError("what answers there has no /v1/cache_dit of this plugin")
        except ClientError as error:
            failed = _fail(f"{url}: {str(error).removeprefix(f'{url}/v1/cache_dit: ')}", args.command)
            continue
        print(json.dumps(found | {"url": url}) if args.json else "\n".join(state_lines(url, found)), flush=True)
    return failed


def _nested(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """``{"secondary": {"a": 1}}`` of ``secondary.a``."""
    body: dict[str, Any] = {}
    for key, value in pairs:
        *sections, name = key.split(".")
        inner = body
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[name] = value
    return body


def state_lines(url: str, state: Mapping[str, Any]) -> list[str]:
    """What is printed of one server: what a change changed, or what is in force."""
    if state.get("changed") is not None:
        changed = [f"{name} {each['before']!r} -> {each['now']!r}" for name, each in state["changed"].items()]
        return [f"{url}: {', '.join(changed) or 'nothing changed'}"]
    switch, totals, workers = state["enabled"], state["totals"], state["workers"]
    ranks = [rank for replica in (workers or {}).get("replicas", ()) for rank in replica["ranks"]]
    agree = "have not answered yet" if workers is None else "agree" if workers["consistent"] else "DISAGREE"
    rows = [(name, f"{each['value']} ({each['origin']})") for name, each in differing(state).items()]
    rows += [
        ("workers", f"{len(ranks)} {agree}" if ranks else agree),
        ("requests", f"{totals['cached_requests']} with caching, {totals['uncached_requests']} without"),
        ("steps", f"{totals['computed_steps']} computed, {totals['cached_steps']} cached"),
    ]
    profile = f", profile {state['profile']}" if state["profile"] else ""
    head = f"{url}: caching {'on' if switch['value'] else 'off'} ({switch['origin']}){profile}"
    return [head, *(f"  {name:<40} {value}" for name, value in rows)]


def differing(described: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that are not the defaults."""
    return {name: each for name, each in described["config"].items() if each["origin"] != "default"}


def outputs_of(answer: dict[str, Any], output: Path, index: int, count: int) -> Iterator[tuple[Path, bytes]]:
    """Path and content of each picture or video of one answer; several get numbers before the suffix."""
    kind = "videos" if answer.get("videos") else "images"
    contents = answer.get(kind) or []
    suffix = ".mp4" if kind == "videos" else output.suffix if output.suffix.lower() in FORMATS else ".png"
    for number, content in enumerate(contents):
        mark = "" if count == 1 else f"-{index:03d}"
        mark += "" if len(contents) == 1 else f"-{number}"
        yield output.with_name(output.stem + mark + suffix), base64.b64decode(content)


def run(args: argparse.Namespace, ask: Callable[..., dict[str, Any]] = ask) -> int:
    """Make the requests and print each as it comes; returns the exit status, 1 where one failed."""
    options = {"key": args.api_key, "timeout": args.timeout}
    started = time.perf_counter()
    try:
        if args.warmup:
            ask(args.url, body_of(args) | {"warmup": True}, **options)
            started = time.perf_counter()
        answers, failures = _all(args, lambda body: ask(args.url, body, **options))
    except (ClientError, OSError) as error:
        return _fail(str(error))
    if not args.json and args.repeat > 1:
        print(summary(answers, time.perf_counter() - started))
    if failures:
        return _fail(failures[0] if args.repeat == 1 else f"{len(failures)} of {args.repeat} failed: {failures[0]}")
    return 0


def _fail(text: str, command: str = "client") -> int:
    print(f"sglang-cachedit {command}: error: " + " ".join(text.split()), file=sys.stderr)
    return 1


def _all(
    args: argparse.Namespace, ask_one: Callable[[dict[str, Any]], dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Answers without their pictures, and failures; pictures are written and answers printed as they come."""
    from tqdm import tqdm

    answers, failures = [], []
    bar = tqdm(total=args.repeat, unit="request", disable=not sys.stderr.isatty(), leave=False)
    numbers, done = iter(range(args.repeat)), queue.SimpleQueue()

    def work() -> None:
        for index in numbers:
            try:
                done.put((index, ask_one(body_of(args, index))))
            except Exception as error:
                done.put((index, error))

    for _ in range(min(args.concurrency, args.repeat)):
        # Whoever interrupts the command does not wait for answers.
        threading.Thread(target=work, daemon=True).start()
    try:
        for _ in range(args.repeat):
            index, answer = done.get()
            if isinstance(answer, ClientError):
                failures.append(str(answer))
            elif isinstance(answer, Exception):
                raise answer
            else:
                paths = _write(args, index, answer)
                bar.clear()
                print(_text(args, index, answer, paths), flush=True)
                answers.append(answer)
            bar.update()
    finally:
        bar.close()
    return answers, failures


def _write(args: argparse.Namespace, index: int, answer: dict[str, Any]) -> list[str]:
    """Paths of the pictures written; the answer no longer holds them."""
    paths = []
    if args.output is not None:
        for path, content in outputs_of(answer, args.output, index, args.repeat):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            paths.append(str(path))
    for kind in ("images", "videos"):
        answer.pop(kind, None)
    return paths


def _text(args: argparse.Namespace, index: int, answer: dict[str, Any], paths: list[str]) -> str:
    return json.dumps(answer | {"files": paths}) if args.json else "\n".join(lines(index, answer, paths))


def lines(index: int, answer: dict[str, Any], paths: Sequence[str] = ()) -> list[str]:
    """What is printed of one answer."""
    size = f"{answer.get('width')}x{answer.get('height')}, {answer.get('num_inference_steps')} steps"
    out = [f"request {index + 1}: {answer['time_cost']:.2f} s, {size}, seed {answer['seed']}"]
    report = answer.get("cache_stats")
    if report is None:
        out.append("  the server sent no cache statistics")
    elif report["reason"]:
        state, codes = "limited" if report["enabled"] else "off", ", ".join(report.get("reason_codes", ()))
        out.append(f"  cache {state}{f' [{codes}]' if codes else ''}: {report['reason']}")
    if report is not None:
        out += [f"  {line}" for line in table.lines(report.get("outputs", [report]))]
    out += [f"  note: {note}" for note in answer.get("notes", ())]
    out += [f"  {path}" for path in paths]
    return out


def summary(answers: Sequence[dict[str, Any]], elapsed: float) -> str:
    """One line over all answers."""
    if not answers:
        return f"no answers in {elapsed:.2f} s"
    times = [answer["time_cost"] for answer in answers]
    reports = [report for answer in answers if (report := answer.get("cache_stats"))]
    computed = sum(report["computed_steps"] for report in reports)
    cached = sum(report["cached_steps"] for report in reports)
    return (
        f"{len(answers)} answers in {elapsed:.2f} s: {min(times):.2f} to {max(times):.2f} s each, "
        f"median {statistics.median(times):.2f} s; {computed} steps computed, {cached} cached"
    )
