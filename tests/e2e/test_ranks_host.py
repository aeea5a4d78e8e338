"""SGLang's own workers on two ranks: the same steps cached on both, and the picture of one rank."""

from __future__ import annotations

import math
import subprocess

import pytest
import torch

from tests.e2e.conftest import free_ports, run_module
from tests.processes import end, host_environment, start

BASE = {"width": 64, "height": 64, "num_inference_steps": 12, "prompt": "red apple", "seed": 1}
VIDEO = {"negative_prompt": "green cat", "num_frames": 9}
KNOBS = {"residual_diff_threshold": 0.9, "max_warmup_steps": 2}

# The branches' differences lie on both sides of the threshold, and their masks differ.
PARTING = {"residual_diff_threshold": 0.7, "max_continuous_cached_steps": -1}
ROW = {"steps": 12, "mask": "110101010101", "uncond_mask": "111001101001"}


def _cached(**params):
    return {"enable_cache_dit": True, "cache_dit_params": KNOBS | params}


REQUESTS = {
    "off": {"enable_cache_dit": False},
    "cached": _cached(),
    "verified": _cached(verify_ranks=True),
    "taylorseer": _cached(enable_taylorseer=True),
    "static": _cached(scm_preset="fast", scm_policy="static"),
    "lockstep": _cached(lockstep=True, verify_ranks=True),
    "following": _cached(cfg_diff_compute_separate=False),
    "measured": _cached(**PARTING),
    "schedule": _cached(schedules=[ROW], scm_policy="static"),
    "output": _cached(schedules=[ROW], scm_policy="static", forecast="output"),
    "failing": _cached(verify_ranks=True) | {"fail": [1, 5]},
    "after it": _cached(),
}
EXACT = {"dit_precision": "fp32"}
"""Server arguments where ranks are compared in float32: the order in which they add up hardly shows."""

ROUNDING = 1e-5
"""Relative distance of the latents of two layouts in float32, of which 6e-7 was measured."""

SHARED = ("off", "cached", "verified", "taylorseer", "static")
LAYOUTS = {
    # name: (model, server arguments, request fields, names of requests)
    "flux 1": ("flux", {}, {}, SHARED),
    "flux Ulysses": ("flux", {"ulysses_degree": 2, "sp_degree": 2}, {}, SHARED),
    "flux TP": ("flux", {"tp_size": 2}, {}, SHARED),
    "flux FSDP CFG": (
        "flux", {"use_fsdp_inference": True, "enable_cfg_parallel": True},
        {"negative_prompt": "green cat", "true_cfg_scale": 3.0}, ("off", "measured", "schedule", "output"),
    ),
    "wan21 1": ("wan21", EXACT, VIDEO, ("off", "cached", "following")),
    "wan21 CFG": (
        "wan21", EXACT | {"enable_cfg_parallel": True}, VIDEO,
        ("off", "cached", "following", "lockstep", "failing", "after it"),
    ),
    "wan22 1": ("wan22", EXACT, VIDEO, ("off", "cached")),
    "wan22 CFG": ("wan22", EXACT | {"enable_cfg_parallel": True}, VIDEO, ("off", "cached", "lockstep")),
    "wan22 Ulysses": ("wan22", EXACT | {"ulysses_degree": 2, "sp_degree": 2}, VIDEO, ("off", "cached")),
}


def ranks_of(layout: str) -> int:
    return 1 if layout.endswith(" 1") else 2


@pytest.fixture(scope="module")
def results(models, tmp_path_factory):
    """Results by layout, request and rank."""
    folder = tmp_path_factory.mktemp("ranks")
    jobs = []
    for name, (model, server, fields, requests) in LAYOUTS.items():
        (port,) = free_ports(1)
        jobs.append({
            "name": name,
            "ranks": ranks_of(name),
            "server": {"model_path": str(models[model]), "backend": "sglang", "master_port": port} | server,
            "requests": [BASE | fields | REQUESTS[request] for request in requests],
        })
    found = run_module("ranks_probe", jobs, folder)
    return {
        name: {
            request: [rank[index] for rank in found[name]] for index, request in enumerate(requests)
        }
        for name, (_, _, _, requests) in LAYOUTS.items()
    }


def _latents(ranks):
    """The whole latents: where the host cuts packed latents, the shards one after the other."""
    first = ranks[0]["latents"]
    if len(ranks) == 2 and first.ndim == 3 and not torch.equal(first, ranks[1]["latents"]):
        return torch.cat([each["latents"] for each in ranks], dim=1).float()
    return first.float()


def _distance(a, b):
    return float((a - b).norm() / b.norm())


def _steps(result):
    return {
        (name, branch): (found["computed"], found["cached"])
        for name, transformer in result["report"]["transformers"].items()
        for branch, found in transformer["branches"].items()
    }


def _all_steps(ranks):
    return {key: steps for rank in ranks for key, steps in _steps(rank).items()}


PARALLEL = [
    (layout, request)
    for layout, (_, _, _, requests) in LAYOUTS.items()
    if ranks_of(layout) == 2
    for request in requests
    if request not in ("failing",)
]


@pytest.mark.parametrize(("layout", "request_name"), PARALLEL)
def test_no_rank_fails_and_ranks_that_share_a_forward_report_the_same(results, layout, request_name):
    ranks = results[layout][request_name]
    assert [each["error"] for each in ranks] == [None, None]
    if request_name == "off":
        return
    assert ranks[0]["report"]["cached_steps"] > 0
    if "CFG" not in layout:
        assert _steps(ranks[0]) == _steps(ranks[1])
        diffs = [each["report"]["transformers"]["transformer"]["branches"]["cond"]["residual_diffs"] for each in ranks]
        assert diffs[0] == diffs[1]


@pytest.mark.parametrize(("layout", "request_name"), [
    p for p in PARALLEL if p[1] not in ("lockstep", "after it") and "FSDP" not in p[0]
])
def test_the_steps_and_the_picture_are_those_of_one_rank(results, layout, request_name):
    single = layout.split()[0] + " 1"
    alone, together = results[single][request_name], results[layout][request_name]
    uncached = _distance(_latents(results[layout]["off"]), _latents(results[single]["off"]))
    # Flux's text encoders are bfloat16, and so is all that follows.
    exact = not layout.startswith("flux")
    bound = ROUNDING if exact else max(1.3 * uncached, 1e-3)
    if request_name != "off":
        assert _all_steps(together) == _all_steps(alone)
        changed = _distance(_latents(alone), _latents(results[single]["off"]))
        assert changed > max(1.3 * uncached, 4e-3), "caching must show"
        if not exact:
            # The rounding of a computed output counts for the steps that are cached after it as well.
            computed, cached = (sum(len(steps[kind]) for steps in _all_steps(together).values()) for kind in (0, 1))
            bound = max(bound, uncached * math.sqrt((computed + cached) / computed))
    assert _distance(_latents(together), _latents(alone)) <= bound


def test_verifying_changes_nothing(results):
    for layout in ("flux Ulysses", "flux TP"):
        plain, verified = results[layout]["cached"], results[layout]["verified"]
        assert torch.equal(_latents(plain), _latents(verified))


@pytest.mark.parametrize("layout", ["wan21 CFG", "wan22 CFG"])
def test_each_cfg_rank_runs_its_own_branch(results, layout):
    cond, uncond = (set(branch for _, branch in _steps(each)) for each in results[layout]["cached"])
    assert (cond, uncond) == ({"cond"}, {"uncond"})


@pytest.mark.parametrize("layout", ["wan21 CFG", "wan22 CFG"])
def test_lockstep_caches_the_same_steps_on_both_branches(results, layout):
    cond, uncond = (_steps(each) for each in results[layout]["lockstep"])
    assert sorted(cond.values()) == sorted(uncond.values())


@pytest.mark.parametrize("request_name", ["measured", "schedule", "output"])
def test_branches_whose_ranks_gather_weights_from_one_another_decide_together(results, request_name):
    cond, uncond = (_steps(each) for each in results["flux FSDP CFG"][request_name])
    assert [list(cond), list(uncond)] == [[("transformer", "cond")], [("transformer", "uncond")]]
    assert list(cond.values()) == list(uncond.values())
    if request_name != "measured":
        assert cond[("transformer", "cond")][1] == [4, 10], "cached where both masks say so"


def test_a_failure_on_one_rank_ends_the_request_on_both_and_the_next_one_works(results):
    first, second = results["wan21 CFG"]["failing"]
    assert "step 5 failed on rank 1: RuntimeError: this block fails" in first["error"]
    assert "this block fails" in second["error"]
    before, after = results["wan21 CFG"]["cached"], results["wan21 CFG"]["after it"]
    assert torch.equal(_latents(before), _latents(after))
    assert _all_steps(before) == _all_steps(after)


def _generate(model, folder, *flags, timeout=600, cold=False, **environment):
    """What ``sglang generate`` on two processes prints: launcher, scheduler, two workers."""
    master, scheduler, _ = free_ports(3)
    command = [
        "sglang", "generate", "--model-path", model, "--prompt", "red apple", "--width", "64", "--height", "64",
        "--num-inference-steps", "12", "--seed", "1", "--num-gpus", "2", "--attention-backend", "torch_sdpa",
        "--warmup-mode", "off", "--master-port", master, "--scheduler-port", scheduler, "--output-path", folder, *flags,
    ]
    out = folder / "log"
    host = start(command, cwd=folder, env=host_environment(**environment), out=out, cold=cold)
    try:
        status = host.wait(timeout)
    except subprocess.TimeoutExpired:
        pytest.fail(f"not done in {timeout} s: {out.read_text(errors='replace')[-4000:]}")
    finally:
        # Workers that wait for one another do not end with the launcher.
        end(host)
    log = out.read_text(errors="replace")
    assert status == 0, log[-4000:]
    assert list(folder.rglob("*.png")) + list(folder.rglob("*.jpg")), log[-4000:]
    return log


def test_the_command_line_with_two_processes(models, tmp_path):
    """The guard compares every step."""
    log = _generate(
        models["flux"], tmp_path, "--ulysses-degree", "2", "--sp-degree", "2", cold=True,
        SGLANG_CACHE_DIT_ENABLED="true", SGLANG_CACHE_DIT_RDT="0.9", SGLANG_CACHE_DIT_WARMUP="2",
        SGLANG_CACHE_DIT_VERIFY_RANKS="true",
    )
    assert log.count("12 steps, 4 computed, 8 cached (cond)") == 1, log[-4000:]


def test_fsdp_over_cfg_ranks_from_the_command_line_comes_to_an_end(models, tmp_path):
    """Each block gathers its weights from both processes; the host refuses the pair only for its own variable."""
    config = tmp_path / "measured.yaml"
    config.write_text(
        "cache_config: {max_warmup_steps: 2, residual_diff_threshold: 0.7, max_continuous_cached_steps: -1}\n"
    )
    log = _generate(
        models["flux"], tmp_path, "--enable-cfg-parallel", "true", "--use-fsdp-inference", "true",
        "--cache-dit-config", str(config), "--negative-prompt", "green cat", "--true-cfg-scale", "3", timeout=300,
    )
    assert log.count("12 steps, 5 computed, 7 cached (cond)") == 1, log[-4000:]
