"""Hashes by chunks: whoever writes or checks its part agrees with who does all of it."""

import hashlib

import pytest

from dualroute.model import tree_hash
from dualroute.model.tree_hash import TRAFFIC, HashedFile, own_range, shared_chunk_bytes

CONTENT = bytes(range(256)) * 160  # 40 KiB


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(tree_hash, "CHUNK", 8192)


def test_a_file_of_one_chunk_has_its_plain_sha256(tmp_path):
    path = tmp_path / "file"
    for content in (b"", b"x", CONTENT):
        path.write_bytes(content)
        assert tree_hash.describe(path) == {
            "size": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }


@pytest.mark.parametrize("step", [1000, 8192, 20000])
def test_written_piece_by_piece_it_is_described_as_it_lies_there(tmp_path, small_chunks, step):
    TRAFFIC.reset()
    with HashedFile(tmp_path / "file", chunk_bytes=8192) as stream:
        for start in range(0, len(CONTENT), step):
            stream.write(CONTENT[start : start + step])
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert (TRAFFIC.written, TRAFFIC.hashed, TRAFFIC.read) == (len(CONTENT), len(CONTENT), 0)
    assert stream.entry() == tree_hash.describe(tmp_path / "file")
    assert (TRAFFIC.hashed, TRAFFIC.read) == (2 * len(CONTENT), len(CONTENT))


@pytest.mark.parametrize("writers", [1, 2, 3, 4, 7, 64])
@pytest.mark.parametrize("size", [1, 4096, 4097, len(CONTENT) - 3])
def test_writers_of_one_file_share_it_without_a_gap(tmp_path, writers, size):
    path, content = tmp_path / "file", CONTENT[:size]
    chunk, chunks, end = shared_chunk_bytes(size, writers), [], 0
    for writer in range(writers):
        start, stop = own_range(size, writers, writer)
        assert start == end
        assert stop - start <= -(-size // writers) + chunk
        end = stop
        if start < stop:
            with HashedFile(path, start, chunk) as stream:
                stream.write(content[start:stop])
            chunks += stream.chunks
    assert (end, path.read_bytes()) == (size, content)
    said = tree_hash.entry(size, chunk, chunks)
    assert not tree_hash.wrong_entry(said)
    assert tree_hash.is_whole(path, said)


def test_one_changed_byte_is_seen_in_its_chunk_alone(tmp_path, small_chunks):
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    said = tree_hash.describe(path)
    path.write_bytes(CONTENT[:20000] + b"!" + CONTENT[20001:])
    assert [piece.is_whole() for piece in tree_hash.pieces(path, said)] == [True, True, False, True, True]
    assert not tree_hash.is_whole(path, said)
    path.write_bytes(CONTENT[:-1])
    assert not tree_hash.is_whole(path, said)


@pytest.mark.parametrize(
    "change",
    [{"chunks": "x"}, {"chunks": []}, {"chunks": ["00"] * 5}, {"chunks": [1] * 5}, {"chunk_bytes": 0},
     {"chunk_bytes": 1}, {"size": -1}, {"size": True}, {"sha256": None}, {"chunks": ["zz"] * 5}],
)  # fmt: skip
def test_an_entry_that_contradicts_itself_is_refused(tmp_path, small_chunks, change):
    (tmp_path / "file").write_bytes(CONTENT)
    said = tree_hash.describe(tmp_path / "file")
    assert not tree_hash.wrong_entry(said)
    assert tree_hash.wrong_entry(said | change)
