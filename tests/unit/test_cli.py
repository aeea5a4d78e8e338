"""The command itself: what it says of itself, and how it ends."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from fastapi import FastAPI, HTTPException, Request

from sglang_cachedit_plugin import __version__, cli
from tests.unit.local_server import serving

COMMAND = (sys.executable, "-m", "sglang_cachedit_plugin")


def test_it_tells_its_version(capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["--version"])
    assert left.value.code == 0 and capsys.readouterr().out == f"sglang-cachedit {__version__}\n"


def _parsers() -> dict[str, argparse.ArgumentParser]:
    top = cli._parser()
    [commands] = [each for each in top._actions if isinstance(each, argparse._SubParsersAction)]
    return {"": top, **commands.choices}


@pytest.mark.parametrize("name", _parsers())
def test_help_has_no_markup_and_shows_defaults(name):
    parser = _parsers()[name]
    text = " ".join(parser.format_help().split())
    assert "`" not in text
    for action in parser._actions:
        named = isinstance(action.default, str | int | float) and not isinstance(action.default, bool)
        if action.help and named and action.default != argparse.SUPPRESS and "default" not in action.help:
            assert f"(default: {action.default})" in text


def test_a_closed_pipe_ends_it_without_a_word():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*COMMAND, "schema"], stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


@pytest.fixture
def silent():
    """Address of a server that takes connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield f"127.0.0.1:{listener.getsockname()[1]}", listener


@pytest.mark.parametrize(
    ("number", "words"), [(signal.SIGINT, "sglang-cachedit: interrupted\n"), (signal.SIGTERM, "")], ids=["int", "term"]
)
def test_a_signal_ends_a_request_under_way_at_once(silent, number, words):
    address, listener = silent
    process = subprocess.Popen(
        [*COMMAND, "client", "--prompt", "a", "--url", address, "--repeat", "3", "--concurrency", "2"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )
    listener.accept()
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (128 + number, words)


def test_sigterm_closes_what_is_under_way(monkeypatch):
    closed = []

    def work(args):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        finally:
            closed.append(True)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(cli, "_schema", work)
    with pytest.raises(SystemExit) as left:
        cli.main(["schema"])
    assert (left.value.code, closed) == (143, [True])
    assert signal.getsignal(signal.SIGTERM) == before


def test_completion_without_its_library_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert cli.main(["completion", "bash"]) == 1
    assert capsys.readouterr().err == (
        'sglang-cachedit: error: completion needs shtab: pip install "sglang-cachedit-plugin[completion]"\n'
    )
    monkeypatch.setitem(sys.modules, "shtab", SimpleNamespace(complete=lambda parser, shell: f"{parser.prog} {shell}"))
    assert cli.main(["completion", "zsh"]) == 0 and capsys.readouterr().out == "sglang-cachedit zsh\n"


@pytest.fixture
def servers():
    """Two running servers with an endpoint of settings, and what was asked of them; the second one refuses."""
    app, asked = FastAPI(), []

    @app.api_route("/{server}/v1/cache_dit", methods=["GET", "PATCH", "DELETE"])
    async def settings(server: str, request: Request):
        body = await request.body()
        asked.append((server, request.method, body.decode(), request.headers.get("authorization")))
        if server == "second":
            raise HTTPException(403, "the client is elsewhere")
        state = {
            "enabled": {"value": True, "origin": "tuned.yaml"}, "profile": "fast", "profiles": ["fast"],
            "config": {"max_warmup_steps": {"value": 4, "origin": "default"},
                       "error_tolerance": {"value": 0.08, "origin": "built-in profiles.fast.error_tolerance"}},
            "workers": {"consistent": False, "age_s": 1.0, "replicas": [{"replica": 0, "ranks": [{}, {}]}]},
            "totals": {"cached_requests": 3, "uncached_requests": 1, "computed_steps": 40, "cached_steps": 60},
        }
        return state | ({} if request.method == "GET" else {"changed": {"enabled": {"before": True, "now": False}}})

    with serving(app) as address:
        yield address, asked


def test_settings_of_several_servers_are_shown_and_changed(servers, capsys, monkeypatch):
    address, asked = servers
    monkeypatch.setenv("SGLANG_CACHE_DIT_CONTROL_KEY", "k")
    assert cli.main(["status", "--url", f"{address}/first/v1"]) == 0
    out = capsys.readouterr().out
    assert f"http://{address}/first: caching on (tuned.yaml), profile fast" in out
    for words in ("error_tolerance", "2 DISAGREE", "3 with caching, 1 without", "40 computed, 60 cached"):
        assert words in out
    assert "max_warmup_steps" not in out
    urls = ["--url", f"http://{address}/second", "--url", f"{address}/first"]
    assert cli.main(["set", "enabled=false", "profile=fast", "secondary.max_warmup_steps=2", *urls]) == 1
    out, err = capsys.readouterr()
    assert out == f"http://{address}/first: enabled True -> False\n"
    assert err == f"sglang-cachedit set: error: http://{address}/second: 403: the client is elsewhere\n"
    assert cli.main(["reset", *urls]) == 1
    body = '{"enabled":false,"profile":"fast","secondary":{"max_warmup_steps":2}}'
    assert asked == [
        ("first", "GET", "", "Bearer k"), ("second", "PATCH", body, "Bearer k"), ("first", "PATCH", body, "Bearer k"),
        ("second", "DELETE", "", "Bearer k"), ("first", "DELETE", "", "Bearer k"),
    ]
