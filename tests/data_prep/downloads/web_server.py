"""A real HTTP server on this machine that behaves as badly as it is told to."""

from __future__ import annotations

import hashlib
import random
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

DATA = random.Random(0).randbytes(3_000_000)
SHA256 = hashlib.sha256(DATA).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves `data` at every path but /missing; `requests` lists the Range headers that came in."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.data = DATA
        self.etag: str | None = '"one"'
        self.ranges = True
        self.cut_after: list[int] = []  # bytes to send before the connection breaks, request by request
        self.requests: list[str | None] = []
        self.if_ranges: list[str | None] = []
        self.modified: str | None = None  # Last-Modified
        self.headers: dict[str, str] = {}  # sent with the file, instead of what is right
        self.chunked = False
        self.length = True  # whether Content-Length is sent
        self.redirects: dict[str, str] = {}

    def handle_error(self, *args: object) -> None:
        """A client that hangs up is a part of these tests."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/file.bin"


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"  # chunks are of this version; a connection is closed after one request

    def handle(self) -> None:
        self.handle_one_request()

    def do_GET(self) -> None:
        server = self.server
        server.requests.append(self.headers["Range"])
        server.if_ranges.append(self.headers["If-Range"])
        if self.path == "/missing":
            self.send_error(404, "gone\x1b[31m away")
            return
        if self.path in server.redirects:
            self.send_response(302)
            self.send_header("Location", server.redirects[self.path])
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start = 0
        found = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
        unchanged = self.headers["If-Range"] in (None, server.etag or server.modified)
        if found and server.ranges and unchanged:
            start = int(found[1])
            if start >= len(server.data):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(server.data)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206)
            place = f"bytes {start}-{len(server.data) - 1}/{len(server.data)}"
            self.send_header("Content-Range", server.headers.get("Content-Range", place))
        else:
            self.send_response(200)
        for key, value in (("ETag", server.etag), ("Last-Modified", server.modified)):
            if value:
                self.send_header(key, server.headers.get(key, value))
        if server.length and not server.chunked:
            length = str(len(server.data) - start)
            self.send_header("Content-Length", server.headers.get("Content-Length", length))
        if "Content-Encoding" in server.headers:
            self.send_header("Content-Encoding", server.headers["Content-Encoding"])
        if server.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        body = server.data[start:]
        whole = not server.cut_after
        if server.cut_after:
            body = body[: server.cut_after.pop(0)]
        if not server.chunked:
            self.wfile.write(body)
            return
        for first in range(0, len(body), 100_000):
            chunk = body[first : first + 100_000]
            self.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
        if whole:
            self.wfile.write(b"0\r\n\r\n")

    def log_message(self, *args: object) -> None:
        pass


def only_the_file(target, *also):
    return {path.name for path in target.parent.iterdir()} == {target.name, *also}
