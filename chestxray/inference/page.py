"""Page contents: answers, heat-maps and phantoms as HTML, and what each visitor sees."""

from __future__ import annotations

import base64
import functools
import html
import io
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jinja2
import numpy as np
from PIL import Image

from chestxray.config import SIX_FINDINGS, StudyError
from chestxray.inference import overlay, plain_words

if TYPE_CHECKING:
    from chestxray.inference.answers import Answer
    from chestxray.inference.reader import Reader

TEMPLATES = Path(__file__).parent / "templates"

EXAMPLES: dict[str, tuple[int, tuple[str, ...]]] = {
    "No finding": (1, ()),
    "Effusion": (2, ("Effusion",)),
    "Mass": (3, ("Mass",)),
    "Pneumothorax": (4, ("Pneumothorax",)),
}
"""The phantoms to choose from, each with its number and findings."""


class Shown(NamedTuple):
    """The radiograph that a visitor sees, (H, W) uint8, in memory for more heat-maps; `drawn`: whether a phantom.

    Its `answer` can be re-weighted without the model.
    """

    pixels: np.ndarray
    drawn: bool
    answer: Answer | None = None


class View(NamedTuple):
    """Contents of the page's parts; the first three are HTML, and `notes` hold doubts or why there is no answer."""

    notes: str
    answer: str = ""
    picture: str = ""
    finding: str | None = None
    shown: Shown | None = None


@dataclass
class Visit:
    """One visitor: the radiograph that they see, if any, the class shares they chose, and their last requests.

    Several requests may be worked on at a time, and end in any order; only the last one's answer is shown.
    """

    shown: Shown | None = None
    prevalence: str = "equal"
    _last_radiograph: object = None
    _last_heat_map: object = None

    def radiograph(self, ask: Callable[[], View]) -> View | None:
        """Ask for another radiograph's answer; None if yet another was asked for before it came."""
        mine = self._last_radiograph = object()
        view = ask()
        if self._last_radiograph is not mine:
            return None
        self.shown = view.shown
        return view

    def heat_map(self, ask: Callable[[Shown | None], str]) -> str | None:
        """Ask for a heat-map; None if another one, or another radiograph, was asked for before it came."""
        mine = self._last_heat_map = object()
        shown = self.shown
        text = ask(shown)
        return text if self._last_heat_map is mine and self.shown is shown else None


class Page:
    """The page's contents as HTML, of what a reader predicts."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        options = dict.fromkeys(("autoescape", "trim_blocks", "lstrip_blocks"), True)
        loader = jinja2.FileSystemLoader(TEMPLATES)
        self._templates = jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined, **options)
        self._templates.filters["percent"] = percent

    def examine(self, path: str | None) -> View:
        """Answer for an uploaded file, None where the visitor took it back; where there is none, `notes` say why."""
        if path is None:
            return View("")
        if not Path(path).exists():
            return View(error_html(f"{Path(path).name}: deleted before its turn came; choose it again"))
        return self._ask(Path(path), Path(path).name, drawn=False)

    def example(self, name: str) -> View:
        """Answer for a phantom, a key of `EXAMPLES`, as `examine` does."""
        return self._ask(example_pixels(name), name, drawn=True)

    def picture(self, shown: Shown | None, finding: str) -> str:
        """A radiograph under a heat-map, as HTML that holds both pictures; the page sets the heat-map's opacity.

        Args:
            shown: the radiograph; None where it is not in memory any more.
            finding: one of the six findings; for anything else, nothing is shown.
        """
        if finding not in SIX_FINDINGS:
            return ""
        if shown is None:
            return error_html("The radiograph is not kept here any more: choose it again.")
        try:
            heat = self.reader.heat_map(shown.pixels, finding)
        except StudyError as error:
            return error_html(str(error))
        layer = Image.fromarray(overlay.heat_layer(heat))
        layer.thumbnail((256, 256))
        return self._html(
            "picture",
            radiograph=_data_url(Image.fromarray(shown.pixels), "JPEG", quality=88),
            layer=_data_url(layer, "PNG"),
            what="Drawn radiograph (phantom)" if shown.drawn else "The radiograph",
            plain=plain_words.PLAIN[finding].name,
            finding=finding,
            note=self.reader.interpretation.localisation,
        )

    def answer(self, answer: Answer) -> str:
        """The class named, and every class and finding with its probability, as HTML; folded away where flagged."""
        classes = sorted(answer.classes.items(), key=lambda entry: -entry[1])  # the one named is the first
        common = plain_words.SHARES.get(answer.prevalence.name, f"as common as {answer.prevalence} says")
        return self._html("answer", answer=answer, classes=classes, words=plain_words.PLAIN, common=common)

    def _ask(self, source: Path | np.ndarray, name: str, drawn: bool) -> View:
        try:
            answer = self.reader.examine(source)
            notes = self._html("notes", flags=answer.flags, drawn=plain_words.DRAWN if drawn else "")
            shown = Shown(answer.pixels, drawn, answer)
            finding = answer.order[0]
            return View(notes, self.answer(answer), self.picture(shown, finding), finding, shown)
        except StudyError as error:
            line = str(error).replace(str(source), name) if isinstance(source, Path) else str(error)
        except Exception as error:  # a fault of ours; its text may hold what a file's header says, so it isn't shown
            print(f"chestxray serve: no answer, {type(error).__name__}", file=sys.stderr)
            line = f"{name}: no answer ({type(error).__name__}); try it as PNG"
        return View(error_html(line))

    def _html(self, template: str, **values: Any) -> str:
        return self._templates.get_template(f"{template}.html.j2").render(values)


def percent(share: float) -> str:
    """A share from 0 to 1 as text that doesn't break: `<1 %`, `12 %`, `>99 %`."""
    if share < 0.01:
        return "<1\N{NO-BREAK SPACE}%"
    return ">99\N{NO-BREAK SPACE}%" if share > 0.99 else f"{100 * share:.0f}\N{NO-BREAK SPACE}%"


def error_html(line: str) -> str:
    """A line that says why there is no answer, as HTML."""
    return f'<div class="note alert" role="alert"><p><strong>No answer.</strong> {html.escape(line)}</p></div>'


@functools.cache
def example_pixels(name: str) -> np.ndarray:
    """The phantom of one key of `EXAMPLES`, (512, 512) uint8, the same in every run."""
    from chestxray.data import phantom

    index, findings = EXAMPLES[name]
    return phantom.render(phantom.compose(index, seed=0, findings=findings, view="PA"), 512)


def _data_url(image: Image.Image, kind: str, **options: Any) -> str:
    """A picture as an address that holds it, so that no file of it is written."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
