"""Downloads against a real HTTP server on this machine: resume, checksums, refusals, no server at all."""

from __future__ import annotations

import json
import socket

import pytest

from data_prep.download import CHECKSUMS_FILE, default_download_folder, fetch
from dualroute.errors import UserError
from tests.data_prep.downloads.web_server import DATA, SHA256, only_the_file


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
