"""Downloads against a real HTTP server on this machine: resume, checksums, refusals, no server at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import re
import socket
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from data_prep import transfer
from data_prep.download import CHECKSUMS_FILE, default_download_folder, fetch
from dualroute.errors import UserError

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


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def unreachable():
    """A URL that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{probe.getsockname()[1]}/file.bin"  # bound, never listening


@pytest.fixture
def target(tmp_path):
    return tmp_path / "downloads" / "corpus" / "file.bin"


def only_the_file(target, *also):
    return {path.name for path in target.parent.iterdir()} == {target.name, *also}


def test_a_plain_download(server, target):
    seen = []
    assert fetch([server.url], target, SHA256, lambda done, total: seen.append((done, total))) == target
    assert target.read_bytes() == DATA
    assert only_the_file(target)
    assert seen[-1] == (len(DATA), len(DATA))
    assert seen == sorted(seen)


def test_what_is_there_is_not_fetched_again(server, target):
    fetch([server.url], target, SHA256)
    fetch([server.url], target, SHA256)
    assert len(server.requests) == 1


def test_a_broken_connection_is_taken_up_where_it_broke(server, target):
    server.cut_after = [1_000_000, 1_000_000]
    fetch([server.url], target, SHA256)
    assert target.read_bytes() == DATA
    assert server.requests == [None, "bytes=1000000-", "bytes=2000000-"]


def test_a_later_run_continues(server, target):
    server.cut_after = [1_000_000, 0]  # the second attempt brings nothing: give up
    with pytest.raises(
        UserError, match=r"broke after 1000000 of 3000000 bytes; .* run again \(it continues\)"
    ):
        fetch([server.url], target, SHA256)
    assert not target.exists()
    fetch([server.url], target, SHA256)
    assert target.read_bytes() == DATA
    assert server.requests[-1] == "bytes=1000000-"


def test_a_server_without_ranges_sends_everything_again(server, target):
    server.cut_after, server.ranges = [1_000_000, 500], False
    with pytest.raises(UserError):
        fetch([server.url], target, SHA256)
    fetch([server.url], target, SHA256)
    assert target.read_bytes() == DATA


def test_a_file_that_changed_meanwhile_is_not_mixed_with_its_old_half(server, target):
    server.cut_after = [1_000_000, 0]
    with pytest.raises(UserError):
        fetch([server.url], target)
    server.data, server.etag = DATA[::-1], '"two"'
    fetch([server.url], target)
    assert target.read_bytes() == DATA[::-1]


def test_a_complete_partial_file_only_wants_its_name(server, target):
    target.parent.mkdir(parents=True)
    target.with_name("file.bin.part").write_bytes(DATA)
    fetch([server.url], target, SHA256)
    assert target.read_bytes() == DATA


def test_a_partial_file_that_is_too_long_is_begun_anew(server, target):
    target.parent.mkdir(parents=True)
    target.with_name("file.bin.part").write_bytes(DATA + b"more")
    fetch([server.url], target, SHA256)
    assert target.read_bytes() == DATA


def test_a_wrong_checksum_leaves_nothing(server, target):
    with pytest.raises(UserError, match=rf"sha256 is {SHA256}, expected {'0' * 64}"):
        fetch([server.url], target, "0" * 64)
    assert not target.exists()
    assert list(target.parent.glob("*.part")) == []


def test_trust_on_first_use(server, target):
    fetch([server.url], target)
    records = target.parent / CHECKSUMS_FILE
    assert json.loads(records.read_text()) == {server.url: SHA256}
    target.unlink()
    server.data, server.etag = DATA[:-1] + b"x", '"two"'
    with pytest.raises(
        UserError, match=r"expected .*\(accept that by deleting the URL from .*checksums\.json"
    ):
        fetch([server.url], target)
    assert not target.exists()
    records.write_text("{}")
    fetch([server.url], target)
    assert target.read_bytes() == server.data


def test_not_found(server, target):
    url = server.url.replace("file.bin", "missing")
    with pytest.raises(UserError, match=r"missing: the server answers 404 Not Found") as error:
        fetch([url], target, SHA256)
    assert "\n" not in str(error.value)
    assert not target.exists()


def test_offline(unreachable, target):
    with pytest.raises(UserError, match=r"no connection \(.*refused\); check the connection and run again"):
        fetch([unreachable], target, SHA256)
    assert not target.exists()


def test_a_mirror_helps(server, unreachable, target):
    fetch([unreachable, server.url.replace("file.bin", "missing"), server.url], target, SHA256)
    assert target.read_bytes() == DATA


def test_a_server_that_falls_silent(target):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/file.bin"
        with pytest.raises(UserError, match=r"TimeoutError|timed out"):
            fetch([url], target, SHA256, timeout=0.2)


def test_the_folder_can_be_chosen(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("DUALROUTE_DOWNLOADS", raising=False)
    assert default_download_folder() == tmp_path / "dualroute"
    monkeypatch.setenv("DUALROUTE_DOWNLOADS", str(tmp_path / "elsewhere"))
    assert default_download_folder() == tmp_path / "elsewhere"


def cut_off(server, target, url=None, sha256=None):
    """A download that ends after a million bytes."""
    server.cut_after = [1_000_000, 0]
    with pytest.raises(UserError, match="broke"):
        fetch([url or server.url], target, sha256)
    server.cut_after = []
    server.requests.clear()
    server.if_ranges.clear()


LONG_AGO = "Sat, 01 Feb 2020 10:00:00 GMT"


@pytest.mark.parametrize(
    ("etag", "modified", "resumes"),
    [
        ('"one"', None, True),
        (None, LONG_AGO, True),
        (None, None, False),
        ('W/"one"', None, False),
        ('"a\u00e9"', None, False),
        (None, "Sat, 01 Feb 2070 10:00:00 GMT", False),
        (None, "yesterday", False),
    ],
)
def test_without_a_checksum_only_a_named_version_is_continued(server, target, etag, modified, resumes):
    server.etag, server.modified = etag, modified
    cut_off(server, target)
    fetch([server.url], target)
    assert target.read_bytes() == DATA
    assert server.requests == ["bytes=1000000-" if resumes else None]
    assert server.if_ranges == [(etag or modified) if resumes else None]
    assert only_the_file(target, CHECKSUMS_FILE)


@pytest.mark.parametrize("etag", [None, '"one"'])
def test_without_a_checksum_another_version_is_never_joined(server, target, etag):
    """The server has another file now, and no way, or the wrong way, to say so."""
    server.etag = etag
    cut_off(server, target)
    server.data = DATA[::-1]
    server.headers["ETag"] = '"two"'  # of a 206 that ignores If-Range
    fetch([server.url], target)
    assert target.read_bytes() == DATA[::-1]


@pytest.mark.parametrize(
    "content_range",
    [
        "bytes 0-2999999/3000000",
        "bytes 1000001-2999999/3000000",
        "bytes 1000000-2999999/2999999",
        "bytes 1000000-2999999/4000000",
        "bytes 1000000-999/3000000",
        "bytes */3000000",
        "lines 1000000-2999999/3000000",
        "",
    ],
)
@pytest.mark.parametrize("checked", [True, False])
def test_a_wrong_range_is_not_joined(server, target, content_range, checked):
    cut_off(server, target, sha256=SHA256 if checked else None)
    server.headers["Content-Range"] = content_range
    fetch([server.url], target, SHA256 if checked else None)
    assert target.read_bytes() == DATA
    assert server.requests == ["bytes=1000000-", None]


def test_another_mirror_does_not_continue_without_a_checksum(server, target):
    cut_off(server, target)
    mirror = server.url + "?mirror"
    fetch([mirror], target)
    assert server.requests == [None]
    assert target.read_bytes() == DATA


def test_with_a_checksum_any_mirror_continues(server, target):
    server.etag = None
    cut_off(server, target, sha256=SHA256)
    fetch([server.url + "?mirror"], target, SHA256)
    assert server.requests == ["bytes=1000000-"]
    assert target.read_bytes() == DATA


@pytest.mark.parametrize("note", [b"", b"{", b"[]", b"null", b'{"bytes": "x"}', b"[" * 99_999, b"\xff"])
def test_a_damaged_note_begins_anew(server, target, note):
    cut_off(server, target)
    target.with_name("file.bin.part.json").write_bytes(note)
    fetch([server.url], target)
    assert server.requests == [None]
    assert target.read_bytes() == DATA


def test_what_never_reached_the_disk_is_fetched_again(server, target):
    """After a power failure the file may end in zeros that nobody sent."""
    cut_off(server, target)
    with open(target.with_name("file.bin.part"), "ab") as stream:
        stream.write(bytes(50_000))
    fetch([server.url], target)
    assert server.requests == ["bytes=1000000-"]
    assert target.read_bytes() == DATA


def test_the_note_says_how_much_has_reached_the_disk(server, target, monkeypatch):
    monkeypatch.setattr("data_prep.transfer._SYNC_BYTES", 1_000_000)
    noted = []
    monkeypatch.setattr(transfer.Part, "keep", lambda self, version: noted.append(version.bytes))
    fetch([server.url], target, SHA256)
    assert noted[0] == 0
    assert noted[-1] == len(DATA)
    assert len(noted) >= 4


def test_chunks(server, target):
    server.chunked = True
    fetch([server.url], target)
    assert target.read_bytes() == DATA


def test_chunks_that_are_cut_off(server, target):
    server.chunked, server.etag = True, None
    server.cut_after = [1_000_000, 500_000]
    with pytest.raises(UserError, match=r"the connection broke \(IncompleteRead\)"):
        fetch([server.url], target)
    assert not target.exists()
    assert not (target.parent / CHECKSUMS_FILE).exists()
    server.cut_after = []
    fetch([server.url], target)
    assert target.read_bytes() == DATA


def test_a_file_without_length_needs_a_checksum(server, target):
    server.length = False
    with pytest.raises(UserError, match="does not say how long the file is, and no checksum of it is known"):
        fetch([server.url], target)
    assert not target.exists()
    fetch([server.url], target, SHA256)
    assert target.read_bytes() == DATA


@pytest.mark.parametrize("length", ["-1", "x", "1e6", "9" * 30])
def test_a_length_that_is_none(server, target, length):
    server.headers["Content-Length"] = length
    with pytest.raises(UserError, match="states a length that is none"):
        fetch([server.url], target, SHA256)


def test_a_file_that_is_compressed_on_the_way(server, target):
    server.headers["Content-Encoding"] = "gzip"
    with pytest.raises(UserError, match=r"sends the file compressed \(gzip\)"):
        fetch([server.url], target)


@pytest.mark.parametrize("length", [True, False])
def test_a_file_without_end(server, target, monkeypatch, length):
    monkeypatch.setattr("data_prep.transfer.MAX_BYTES", 2_000_000)
    server.length = length
    with pytest.raises(UserError, match="more than the 2,000,000"):
        fetch([server.url], target, SHA256)
    assert not target.exists()
    assert not target.with_name("file.bin.part").exists()


def test_redirects(server, target):
    server.redirects = {"/file.bin": "/a", "/a": f"{server.url}?there"}
    fetch([server.url], target)
    assert target.read_bytes() == DATA


@pytest.mark.parametrize(
    "to",
    ["/file.bin", "ftp://127.0.0.1/x", "file:///etc/hostname", "http://[bad", "data:text/plain,x"],
)
def test_redirects_that_lead_nowhere(server, target, to):
    server.redirects = {"/file.bin": to}
    with pytest.raises(
        UserError, match=r"the server (sends|answers)|no connection|the connection broke"
    ) as error:
        fetch([server.url], target)
    assert str(error.value).isprintable()
    assert not target.exists()


def test_many_redirects(server, target):
    server.redirects = {f"/{n}": f"/{n + 1}" for n in range(20)}
    with pytest.raises(UserError, match=r"sends elsewhere, too often or where it must not \(302\)"):
        fetch([server.url.replace("file.bin", "0")], target)
    assert len(server.requests) < 10


def test_https_is_not_left():
    request = urllib.request.Request("https://example.org/a")
    with pytest.raises(urllib.error.HTTPError):
        transfer._Redirects().redirect_request(request, None, 302, "", {}, "http://example.org/a")


def test_the_words_of_a_server_are_not_repeated(server, target):
    with pytest.raises(UserError) as error:
        fetch([server.url.replace("file.bin", "missing")], target)
    assert "404 Not Found;" in str(error.value)
    assert str(error.value).isprintable()


def test_a_file_that_is_there_is_compared(server, target, monkeypatch):
    fetch([server.url], target)
    monkeypatch.setattr("data_prep.download._checked", set())
    target.write_bytes(DATA[:-1])
    for sha256 in (None, SHA256):
        with pytest.raises(UserError, match=r"file\.bin: sha256 is .*; delete it to download it again"):
            fetch([server.url], target, sha256)
    target.unlink()
    target.mkdir()
    with pytest.raises(UserError, match="is a folder, not a file; remove it to download it again"):
        fetch([server.url], target, SHA256)


def test_a_file_that_was_put_there_is_recorded(target):
    target.parent.mkdir(parents=True)
    target.write_bytes(DATA)
    fetch(["http://127.0.0.1:9/file.bin"], target)
    assert json.loads((target.parent / CHECKSUMS_FILE).read_text()) == {"http://127.0.0.1:9/file.bin": SHA256}


@pytest.mark.parametrize(
    "records", [b"", b"{", b"[]", b'{"a": 5}', b'{"a": "b"}', b"[" * 99_999, b'{"a": 1, "a": 2}', b"\xff"]
)
def test_damaged_records(server, target, records):
    target.parent.mkdir(parents=True)
    (target.parent / CHECKSUMS_FILE).write_bytes(records)
    with pytest.raises(UserError, match=r"checksums\.json: .*; (mend or )?delete") as error:
        fetch([server.url], target)
    assert "\n" not in str(error.value)
    assert not server.requests


@pytest.mark.parametrize("name", ["file.bin.part", "file.bin.part.json", CHECKSUMS_FILE, "file.bin"])
def test_pipes_are_not_waited_for(server, target, name):
    target.parent.mkdir(parents=True)
    os.mkfifo(target.parent / name)
    if name == "file.bin.part.json":
        fetch([server.url], target)
        assert target.read_bytes() == DATA
        return
    with pytest.raises(UserError, match=f"{name}: is a named pipe, not a file; "):
        fetch([server.url], target)


def test_two_that_want_the_same_file(server, target):
    """The second waits; the file is fetched once."""
    with ThreadPoolExecutor(2) as pool:
        paths = list(pool.map(lambda _: fetch([server.url], target), range(2)))
    assert paths == [target, target]
    assert target.read_bytes() == DATA
    assert server.requests == [None]
    assert only_the_file(target, CHECKSUMS_FILE)


def test_a_full_disk_is_no_complete_file(server, target, monkeypatch):
    """The last bytes wait in a buffer: what cannot be written out at the end is missed."""

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("data_prep.transfer.os.fsync", full)
    with pytest.raises(OSError, match="No space left") as error:
        fetch([server.url], target)
    assert error.value.filename == str(target.with_name("file.bin.part"))
    assert not target.exists()
    monkeypatch.undo()
    fetch([server.url], target)
    assert target.read_bytes() == DATA
