"""A real server that is hurt in every way: the next request is drawn as by a fresh server, and nothing stays behind."""

from __future__ import annotations

import signal
import threading
import time

import httpx
import psutil
import pytest
import torch
from safetensors.torch import save_file

from benchmarks.soak.soak import server_process
from tests.e2e import hurt

TIMEOUT_S = 15
"""Of the server's wait for its workers."""

# Three servers, so that two workers share the work.
pytestmark = pytest.mark.xdist_group("faults elsewhere")
at_each_step = pytest.mark.xdist_group("faults at each step")


@pytest.fixture(scope="module")
def lora(tmp_path_factory) -> str:
    """An adapter of tiny FLUX that is seen in the picture."""
    made = torch.Generator().manual_seed(3)
    weights = {}
    for layer in ("attn.to_q", "attn.to_v"):
        name = f"transformer.transformer_blocks.1.{layer}"
        weights[f"{name}.lora_A.weight"] = torch.randn(4, 128, generator=made)
        weights[f"{name}.lora_B.weight"] = torch.randn(128, 4, generator=made)
    file = tmp_path_factory.mktemp("lora") / "lora.safetensors"
    save_file(weights, file)
    return str(file)


def with_lora(server: hurt.Server, lora: str) -> tuple[str, dict]:
    """The picture with the adapter."""
    body = {"lora_nickname": "tiny", "lora_path": lora}
    answer = httpx.post(f"{server.url}/v1/set_lora", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    return server.picture()


@pytest.fixture(scope="module")
def server(models, lora, tmp_path_factory):
    """The hurt server, and what a fresh one draws."""
    folder = tmp_path_factory.mktemp("faults")
    with hurt.serving_faults(models, folder / "fresh") as fresh:
        first = {"plain": fresh.picture(), "lora": with_lora(fresh, lora)}
    with hurt.serving_faults(models, folder / "hurt", "--scheduler-rpc-timeout", str(TIMEOUT_S)) as made:
        # The fault comes first, so that this server is not fresh any more when it draws what is compared.
        made.arm("block", "error")
        assert made.ask(hurt.EDGES).status_code in (200, 500) and not made.armed()
        made.fresh = first | {"edges": made.picture(hurt.EDGES)}
        assert made.picture() == made.fresh["plain"]
        made.materialize()
        yield made


def test_the_faults_meet_cached_and_computed_steps(server):
    hurt.meets_both_kinds_of_steps(server)


@at_each_step
@pytest.mark.parametrize("call", range(2 * hurt.STEPS))
def test_an_error_in_a_block_at_each_step_and_branch(server, call):
    hurt.survives(server, "block", "error", call)


FAULTS = [
    ("vae", "error", 0), ("vae", "memory", 0), ("similarity", "error", 0), ("similarity", "error", 3),
    ("block", "memory", 0), ("block", "memory", 7), ("forecast", "memory", 0), ("forecast", "error", 3),
    ("kernel", "memory", 1),
]


@pytest.mark.parametrize(("place", "kind", "call"), FAULTS)
def test_a_fault_elsewhere(server, place, kind, call):
    hurt.survives(server, place, kind, call)


@pytest.mark.parametrize("call", [0, 4, 9])
def test_not_a_number_in_the_latents(server, call):
    hurt.survives_nan(server, call)


@pytest.mark.parametrize("kind", ["error", "memory"])
def test_a_fault_under_the_probe_s_eyes_costs_one_request(server, kind):
    knobs = hurt.EDGES | {"Bn_compute_blocks": 2 if kind == "error" else 3}
    server.arm("block", kind)
    answer = server.ask(knobs)
    assert answer.status_code in (200, 500)
    server.picture(knobs)
    hurt.check(server)
    assert server.picture(hurt.EDGES) == server.fresh["edges"]


def test_a_client_that_hangs_up(server):
    hurt.survives_a_hang_up(server)


def test_a_request_that_is_given_up_by_the_server(server):
    server.arm("block", str(TIMEOUT_S + 2), 3)
    answer = server.ask()
    assert answer.status_code == 500 and "did not respond in time" in answer.json()["detail"]
    time.sleep(2)
    hurt.check(server)


def test_another_lora_between_requests(server, lora):
    assert with_lora(server, lora) == server.fresh["lora"]
    assert server.fresh["lora"][0] != server.fresh["plain"][0]
    server.arm("block", "error", 5)
    assert server.ask().status_code == 500
    assert server.picture() == server.fresh["lora"]
    httpx.post(f"{server.url}/v1/unmerge_lora_weights", json={}, timeout=120).raise_for_status()
    assert server.picture() == server.fresh["plain"]


@pytest.mark.parametrize("after", [pytest.param("errors at each step", marks=at_each_step), "faults elsewhere"])
def test_the_worker_is_not_larger_than_at_rest(server, after):
    hurt.is_not_larger(server)


@pytest.mark.xdist_group("termination")
def test_termination_in_the_middle_of_denoising_ends_all_processes(models, tmp_path):
    """SIGTERM goes to the first process alone, as from a supervisor."""
    with hurt.serving_faults(models, tmp_path / "ended", "--http-graceful-shutdown-timeout", "1") as server:
        first = server_process(server.url)
        family = [first, *first.children(recursive=True)]
        assert len(family) > 1
        server.arm("block", "3", 4)
        asking = threading.Thread(target=_ignore, args=(server.ask,))
        asking.start()
        while server.armed():
            time.sleep(0.05)
        began = time.monotonic()
        first.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs(family, timeout=60)
        assert alive == [], time.monotonic() - began
        asking.join(timeout=30)
        assert not asking.is_alive()


def _ignore(ask) -> None:
    try:
        ask()
    except httpx.HTTPError:
        return

