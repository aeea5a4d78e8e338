"""Why a request is not cached, or only in part: every code that a report can carry, and what to do about it.

docs/troubleshooting.md is made from this table. The report's own sentence is more exact: it names classes and numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple


class Advice(NamedTuple):
    """What a code means, and what helps."""

    sentence: str
    what_to_do: str


NOT_WANTED = frozenset({"not_configured", "request"})
"""Codes of requests that nobody wanted cached; all others keep a wanted request from it, or limit it."""

REASONS: Mapping[str, Advice] = {
    "not_configured": Advice(
        "Caching is off on this server and the request does not ask for it.",
        "Start with `SGLANG_CACHE_DIT_PROFILE=balanced`, send `enable_cache_dit: true`, or run "
        "`sglang-cachedit set enabled=true`.",
    ),
    "request": Advice(
        "The request says `enable_cache_dit: false`.", "Leave the field out, or send `true`.",
    ),
    "no_adapter": Advice(
        "Nobody describes the blocks of the model's transformer.",
        "Write a row for the class, see [adding a model](adding-a-model.md); `error_tolerance` or `forecast: output` "
        "may work without one.",
    ),
    "model": Advice(
        "The model has nothing that can be left out: no transformer, no scheduler whose steps can be counted, or "
        "blocks that cannot be cached.",
        "[Models](models.md) says what each class can do. Where the whole output can be forecast, use a profile "
        "(`balanced`) or `forecast: output`.",
    ),
    "blocks": Advice(
        "The model's blocks are not as its row declares. The first computed forward shows that; it stays as computed.",
        "Another version of the model's code: report it with the sentence. `error_tolerance` on the native backend "
        "works all the same, it needs no blocks.",
    ),
    "block_count": Advice(
        "The first and last blocks that always run are all there are, or do not fit the model.",
        "Lower `Fn_compute_blocks` and `Bn_compute_blocks`.",
    ),
    "stage": Advice(
        "The host's stage does not let this request be cached, or makes its steps where they cannot be seen.",
        "`sglang-cachedit doctor --model-path` says it before a start; [compatibility](compatibility.md) has the "
        "stages.",
    ),
    "ranks": Advice(
        "The ranks that must agree are not known, or not all of them run this stage.",
        "Use a layout of [ranks](ranks.md); FSDP and one decision for all its ranks need CFG parallelism as described "
        "there.",
    ),
    "other_rank": Advice(
        "Another rank cannot serve the request, so none caches it.", "Its own sentence follows; look that one up.",
    ),
    "cuda_graphs": Advice(
        "Breakable CUDA graphs are on, and these settings decide while a step runs.",
        "Use static schedules with `forecast: output`, or `--enable-breakable-cuda-graph false`.",
    ),
    "other_cache": Advice(
        "TeaCache or Spectrum of the host leaves out steps itself.", "Switch one of the two off.",
    ),
    "steps": Advice(
        "None of the request's steps can be cached: too few, or the settings allow none.",
        "Lower `max_warmup_steps`, raise `residual_diff_threshold` above 0, or use more steps; "
        "`sglang-cachedit doctor --model-path` says how many are needed.",
    ),
    "schedule": Advice(
        "A schedule (mask, preset, bins or tuned) does not fit the steps or the size of the request, and was left out "
        "or resampled.",
        "Write one for these steps, or tune for this size: [tuning](tuning.md).",
    ),
    "branches": Advice(
        "Forwards cannot be told apart, or branches must decide together.",
        "Nothing: the pictures are right. [Ranks](ranks.md) says which branches decide together.",
    ),
    "error_control": Advice(
        "`error_tolerance` cannot see the error of its forecasts, so all steps are computed from there on.",
        "Use settings of DBCache (`residual_diff_threshold`) with this scheduler or model.",
    ),
    "input": Advice(
        "The model's input changed its shape within the request, so what was kept was dropped and steps were computed.",
        "Nothing: the pictures are right, such models cache less.",
    ),
    "nan_diffs": Advice(
        "Residual differences were NaN or infinite; these steps were computed.",
        "Look at the model's precision: uncached pictures have the same numbers.",
    ),
    "picture": Advice(
        "Something was found wrong after steps had been cached; the picture may be wrong, later ones are computed.",
        "Repeat the request with `enable_cache_dit: false`, and report the sentence.",
    ),
    "sections": Advice(
        "The file has sections that only the diffusers backend reads.",
        "Use the host's flags, or `--backend diffusers`.",
    ),
    "refused": Advice(
        "The request's settings cannot be used for this model; the answer was 400.",
        "The sentence says what would fit.",
    ),
    "other": Advice("A limit that has no code of its own.", "The sentence says all that is known."),
}


def codes_of(reasons: Iterable[object]) -> list[str]:
    """The codes of reasons, each once; ``other`` for one that carries none."""
    return list(dict.fromkeys(getattr(reason, "code", "other") for reason in reasons))


def page() -> str:
    """docs/troubleshooting.md."""
    lines = [
        "# Why is a request not cached?", "",
        "Generated from `report/reasons.py` by `python docs/generate.py`.", "",
        "Each report has `reason`, a sentence, and `reason_codes`, the codes below; the log, the page `/cache_dit`, "
        "the client and the doctor show both. With `strict: true` a server answers 400 in place of going on uncached.",
    ]
    for code, advice in REASONS.items():
        lines += ["", f"## {code}", "", advice.sentence, "",
                  f"**What to do:** {advice.what_to_do}"]
    return "\n".join(lines) + "\n"
