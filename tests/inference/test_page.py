"""What the page shows: answers, heat-maps and phantoms, and the last request of each visitor."""

import base64
import dataclasses
import html
import io
import re

import numpy as np
import pytest
from fake_reader import FakeReader
from PIL import Image

from chestxray.config import CLASSES, SIX_FINDINGS
from chestxray.evaluation import posterior
from chestxray.inference import plain_words
from chestxray.inference.page import EXAMPLES, Page, Shown, View, Visit, percent

PATIENT = "Doe^Jane"


@pytest.fixture
def png(tmp_path):
    """A file to upload."""
    path = tmp_path / "chest.png"
    Image.fromarray(np.linspace(0, 255, 96 * 64).reshape(96, 64).astype(np.uint8)).save(path)
    return path


@pytest.fixture
def page():
    return Page(FakeReader())


def pictures(text):
    """The pictures that HTML holds: the radiograph and the layer over it."""
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in re.findall(r'base64,([^"]+)"', text)]


class TestPage:
    def test_an_upload_is_answered(self, page, png):
        view = page.examine(str(png))
        assert view.answer.count("<li") == 6 and "Fluid around the lung" in view.answer
        assert view.finding in SIX_FINDINGS and view.shown.pixels.shape == (96, 64)
        film, layer = pictures(view.picture)
        assert film.size == (64, 96) and layer.mode == "RGBA"
        assert abs(layer.width / layer.height - film.width / film.height) < 0.02
        assert "alert" not in view.notes and "<details" not in view.answer

    def test_probabilities_and_operating_points_are_the_readers(self, page, png):
        answer = page.reader.examine(png)
        text = html.unescape(page.answer(answer))
        assert [percent(answer.present[name]) in text for name in answer.present] == [True] * 6
        assert text.count("Above the operating point") == sum(answer.above.values()) > 0
        assert text.count("Below the operating point") == 6 - sum(answer.above.values()) > 0
        assert "found 81\N{NO-BREAK SPACE}%, wrongly marked\n43\N{NO-BREAK SPACE}%" in text

    @pytest.mark.parametrize("prevalence", posterior.SHARES)
    def test_the_class_named_is_the_first_of_the_probabilities_shown(self, page, png, prevalence):
        equal = page.examine(str(png)).shown.answer
        answer = dataclasses.replace(equal, prevalence=posterior.read_shares(prevalence))
        text = html.unescape(page.answer(answer))
        weights = answer.equal * posterior.read_shares(prevalence).values
        due = dict(sorted(zip(CLASSES, weights / weights.sum(), strict=True), key=lambda entry: -entry[1]))
        rows = re.findall(r'<th scope="row">(.*?)</th><td>(.*?)</td>', text)
        assert [share for _, share in rows] == [percent(share) for share in due.values()]
        assert [re.sub(r".*<small>|</small>", "", name).replace(" ", "_") for name, _ in rows] == list(due)
        first = next(iter(due))
        assert f"<h2>Class: {first.replace('_', ' ')}, {percent(due[first])}</h2>" in text
        assert plain_words.SHARES[prevalence] in text and first == ("Mass" if prevalence == "equal" else "No_finding")
        assert text.partition("by itself")[2] == html.unescape(page.answer(equal)).partition("by itself")[2]
        assert len(page.reader.asked) == 1  # the model ran once

    def test_flags_are_an_alert_and_fold_the_answer_away(self, page, png):
        page.reader.flags = ["this is <b>no</b> frontal radiograph."]
        notes, answer, *_ = page.examine(str(png))
        assert answer.startswith("<details>") and answer.count("<li") == 6
        assert 'role="alert"' in notes and "This is &lt;b&gt;no&lt;/b&gt; frontal radiograph." in notes

    @pytest.mark.parametrize("name", EXAMPLES)
    def test_a_phantom_is_said_to_be_drawn(self, page, name):
        view = page.example(name)
        assert "a drawing made by a program" in view.notes and "Drawn radiograph (phantom)" in view.picture
        assert page.reader.asked[0].shape == (512, 512)
        assert page.example(name).answer == view.answer

    def test_what_cannot_be_read_is_one_line_with_the_files_own_name(self, page, png):
        png.write_bytes(b"<script>alert(1)</script>")
        view = page.examine(str(png))
        assert "chest.png: begins with" in view.notes and str(png.parent) not in view.notes
        assert view.notes.count("\n") == 0 and "<script>" not in view.notes
        assert view.shown is None and not view.answer

    def test_a_fault_of_ours_tells_nothing_of_the_patient(self, page, png, capsys):
        page.reader.error = RuntimeError(f"cannot read {PATIENT}")
        view = page.examine(str(png))
        assert "chest.png: no answer (RuntimeError)" in view.notes
        assert PATIENT not in view.notes + "".join(capsys.readouterr())

    def test_a_file_that_waited_too_long_is_asked_for_again(self, page, png):
        png.unlink()
        assert "chest.png: deleted before its turn came; choose it again" in page.examine(str(png)).notes

    def test_nothing_chosen_is_no_answer(self, page):
        assert page.examine(None) == View("")
        assert page.picture(Shown(np.zeros((8, 8), np.uint8), True), None) == ""

    def test_a_heat_map_of_what_was_forgotten_says_so(self, page):
        assert "choose it again" in page.picture(None, "Mass")

    def test_each_finding_has_its_own_heat_map(self, page, png):
        shown = page.examine(str(png)).shown
        layers = [np.asarray(pictures(page.picture(shown, name))[1]) for name in SIX_FINDINGS]
        hottest = [np.unravel_index(layer[..., 3].argmax(), layer.shape[:2])[0] for layer in layers]
        assert hottest == sorted(hottest) and len(set(hottest)) == 6

    def test_a_line_stands_above_heat_maps_that_do_not_localise(self, page, png):
        shown = page.examine(str(png)).shown
        picture = page.picture(shown, "Mass")
        assert 0 < picture.index("were not compared with lesion boxes") < picture.index("<img")
        page.reader.interpretation = dataclasses.replace(page.reader.interpretation, localisation="")
        assert page.picture(shown, "Mass").startswith("<figure")


@pytest.mark.parametrize(("share", "text"), [(0, "<1"), (0.004, "<1"), (0.126, "13"), (0.99, "99"), (0.997, ">99")])
def test_percent(share, text):
    assert percent(share) == f"{text}\N{NO-BREAK SPACE}%"


class TestVisit:
    """Wishes that overlap: each may end while another is being worked on."""

    @pytest.fixture
    def visit(self):
        return Visit()

    def view(self, grey):
        return View(f"{grey}", shown=Shown(np.full((4, 4), grey, np.uint8), False))

    def test_an_answer_that_comes_late_replaces_none_of_a_later_wish(self, visit):
        def slow():
            assert visit.radiograph(lambda: self.view(2)).notes == "2"
            return self.view(1)

        assert visit.radiograph(slow) is None
        assert visit.shown.pixels[0, 0] == 2

    def test_a_heat_map_is_not_shown_beside_the_answer_for_another_radiograph(self, visit):
        visit.radiograph(lambda: self.view(1))

        def slow(shown):
            visit.radiograph(lambda: self.view(2))
            return f"{shown.pixels[0, 0]}"

        assert visit.heat_map(slow) is None
        assert visit.heat_map(lambda shown: f"{shown.pixels[0, 0]}") == "2"

    def test_the_last_heat_map_counts(self, visit):
        visit.radiograph(lambda: self.view(1))
        assert visit.heat_map(lambda shown: visit.heat_map(lambda shown: "later") and "earlier") is None

    def test_what_cannot_be_read_leaves_nothing_to_map(self, visit):
        visit.radiograph(lambda: self.view(1))
        visit.radiograph(lambda: View("No answer"))
        assert visit.heat_map(lambda shown: str(shown)) == "None"
