"""The report's files, texts and figures; the page in a browser is tests/e2e/test_report_page.py."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
from PIL import Image

from sglang_cachedit_plugin.evaluation import plots
from sglang_cachedit_plugin.tune import charts, report, sheet
from tests.unit.tune.sample_results import HOSTILE, points, results


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


def test_headline_has_the_chosen_point_in_figures():
    facts = dict((caption, value) for value, caption in report.headline(results_grid()))
    assert facts == {
        "steps computed": "14 of 28", "faster denoising": "2.00×", "PSNR, mean": "43.2 dB", "PSNR, worst": "39.3 dB",
    }


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
    drawn = plots.svg(charts.strips_panel([point], None))
    for text in ("tuned 7 cond", "tuned 7 uncond", "2 of 3", "1 of 3"):
        assert f">{text}</text>" in drawn
    assert (drawn.count("var(--accent)"), drawn.count("var(--rule)")) == (3, 3)


def test_the_chart_has_the_front_of_each_kind_and_the_chosen_point():
    found = charts.shown([*points(), {**points()[0], "name": "mine", "computed": 27}], "mean", "mine")
    assert [point["name"] for point in found["baseline"]] == ["SCM fast", "TaylorSeer 1", "SCM medium", "SCM slow"]
    assert [point["name"] for point in found["tuned"]][-1] == "mine"
    # What equals the reference is in the table only.
    assert "all" not in [point["name"] for point in found["fewer_steps"]]


def test_differences_share_one_amplification(written, tmp_path):
    rows = sheet.read(written[0]["sheet"], written[1].parent)
    factor = sheet.amplification(rows)
    differences = [cell.difference for row in rows for cell in row.cells if cell.difference is not None]
    middle = np.median([np.percentile(difference, 99) for difference in differences])
    assert factor * middle <= 255 < 2 * factor * middle
    chosen = rows[0].cells[1]
    assert chosen.column == "chosen"
    assert re.fullmatch(r"\d\d\.\d dB, 0\.61 s", chosen.figures) and rows[0].cells[0].figures == "1.20 s"
    assert f"tuned, {chosen.figures}" in written[1].read_text()
    assert np.array_equal(sheet.amplified(chosen.difference, 2), np.minimum(chosen.difference.astype(int) * 2, 255))
    assert rows[1].cells[2].picture is None


def test_labels_cover_no_point_no_line_and_no_other_label():
    from matplotlib.figure import Figure

    axes = Figure(figsize=(5, 3), dpi=72).add_axes((0.1, 0.1, 0.8, 0.8))
    axes.set(xlim=(-1, 12), ylim=(-10, 130))
    spots = [(index, index**2) for index in range(12)]
    axes.plot(*zip(*spots, strict=True), "o-")
    labels = plots.Labels(axes)
    marks = list(labels.taken)
    written = [labels.add(f"label {index}", [spot], "ink") for index, spot in enumerate(spots)]
    boxes = labels.taken[len(marks):]
    assert 3 < sum(written) == len(boxes) == len(axes.texts) < len(spots)
    (line,) = (line.get_transform().transform_path(line.get_path()) for line in axes.lines)
    axes.figure.draw_without_rendering()
    for index, (box, text) in enumerate(zip(boxes, axes.texts, strict=True)):
        drawn = text.get_window_extent()
        assert box.x0 <= drawn.x0 and drawn.x1 <= box.x1 and box.y0 <= drawn.y0 and drawn.y1 <= box.y1
        assert not box.count_overlaps([*marks, *boxes[:index]])
        assert not line.intersects_bbox(box, filled=False)


def test_drawings_follow_the_page_and_bring_no_colour_of_their_own():
    for panel in charts.quality_panels(points(), "tuned-14", 12):
        drawn = plots.svg(panel)
        assert not re.search(r"#[0-9a-f]{6}\b", re.sub(r'"#[^"]*"', "", drawn))
        assert "var(--accent)" in drawn and "http" not in drawn
