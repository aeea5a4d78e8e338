"""What the log says: at start, of a request, of a change; and what it leaves out."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from sglang_cachedit_plugin.config import effective
from sglang_cachedit_plugin.config.effective import Defaults
from sglang_cachedit_plugin.config.sources import LOG_VARIABLE, read_environment, read_file
from sglang_cachedit_plugin.errors import RefusedError, SettingError
from sglang_cachedit_plugin.integration import log, sglang_api, startup
from sglang_cachedit_plugin.integration.request import WARMUP, Session, count

PROFILE = {"SGLANG_CACHE_DIT_PROFILE": "balanced"}


@pytest.fixture(autouse=True)
def process(monkeypatch):
    monkeypatch.delenv(LOG_VARIABLE, raising=False)
    monkeypatch.setattr(effective, "_current", Defaults())
    monkeypatch.setattr(sglang_api, "publishes_metrics", lambda: False)
    monkeypatch.setattr(sglang_api, "is_first_rank", lambda: True)


def settings(environment=(), file=None) -> None:
    read = read_environment(dict(environment))[0]
    effective.install(Defaults(environment=read, **({} if file is None else {"file": read_file(file)})))


@pytest.mark.parametrize(
    ("environment", "file", "line"),
    [
        ({}, None, None),
        (PROFILE, None, "cache-dit: on, profile balanced; 1 variable from the environment"),
        (
            {"SGLANG_CACHE_DIT_RDT": "0.2", "SGLANG_CACHE_DIT_MC": "2"}, {"cache_config": {}},
            "cache-dit: on, from cache_dit_config; 2 variables from the environment",
        ),
        (
            PROFILE | {"SGLANG_CACHE_DIT_ENABLED": "no"}, None,
            "cache-dit: off, SGLANG_CACHE_DIT_ENABLED says no; 2 variables from the environment",
        ),
        ({}, {"profiles": {"mine": {}}}, "cache-dit: off, nothing switches it on, from cache_dit_config"),
    ],
)
def test_the_start_says_whether_requests_are_cached_and_from_where(environment, file, line):
    settings(environment, file)
    assert startup.start_line() == line


@pytest.mark.parametrize(("level", "lines"), [("", 1), ("requests", 1), ("changes", 1), ("quiet", 0)])
def test_the_start_is_one_line_unless_the_log_is_quiet(monkeypatch, capsys, level, lines):
    settings(PROFILE)
    monkeypatch.setenv(LOG_VARIABLE, level)
    startup.before_launch(SimpleNamespace(cache_dit_config=None, enable_breakable_cuda_graph=False))
    assert capsys.readouterr().err.count("cache-dit: on") == lines


@pytest.fixture
def served(monkeypatch):
    """Lines of one request."""

    def serve(enable=None, **extra) -> list[str]:
        lines: list[str] = []
        monkeypatch.setattr(sglang_api, "logger", lambda: SimpleNamespace(info=lines.append))
        session = Session("native", effective.current().decide(enable, None))
        count([SimpleNamespace(extra=extra, is_warmup=False, request_id="r7")], session.close())
        return lines

    return serve


@pytest.mark.parametrize("enable", [None, False])
def test_a_server_without_caching_says_nothing_of_its_requests(served, enable):
    assert served(enable) == []


def test_a_request_has_one_line_with_its_id(served):
    settings(PROFILE)
    assert served(False) == ["cache-dit: r7: off [request]: request"]
    assert served()[0].startswith("cache-dit: r7: 0 steps, 0 computed")


@pytest.mark.parametrize("level", ["changes", "quiet"])
def test_lines_of_requests_can_be_left_out(monkeypatch, served, level):
    settings(PROFILE)
    monkeypatch.setenv(LOG_VARIABLE, level)
    assert served(False) == []


def test_a_clients_warmup_has_no_line(served):
    settings(PROFILE)
    assert served(**{WARMUP: True}) == []


def test_a_word_that_is_no_level_ends_the_start():
    with pytest.raises(SettingError, match=r"SGLANG_CACHE_DIT_LOG = 'request' .* did you mean 'requests'"):
        read_environment({LOG_VARIABLE: "request"})


def test_what_the_host_says_of_a_refusal_is_left_out_and_all_else_stays(capsys):
    handler = logging.StreamHandler()
    root, before = logging.getLogger(), logging.getLogger().handlers
    root.handlers = [handler]
    refused = RefusedError(SettingError("strict", True, "request", "no blocks"))
    try:
        log.leave_out_refusals()
        log.leave_out_refusals()
        for error in (refused, ValueError("CUDA error")):
            try:
                raise error
            except ValueError as raised:
                logging.getLogger("host").error(f"Error executing request r1: {raised}", exc_info=True)
                logging.getLogger("host").exception("Video job %s failed", "r1")
    finally:
        root.handlers = before
    assert len(handler.filters) == 1
    said = capsys.readouterr().err
    assert "refuses" not in said and said.count("Traceback") == 2 and said.count("CUDA error") == 3
