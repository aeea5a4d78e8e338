"""Several hosts side by side: real processes, with a stand-in for the engine in each."""

from __future__ import annotations

import functools
import os
import signal
import time
from pathlib import Path

import pytest

from sglang_cachedit_plugin.errors import SettingError
from sglang_cachedit_plugin.tune.engine import EngineError
from sglang_cachedit_plugin.tune.hosts import Hosts, environments


class Stand:
    """Answers with its process and what it was asked; leaves a file when it is closed."""

    def __init__(self, folder: Path, marks: Path):
        self.folder, self.marks = folder, marks

    def run(self, request):
        if request.get("wrong"):
            raise ValueError("no such picture")
        if request.get("die"):
            os._exit(3)
        time.sleep(request.get("sleep", 0.0))
        return {"number": request["number"], "pid": os.getpid(), "folder": str(self.folder),
                "threads": os.environ.get("OMP_NUM_THREADS")}

    def close(self):
        (self.marks / str(os.getpid())).touch()


@pytest.fixture
def hosts(tmp_path):
    (tmp_path / "closed").mkdir()
    make = functools.partial(Stand, marks=tmp_path / "closed")
    found = Hosts(make, tmp_path / "record", [{"OMP_NUM_THREADS": "7"}, {"OMP_NUM_THREADS": "7"}])
    yield found
    found.close()


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_answers_come_in_the_order_of_the_requests_from_both_hosts(hosts, tmp_path):
    before = os.environ.get("OMP_NUM_THREADS")
    asked = [{"number": number, "sleep": 0.4 if number % 3 == 0 else 0.02} for number in range(12)]
    found = list(hosts.run_all(asked))
    assert [each["number"] for each in found] == list(range(12))
    pids = {each["pid"] for each in found}
    assert len(pids) == 2 and os.getpid() not in pids
    assert len({each["folder"] for each in found}) == 2
    assert {each["threads"] for each in found} == {"7"} and os.environ.get("OMP_NUM_THREADS") == before
    hosts.close()
    assert {path.name for path in (tmp_path / "closed").iterdir()} == set(map(str, pids))
    assert not any(map(alive, pids))


def test_one_request_starts_one_host_and_none_starts_none(hosts, tmp_path):
    assert list(hosts.run_all([])) == []
    for number in range(3):
        (found,) = hosts.run_all([{"number": number}])
    hosts.close()
    assert [path.name for path in (tmp_path / "closed").iterdir()] == [str(found["pid"])]


def test_a_failed_request_is_an_engine_error_and_its_host_goes_on(hosts):
    (first,) = hosts.run_all([{"number": 0}])
    with pytest.raises(EngineError, match="ValueError: no such picture"):
        list(hosts.run_all([{"wrong": True}]))
    (second,) = hosts.run_all([{"number": 1}])
    assert second["pid"] == first["pid"]


def test_a_host_that_dies_is_an_error_not_a_wait(hosts):
    with pytest.raises(EngineError, match="has ended"):
        list(hosts.run_all([{"die": True}]))


def test_an_interrupt_ends_hosts_that_are_busy(hosts, tmp_path):
    """Ctrl-C reaches every process of the terminal; only the parent may act on it."""
    (found,) = hosts.run_all([{"number": 0}])
    waiting = hosts.run_all([{"number": 1, "sleep": 60.0}])
    time.sleep(0.3)
    os.kill(found["pid"], signal.SIGINT)
    time.sleep(0.2)
    assert alive(found["pid"])
    started = time.monotonic()
    hosts.close()
    assert time.monotonic() - started < 10.0
    assert (tmp_path / "closed" / str(found["pid"])).exists() and not alive(found["pid"])
    with pytest.raises(EngineError):
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
