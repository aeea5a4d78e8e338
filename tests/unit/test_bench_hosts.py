"""Host processes of the benchmark, with a small script in the host's place."""

from __future__ import annotations

import os
import sys
import textwrap
import time

import psutil
import pytest

from sglang_cachedit_plugin.bench.hosts import HostError, HostProcess

STUB = textwrap.dedent("""
    import json, os, subprocess, sys, time
    replies = open(int(sys.argv[1]), "w")
    def reply(**what):
        replies.write(json.dumps(what) + "\\n")
        replies.flush()
    arguments = json.loads(sys.stdin.readline())["arguments"]
    if "refuse" in arguments:
        reply(error="ValueError: no such model")
        raise SystemExit(1)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    print("noise on stdout", flush=True)
    reply(start_s=0.5, error=None)
    for line in sys.stdin:
        prompt = json.loads(line)["request"]["prompt"]
        if prompt == "die":
            sys.exit("RuntimeError: out of memory")
        if prompt == "hang":
            time.sleep(60)
        if prompt == "fail":
            print("\\x1b[91mAssertionError: not mounted\\x1b[0m", file=sys.stderr, flush=True)
            reply(error="Error executing request None: ")
            continue
        reply(seconds=1.0, error=None, child=child.pid)
""")


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Starts a stub; everything is ended after the test."""
    script = tmp_path / "stub.py"
    script.write_text(STUB)
    monkeypatch.setattr(HostProcess, "WORKER", (sys.executable, str(script)))
    started = []

    def begin(*arguments, timeout=20.0):
        started.append(HostProcess(arguments, os.environ, tmp_path / "logs" / "host.log", timeout))
        return started[-1]

    yield begin
    for host in started:
        host.close()


def test_requests_are_answered_apart_from_the_hosts_output(start, tmp_path):
    host = start()
    assert host.start_s == 0.5
    assert [host.run({"prompt": "a"})["seconds"] for _ in range(2)] == [1.0, 1.0]
    assert "noise on stdout" in (tmp_path / "logs" / "host.log").read_text()


def test_a_failed_request_names_the_cause_from_the_log_and_the_host_goes_on(start):
    host = start()
    assert host.run({"prompt": "fail"})["error"] == "Error executing request None: AssertionError: not mounted"
    assert host.run({"prompt": "a"})["error"] is None


def test_a_host_that_ends_says_its_last_words(start):
    host = start()
    with pytest.raises(HostError, match="left with status 1: RuntimeError: out of memory"):
        host.run({"prompt": "die"})
    with pytest.raises(HostError, match="left with status 1"):
        host.run({"prompt": "a"})


def test_a_host_that_hangs_is_given_up(start):
    host = start()
    host.timeout = 0.3
    with pytest.raises(HostError, match=r"no answer within 0\.3 s"):
        host.run({"prompt": "hang"})


def test_a_host_that_does_not_start_is_an_error(start):
    with pytest.raises(HostError, match="ValueError: no such model"):
        start("refuse")


def test_closing_ends_everything_it_started(start):
    host = start()
    child = psutil.Process(host.run({"prompt": "a"})["child"])
    host.close()
    deadline = time.monotonic() + 5
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
    host.close()
