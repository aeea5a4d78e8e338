"""The report's files, texts and figures; the page in a browser is tests/e2e/test_report_page.py."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
from PIL import Image

from sglang_cachedit_plugin.evaluation.plots import Axis, overlaps, place
from sglang_cachedit_plugin.tune import charts, report, sheet
from tests.unit.sample_results import HOSTILE, points, results


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    given = results(folder)
    given["grids"][0]["points"][0]["ssim"]["mean"] = float("nan")
    return given, report.write_report(given, folder)


def test_all_files_are_written(written):
    folder = written[1].parent
    figures = json.loads((folder / "results.json").read_text())
    assert [point["name"] for point in figures["grids"][0]["points"]] == [point["name"] for point in points()]
    assert figures["grids"][0]["points"][0]["ssim"]["mean"] is None
    assert Image.open(folder / "report.png").width > 1000
    # Four columns of two prompts, each with its difference below.
    assert Image.open(folder / "contact-sheet.png").height > 2 * 2 * 192


def test_every_text_is_escaped(written):
    page = written[1].read_text()
    assert HOSTILE not in page
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(") >= 4


def test_nothing_is_loaded_from_outside(written):
    page = written[1].read_text()
    assert not re.search(r"https?:|url\(|@import", page)
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in page
    assert page.count('src="data:image/') == page.count("<img") == 12


def test_headline_names_the_best_rival_at_no_more_steps():
    grid = results_grid()
    facts = dict((caption, value) for value, caption in report.headline(grid))
    assert facts["steps computed"] == "14 of 28"
    assert facts["PSNR, mean"] == "43.2 dB" and facts["PSNR, worst prompt"] == "39.3 dB"
    assert facts["against the best other at no more computed steps (growing window 14)"] == "+8.6 dB"
    assert facts["of the others tried reaches this mean with fewer than all steps"] == "none"


def test_headline_says_when_the_tuned_schedule_loses():
    grid = results_grid()
    rival = next(point for point in grid["points"] if point["name"] == "fewer-10")
    rival["psnr"]["mean"] = 45.0
    facts = dict((caption, value) for value, caption in report.headline(grid))
    assert facts["against the best other at no more computed steps (10 steps)"] == "−1.8 dB"
    assert facts["computed by the first other that reaches this mean (10 steps)"] == "10 steps"


def results_grid():
    return {"steps": 28, "points": points(), "chosen": "tuned-14"}


@pytest.mark.parametrize(("field", "value", "message"), [
    ("kind", "magic", "kind 'magic', expected one of tuned, "), ("name", "tuned-14", "two points are called"),
])
def test_points_that_cannot_be_drawn_are_refused(tmp_path, field, value, message):
    given = {"grids": [{**results_grid(), "size": [64, 64]}]}
    given["grids"][0]["points"][0][field] = value
    with pytest.raises(ValueError, match=message):
        report.write_report(given, tmp_path)


def test_bare_results_are_enough(tmp_path):
    bare = [{"name": "a", "kind": "tuned", "label": "a", "computed": 3, "psnr": {"mean": math.inf, "min": 30.0}}]
    page = report.write_report({"grids": [{"steps": 4, "size": [8, 8], "points": bare, "chosen": "a"}]}, tmp_path)
    assert "identical" in page.read_text()
    assert not (tmp_path / "contact-sheet.png").exists()


def test_schedules_of_branches_have_a_strip_each():
    point = {**points()[0], "mask": {"cond": [1, 0, 1], "uncond": [1, 0, 0]}}
    strips = charts.mask_strips([point], None)
    texts = [shape.text for shape in strips.shapes]
    assert "tuned 7 cond" in texts and "tuned 7 uncond" in texts
    assert "2 of 3" in texts and "1 of 3" in texts
    filled = [shape.colour for shape in strips.shapes if shape.kind == "bar"]
    assert filled == ["accent", "rule", "accent", "accent", "rule", "rule"]


def test_differences_share_one_amplification(written, tmp_path):
    rows = sheet.read(written[0]["sheet"], written[1].parent)
    factor = sheet.amplification(rows)
    differences = [cell.difference for row in rows for cell in row.cells if cell.difference is not None]
    middle = np.median([np.percentile(difference, 99) for difference in differences])
    assert factor * middle <= 255 < 2 * factor * middle
    chosen = rows[0].cells[1]
    assert chosen.column == "chosen"
    assert np.array_equal(sheet.amplified(chosen.difference, 2), np.minimum(chosen.difference.astype(int) * 2, 255))
    assert rows[1].cells[2].picture is None


def test_labels_never_overlap():
    taken = []
    spots = [(20.0 + 3 * index, 50.0) for index in range(30)]
    found = [place(f"label {index}", [spot], taken, (0, 0, 200, 100)) for index, spot in enumerate(spots)]
    assert sum(label is not None for label in found) == len(taken) > 3
    assert not any(overlaps(one, other) for i, one in enumerate(taken) for other in taken[:i])
    assert all(min(box) >= 0 and box[2] <= 200 and box[3] <= 100 for box in taken)


@pytest.mark.parametrize(("low", "high", "ticks"), [
    (0, 10, [0, 2, 4, 6, 8, 10]), (15.2, 48.1, [20, 30, 40]), (0.0, 0.101, [0, 0.02, 0.04, 0.06, 0.08, 0.1]),
])
def test_ticks_are_round_and_within_the_axis(low, high, ticks):
    assert Axis(low, high, 0, 100).ticks(6) == pytest.approx(ticks)


def test_steps_have_whole_ticks():
    assert Axis(1.8, 5.2, 0, 100).ticks(8, least=1) == [2, 3, 4, 5]
