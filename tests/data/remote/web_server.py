"""An HTTP server of a folder that answers as badly as it is told to, and notes what it was asked."""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class WebServer(ThreadingHTTPServer):
    """Serves ``folder``.

    Attributes:
        faults: by file name, what becomes of its next requests, one after the other: ("drop", n) breaks the
            connection after n bytes, ("stall", n) falls silent after them, ("drip", n) goes on with a byte
            now and
            then, ("status", code) answers so, ("length", n) states another length, ("flip", n) sends another
            byte at n, ("range", text) states another place.
        asked: (file, Range, status) of each request.
        wanted: Authorization that is asked for; None for none.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.faults: dict[str, list[tuple[str, int | str]]] = {}
        self.always: dict[str, tuple[str, int | str]] = {}
        self.asked: list[tuple[str, str | None, int]] = []
        self.headers: dict[str, str] = {}
        self.wanted: str | None = None
        self.delay = 0.0
        self.etag = '"one"'
        self.over = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/set"

    def count(self, status: int | None = None) -> Counter[str]:
        """{file: requests}, of those with ``status`` if one is given."""
        return Counter(file for file, _, code in self.asked if status in (None, code))

    def handle_error(self, *args: object) -> None:
        """Clients that hang up are a part of these tests."""


class Handler(BaseHTTPRequestHandler):
    server: WebServer
    protocol_version = "HTTP/1.1"

    def handle(self) -> None:
        self.handle_one_request()

    def do_GET(self) -> None:
        server = self.server
        name = self.path.partition("?")[0].removeprefix("/set/")
        kind, value = server.always.get(name, ("", 0))
        if server.faults.get(name):
            kind, value = server.faults[name].pop(0)
        asked = self.headers["Range"]

        def answer(status: int, headers: dict[str, str], body: Callable[[], None] | None = None) -> None:
            server.asked.append((name, asked, status))
            self.send_response(status)
            for key, text in {**headers, **server.headers}.items():
                self.send_header(key, text)
            self.end_headers()
            if body is not None:
                body()

        if server.wanted is not None and self.headers["Authorization"] != server.wanted:
            return answer(401, {"Content-Length": "0"})
        if kind == "status":
            return answer(int(value), {"Content-Length": "0"})
        path = server.folder / name
        if not path.is_file():
            return answer(404, {"Content-Length": "0"})
        time.sleep(server.delay)
        data = path.read_bytes()
        start = 0
        found = re.fullmatch(r"bytes=(\d+)-", asked or "")
        if found and self.headers["If-Range"] in (None, server.etag):
            start = int(found[1])
            if start >= len(data):
                return answer(416, {"Content-Range": f"bytes */{len(data)}", "Content-Length": "0"})
        headers = {"Content-Length": str(len(data) - start), "ETag": server.etag}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if kind == "length":
            headers["Content-Length"] = str(int(value))
        if kind == "range":
            headers["Content-Range"] = str(value)
        if kind == "flip":
            data = data[: int(value)] + bytes([data[int(value)] ^ 1]) + data[int(value) + 1 :]

        def body() -> None:
            rest = data[start:]
            if kind in ("drop", "stall", "drip"):
                self.wfile.write(rest[: int(value)])
                self.wfile.flush()
                if kind == "stall":
                    server.over.wait(20)
                for place in range(int(value), len(rest)) if kind == "drip" else ():
                    self.wfile.write(rest[place : place + 1])
                    self.wfile.flush()
                    if server.over.wait(0.05):
                        break
                return
            self.wfile.write(rest)

        answer(206 if start else 200, headers, body)

    def log_message(self, *args: object) -> None:
        pass
