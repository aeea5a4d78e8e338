"""The diffusers backend is hurt: the next request is drawn as by a fresh server, and nothing stays behind."""

from __future__ import annotations

import pytest

from tests.e2e import hurt


@pytest.fixture(scope="module")
def server(models, tmp_path_factory):
    """The hurt server; its first picture came before anything bad."""
    with hurt.serving_faults(models, tmp_path_factory.mktemp("faults"), "--backend", "diffusers") as made:
        made.fresh = {"plain": made.picture()}
        made.arm("block", "error")
        assert made.ask(hurt.EDGES).status_code in (200, 500) and not made.armed()
        made.picture(hurt.EDGES)
        assert made.picture() == made.fresh["plain"]
        made.materialize()
        yield made


def test_the_faults_meet_cached_and_computed_steps(server):
    hurt.meets_both_kinds_of_steps(server)


FAULTS = [
    ("block", "error", 0), ("block", "error", 5), ("block", "memory", 8), ("similarity", "error", 0),
    ("similarity", "memory", 3), ("forecast", "error", 1), ("vae", "error", 0),
]


@pytest.mark.parametrize(("place", "kind", "call"), FAULTS)
def test_a_fault(server, place, kind, call):
    hurt.survives(server, place, kind, call)


@pytest.mark.parametrize("call", [0, 9])
def test_not_a_number_in_the_latents(server, call):
    hurt.survives_nan(server, call)


def test_a_client_that_hangs_up(server):
    hurt.survives_a_hang_up(server)


def test_what_only_the_worker_can_refuse_is_400_in_one_line(server):
    answer = server.ask({"Fn_compute_blocks": 99, "strict": True})
    assert answer.status_code == 400
    assert answer.json()["detail"].startswith("strict = True (cache_dit_params.strict): Fn_compute_blocks 99 + Bn_")
    hurt.check(server)


def test_the_worker_is_not_larger_than_at_rest(server):
    hurt.is_not_larger(server)
