"""The report as people open it: in a Chromium without a screen, wide and on a phone, with no network to ask."""

import itertools
import re

import numpy as np
import pandas as pd
import pytest
from browser import CHROMIUM, NO_CHROMIUM, PHONE, QUIET

from chestxray import report
from chestxray.config import REFERENCE

pytest.importorskip("playwright", reason="playwright is not installed; it comes with the extra test")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM),
    pytest.mark.skipif(not (REFERENCE / "data.json").exists(), reason="the committed reference has no facts yet"),
]
WIDE = {"width": 1280, "height": 900}
PATIENCE = 120_000
"""Milliseconds that a busy machine may take for anything."""


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """The committed reference's report in a browser: the page, and all that it asked for."""
    from playwright.sync_api import sync_playwright

    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(report.build(REFERENCE), "utf-8")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        page = browser.new_page(viewport=WIDE)
        page.set_default_timeout(PATIENCE)
        asked = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        yield page, asked
        browser.close()


def test_nothing_is_fetched_but_the_page_itself(opened):
    page, asked = opened
    assert asked == [page.url]
    assert page.locator("img").count() > 10
    # The list would have shown it: a picture from elsewhere is asked for.
    page.evaluate("document.body.append(Object.assign(new Image(), {src: 'http://127.0.0.1:9/elsewhere.png'}))")
    page.wait_for_function("document.querySelector('body > img').complete")
    assert asked[1:] == ["http://127.0.0.1:9/elsewhere.png"]
    page.evaluate("document.querySelector('body > img').remove()")


def test_every_picture_is_drawn_and_has_words(opened):
    page, _ = opened
    pictures = page.locator("img").evaluate_all("all => all.map(one => [one.naturalWidth, one.alt])")
    assert all(width > 300 and len(words) >= 20 for width, words in pictures)
    assert len({words for _, words in pictures}) == len(pictures)


def test_words_are_told_apart_from_the_paper_and_headings_are_in_order(opened):
    page, _ = opened
    levels = page.locator("h1, h2, h3").evaluate_all("all => all.map(one => Number(one.tagName[1]))")
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    places = page.locator("nav a").evaluate_all("all => all.map(one => document.querySelector(one.hash) !== null)")
    assert len(places) >= 8 and all(places)
    colours = page.locator("p, th, td, a, h1, h2, h3, summary").evaluate_all(
        """all => all.map(one => {
            const paper = part => getComputedStyle(part).backgroundColor;
            let behind = one;
            while (behind.parentElement && paper(behind) === 'rgba(0, 0, 0, 0)') behind = behind.parentElement;
            return [getComputedStyle(one).color, paper(behind)];
        })"""
    )
    assert min(contrast(*pair) for pair in set(map(tuple, colours))) >= 4.5


def contrast(first, second):
    """Contrast ratio of two CSS colours (WCAG 2.2), 1 to 21."""

    def luminance(colour):
        parts = np.array([float(part) for part in re.findall(r"[\d.]+", colour)[:3]]) / 255
        return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]

    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_it_is_read_on_a_phone_without_moving_the_page_sideways(opened):
    page, _ = opened
    page.set_viewport_size(PHONE)
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= PHONE["width"]
    sizes = page.locator("p, td, th").evaluate_all("all => all.map(one => parseFloat(getComputedStyle(one).fontSize))")
    assert min(sizes) >= 12
    # What is wider than the phone scrolls in a box of its own, which keys can reach.
    wide = page.locator("table, img").evaluate_all(
        """all => all.filter(one => one.getBoundingClientRect().width > innerWidth)
            .map(one => one.closest('.scroll')).map(box => box && box.tabIndex === 0
                && getComputedStyle(box).overflowX === 'auto')"""
    )
    assert wide and all(wide)
    page.set_viewport_size(WIDE)


def test_its_figures_are_those_of_the_files(opened):
    page, _ = opened
    metrics = pd.read_csv(REFERENCE / "metrics.csv", index_col=["model", "metric"])
    entry = metrics.loc[("ensemble", "macro_auroc")]
    words = page.locator("main").inner_text()
    for value in entry[["estimate", "low", "high"]]:
        assert f"{value:.3f}".lstrip("0") in words
