"""A tuning run that is interrupted goes on, and comes to the file that it would have come to."""

from __future__ import annotations

import numpy as np
import pytest

from sglang_cachedit_plugin.evaluation.host_process import Outcome
from sglang_cachedit_plugin.tune import job, refine, write
from sglang_cachedit_plugin.tune.evaluate import Evaluator, Grid, Progress, Prompt
from sglang_cachedit_plugin.tune.job import Plan
from sglang_cachedit_plugin.tune.store import Store
from tests.unit.tune.test_files import MODEL, PROVENANCE
from tests.unit.tune.test_job import Host, sigmas

PLAN = Plan(
    grids=[Grid(12, (8, 8))], tune=[Prompt("a", 1), Prompt("b", 2)], heldout=[Prompt("c", 11)], target={"budget": 5},
    seed=1, evaluations=2, baselines=("fewer", "growing"), shares=(0.5,),
)


class Fields(Host):
    """In place of the host's engine: the same fields, recorded as the host's workers do.

    Args:
        interrupted: request at which Ctrl-C is pressed.
    """

    def __init__(self, interrupted: int = 10**9):
        super().__init__()
        self.interrupted = interrupted

    def run(self, request) -> Outcome:
        self.served += 1
        if self.served == self.interrupted:
            raise KeyboardInterrupt
        prompt, steps = Prompt(request["prompt"], request["seed"]), request["num_inference_steps"]
        row = self.row(request["cache_dit_params"], steps) if request["enable_cache_dit"] else None
        final = self.draw(prompt, steps, row)
        computed = row["mask"].count("1") if row else 0
        report = {
            "denoising_s": 0.1 * steps, "computed_steps": computed, "enabled": row is not None, "reason": None,
            "transformers": {"transformer": {"steps": steps}},
        }
        picture = (128 + 20 * final.reshape(8, 8, 3)).clip(0, 255).astype(np.uint8)
        return Outcome(
            picture=picture, latents=final.astype(np.float32), report=report, seconds=0.1,
            tensors=self.recorded(prompt, steps),
        )

    def run_all(self, requests):
        return map(self.run, requests)

    def recorded(self, prompt, steps):
        places, x = sigmas(steps), self.start(prompt)
        change = np.append(places[1:], 0.0) - places
        found = {"timesteps": 1000 * places}
        for step in range(steps):
            output = self.velocity(prompt, places[step])
            found |= {f"input/transformer/cond/{step}": x, f"output/transformer/cond/{step}": output}
            x = x + change[step] * output
        return found


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(refine, "ROUNDS", 60)


def tune(folder, engine) -> str:
    evaluator = Evaluator(engine, Store(folder, {}), {}, Progress(quiet=True))
    write.write(folder / "t.yaml", job.run(PLAN, evaluator, lambda text: None), PROVENANCE, MODEL)
    return (folder / "t.yaml").read_text()


def test_an_interrupted_run_comes_to_the_file_of_one_that_was_not(tmp_path):
    whole = Fields()
    text = tune(tmp_path / "whole", whole)
    assert whole.served > 40
    for at in (2, 15, whole.served):
        folder, first, second = tmp_path / str(at), Fields(at), Fields()
        with pytest.raises(KeyboardInterrupt):
            tune(folder, first)
        assert tune(folder, second) == text
        assert first.served - 1 + second.served == whole.served


def test_the_end_of_a_run_says_how_much_was_served_and_how_much_was_known(capsys):
    progress = Progress()
    progress.step()
    progress.known(3)
    progress.end()
    assert capsys.readouterr().err.splitlines()[-1] == "1 requests served, 3 known"
