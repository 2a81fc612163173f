"""Web page: upload a radiograph or choose a phantom, and see the reference ensemble's answer in plain words.

`build` lays out with gradio what `page` makes, and `Server` serves it. Uploads lie in a folder of this process: they
are deleted within two minutes, and when it ends.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from chestxray.config import COMMITTED, SIX_FINDINGS, StudyError
from chestxray.evaluation import posterior
from chestxray.inference import overlay, plain_words, reader
from chestxray.inference.page import EXAMPLES, TEMPLATES, Page, View, Visit

MODEL_CARD = COMMITTED / "5_results" / "MODEL_CARD.md"

LARGEST_UPLOAD, MOST_UPLOADS = 50_000_000, 1_000_000_000
"""Bytes of one upload, and of uploads on disk at a time; more are refused until some were deleted."""
STAY, SWEEP = 120, 10
"""Seconds within which an upload is deleted, answered or not; and between two searches for uploads to delete."""

POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'"
)
"""What browsers may load for the page: only what this server sends."""
_HEADERS = {"content-security-policy": POLICY, "referrer-policy": "no-referrer", "x-content-type-options": "nosniff"}

TITLE = "Chest radiographs: what a model sees"
INTRODUCTION = (
    "<p>Frontal chest radiographs only. A file is read on the computer that runs this page and deleted within two "
    "minutes; nothing that a DICOM header says of a patient is shown or kept. No file at hand? Take a drawing, a "
    "<em>phantom</em>:</p>"
)
START = (
    '<div class="note start"><p>Choose a file or a phantom. Here you will then see which of seven classes is the most '
    "probable, how probable six findings are, how far the networks agree, and a heat-map of what they looked "
    "at.</p></div>"
)

_PAINT = "(value) => { document.documentElement.style.setProperty('--heat', value / 100); }"
_ANNOUNCE = """() => {
    document.documentElement.lang = 'en';
    document.getElementById('notes')?.setAttribute('aria-live', 'polite');
}"""


class Server(contextlib.ExitStack):
    """The page at `url`, served from this process until `close`, which also removes what was uploaded to `folder`."""

    def __init__(
        self, model: reader.Reader | None = None, host: str = "127.0.0.1", port: int | None = None, share: bool = False
    ) -> None:
        """Start to serve.

        Args:
            model: the reader that predicts; the reference ensemble if None.
            host: the address to listen on; 0.0.0.0 lets other machines in.
            port: the port; the first free one from 7860 if None.
            share: whether to ask Gradio's servers for a public address, which passes on all that is uploaded.

        Raises:
            StudyError: gradio is missing, host or port can't be listened on, or the reference can't be loaded.
        """
        super().__init__()
        host = host.strip("[]")
        _check_address(host, port)
        gradio = _gradio()
        page = Page(model or reader.load())
        # Readable by this user only; removed when the process ends, if not before.
        folder = tempfile.TemporaryDirectory(prefix="chestxray-", ignore_cleanup_errors=True)
        self.folder = Path(self.enter_context(folder))
        self.enter_context(_environment("GRADIO_TEMP_DIR", str(self.folder)))
        self._blocks = build(gradio, page)
        self.callback(self._blocks.close, verbose=False)
        self.closed = threading.Event()
        self.callback(self.closed.set)
        name = f"[{host}]" if ":" in host else host  # as an IPv6 address stands in a URL
        try:
            with _without_proxy(host, share):
                _, self.url, self.shared = self._blocks.launch(
                    server_name=name, server_port=port, share=share, **_launch_options(gradio, self.folder)
                )
        except OSError as error:
            self.close()
            raise _cannot_listen(host, port, error) from error
        except Exception as error:  # gradio asks its own page whether it is there; httpx has many kinds of errors
            self.close()
            what = f"{host}: the page was started, but does not answer ({type(error).__name__})"
            raise StudyError(f"{what}; try again when this machine is less busy, or give another --host") from error
        threading.Thread(target=self._sweep, daemon=True).start()

    def _sweep(self) -> None:
        """Delete uploads that broke off: gradio deletes only those that were completed, which lie in subfolders."""
        while not self.closed.wait(SWEEP):
            for path, status in _files(self.folder):
                if path.parent == self.folder and time.time() - status.st_mtime > STAY - SWEEP:
                    path.unlink(missing_ok=True)


def _cannot_listen(host: str, port: int | None, error: Exception) -> StudyError:
    ports = f"port {port}" if port else "ports from 7860"
    return StudyError(f"host {host!r}, {ports}: cannot be listened on ({error}); give another --host or --port")


def _check_address(host: str, port: int | None) -> None:
    """Bind to an address and let it go: gradio would try a hundred ports of a host that isn't there."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port or 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port left a moment ago is free
            probe.bind(address)
    except (OSError, UnicodeError) as error:
        raise _cannot_listen(host, port, error) from error


@contextlib.contextmanager
def _without_proxy(host: str, share: bool) -> Iterator[None]:
    """Let gradio ask its own page without the environment's proxy, which it needs for a public address alone."""
    before = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    names = ",".join(filter(None, [before, "localhost", "127.0.0.1", "::1", host])) if share else "*"
    with _environment("no_proxy", names), _environment("NO_PROXY", names):
        yield


def _launch_options(gradio: Any, folder: Path) -> dict[str, Any]:
    """Options of `Blocks.launch`: limits and styles, with nothing that sends or records anything."""
    from starlette.middleware import Middleware
    from starlette.middleware.base import BaseHTTPMiddleware
    from starlette.responses import PlainTextResponse

    async def guard(request: Any, call_next: Callable) -> Any:
        """Refuse uploads while too many lie in the folder, and tell browsers to load nothing from elsewhere."""
        uploading = request.url.path.rstrip("/").endswith("/upload")
        if uploading and sum(status.st_size for _, status in _files(folder)) > MOST_UPLOADS:
            return PlainTextResponse("too many uploads wait; try again in a minute", 503)
        response = await call_next(request)
        response.headers.update(_HEADERS)
        return response

    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # none is fetched
    theme = gradio.themes.Default(primary_hue="blue", **fonts)
    return {
        "theme": theme,
        # In the head rather than as `css`, which gradio rewrites.
        "head": f"<style>\n{(TEMPLATES / 'page.css').read_text('utf-8')}</style>",
        "footer_links": [],
        "max_file_size": LARGEST_UPLOAD,
        # Visitors whose radiograph stays in memory for more heat-maps; the longest unused one goes first.
        "state_session_capacity": 64,
        "app_kwargs": {"middleware": [Middleware(BaseHTTPMiddleware, dispatch=guard)]},
        "prevent_thread_lock": True,
        "quiet": True,
        "show_error": False,
        "ssr_mode": False,
        "run_history": False,
    }


def build(gradio: Any, page: Page) -> Any:
    """Lay out the page; returns a `gradio.Blocks`, not yet served.

    Args:
        gradio: the package.
        page: makes the contents.
    """
    with gradio.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(SWEEP, STAY - SWEEP)) as blocks:
        gradio.HTML(f"<h1>{TITLE}</h1>", padding=False)
        gradio.HTML(f'<p role="note">{plain_words.WARNING}</p>', elem_id="warning", padding=False)
        with gradio.Tab("Radiograph"):
            parts = _controls(gradio)
        with gradio.Tab("The model"):
            gradio.Markdown(model_card(), elem_id="card")
        _connect(gradio, page, parts)
        blocks.load(None, None, None, js=_ANNOUNCE)
    return blocks.queue(max_size=200, api_open=False)  # more requests are turned away


def _controls(gradio: Any) -> SimpleNamespace:
    """Lay out the first tab; returns its components by name."""
    parts = SimpleNamespace(visit=gradio.State(Visit(), time_to_live=3600))
    column = functools.partial(gradio.Column, scale=1, min_width=280)
    with gradio.Row():
        with column():
            label = f"PNG, JPEG, TIFF or DICOM, up to {LARGEST_UPLOAD // 10**6} MB"
            parts.file = gradio.File(label=label, file_count="single", type="filepath", height=150, elem_id="upload")
        with column():
            gradio.HTML(INTRODUCTION, padding=False)
            with gradio.Row(elem_id="examples"):
                parts.examples = {name: gradio.Button(f"Phantom: {name.lower()}", min_width=100) for name in EXAMPLES}
    parts.notes = gradio.HTML(START, elem_id="notes", padding=False)
    with gradio.Row(visible=False) as parts.results:
        with column():
            parts.picture = gradio.HTML(elem_id="picture", padding=False)
            opacity, label = round(100 * overlay.OPACITY), "Opacity of the heat-map, %"
            parts.opacity = gradio.Slider(0, 100, opacity, step=5, label=label, elem_id="opacity")
            findings = [(f"{plain_words.PLAIN[name].name} ({name})", name) for name in SIX_FINDINGS]
            parts.finding = gradio.Radio(findings, label="Heat-map of", elem_id="finding")
        with column():
            common = [(words, name) for name, words in plain_words.SHARES.items()]
            parts.shares = gradio.Radio(common, value="equal", label="The seven classes are", elem_id="shares")
            parts.answer = gradio.HTML(elem_id="answer", padding=False)
    return parts


def _connect(gradio: Any, page: Page, parts: SimpleNamespace) -> None:
    """Say what each control does."""
    shown = [parts.notes, parts.answer, parts.picture, parts.finding, parts.results, parts.visit]
    # One radiograph per core; the queue tells the others how many are before them.
    queue = {"concurrency_limit": max(1, os.cpu_count() or 1), "concurrency_id": "reader"}
    progress = {"show_progress_on": [parts.notes, parts.picture, parts.answer, parts.finding]}

    def answer(visit: Visit) -> str:
        return page.answer(replace(visit.shown.answer, prevalence=posterior.read_shares(visit.prevalence)))

    def show(visit: Visit, ask: Callable[[], View]) -> dict[Any, Any]:
        view = visit.radiograph(ask)
        if view is None:
            return {parts.visit: visit}
        return {
            parts.notes: view.notes,
            parts.answer: answer(visit) if view.shown else "",
            parts.picture: view.picture,
            parts.finding: gradio.update(value=view.finding),
            parts.results: gradio.update(visible=view.shown is not None),
            parts.visit: visit,
        }

    def examine(path: str | None, visit: Visit) -> dict[Any, Any]:
        return show(visit, lambda: page.examine(path)) | {parts.file: None}

    def example(name: str, visit: Visit) -> dict[Any, Any]:
        return show(visit, lambda: page.example(name))

    def heat_map(name: str, visit: Visit) -> Any:
        text = visit.heat_map(lambda shown: page.picture(shown, name))
        return gradio.skip() if text is None else text

    def reweight(name: str, visit: Visit) -> Any:
        visit.prevalence = name if name in plain_words.SHARES else visit.prevalence  # and no file of this machine
        return answer(visit) if visit.shown else gradio.skip()

    parts.shares.input(reweight, [parts.shares, parts.visit], parts.answer, api_name="shares", show_progress="hidden")
    parts.file.upload(examine, [parts.file, parts.visit], [*shown, parts.file], api_name="examine", **queue, **progress)
    for name, button in parts.examples.items():
        api_name = "example_" + name.lower().replace(" ", "_")
        button.click(functools.partial(example, name), parts.visit, shown, api_name=api_name, **queue, **progress)
    wanted = {"api_name": "heat_map", "show_progress_on": [parts.picture]}
    parts.finding.input(heat_map, [parts.finding, parts.visit], parts.picture, **wanted, **queue)
    parts.opacity.change(None, parts.opacity, None, js=_PAINT)


def model_card() -> str:
    """The model card in Markdown; a line that says so where there is none."""
    try:
        return MODEL_CARD.read_text("utf-8")
    except OSError:
        return "There is no model card here: `chestxray maintain publish` writes it."


def serve(host: str = "127.0.0.1", port: int | None = None, share: bool = False, wait: bool = True) -> Server:
    """Serve the page with the reference ensemble, and print where it is.

    Args:
        host: as for `Server`.
        port: as for `Server`.
        share: as for `Server`.
        wait: return only when Ctrl-C was pressed; False returns at once, as a notebook's cell should.
    """
    server = Server(host=host, port=port, share=share)
    print(f"{server.url}  (Ctrl-C stops it)", flush=True)
    if server.shared:
        print(f"{server.shared}  (public: whoever has this address can use the page)", flush=True)
    elif share:
        print("No public address could be had: Gradio's servers did not answer.", file=sys.stderr)
    if host not in ("127.0.0.1", "localhost", "::1"):
        print(f"{host}: other machines can reach the page, without a password", file=sys.stderr)
    if wait:
        # What ends a service (systemd, docker, kill) must remove the uploads as Ctrl-C does.
        signal.signal(signal.SIGTERM, lambda *caught: server.closed.set())
        with contextlib.suppress(KeyboardInterrupt):
            server.closed.wait()
        server.close()
    return server


def _gradio() -> Any:
    """The package gradio, with its telemetry switched off; `StudyError` where it is missing."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    try:
        import gradio
    except ImportError as error:
        what = f"the web page needs {error.name or 'gradio'}, which is missing"
        raise StudyError(f"{what}: pip install 'chestxray[web]'") from error
    return gradio


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """Set an environment variable, and put back what it was."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def _files(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """The files below a folder with their status; those that vanish meanwhile are left out."""
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                yield Path(place, name), Path(place, name).stat()
