"""The report in a real browser: opened from disk, no network, points where the data says, no sideways scrolling."""

from __future__ import annotations

import pytest

from sglang_cachedit_plugin.tune.report import write_report
from tests.unit.sample_results import points, results


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
def test_points_lie_where_the_data_says(page, statistic):
    chart = page.locator(f"svg[data-statistic={statistic}]")
    axes = [[float(part) for part in chart.get_attribute(name).split()] for name in ("data-x-axis", "data-y-axis")]
    drawn = chart.evaluate("""svg => Object.fromEntries([...svg.querySelectorAll('[data-name]')].map(mark => {
        const box = mark.getBBox()
        return [mark.dataset.name, [box.x + box.width / 2, box.y + box.height / 2]]
    }))""")
    read = {
        name: [low + (pixel - start) / (end - start) * (high - low)
               for pixel, (low, high, start, end) in zip(spot, axes, strict=True)]
        for name, spot in drawn.items()
    }
    expected = {p["name"]: [p["computed"], p["psnr"][statistic]] for p in points() if p["name"] != "all"}
    assert set(read) == set(expected)
    for name, values in expected.items():
        assert read[name] == pytest.approx(values, abs=0.02), name
    ticks = chart.evaluate("svg => [...svg.querySelectorAll('text')].map(text => [text.textContent, text.getBBox().x])")
    named = {text: left for text, left in ticks}
    assert named["10"] < named["14"] < named["18"]


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
