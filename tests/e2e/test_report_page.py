"""The report in a real browser: opened from disk, no network, points where the data says, no sideways scrolling."""

from __future__ import annotations

import pytest

from sglang_cachedit_plugin.tune import charts
from sglang_cachedit_plugin.tune.report import write_report
from tests.unit.tune.sample_results import points, results


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    return write_report(results(folder), folder)


@pytest.fixture(params=[(1200, 900, "light"), (375, 800, "dark")], ids=["desktop", "phone"])
def page(browser, report, request):
    width, height, scheme = request.param
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    page.asked, page.said = [], []
    page.on("request", lambda asked: page.asked.append(asked.url))
    page.on("console", lambda message: page.said.append(message.text))
    page.on("dialog", lambda dialog: page.said.append(dialog.message))
    page.goto(report.as_uri())
    yield page
    page.close()


def test_it_opens_from_disk_alone(page, report):
    assert [url for url in page.asked if not url.startswith("data:")] == [report.as_uri()]
    assert page.said == []
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")


def test_nothing_scrolls_sideways(page):
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]


@pytest.mark.parametrize("statistic", ["mean", "min"])
def test_points_lie_where_the_ticks_say(page, statistic):
    title = {"mean": "PSNR in dB, mean of 48 held-out prompts", "min": "PSNR in dB, worst of 48 held-out prompts"}
    chart = page.get_by_role("img", name=title[statistic])
    ticks, drawn = chart.evaluate("""(svg, statistic) => {
        const middle = box => [box.x + box.width / 2, box.y + box.height / 2]
        const ticks = axis => [...svg.querySelectorAll(`g[id^=${axis}tick]`)]
            .map(tick => [Number(tick.querySelector('text').textContent), middle(tick.querySelector('path').getBBox())])
        const marks = [...svg.querySelectorAll(`g[id^="${statistic}:"]`)]
        return [[ticks('x'), ticks('y')], Object.fromEntries(
            marks.map(mark => [mark.id.split(':')[1], middle(mark.querySelector('use').getBBox())]))]
    }""", statistic)
    scales = []
    for axis, found in enumerate(ticks):
        (low, start), (high, end) = (found[0][0], found[0][1][axis]), (found[-1][0], found[-1][1][axis])
        scales.append((low, start, (high - low) / (end - start)))
    read = {
        name: [low + (pixel - start) * scale for pixel, (low, start, scale) in zip(spot, scales, strict=True)]
        for name, spot in drawn.items()
    }
    fronts = charts.shown(points(), statistic, "tuned-14").values()
    expected = {p["name"]: [p["computed"], p["psnr"][statistic]] for front in fronts for p in front}
    assert set(read) == set(expected)
    for name, values in expected.items():
        assert read[name] == pytest.approx(values, abs=0.02), name


def test_no_label_of_a_chart_covers_another(page):
    overlaps = page.evaluate("""() => [...document.querySelectorAll('svg')].flatMap(svg => {
        const boxes = [...svg.querySelectorAll('text')].filter(text => text.textContent).map(text => text.getBBox())
        return boxes.flatMap((a, i) => boxes.slice(0, i).filter(b => a.x < b.x + b.width && b.x < a.x + a.width
            && a.y + 2 < b.y + b.height - 2 && b.y + 2 < a.y + a.height - 2))
    }).length""")
    assert overlaps == 0


def test_the_table_has_every_point_and_marks_the_chosen(page):
    assert page.locator("tbody tr").count() == len(points())
    assert page.locator("tr.chosen").inner_text().split("\t")[:2] == ["tuned 14 (chosen)", "14"]


def test_text_is_large_enough_to_read(page):
    smallest = page.evaluate("""() => Math.min(...[...document.querySelectorAll('svg text')]
        .filter(text => text.getClientRects().length && text.textContent)
        .map(text => parseFloat(getComputedStyle(text).fontSize) * text.ownerSVGElement.getScreenCTM().a))""")
    assert smallest >= 8.5


def test_text_stands_out_from_the_page(page):
    """WCAG AA: 4.5 to 1, in both themes."""
    ratios = page.evaluate("""() => {
        const parse = colour => colour.match(/[\\d.]+/g).slice(0, 3).map(Number)
        const luminance = colour => parse(colour).map(part => part / 255)
            .map(part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
            .reduce((sum, part, index) => sum + part * [0.2126, 0.7152, 0.0722][index], 0)
        const paper = luminance(getComputedStyle(document.body).backgroundColor)
        return [...document.querySelectorAll('p, td, th, h2, svg text')].map(element => {
            const style = getComputedStyle(element)
            const text = luminance(element.tagName === 'text' ? style.fill : style.color)
            return (Math.max(text, paper) + 0.05) / (Math.min(text, paper) + 0.05)
        })
    }""")
    assert min(ratios) >= 4.5
