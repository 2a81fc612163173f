"""The web page: upload a radiograph or take a drawn one, and see what the reference ensemble says of it.

It owns the page, the server and the life of an upload. What a radiograph shows is asked of a reader (`chestxray.load`);
what the answer means in everyday words stands in `wording`. It must not decode an image, know a model, or keep anything
that was uploaded.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import html
import inspect
import io
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from PIL import Image

from chestxray.config import REPOSITORY, SIX_FINDINGS, StudyError
from chestxray.inference import overlay, plain_words

MODEL_CARD = REPOSITORY / "5_results" / "MODEL_CARD.md"
TEMPLATES = Path(__file__).parent / "templates"

LARGEST_UPLOAD = 50_000_000
"""Bytes of one upload."""
MOST_UPLOADS = 1_000_000_000
"""Bytes of uploads on disk at a time; more are refused until some were answered."""
LONGEST_STAY = 300.0
"""Seconds after which an upload that nobody asked about is deleted; one that was answered goes at once."""
WAITING = 200
"""Requests that may wait; more are turned away."""
SESSIONS = 64
"""Visitors whose last radiograph is kept in memory for more heat-maps; the longest unused one is forgotten first."""
LARGEST_SIDE = 1024
"""Pixels of the longer side of what is shown and kept in memory."""

EXAMPLES: dict[str, tuple[int, tuple[str, ...]]] = {
    "No finding": (1, ()),
    "Effusion": (2, ("Effusion",)),
    "Mass": (3, ("Mass",)),
    "Pneumothorax": (4, ("Pneumothorax",)),
}
"""The phantoms to choose from: what each shows, with its number and findings in the phantom's own words."""

POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'"
)
"""What browsers may load for the page: only what this server sends."""

TITLE = "Chest radiographs: what a model sees"
INTRODUCTION = (
    "<p>Frontal chest radiographs only. A file is read on the computer that runs this page and deleted when the answer "
    "is there; nothing that a DICOM header says of a patient is shown or kept. No file at hand? Take a drawing, a "
    "<em>phantom</em>:</p>"
)
START = (
    '<div class="note start"><p>Choose a file or a phantom. Here you will then see how probable six findings are, how '
    "far the networks agree, and a heat-map of what they looked at.</p></div>"
)

_CHOSEN_OPACITY = 60
_PAINT = "(value) => { document.documentElement.style.setProperty('--heat', value / 100); }"
_ANNOUNCE = """() => {
    document.documentElement.lang = 'en';
    document.getElementById('notes')?.setAttribute('aria-live', 'polite');
}"""


@dataclass(frozen=True)
class Shown:
    """What a visitor is looking at, kept while more heat-maps may be asked for.

    Attributes:
        pixels: (H, W) uint8, the radiograph, its longer side at most `LARGEST_SIDE`.
        drawn: whether it is a phantom.
    """

    pixels: np.ndarray
    drawn: bool


@dataclass
class Visit:
    """One visitor: what they look at, and what they asked for last.

    Several of their wishes may be worked on at a time, and end in any order; the last one counts.

    Attributes:
        shown: what they look at; None before the first answer.
    """

    shown: Shown | None = None
    _last_radiograph: object = None
    _last_heat_map: object = None

    def radiograph(self, ask: Callable[[], View]) -> View | None:
        """Ask about another radiograph; None if they asked for yet another before the answer came."""
        mine = self._last_radiograph = object()
        view = ask()
        if self._last_radiograph is not mine:
            return None
        self.shown = view.shown
        return view

    def heat_map(self, ask: Callable[[Shown | None], str]) -> str | None:
        """Ask for a heat-map of what they look at; None if they looked at, or asked for, another one before it came."""
        mine = self._last_heat_map = object()
        shown = self.shown
        text = ask(shown)
        return text if self._last_heat_map is mine and self.shown is shown else None


class View(NamedTuple):
    """What the page's parts show.

    Attributes:
        notes: what is doubtful about the answer, or why there is none, as HTML.
        answer: every class with its probability, as HTML.
        picture: the radiograph under a heat-map, as HTML.
        finding: what the heat-map is of; None where there is none.
        shown: what to keep for more heat-maps; None where there is no answer.
    """

    notes: str
    answer: str = ""
    picture: str = ""
    finding: str | None = None
    shown: Shown | None = None


@dataclass
class Uploads:
    """The uploads on disk: who still waits for which, and when each is deleted.

    Two visitors who upload the same file share it, so it goes only when both were answered; and never while another
    upload is arriving, which may be of the same file.

    Attributes:
        folder: where the server puts them; nothing else is in it.
    """

    folder: Path
    _arriving: int = 0
    _waiting: Counter[str] = field(default_factory=Counter)
    _answered: set[str] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def bytes(self) -> int:
        """Bytes on disk."""
        return sum(status.st_size for _, status in self._files())

    def arrives(self) -> None:
        """An upload begins."""
        with self._lock:
            self._arriving += 1

    def arrived(self, paths: list[str]) -> None:
        """An upload ended, and left these files (none if it failed)."""
        with self._lock:
            self._arriving -= 1
            self._waiting.update(paths)
            self._clear()

    def answered(self, path: str) -> None:
        """Someone who uploaded this file was answered."""
        with self._lock:
            self._waiting[path] -= 1
            self._answered.add(path)
            self._clear()

    def sweep(self, age: float = LONGEST_STAY) -> None:
        """Delete what is older than `age` seconds, whoever waits for it."""
        with self._lock:
            self._clear()
            for path, status in list(self._files()):
                if time.time() - status.st_mtime > age:
                    self._delete(path)
                    self._waiting.pop(str(path), None)
                    self._answered.discard(str(path))

    def _clear(self) -> None:
        if self._arriving:
            return
        for path, status in list(self._files()):
            if path.parent == self.folder and not status.st_size:  # gradio leaves one for each upload that it hands on
                self._delete(path)
        for path in [path for path in self._answered if self._waiting[path] <= 0]:
            self._delete(Path(path))
            self._answered.discard(path)
            del self._waiting[path]

    def _delete(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # the folder that the server made for this file; not empty if shared
            if path.parent != self.folder:
                path.parent.rmdir()

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        for place, _, names in os.walk(self.folder):
            for name in names:
                with contextlib.suppress(FileNotFoundError):  # renamed by the server meanwhile
                    yield Path(place, name), Path(place, name).stat()


class Guard:
    """An ASGI layer around the server: counts uploads in and out, and tells browsers to load nothing from elsewhere."""

    def __init__(self, app: Callable, uploads: Uploads) -> None:
        self.app = app
        self.uploads = uploads

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if scope["method"] == "POST" and scope["path"].rstrip("/").endswith("/upload"):
            return await self._upload(scope, receive, send)
        return await self.app(scope, receive, _with_policy(send))

    async def _upload(self, scope: dict, receive: Callable, send: Callable) -> None:
        if self.uploads.bytes() > MOST_UPLOADS:
            await send({"type": "http.response.start", "status": 503, "headers": [(b"content-type", b"text/plain")]})
            return await send({"type": "http.response.body", "body": b"too many uploads wait; try again in a minute"})
        answer, counted = bytearray(), False

        async def note(message: dict) -> None:
            nonlocal counted
            if message["type"] == "http.response.body":
                answer.extend(message.get("body", b""))
                if not message.get("more_body"):
                    # Before the visitor hears of it, so that no question about a file comes ahead of its count.
                    counted = True
                    self.uploads.arrived(_paths(answer))
            await _with_policy(send)(message)

        self.uploads.arrives()
        try:
            await self.app(scope, receive, note)
        finally:
            if not counted:
                self.uploads.arrived([])


class Page:
    """What the page's controls do; each returns what its parts show next.

    Attributes:
        reader: answers for radiographs, as `chestxray.load` gives it.
        uploads: told of every upload that was answered.
    """

    def __init__(self, reader: Any, uploads: Uploads) -> None:
        self.reader = reader
        self.uploads = uploads
        templates = jinja2.Environment(
            loader=jinja2.FileSystemLoader(TEMPLATES),
            undefined=jinja2.StrictUndefined,
            autoescape=True,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._notes = templates.get_template("notes.html.j2")
        self._answer = templates.get_template("answer.html.j2")

    def examine(self, path: str | None) -> View:
        """Answer for an uploaded file, and delete it.

        Args:
            path: the file; None where the visitor took it back.

        Returns:
            The answer; where there is none, one line that says why in `notes`, and nothing else.
        """
        if path is None:
            return View("")
        try:
            return self._ask(Path(path), Path(path).name, drawn=False)
        finally:
            self.uploads.answered(path)

    def example(self, name: str) -> View:
        """Answer for a phantom, a key of `EXAMPLES`; returns what `examine` does."""
        return self._ask(example_pixels(name), name, drawn=True)

    def picture(self, shown: Shown | None, finding: str) -> str:
        """The radiograph under the heat-map of one of the six findings, as HTML; empty where it is none of them."""
        if finding not in SIX_FINDINGS:
            return ""
        if shown is None:
            return error_html("The radiograph is not kept here any more: choose it again.")
        try:
            return picture_html(shown, finding, self.reader.heat_map(shown.pixels, finding))
        except StudyError as error:
            return error_html(str(error))

    def _ask(self, source: Path | np.ndarray, name: str, drawn: bool) -> View:
        try:
            answer = self.reader.examine(source)
            notes = self._notes.render(flags=answer.flags, drawn=plain_words.DRAWN if drawn else "")
            shown = Shown(shrink(answer.pixels), drawn)
            finding = plain_words.order(answer)[0]
            return View(notes, self.answer_html(answer), self.picture(shown, finding), finding, shown)
        except StudyError as error:
            line = str(error).replace(str(source), name) if isinstance(source, Path) else str(error)
        except Exception as error:  # a fault of ours; its text may hold what a file's header says, so it isn't shown
            print(f"chestxray serve: no answer, {type(error).__name__}", file=sys.stderr)
            line = f"{name}: no answer ({type(error).__name__}); try it as PNG"
        return View(error_html(line))

    def answer_html(self, answer: Any) -> str:
        """Every class with its probability, as HTML, folded away where it is doubtful; `answer` is a reader's."""
        rows = []
        for name in plain_words.order(answer):
            low, high, point = answer.low[name], answer.high[name], answer.operating_points.get(name)
            rows.append(
                {
                    "title": name.replace("_", " "),
                    "plain": plain_words.PLAIN[name],
                    "probability": percent(answer.calibrated[name]),
                    "range": f"{percent(low)} to {percent(high)}",
                    "at": round(100 * answer.calibrated[name], 1),
                    "left": round(100 * low, 1),
                    "width": round(100 * (high - low), 1),
                    "point": point is not None,
                    "above": bool(point is not None and answer.above[name]),
                    "sensitivity": point and percent(point.sensitivity),
                    "line": point and round(100 * point.probability, 1),
                    "alarms": point and percent(1 - point.specificity),
                }
            )
        return self._answer.render(rows=rows, doubtful=bool(answer.flags))


def percent(share: float) -> str:
    """A share from 0 to 1 as text that doesn't break: `<1 %`, `12 %`, `>99 %`."""
    if share < 0.01:
        return "<1\N{NO-BREAK SPACE}%"
    return ">99\N{NO-BREAK SPACE}%" if share > 0.99 else f"{100 * share:.0f}\N{NO-BREAK SPACE}%"


def error_html(line: str) -> str:
    """One line that says why there is no answer, as HTML."""
    return f'<div class="note alert" role="alert"><p><strong>No answer.</strong> {html.escape(line)}</p></div>'


def picture_html(shown: Shown, finding: str, heat: np.ndarray) -> str:
    """A radiograph under a heat-map, as HTML that holds both pictures; the page sets how opaque the heat-map is.

    Args:
        shown: the radiograph.
        finding: what the heat-map is of.
        heat: (H, W), 0 to 1.
    """
    plain = plain_words.PLAIN[finding].name
    what = "Drawn radiograph (phantom)" if shown.drawn else "The radiograph"
    layer = Image.fromarray(overlay.heat_layer(heat))
    layer.thumbnail((256, 256))
    peak = np.unravel_index(int(np.argmax(heat)), heat.shape)
    where = f", strongest {_place(peak[0] / heat.shape[0], peak[1] / heat.shape[1])}" if heat.max() > 0 else ""
    return (
        f'<figure class="film"><div><img src="{_data(Image.fromarray(shown.pixels), "JPEG", quality=88)}" alt="{what}">'
        f'<img class="heat" src="{_data(layer, "PNG")}" alt="Heat-map of {plain}{where}"></div>'
        f"<figcaption>{what}. The lighter the colour, the more it raised the score of “{plain}” "
        f"({finding}){where}. It shows what the model looked at, not where a finding is.</figcaption></figure>"
    )


def shrink(pixels: np.ndarray) -> np.ndarray:
    """A radiograph, (H, W) uint8, with its longer side at most `LARGEST_SIDE` pixels."""
    if max(pixels.shape) <= LARGEST_SIDE:
        return pixels
    image = Image.fromarray(pixels)
    image.thumbnail((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.BOX)
    return np.asarray(image)


@functools.cache
def example_pixels(name: str) -> np.ndarray:
    """The phantom of one key of `EXAMPLES`, (512, 512) uint8, the same in every run."""
    from chestxray.data.phantom import radiograph

    index, findings = EXAMPLES[name]
    return radiograph.render(radiograph.compose(index, seed=0, findings=findings, view="PA"), 512)


class Server:
    """The page, served from this process until it is closed.

    Attributes:
        url: where the page is.
        shared: its public address, or None.
        folder: where uploads lie until they are answered; removed by `close`.
        uploads: what is in it.
    """

    def __init__(
        self, reader: Any = None, host: str = "127.0.0.1", port: int | None = None, share: bool = False
    ) -> None:
        """Start to serve.

        Args:
            reader: what answers; the reference ensemble if None.
            host: the address to listen on; 0.0.0.0 lets other machines in.
            port: the port; the first free one from 7860 if None.
            share: whether to ask Gradio's servers for a public address, which passes on all that is uploaded.

        Raises:
            StudyError: gradio is missing, the port is taken, or the reference can't be loaded.
        """
        gradio = _gradio()
        if reader is None:
            import chestxray

            reader = chestxray.load()
        self.folder = Path(tempfile.mkdtemp(prefix="chestxray-"))  # readable by this user only
        self._closed = threading.Event()
        self._before = os.environ.get("GRADIO_TEMP_DIR")
        os.environ["GRADIO_TEMP_DIR"] = str(self.folder)
        self.uploads = Uploads(self.folder)
        self._blocks = build(gradio, Page(reader, self.uploads))
        try:
            _, self.url, self.shared = self._blocks.launch(
                server_name=host,
                server_port=port,
                share=share,
                max_file_size=LARGEST_UPLOAD,
                state_session_capacity=SESSIONS,
                app_kwargs={"middleware": [_layer(Guard, uploads=self.uploads)]},
                prevent_thread_lock=True,
                quiet=True,
                show_error=False,
                **_accepted(
                    gradio.Blocks.launch,
                    **_looks(gradio),
                    ssr_mode=False,
                    enable_monitoring=False,
                    run_history=False,
                    footer_links=[],
                ),
            )
        except OSError as error:
            self.close()
            where = f"{host}, port {port}" if port else f"{host}, ports from 7860"
            raise StudyError(f"{where}: cannot be listened on ({error}); give another --host or --port") from error
        except ValueError as error:  # gradio asks its own page whether it is there
            self.close()
            raise StudyError(
                f"{host}: the page was started, but does not answer; let NO_PROXY name {host}, or try again when this "
                "machine is less busy"
            ) from error
        threading.Thread(target=self._sweep, daemon=True).start()

    def wait(self) -> None:
        """Return when `stop` or `close` was called."""
        self._closed.wait()

    def stop(self) -> None:
        """Let `wait` return."""
        self._closed.set()

    def close(self) -> None:
        """Stop serving, and remove what was uploaded."""
        self.stop()
        self._blocks.close(verbose=False)
        shutil.rmtree(self.folder, ignore_errors=True)
        if os.environ.get("GRADIO_TEMP_DIR") == str(self.folder):
            os.environ.pop("GRADIO_TEMP_DIR")
            if self._before is not None:
                os.environ["GRADIO_TEMP_DIR"] = self._before

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _sweep(self) -> None:
        while not self._closed.wait(10):
            self.uploads.sweep()


def build(gradio: Any, page: Page) -> Any:
    """Lay out the page.

    Args:
        gradio: the package.
        page: what the controls do.

    Returns:
        A `gradio.Blocks`, not yet served.
    """
    options = _accepted(gradio.Blocks.__init__, analytics_enabled=False)
    if "theme" not in inspect.signature(gradio.Blocks.launch).parameters:  # gradio 5 takes them here
        options |= _looks(gradio)
    with gradio.Blocks(title=TITLE, **options) as blocks:
        gradio.HTML(f"<h1>{TITLE}</h1>", padding=False)
        gradio.HTML(f'<p role="note">{plain_words.WARNING}</p>', elem_id="warning", padding=False)
        with gradio.Tab("Radiograph"):
            visit = gradio.State(Visit(), time_to_live=3600)
            with gradio.Row():
                with gradio.Column(scale=1, min_width=280):
                    file = gradio.File(
                        label=f"PNG, JPEG, TIFF or DICOM, up to {LARGEST_UPLOAD // 10**6} MB",
                        file_count="single",
                        type="filepath",
                        height=150,
                        elem_id="upload",
                    )
                with gradio.Column(scale=1, min_width=280):
                    gradio.HTML(INTRODUCTION, padding=False)
                    with gradio.Row(elem_id="examples"):
                        examples = {name: gradio.Button(f"Phantom: {name.lower()}", min_width=100) for name in EXAMPLES}
            notes = gradio.HTML(START, elem_id="notes", padding=False)
            with gradio.Row(visible=False) as results:
                with gradio.Column(scale=1, min_width=280):
                    picture = gradio.HTML(elem_id="picture", padding=False)
                    opacity = gradio.Slider(
                        0, 100, _CHOSEN_OPACITY, step=5, label="Opacity of the heat-map, %", elem_id="opacity"
                    )
                    finding = gradio.Radio(
                        [(f"{plain_words.PLAIN[name].name} ({name})", name) for name in SIX_FINDINGS],
                        label="Heat-map of",
                        elem_id="finding",
                    )
                with gradio.Column(scale=1, min_width=280):
                    answer = gradio.HTML(elem_id="answer", padding=False)
        with gradio.Tab("The model"):
            gradio.Markdown(model_card(), elem_id="card")

        parts = [notes, answer, picture, finding, results, visit]
        # One radiograph a core; the queue tells the others how many are before them.
        together = {"concurrency_limit": max(1, os.cpu_count() or 1), "concurrency_id": "reader"}
        together |= {"show_progress_on": [notes, picture, answer, finding]}

        def show(visiting: Visit, ask: Callable[[], View]) -> dict[Any, Any]:
            view = visiting.radiograph(ask)
            if view is None:
                return {visit: visiting}
            return {
                notes: view.notes,
                answer: view.answer,
                picture: view.picture,
                finding: gradio.update(value=view.finding),
                results: gradio.update(visible=view.shown is not None),
                visit: visiting,
            }

        def examine(path: str | None, visiting: Visit) -> dict[Any, Any]:
            return show(visiting, lambda: page.examine(path)) | {file: None}

        def example(name: str, visiting: Visit) -> dict[Any, Any]:
            return show(visiting, lambda: page.example(name))

        def heat_map(name: str, visiting: Visit) -> Any:
            text = visiting.heat_map(lambda shown: page.picture(shown, name))
            return gradio.skip() if text is None else text

        file.upload(examine, [file, visit], [*parts, file], api_name="examine", **together)
        for name, button in examples.items():
            called = "example_" + name.lower().replace(" ", "_")
            button.click(functools.partial(example, name), visit, parts, api_name=called, **together)
        together["show_progress_on"] = [picture]
        finding.input(heat_map, [finding, visit], picture, api_name="heat_map", **together)
        opacity.change(None, opacity, None, js=_PAINT)
        blocks.load(None, None, None, js=_ANNOUNCE)
    return blocks.queue(max_size=WAITING, **_accepted(gradio.Blocks.queue, api_open=False))


def model_card() -> str:
    """The model card in Markdown; a line that says so where there is none."""
    try:
        return MODEL_CARD.read_text("utf-8")
    except OSError:
        return "There is no model card here: `chestxray publish` writes it."


def serve(host: str = "127.0.0.1", port: int | None = None, share: bool = False, wait: bool = True) -> Server:
    """Serve the page with the reference ensemble, and print where it is.

    Args:
        host: the address to listen on.
        port: the port; the first free one from 7860 if None.
        share: whether to ask Gradio's servers for a public address.
        wait: return only when Ctrl-C was pressed; False returns at once, as a notebook's cell should.

    Returns:
        The server; it serves until it is closed, or the process ends.

    Raises:
        StudyError: as `Server`.
    """
    import atexit

    server = Server(host=host, port=port, share=share)
    atexit.register(server.close)
    print(f"{server.url}  (Ctrl-C stops it)", flush=True)
    if server.shared:
        print(f"{server.shared}  (public: whoever has this address can use the page)", flush=True)
    elif share:
        print("No public address could be had: Gradio's servers did not answer.", file=sys.stderr)
    if host not in ("127.0.0.1", "localhost", "::1"):
        print(f"{host}: other machines can reach the page, without a password", file=sys.stderr)
    if wait:
        # What ends a service (systemd, docker, kill) must remove the uploads as Ctrl-C does.
        signal.signal(signal.SIGTERM, lambda *caught: server.stop())
        with contextlib.suppress(KeyboardInterrupt):
            server.wait()
        server.close()
    return server


def _gradio() -> Any:
    """The package gradio, told to send nothing about its use to anyone.

    Raises:
        StudyError: it is missing.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    try:
        import gradio
    except ImportError as error:
        raise StudyError(
            f"the web page needs {error.name or 'gradio'}, which is missing: pip install 'chestxray[web]'"
        ) from error
    return gradio


def _looks(gradio: Any) -> dict[str, Any]:
    # Fonts that the reader's machine has: no font is fetched.
    theme = gradio.themes.Default(
        primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    # In the head rather than as `css`, which gradio rewrites.
    return {"theme": theme, "head": f"<style>\n{(TEMPLATES / 'page.css').read_text('utf-8')}</style>"}


def _accepted(function: Callable, **options: Any) -> dict[str, Any]:
    """Those of the options that this version of gradio knows."""
    known = inspect.signature(function).parameters
    return {name: value for name, value in options.items() if name in known}


def _layer(kind: type, **options: Any) -> Any:
    from starlette.middleware import Middleware

    return Middleware(kind, **options)


def _paths(answer: bytes | bytearray) -> list[str]:
    """The files that the server says it stored."""
    try:
        paths = json.loads(answer)
    except ValueError:
        return []
    return [path for path in paths if isinstance(path, str)] if isinstance(paths, list) else []


def _with_policy(send: Callable) -> Callable:
    async def sending(message: dict) -> None:
        if message["type"] == "http.response.start":
            headers = [
                (b"content-security-policy", POLICY.encode()),
                (b"referrer-policy", b"no-referrer"),
                (b"x-content-type-options", b"nosniff"),
            ]
            message = {**message, "headers": [*message.get("headers", []), *headers]}
        await send(message)

    return sending


def _place(row: float, column: float) -> str:
    """Where a point is, in words, as one sees it: rows and columns in shares of the side."""
    vertical = ("at the top", "in the middle", "at the bottom")[min(2, int(3 * row))]
    horizontal = ("left", "", "right")[min(2, int(3 * column))]
    return f"{vertical} {horizontal}".strip()


def _data(image: Image.Image, kind: str, **options: Any) -> str:
    """A picture as an address that holds it, so that no file of it is ever written."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
