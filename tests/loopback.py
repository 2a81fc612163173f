"""A web server on this machine that does what servers do wrong."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar


@dataclass
class Resource:
    """A file as a server gives it.

    Attributes:
        data: its bytes.
        etag: empty for none.
        breaks: bytes of the body after which the first, second … answer breaks off; none for the ones after.
        stalls: seconds before the body of each answer in turn.
        claims: Content-Length sent instead of the true one.
        statuses: of the first answers, before the file is given.
        leads_to: the path that a status of redirection names.
        ranges: whether parts can be asked for.
        chunked: send the body in chunks without a length.
        trickle: seconds between two bytes.
        shift: bytes by which a part begins elsewhere than asked.
        asked: the Range of each request.
    """

    data: bytes
    etag: str = '"one"'
    breaks: list[int] = field(default_factory=list)
    stalls: list[float] = field(default_factory=list)
    claims: int | None = None
    statuses: list[int] = field(default_factory=list)
    leads_to: str = ""
    ranges: bool = True
    chunked: bool = False
    trickle: float = 0.0
    shift: int = 0
    asked: list[str | None] = field(default_factory=list)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    files: ClassVar[dict[str, Resource]]

    def do_HEAD(self) -> None:
        self._head(200, self.files[self.path].data, 0)

    def do_GET(self) -> None:
        self.close_connection = True
        file = self.files.get(self.path)
        if file is None:
            return self.send_error(404)
        wanted = self.headers.get("Range")
        file.asked.append(wanted)
        if file.statuses and (status := file.statuses.pop(0)) != 200:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.send_header("Retry-After", "0")
            if file.leads_to:
                self.send_header("Location", file.leads_to)
                self.send_header("Connection", "close")
            return self.end_headers()
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and file.ranges else 0
        if start and self.headers.get("If-Range", file.etag) != file.etag:
            start = 0
        if start and start >= len(file.data):
            self.send_response(416)
            self.send_header("Content-Length", "0")
            return self.end_headers()
        start = max(0, start - file.shift) if start else 0
        self._head(206 if start else 200, file.data, start)
        if file.stalls:
            time.sleep(file.stalls.pop(0))
        self._body(file, file.data[start:])

    def _head(self, status: int, data: bytes, start: int) -> None:
        file = self.files[self.path]
        self.send_response(status)
        if file.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str((file.claims or len(data)) - start))
        if file.etag:
            self.send_header("ETag", file.etag)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{file.claims or len(data)}")
        self.end_headers()

    def _body(self, file: Resource, body: bytes) -> None:
        if file.breaks:
            body = body[: file.breaks.pop(0)]
            self.wfile.write(body)
            return self.wfile.flush()
        try:
            if file.trickle:
                for byte in body:
                    self.wfile.write(bytes([byte]))
                    self.wfile.flush()
                    time.sleep(file.trickle)
            elif file.chunked:
                self.wfile.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body))
            else:
                self.wfile.write(body)
        except OSError:
            pass  # the client has given up

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serve() -> Iterator[tuple[dict[str, Resource], Callable[[str], str]]]:
    """Serve files: a dict from path to `Resource` to fill, and a function from path to URL."""

    class Handler(_Handler):
        files: ClassVar[dict[str, Resource]] = {}

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield Handler.files, lambda path: f"http://127.0.0.1:{server.server_address[1]}{path}"
    finally:
        server.shutdown()
        server.server_close()
