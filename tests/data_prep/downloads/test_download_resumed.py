"""Downloads that broke, servers that lie, records and files that were damaged, disks that are full."""

from __future__ import annotations

import errno
import json
import os
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from data_prep.download import CHECKSUMS_FILE, fetch
from dualroute.data.remote import http_transfer as transfer
from dualroute.errors import UserError
from tests.data_prep.downloads.web_server import DATA, SHA256, only_the_file


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
    monkeypatch.setattr("dualroute.data.remote.http_transfer._SYNC_BYTES", 1_000_000)
    noted = []
    monkeypatch.setattr(transfer.Part, "keep", lambda self, validator, total, done: noted.append(done))
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
    monkeypatch.setattr("dualroute.data.remote.http_transfer.MAX_BYTES", 2_000_000)
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

    monkeypatch.setattr("dualroute.data.remote.http_transfer.os.fsync", full)
    with pytest.raises(OSError, match="No space left") as error:
        fetch([server.url], target)
    assert error.value.filename == str(target.with_name("file.bin.part"))
    assert not target.exists()
    monkeypatch.undo()
    fetch([server.url], target)
    assert target.read_bytes() == DATA
