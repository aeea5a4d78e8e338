"""Twenty defects, put into a copy of the package one at a time: the tests named with each must fail.

``python -m tests.mutations [WORDS]`` runs those whose name holds the words, all without, and prints a table. Exit
status 1 if a defect was not caught, 2 if the text that it replaces is not there once: then the code has moved on, and
the defect has to follow it.
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.processes import ROOT, host_environment, run

LEFT_OUT = shutil.ignore_patterns(".git", ".venv", ".uv", "outputs", "__pycache__", ".*_cache", "*.egg-info")
CACHE = "sglang_cachedit_plugin/cache"


@dataclass(frozen=True)
class Mutation:
    """``old`` becomes ``new`` in ``file``, which ``tests`` (of ``make test-unit``) must notice."""

    name: str
    file: str
    old: str
    new: str
    tests: str


MUTATIONS = (
    Mutation("mask inverted", f"{CACHE}/step_plan.py", "if self.mask[step]:", "if not self.mask[step]:",
             "tests/unit/cache/test_step_plan.py"),
    Mutation("cached steps in a row not limited", f"{CACHE}/step_plan.py",
             " or 0 <= self.max_continuous <= continuous", "", "tests/unit/cache/test_step_plan.py"),
    Mutation("decision inverted", f"{CACHE}/branch_cache.py", "may_cache and decisive < threshold",
             "may_cache and decisive > threshold",
             "tests/unit/cache/test_branch_decisions.py tests/unit/cache/test_branch_cache.py"),
    Mutation("plan of the wrong branch", f"{CACHE}/branch_cache.py",
             "plan = self.request.plan_of(self._identity.branch)", "plan = self.request.plan_of(COND)",
             "tests/unit/cache/test_output_cache.py"),
    Mutation("one context for all branches", f"{CACHE}/branch_cache.py",
             "key, step = (blocks, self._identity.branch)", "key, step = (blocks, COND)",
             "tests/unit/cache/test_branch_cache.py tests/unit/integration/test_cache_dit_sections.py"),
    Mutation("wrong step", f"{CACHE}/branch_cache.py", "plan.action(self._identity.step - self.request.first_step, ",
             "plan.action(self._identity.step - self.request.first_step + 1, ",
             "tests/unit/cache/test_branch_decisions.py tests/unit/cache/test_branch_cache.py"),
    Mutation("history of the last loop kept", f"{CACHE}/branch_cache.py",
             "if state is None or step < state.last_step:", "if state is None:",
             "tests/unit/cache/test_branch_cache.py tests/unit/cache/test_branch_decisions.py"),
    Mutation("difference upside down", f"{CACHE}/similarity.py", "else total / magnitude", "else magnitude / total",
             "tests/unit/cache/test_similarity.py"),
    Mutation("sums of the ranks not added up", f"{CACHE}/similarity.py", "dist.all_reduce(packed, group=group)", "pass",
             "tests/dist/test_ranks.py"),
    Mutation("ranks do not ask each other", f"{CACHE}/rank_agreement.py", "dist.all_reduce(flags, group=group)", "pass",
             "tests/dist/test_ranks.py tests/dist/test_layouts.py"),
    Mutation("polynomial mirrored", f"{CACHE}/forecast.py", "(at - other) / (own - other)",
             "(at + other) / (own - other)", "tests/unit/cache/test_forecast.py"),
    Mutation("another shape not noticed", f"{CACHE}/inputs.py", "before[place] != now[place]", "False",
             "tests/unit/cache/test_input_changes.py"),
    Mutation("snapshot not restored", f"{CACHE}/corrector.py", "solver.restore(snapshot)", "pass",
             "tests/unit/cache/test_corrector.py"),
    Mutation("corrected from the wrong latents", f"{CACHE}/corrector.py", "pending.with_tensors(output, sample)",
             "pending.with_tensors(output, call.sample)", "tests/unit/cache/test_corrector.py"),
    Mutation("a step too many under a tolerance", f"{CACHE}/error_control.py", "or step >= self._until",
             "or step > self._until", "tests/unit/cache/test_error_control.py"),
    Mutation("error of one step alone held against the tolerance", f"{CACHE}/error_control.py",
             "if not passed + error <= self._tolerance:", "if not error <= self._tolerance:",
             "tests/unit/cache/test_error_control.py"),
    Mutation("cached steps taken for computed ones", f"{CACHE}/denoising_steps.py",
             "cached = cached or counts[1] != before[1]", "cached = False",
             "tests/unit/cache/test_corrector.py tests/unit/cache/test_error_control.py"),
    Mutation("half cached after a failure", f"{CACHE}/cached_model.py", "            self._bypass()\n            raise",
             "            raise", "tests/unit/cache/test_cached_model.py"),
    Mutation("old settings not put back", "sglang_cachedit_plugin/serving/control.py",
             "await _put_back(server, before.overrides)", "pass", "tests/unit/serving/test_control.py"),
    Mutation("weakest source wins", "sglang_cachedit_plugin/config/sources.py",
             "for layer in layers if not group", "for layer in reversed(layers) if not group",
             "tests/unit/config/test_precedence.py tests/unit/config/test_sources.py"),
)


def missing() -> list[str]:
    """Defects whose text is not there once."""
    return [
        f"{each.name}: {each.file} has this text {found} times, not once: {each.old!r}"
        for each in MUTATIONS
        if (found := (ROOT / each.file).read_text().count(each.old) if (ROOT / each.file).exists() else 0) != 1
    ]


def tried(mutation: Mutation, copy: Path) -> tuple[str, float]:
    """What the tests say of a defect, and their seconds."""
    file = copy / mutation.file
    own = file.read_text()
    file.write_text(own.replace(mutation.old, mutation.new))
    began = time.monotonic()
    try:
        done = run(
            ["-m", "pytest", "-x", "-o", "addopts=", "-q", "--tb=no", "-p", "no:cacheprovider", "-p", "no:xdist",
             *mutation.tests.split()],
            cwd=copy, env=host_environment(PYTHONPATH=str(copy), PYTHONDONTWRITEBYTECODE="1"), timeout=600,
        )
    finally:
        file.write_text(own)
    # 1 is a test that fails; anything else is a defect that stops the tests before they begin.
    found = {0: "NOT CAUGHT", 1: "caught"}.get(done.returncode, f"pytest left with {done.returncode}")
    if (failed := re.search(r"^FAILED \S+::(\w+)", done.stdout, re.MULTILINE)) is not None:
        found += f" by {failed[1]}"
    return found, time.monotonic() - began


def main(wanted: str = "") -> int:
    """Command line."""
    if lines := missing():
        print("\n".join(lines), file=sys.stderr)
        return 2
    outcomes = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "copy")
        shutil.copytree(ROOT, copy, ignore=LEFT_OUT)
        for each in MUTATIONS:
            if wanted in each.name:
                found, seconds = tried(each, copy)
                outcomes.append(found)
                print(f"| {each.name} | `{each.file.rpartition('/')[2]}` | {found} | {seconds:.0f} s |", flush=True)
    return int(not all(found.startswith("caught") for found in outcomes))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
