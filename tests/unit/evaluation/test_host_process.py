"""Host processes, one and several side by side, with a small script in the host's place."""

from __future__ import annotations

import os
import sys
import textwrap
import time

import psutil
import pytest

from sglang_cachedit_plugin.errors import SettingError
from sglang_cachedit_plugin.evaluation.host_process import HostError, HostPool, HostProcess, environments

STUB = textwrap.dedent("""
    import json, os, subprocess, sys, time
    replies = open(int(sys.argv[1]), "w")
    def reply(**what):
        replies.write(json.dumps(what) + "\\n")
        replies.flush()
    server = json.loads(sys.stdin.readline())["server"]
    if "refuse" in server:
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
        started.append(HostProcess(os.environ, tmp_path / "logs" / "host.log", timeout))
        return started[-1].start(arguments)

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


SERVES = textwrap.dedent("""
    import json, os, sys, time
    import numpy as np
    from safetensors.numpy import save_file
    replies = open(int(sys.argv[1]), "w")
    def reply(**what):
        replies.write(json.dumps(what) + "\\n")
        replies.flush()
    server = json.loads(sys.stdin.readline())["server"]
    if server["model_path"] == "none":
        reply(error="ValueError: no such model")
        raise SystemExit(1)
    reply(start_s=0.5, error=None)
    for line in sys.stdin:
        job = json.loads(line)
        request = job["request"]
        if request.get("wrong"):
            reply(error="ValueError: no such picture")
            continue
        if request.get("die"):
            os._exit(3)
        time.sleep(request.get("sleep", 0.0))
        np.save(job["picture"], np.full((2, 2, 3), request["number"], np.uint8))
        folder = os.environ["SGLANG_CACHEDIT_RECORD"]
        save_file({"latents": np.ones(3, np.float32)}, os.path.join(folder, "last.safetensors"))
        report = {"pid": os.getpid(), "folder": folder, "threads": os.environ.get("OMP_NUM_THREADS"),
                  "cache": [name for name in os.environ if name.startswith("SGLANG_CACHE_DIT_")]}
        reply(seconds=0.1, metrics={"cache_dit": report}, error=None)
""")


@pytest.fixture
def pool(tmp_path, monkeypatch):
    """Makes pools of two hosts."""
    script = tmp_path / "serves.py"
    script.write_text(SERVES)
    monkeypatch.setattr(HostProcess, "WORKER", (sys.executable, str(script)))
    made = []

    def make(model="m"):
        made.append(HostPool({"model_path": model}, tmp_path / "record", [{"OMP_NUM_THREADS": "7"}] * 2))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_a_pool_answers_in_the_order_of_the_requests_from_both_hosts(pool, monkeypatch):
    monkeypatch.setenv("SGLANG_CACHE_DIT_RDT", "0.5")
    before = os.environ.get("OMP_NUM_THREADS")
    asked = [{"number": number, "sleep": 0.4 if number % 3 == 0 else 0.02} for number in range(12)]
    hosts = pool()
    found = list(hosts.run_all(asked))
    assert [each.picture[0, 0, 0] for each in found] == list(range(12))
    assert all(each.latents.tolist() == [1, 1, 1] and each.tensors == {} for each in found)
    pids = {each.report["pid"] for each in found}
    assert len(pids) == 2 and len({each.report["folder"] for each in found}) == 2
    assert {each.report["threads"] for each in found} == {"7"} and os.environ.get("OMP_NUM_THREADS") == before
    # What the shell says of caching is for servers; here every request says all of it.
    assert not any(each.report["cache"] for each in found)
    hosts.close()
    assert not any(map(psutil.pid_exists, pids))


def test_one_request_starts_one_host_and_none_starts_none(pool, tmp_path):
    hosts = pool()
    assert list(hosts.run_all([])) == []
    assert len({next(hosts.run_all([{"number": number}])).report["pid"] for number in range(3)}) == 1
    assert [path.name for path in (tmp_path / "record").iterdir()] == ["0"]


def test_a_failed_request_of_a_pool_is_an_error_and_its_host_goes_on(pool):
    hosts = pool()
    (first,) = hosts.run_all([{"number": 0}])
    with pytest.raises(HostError, match="ValueError: no such picture"):
        list(hosts.run_all([{"wrong": True}]))
    (second,) = hosts.run_all([{"number": 1}])
    assert second.report["pid"] == first.report["pid"]


def test_a_host_of_a_pool_that_dies_or_does_not_start_is_an_error_not_a_wait(pool):
    with pytest.raises(HostError, match="left with status 3"):
        list(pool().run_all([{"die": True}]))
    with pytest.raises(HostError, match="no such model"):
        list(pool("none").run_all([{"number": number} for number in range(4)]))


def test_closing_a_pool_ends_hosts_that_are_busy(pool):
    """Ctrl-C reaches every process of the terminal's session; only the parent may act on it."""
    hosts = pool()
    (found,) = hosts.run_all([{"number": 0}])
    pid = found.report["pid"]
    assert os.getsid(pid) != os.getsid(0)
    waiting = hosts.run_all([{"number": 1, "sleep": 60.0}])
    time.sleep(0.3)
    started = time.monotonic()
    hosts.close()
    assert time.monotonic() - started < 10.0 and not psutil.pid_exists(pid)
    with pytest.raises(HostError):
        next(waiting)


def test_cores_are_shared_and_gpus_are_divided(monkeypatch):
    import torch

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert environments(None, 1) == [{"OMP_NUM_THREADS": "2"}] * 4
    assert environments(1, 1) == [{"OMP_NUM_THREADS": "8"}]
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,5,7")
    assert environments(None, 4) == [{}]
    assert environments(2, 2) == [{"CUDA_VISIBLE_DEVICES": "2,3"}, {"CUDA_VISIBLE_DEVICES": "5,7"}]
    with pytest.raises(SettingError, match=r"--hosts.*expected at most 2"):
        environments(3, 2)
