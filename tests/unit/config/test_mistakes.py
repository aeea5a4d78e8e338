"""What new users get wrong, and the line that each of them is told: ``mistakes.yaml``."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from fastapi import FastAPI, HTTPException
from fastapi.testclient import TestClient

from sglang_cachedit_plugin import cli
from sglang_cachedit_plugin.config import effective
from sglang_cachedit_plugin.config.effective import Defaults
from sglang_cachedit_plugin.config.sources import read_environment, read_file, read_overrides
from sglang_cachedit_plugin.errors import SettingError
from sglang_cachedit_plugin.serving import generate, validation

MISTAKES = yaml.safe_load(Path(__file__).with_name("mistakes.yaml").read_text())
HOST_FIELDS = frozenset({"prompt", "n", "size", "profile", "num_inference_steps", "enable_teacache", "quality", "seed"})


async def _fields(given) -> None:
    async def body():
        return given

    await validation.Fields(HOST_FIELDS)(SimpleNamespace(
        headers={}, json=body, method="POST", client=None, url=SimpleNamespace(path="/v1/images/generations")
    ))


def _generate(given) -> None:
    app = FastAPI()
    app.include_router(generate.router)
    answer = TestClient(app).post("/generate", json=given)
    raise HTTPException(answer.status_code, answer.json()["detail"])


def _command(given) -> None:
    with suppress(SystemExit):
        cli.main(given)


MADE = {
    "environment": lambda given: Defaults(environment=read_environment(given)[0]).check_profiles(),
    "file": lambda given: Defaults(file=read_file(given)).check_profiles(),
    "request": lambda given: validation.check("id", **given),
    "fields": lambda given: asyncio.run(_fields(given)),
    "generate": _generate,
    "control": lambda given: read_overrides(given, profiles=effective.current().start_up_profiles),
    "command": _command,
}


@pytest.mark.parametrize(
    ("kind", "mistake"), [(kind, each) for kind, mistakes in MISTAKES.items() for each in mistakes],
    ids=lambda value: value if isinstance(value, str) else str(value["given"])[:60],
)
def test_a_mistake_is_told_in_its_line(kind, mistake, capsys, monkeypatch):
    monkeypatch.setattr(effective, "_current", Defaults())
    try:
        MADE[kind](mistake["given"])
    except (SettingError, HTTPException) as error:
        told = getattr(error, "detail", str(error))
    else:
        told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told == mistake["told"]
