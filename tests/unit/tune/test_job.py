"""A whole tuning run over a loop that stands for the host: Euler's method on known velocity fields."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import yaml
from PIL import Image

from sglang_cachedit_plugin.errors import CacheDitError
from sglang_cachedit_plugin.evaluation import quality
from sglang_cachedit_plugin.evaluation.host_process import HostError
from sglang_cachedit_plugin.tune import candidates, job, refine, report, selection, write
from sglang_cachedit_plugin.tune.evaluate import Grid, Prompt
from sglang_cachedit_plugin.tune.job import Plan
from sglang_cachedit_plugin.tune.promise import TOLERANCES, Promise
from sglang_cachedit_plugin.tune.trajectory import Trajectories, products
from tests.unit.tune.test_files import MODEL, PROVENANCE

SIZE = (8, 8)
WIDTH = 192


def sigmas(steps: int) -> np.ndarray:
    line = np.linspace(1.0, 1.0 / steps, steps)
    return 3 * line / (1 + 2 * line)


class Host:
    """In place of the evaluator. Velocities bend most early and late, differently for each prompt.

    Args:
        curved: with 0 the output never changes, so that fewer steps lose nothing.
    """

    def __init__(self, curved: float = 1.0):
        self.curved, self.served = curved, 0

    def velocity(self, prompt: Prompt, sigma: float) -> np.ndarray:
        a, b, c = np.random.default_rng(prompt.seed).normal(size=(3, WIDTH))
        return a + self.curved * (b * np.cos(5 * sigma) + 0.4 * c * np.exp(-20 * sigma))

    def start(self, prompt: Prompt) -> np.ndarray:
        return np.random.default_rng(1000 + prompt.seed).normal(size=WIDTH)

    def draw(self, prompt: Prompt, steps: int, row=None) -> np.ndarray:
        from sglang_cachedit_plugin.cache.forecast import damped_weights

        places, x, known, cached, before = sigmas(steps), self.start(prompt), [], [], None
        change = np.append(places[1:], 0.0) - places
        weights = iter((row or {}).get("weights", ()))
        for step in range(steps):
            if row is None or row["mask"][step] == "1":
                output = self.velocity(prompt, places[step])
                known.append((places[step], output))
                if cached and row.get("corrector"):
                    used = known[-(row["corrector"] + 1):]
                    for each in cached:
                        factors = damped_weights([1000 * p for p, _ in used], 1000 * places[each])
                        before = before + change[each] * sum(w * v for w, (_, v) in zip(factors, used, strict=True))
                    output, x = output + row["carry"] * (before - x) / places[step], before
                cached = []
                x = x + change[step] * output
                continue
            before = before if cached else x
            cached.append(step)
            if "weights" in row:
                used = next(weights)
                output = sum(w * v for w, (_, v) in zip(used, known[-len(used):], strict=True))
            else:
                used = known[-(row["order"] + 1):]
                factors = damped_weights([1000 * p for p, _ in used], 1000 * places[step], row.get("damping", 1.0))
                output = sum(w * v for w, (_, v) in zip(factors, used, strict=True))
            x = x + change[step] * output
        return x

    def trajectories(self, prompts, grid):
        places = sigmas(grid.steps)
        outputs = [np.stack([self.velocity(prompt, place) for place in places]) for prompt in prompts]
        return Trajectories(
            timesteps=1000 * places, change=np.append(places[1:], 0.0) - places,
            gram=np.stack([products(each) for each in outputs]),
            peak=np.array([np.ptp(self.draw(prompt, grid.steps)) for prompt in prompts]),
        )

    def reference(self, prompt, grid):
        return {"denoising_s": 0.1 * grid.steps, "latents": self.draw(prompt, grid.steps), "picture": None}

    def references(self, prompts, grid):
        return [self.reference(prompt, grid) for prompt in prompts]

    def measure_all(self, prompts, grid, more, *, pictures, keep=0, steps=None):
        return [self.measure(each, grid, more, pictures=pictures, steps=steps) for each in prompts]

    def measure(self, prompt, grid, more, *, pictures, keep=False, steps=None):
        self.served += 1
        if more.get("enable_teacache"):
            raise HostError("this model has no such thing")
        params = more.get("cache_dit_params") or {}
        if more.get("enable_cache_dit"):
            row = self.row(params, grid.steps)
            final, computed = self.draw(prompt, grid.steps, row), row["mask"].count("1")
        else:
            final, computed = self.draw(prompt, steps or grid.steps), 0
        value = quality.latent_psnr(self.draw(prompt, grid.steps), final)
        return {
            "latent_psnr": value, "psnr": value, "ssim": min(1.0, value / 80), "computed": computed,
            "denoising_s": 0.1 * (computed or steps or grid.steps), "picture": np.zeros((8, 8, 3), np.uint8),
        }

    @classmethod
    def row(cls, params, steps):
        corrector = params["corrector_order"] if params.get("corrector") else 0
        return {**cls.schedule(params, steps), "corrector": corrector, "carry": params.get("corrector_carry", 0.5)}

    @staticmethod
    def schedule(params, steps):
        if tolerance := params.get("error_tolerance"):
            gap = 1 + int(200 * tolerance)
            return {"mask": "".join(str(int(step < 3 or step % gap == 0)) for step in range(steps)), "order": 1}
        if "schedules" in params:
            return {"order": 0, **params["schedules"][0]} if params["forecast"] == "output" else {
                "order": 0, "mask": params["schedules"][0]["mask"],
            }
        mask = params.get("steps_computation_mask")
        order = 1 if params.get("forecast") == "output" else 0
        mask = mask if isinstance(mask, list) else [int(step % 2 == 0) for step in range(steps)]
        return {"mask": "".join(map(str, mask)), "order": order}


PLAN = Plan(
    grids=[Grid(16, SIZE)], tune=[Prompt("a", 1), Prompt("b", 2), Prompt("c", 3)],
    heldout=[Prompt("d", 11), Prompt("e", 12)], target={"budget": 6}, seed=1, evaluations=2,
    baselines=("growing", "dpcache", "dbcache-0.24", "teacache"), shares=(0.25, 0.5),
)


@pytest.fixture(scope="module", autouse=True)
def _short():
    """A short search is enough for a small field."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refine, "ROUNDS", 60)
        yield


@pytest.fixture(scope="module")
def result():
    return job.run(PLAN, Host(), lambda text: None)[0]


def test_every_budget_is_tuned_and_the_asked_one_is_chosen(result):
    points = {point["name"]: point for point in result.points}
    assert {"tuned-4", "tuned-6", "tuned-8", "fewer-4", "fewer-8", "growing-6", "dpcache-6"} <= set(points)
    assert result.chosen["name"] == "tuned-6"
    assert {name: point["name"] for name, point in result.profiles.items()} == {
        "tuned-25": "tuned-4", "tuned-50": "tuned-8", "chosen": "tuned-6",
    }
    # Error control with about as many steps is always there: a schedule that loses to it is not written.
    assert any(name.startswith("tolerance-") and abs(points[name]["computed"] - 6) <= 2 for name in points)
    assert any("TeaCache: the model does not have it" in remark for remark in result.remarks)


def test_tuned_schedules_win_where_the_field_is_curved(result):
    for budget in (4, 6, 8):
        tuned = next(p for p in result.points if p["name"] == f"tuned-{budget}")
        assert selection.better(result.points, tuned) is None
        best = max(p["psnr"]["mean"] for p in selection.rivals(result.points, budget))
        assert tuned["psnr"]["mean"] > best + 3.0


def test_the_same_seed_finds_the_same(result):
    again = job.run(PLAN, Host(), lambda text: None)[0]
    assert again.points == result.points
    assert again.rows == result.rows


def test_a_quality_is_reached_with_the_fewest_steps(result):
    first = job.run(replace(PLAN, target={"min_psnr": 1.0}, baselines=()), Host(), lambda text: None)[0]
    least = next(p for p in first.points if p["name"] == "tuned-8")["tuning"]["psnr"] - 3.0
    plan = replace(PLAN, target={"min_psnr": least}, baselines=())
    found = job.run(plan, Host(), lambda text: None)[0]
    tried = {p["computed"]: p["tuning"]["psnr"] for p in found.points if p["kind"] == "tuned"}
    assert found.chosen["tuning"]["psnr"] >= least
    assert found.chosen["computed"] == min(computed for computed, value in tried.items() if value >= least)
    assert found.chosen["computed"] <= 8


class Surprising(Host):
    """Held-out prompts bend four times as much as those that are tuned on."""

    def velocity(self, prompt, sigma):
        a = np.random.default_rng(prompt.seed).normal(size=(3, WIDTH))[0]
        return a + (super().velocity(prompt, sigma) - a) * (4 if prompt.seed > 10 else 1)


@pytest.mark.parametrize(("host", "missed"), [(Host, False), (Surprising, True)])
def test_a_quality_that_held_out_prompts_miss_is_said(host, missed):
    plan = replace(PLAN, target={"min_psnr": 65.0}, baselines=())
    found = job.run(plan, host(), lambda text: None)[0]
    assert found.chosen["tuning"]["psnr"] >= 65.0
    assert (found.chosen["psnr"]["mean"] < 65.0) is missed
    assert any("misses it on the 2 held-out ones" in remark for remark in found.remarks) is missed


def test_schedules_of_one_file_share_their_corrector(tmp_path):
    plan = replace(PLAN, grids=[Grid(12, SIZE), Grid(16, SIZE)], shares=(0.5,), evaluations=0, baselines=())
    results = job.run(plan, Host(), lambda text: None)
    knobs = [result.knobs[name] for result in results for name in result.knobs]
    assert len(knobs) == 3 and all(each == knobs[0] for each in knobs)
    assert knobs[0]["corrector"] is True
    write.write(tmp_path / "t.yaml", results, PROVENANCE, MODEL)
    assert len(yaml.safe_load((tmp_path / "t.yaml").read_text())["cache_config"]["schedules"]) == 2


PROMISED = replace(
    PLAN, tune=[Prompt("a", seed) for seed in range(100, 130)], heldout=[Prompt("b", seed) for seed in range(200, 210)],
    target={"min_psnr": 45.0}, promise=Promise(share=0.9, confidence=0.9), baselines=(),
)


def test_the_largest_tolerance_that_keeps_the_promise_is_written(tmp_path):
    found = job.run(PROMISED, Host(), lambda text: None)[0]
    tolerance = found.chosen["settings"]["error_tolerance"]

    def missing(value, prompts):
        figures = Host().measure_all(prompts, found.grid, candidates.tolerance(value).request, pictures=True)
        return sum(each["psnr"] < 45.0 for each in figures)

    after = TOLERANCES[TOLERANCES.index(tolerance) + 1]
    assert missing(tolerance, PROMISED.tune) == found.promise["missing"] <= PROMISED.promise.allowed(30)
    assert missing(after, PROMISED.tune) > PROMISED.promise.allowed(30)
    assert found.promise["heldout_missing"] == missing(tolerance, PROMISED.heldout)
    assert found.promise["bound"] <= 0.1
    # Plain fewer steps are measured whatever is asked for.
    assert [point["kind"] for point in found.points].count("fewer_steps") == 3
    write.write(tmp_path / "t.yaml", [found], PROVENANCE, MODEL)
    assert yaml.safe_load((tmp_path / "t.yaml").read_text()) == {
        "cache_config": {"error_tolerance": tolerance}, "profiles": {},
    }
    said = " ".join((tmp_path / "t.yaml").read_text().replace("#", "").split())
    bound = f"{found.promise['missing']} of 30 calibration prompts miss it, so at most {found.promise['bound']:.1%} do"
    assert "At least 90.0% of unseen prompts reach PSNR 45, with confidence 0.9" in said and bound in said
    figures = report.results(PROMISED, [found], Pictures(), PROVENANCE, MODEL, tmp_path)
    assert bound in figures["grids"][0]["selection"] and figures["grids"][0]["promise"] == found.promise


def test_a_promise_that_no_tolerance_keeps_is_an_error():
    with pytest.raises(CacheDitError, match=r"PSNR 101 cannot be shown for 90\.0% of prompts"):
        job.run(replace(PROMISED, target={"min_psnr": 101.0}), Host(), lambda text: None)


def test_the_file_holds_the_better_one_where_nothing_can_be_gained(tmp_path):
    straight = job.run(replace(PLAN, shares=(0.5,), target={"budget": 8}), Host(0.0), lambda text: None)[0]
    write.write(tmp_path / "t.yaml", [straight], PROVENANCE, MODEL)
    text = (tmp_path / "t.yaml").read_text()
    tuned = straight.chosen
    if selection.better(straight.points, tuned) is None:
        assert tuned["psnr"]["mean"] == quality.IDENTICAL_PSNR
    else:
        assert "was better" in text


def test_the_outcome_is_what_the_report_takes(result, tmp_path):
    figures = report.results(PLAN, [result], Pictures(), PROVENANCE, MODEL, tmp_path)
    page = report.write_report(figures, tmp_path)
    assert page.stat().st_size > 5000
    assert figures["grids"][0]["selection"].startswith("tuned, 6 computed")
    assert (tmp_path / "pictures" / "0-chosen.png").is_file()
    assert figures["grids"][0]["methods"][0]["method"].startswith("output")


class Pictures(Host):
    """With pictures, for the sheet."""

    def reference(self, prompt, grid):
        return super().reference(prompt, grid) | {"picture": np.full((8, 8, 3), 200, np.uint8)}


class Videos(Host):
    """Videos of three frames, of which the middle one is told by its brightness."""

    FRAMES = np.stack([np.full((8, 8, 3), value, np.uint8) for value in (10, 120, 230)])

    def reference(self, prompt, grid):
        return super().reference(prompt, grid) | {"picture": self.FRAMES}

    def measure(self, *arguments, **options):
        return super().measure(*arguments, **options) | {"picture": self.FRAMES}


def test_of_a_video_the_sheet_has_the_middle_frame(result, tmp_path):
    video = replace(result, grid=Grid(result.grid.steps, (*SIZE, 3)))
    figures = report.results(PLAN, [video], Videos(), PROVENANCE, MODEL, tmp_path)
    page = report.write_report(figures, tmp_path).read_text()
    for column in ("uncached", "chosen"):
        still = np.asarray(Image.open(tmp_path / "pictures" / f"0-{column}.png"))
        assert still.shape == (8, 8, 3) and (still == 120).all()
    assert (tmp_path / "contact-sheet.png").is_file()
    assert "8×8×3" in page
