"""The served page as people meet it, in a Chromium without a screen: with a mouse, a phone, or a keyboard alone."""

import re
import threading

import dicom_files
import numpy as np
import pytest
from browser import CHROMIUM, NO_CHROMIUM, PHONE, QUIET
from fake_reader import FakeReader
from PIL import Image
from test_web import stored

from chestxray.inference import plain_words, web

pytest.importorskip("playwright", reason="playwright is not installed; it comes with the extra test")
pytest.importorskip("gradio", reason="gradio is not installed; it comes with the extra web")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)

from playwright.sync_api import TimeoutError, expect, sync_playwright  # noqa: E402

PATIENCE = 120_000
"""Milliseconds that a busy machine may take for anything."""
UPLOAD = "#upload input[type=file]"

expect.set_options(timeout=PATIENCE)


@pytest.fixture(scope="module")
def reader():
    return FakeReader()


@pytest.fixture(scope="module")
def server(reader):
    with web.Server(reader) as serving:
        yield serving


@pytest.fixture(scope="module")
def visitor(server):
    """A browser with a profile of its own, which keeps the page's scripts from one test to the next."""
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser.new_context()
        browser.close()


@pytest.fixture
def page(visitor, server, reader):
    """The page, just opened. Whatever a test does, nothing is fetched from elsewhere and nothing breaks."""
    reader.flags, reader.error, reader.hold = [], None, None
    page = visitor.new_page()
    page.set_default_timeout(PATIENCE)
    asked, broken = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: broken.append(str(error)))
    page.goto(server.url)
    ready(page)
    yield page
    page.close()
    elsewhere = [url for url in asked if not url.startswith((server.url, "data:", f"blob:{server.url}"))]
    assert len(asked) > 5 and elsewhere == [] and broken == []


@pytest.fixture
def png(tmp_path):
    path = tmp_path / "chest.png"
    Image.fromarray(np.linspace(0, 255, 240 * 200).reshape(240, 200).astype(np.uint8)).save(path)
    return path


def ready(page):
    """Wait until the page's scripts listen: what is pressed before that goes unheard."""
    page.wait_for_selector(UPLOAD, state="attached")
    page.wait_for_selector("#notes[aria-live=polite]", state="attached")


def upload(page, path):
    page.set_input_files(UPLOAD, path)


def answered(page, caption):
    """Wait until the answer for a radiograph is there, told by what stands below it."""
    expect(page.locator("#picture figcaption")).to_contain_text(caption)
    expect(page.locator("#answer li")).to_have_count(6)


def opacity(page):
    return float(page.locator("img.heat").evaluate("layer => getComputedStyle(layer).opacity"))


def cut_off(page):
    """What reaches beyond the page's right side once it is drawn, but for what scrolls by itself."""
    page.wait_for_timeout(200)
    return page.evaluate(
        """() => [...document.querySelectorAll('.gradio-container *')].filter(part => {
            const place = part.getBoundingClientRect();
            const scrolls = part.closest('#card table, .tab-wrapper');
            return place.width > 0 && place.right > innerWidth + 1 && !scrolls;
        }).map(part => part.outerHTML.slice(0, 120))
        .concat(document.documentElement.scrollWidth > innerWidth ? ['the page scrolls sideways'] : [])"""
    )


def test_an_upload_is_answered(page, png):
    upload(page, png)
    answered(page, "The radiograph.")
    words = page.locator("#answer").inner_text()
    assert [plain.name for plain in plain_words.PLAIN.values() if plain.name not in words] == []
    assert len(re.findall("(?:Above|Below) the operating point", words)) == 6 and re.search(
        r"\d %", words.replace("\N{NO-BREAK SPACE}", " ")
    )
    sizes = page.locator("#picture img").evaluate_all("parts => parts.map(part => part.naturalWidth)")
    assert sizes == [200, 200]
    assert all(page.locator("img:visible").evaluate_all("parts => parts.map(part => part.alt.trim().length > 3)"))


def test_class_and_probabilities_follow_the_shares(page, png):
    upload(page, png)
    answered(page, "The radiograph.")
    expect(page.locator("#answer h2").first).to_contain_text("Class: Mass")
    page.get_by_label(plain_words.SHARES["nih"]).check()
    expect(page.locator("#answer h2").first).to_contain_text("Class: No finding")
    expect(page.locator("#answer tr").first).to_contain_text("No finding")
    assert cut_off(page) == []


def test_the_slider_changes_the_layer_and_the_choice_outlives_another_heat_map(page, png):
    upload(page, png)
    answered(page, "The radiograph.")
    assert opacity(page) == 0.6
    for text, share in (("0", 0), ("100", 1), ("35", 0.35)):
        page.locator("#opacity input[type=range]").fill(text)
        page.wait_for_function(f"getComputedStyle(document.querySelector('img.heat')).opacity == {share}")
    before = page.locator("img.heat").get_attribute("src")
    page.get_by_label("Fluid around the lung (Effusion)").check()
    expect(page.locator("img.heat")).to_have_attribute("alt", re.compile("^Heat-map of Fluid around the lung"))
    assert page.locator("img.heat").get_attribute("src") != before and opacity(page) == 0.35


def test_a_phantom_is_said_to_be_drawn_and_the_warning_stays_in_view(page):
    page.get_by_role("button", name="Phantom: effusion").click()
    answered(page, "Drawn radiograph (phantom)")
    expect(page.locator("#notes")).to_contain_text("a drawing made by a program")
    for place in ("0", "document.documentElement.scrollHeight"):
        page.evaluate(f"window.scrollTo(0, {place})")
        warning = page.get_by_text("not a medical device").locator("visible=true").first
        box = warning.bounding_box()
        assert box["y"] >= 0 and box["y"] + box["height"] <= page.viewport_size["height"]
        held = "([x, y]) => document.elementFromPoint(x, y).closest('#warning') !== null"
        assert page.evaluate(held, [box["x"] + box["width"] / 2, box["y"] + box["height"] / 2])


def test_a_bad_file_is_one_line_and_takes_the_last_answer_away(page, png):
    page.get_by_role("button", name="Phantom: mass").click()
    answered(page, "Drawn radiograph (phantom)")
    png.write_bytes(b"<b>no image</b>")
    upload(page, png)
    alert = page.get_by_role("alert").filter(has_text="No answer.")
    expect(alert).to_contain_text("chest.png: begins with")
    assert "\n" not in alert.inner_text().strip() and "Traceback" not in page.content()
    expect(page.locator("#picture img")).to_have_count(0)
    expect(page.locator("#answer li")).to_have_count(0)


def test_a_file_that_is_too_large_is_one_line(page, server, png, monkeypatch):
    monkeypatch.setitem(server._blocks.config, "max_file_size", 1000)
    page.reload()
    ready(page)
    png.write_bytes(bytes(2000))
    before = stored(server)
    upload(page, png)
    said = page.get_by_text(re.compile("maximum allowed size"))
    expect(said).to_be_visible()
    assert "\n" not in said.inner_text() and stored(server) == before


def test_dicom_is_answered_and_says_nothing_of_the_patient(page, tmp_path, reader):
    reader.flags = ["No frontal view."]
    stored = np.linspace(0, 4095, 300 * 260).reshape(300, 260).astype(np.int32)
    upload(page, dicom_files.write(tmp_path / "IM0001", stored, 12, "jpeg-lossless"))
    answered(page, "The radiograph.")
    alert = page.get_by_role("alert").filter(has_text="Doubtful")
    expect(alert).to_contain_text("No frontal view.")
    expect(page.locator("#answer li").first).to_be_hidden()
    page.get_by_text("Show the answer nevertheless").click()
    expect(page.locator("#answer li").first).to_be_visible()
    text = page.content()
    assert [told for told in (dicom_files.NAME, dicom_files.NUMBER, dicom_files.DATE) if told in text] == []


def test_an_answer_that_comes_late_does_not_replace_a_later_one(page, reader, png):
    reader.hold, reader.mapped = threading.Event(), []
    try:
        page.get_by_role("button", name="Phantom: mass").click()
        upload(page, png)
        answered(page, "The radiograph.")
        assert reader.mapped == [(240, 200)]
    finally:
        reader.hold.set()
    while (512, 512) not in reader.mapped:  # the phantom's answer comes now
        page.wait_for_timeout(50)
    page.wait_for_timeout(500)
    page.get_by_label("Fluid around the lung (Effusion)").check()
    expect(page.locator("img.heat")).to_have_attribute("alt", re.compile("^Heat-map of Fluid around the lung"))
    assert reader.mapped[-1] == (240, 200)
    assert "phantom" not in page.locator("#picture").inner_text() + page.locator("#notes").inner_text()


def test_on_a_narrow_screen_nothing_is_cut_off(page, png, reader):
    page.set_viewport_size(PHONE)
    assert cut_off(page) == []
    reader.flags = ["It differs from what the models were fitted on: " + "x" * 90]
    upload(page, png)
    answered(page, "The radiograph.")
    page.get_by_text("Show the answer nevertheless").click()
    assert cut_off(page) == []
    page.get_by_role("tab", name="The model").click()
    expect(page.locator("#card")).to_be_visible()
    assert cut_off(page) == []


def test_a_keyboard_is_enough(page, png):
    reached = []

    def tab_to(wanted):
        """Press Tab until the focus is there; every stop on the way must be seen to have it."""
        for _ in range(40):
            page.keyboard.press("Tab")
            name, seen = page.evaluate(
                """() => {
                    const part = document.activeElement, label = part.closest('label');
                    const drawn = [part, label].filter(Boolean).map(it => getComputedStyle(it));
                    if (part === document.body) return ['BODY', false];  // between the last part and the first
                    const name = part.getAttribute('aria-label') || (label ?? part).innerText || part.tagName;
                    const outlined = it => it.outlineStyle !== 'none' && parseFloat(it.outlineWidth) >= 2;
                    return [name.trim(), drawn.some(outlined)];
                }"""
            )
            reached.append(name)
            assert seen or name == "BODY", f"no focus to be seen on {name!r}"
            if re.search(wanted, name):
                return
        raise AssertionError(f"Tab doesn't reach {wanted!r}; it reached {reached}")

    def file_chooser():
        """Press Enter on the upload; once more where a busy machine drew that part anew just then."""
        for _ in range(6):
            tab_to("upload")
            try:
                with page.expect_file_chooser(timeout=PATIENCE / 6) as chooser:
                    page.keyboard.press("Enter")
            except TimeoutError:
                continue
            return chooser.value
        raise AssertionError("Enter on the upload opens no file chooser")

    file_chooser().set_files(png)
    answered(page, "The radiograph.")
    tab_to("Phantom: mass")
    page.keyboard.press("Enter")
    answered(page, "Drawn radiograph (phantom)")
    tab_to("range slider")
    page.keyboard.press("ArrowRight")
    page.wait_for_function("getComputedStyle(document.querySelector('img.heat')).opacity == 0.65")
    tab_to("Fluid around")
    page.keyboard.press("Space")
    expect(page.locator("img.heat")).to_have_attribute("alt", re.compile("^Heat-map of Fluid around the lung"))
