"""Compressed streams: one after another, cut off, followed by garbage, or made to fill the memory."""

from __future__ import annotations

import bz2
import errno
import gzip
import io
import lzma
import zlib

import pytest
import zstandard

from data_prep.readers import streams
from data_prep.readers.documents import ReadOptions
from dualroute.errors import UserError
from tests.data_prep.samples import COMPRESS, TEXTS, jsonl, read, texts_of, written

DAMAGED = "the file is damaged or cut off"


@pytest.mark.parametrize("ending", COMPRESS)
def test_streams_one_after_another(tmp_path, ending):
    compress = COMPRESS[ending]
    data = b"".join(compress(jsonl([text])) + compress(b"") for text in TEXTS)
    assert texts_of(written(tmp_path, f"a.jsonl{ending}", data)) == TEXTS


@pytest.mark.parametrize("ending", COMPRESS)
def test_what_follows_a_stream_and_is_none_is_damage(tmp_path, ending):
    """Python's readers of xz and bz2 pass over it, and with it over a second stream that is damaged."""
    whole = COMPRESS[ending](jsonl())
    for more in (b"garbage", b"\xff" + whole[1:], whole[: len(whole) // 2], whole[:3]):
        with pytest.raises(UserError, match=rf"a\.jsonl{ending}: {DAMAGED}"):
            read(written(tmp_path, f"a.jsonl{ending}", whole + more))


@pytest.mark.parametrize("ending", COMPRESS)
def test_an_empty_file_is_no_compressed_one(tmp_path, ending):
    with pytest.raises(UserError, match=rf"a\.txt{ending}: {DAMAGED}"):
        read(written(tmp_path, f"a.txt{ending}", b""))


def test_padding_between_xz_streams_is_allowed(tmp_path):
    data = lzma.compress(jsonl(TEXTS[:5])) + b"\0" * 64 + lzma.compress(jsonl(TEXTS[5:])) + b"\0" * 70_000
    assert texts_of(written(tmp_path, "a.jsonl.xz", data)) == TEXTS


def test_legacy_lzma_and_gzip_with_every_header_field(tmp_path):
    assert texts_of(written(tmp_path, "a.jsonl.xz", lzma.compress(jsonl(), lzma.FORMAT_ALONE))) == TEXTS
    packer = zlib.compressobj(wbits=-15)
    body = packer.compress(jsonl()) + packer.flush()
    header = b"\x1f\x8b\x08\x1c" + bytes(6) + b"\x04\0more" + b"name\0" + b"comment\0"
    tail = zlib.crc32(jsonl()).to_bytes(4, "little") + len(jsonl()).to_bytes(4, "little")
    assert texts_of(written(tmp_path, "a.jsonl.gz", header + body + tail)) == TEXTS


def test_zstd_of_a_long_window(tmp_path):
    """As ``zstd --long=31`` makes it; the library's own limit is 128 MiB."""
    descriptor = bytes([(31 - 10) << 3])
    block = (len(jsonl()) << 3 | 1).to_bytes(3, "little") + jsonl()  # raw, and the last
    frame = b"\x28\xb5\x2f\xfd" + b"\0" + descriptor + block
    assert texts_of(written(tmp_path, "a.jsonl.zst", frame)) == TEXTS


def test_zstd_skippable_frames(tmp_path):
    """As pzstd and seekable zstd write them."""
    note = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"hello"
    compress = COMPRESS[".zst"]
    data = note + compress(jsonl(TEXTS[:5])) + note + compress(jsonl(TEXTS[5:])) + note
    assert texts_of(written(tmp_path, "a.jsonl.zst", data)) == TEXTS


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    """Many short documents, none of which is too long: only the sum tells."""
    monkeypatch.setattr(streams, "_FREE_EXPANSION", 1 << 18)
    monkeypatch.setattr(streams, "MAX_EXPANSION", 100)
    for ending, compress in COMPRESS.items():
        path = written(tmp_path, f"a.jsonl{ending}", compress(b"\n" * (1 << 20)))
        with pytest.raises(UserError, match=rf"a\.jsonl{ending}: .* bytes unpack to more than .* bomb"):
            read(path)
    nested = gzip.compress(bz2.compress(gzip.compress(b"\n" * (1 << 20))))
    with pytest.raises(UserError, match="bomb"):
        read(written(tmp_path, "a.jsonl.gz.bz2.gz", nested))
    honest = COMPRESS[".gz"](jsonl())
    assert texts_of(written(tmp_path, "a.jsonl.gz", honest)) == TEXTS


@pytest.mark.parametrize("ending", COMPRESS)
def test_a_small_read_unpacks_little(tmp_path, ending):
    """A first line is had without unpacking the 64 MB behind it."""
    import tracemalloc

    from data_prep.readers.formats import read_documents

    path = written(tmp_path, f"a.jsonl{ending}", COMPRESS[ending](b'{"text": "x"}\n' + b" " * (64 << 20)))
    tracemalloc.start()
    try:
        reading = read_documents(path, path.name, ReadOptions(max_document_bytes=1 << 20))
        assert next(reading).text == "x"
        assert tracemalloc.get_traced_memory()[1] < 40 << 20
    finally:
        tracemalloc.stop()


def test_a_copy_for_which_there_is_no_room_names_the_place(tmp_path, monkeypatch):
    from tests.data_prep.samples import parquet, tar

    class Full(io.BytesIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(streams.tempfile, "TemporaryFile", lambda **options: Full())
    monkeypatch.setattr(streams.tempfile, "tempdir", "/scratch")
    path = written(tmp_path, "a.tar", tar({"x.parquet": parquet()}))
    with pytest.raises(UserError, match=r"a\.tar!x\.parquet: its copy in /scratch .*space left.*TMPDIR"):
        read(path)


def test_compressions_around_one_another_have_an_end(tmp_path):
    data, name = jsonl(), "a.jsonl"
    for _ in range(3):
        data, name = gzip.compress(data), name + ".gz"
    assert texts_of(written(tmp_path, name, data)) == TEXTS
    with pytest.raises(UserError, match="unknown kind of file"):
        read(written(tmp_path, name + ".gz", gzip.compress(data)))


def test_the_library_alone_would_not_notice_a_cut_frame(tmp_path):
    """What `streams` is for: the reader of the zstandard package reports success."""
    data = zstandard.ZstdCompressor().compress(jsonl())
    with pytest.raises(UserError, match="ends inside a frame"):
        read(written(tmp_path, "a.jsonl.zst", data[:-20]))


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_text_in_utf16_and_utf32(tmp_path, encoding):
    text = "naïve 中文 \U0001f600\r\nsecond line"
    path = written(tmp_path, "a.txt", ("\ufeff" + text).encode(encoding))
    assert texts_of(path) == [text]
    assert texts_of(path, separator="\r\n") == ["naïve 中文 \U0001f600", "second line"]
    gz = written(tmp_path, "a.txt.gz", gzip.compress(("\ufeff" + text).encode(encoding)))
    assert texts_of(gz) == [text]


def test_damage_in_utf16_meets_on_decode_error(tmp_path):
    data = "\ufeffgood|bad ".encode("utf-16-le") + b"\x00\xd8" + " x|good too".encode("utf-16-le") + b"!"
    path = written(tmp_path, "a.txt", data)
    with pytest.raises(UserError, match=r"a\.txt: byte .* is not UTF-8"):
        read(path, separator="|")
    assert texts_of(path, separator="|", on_decode_error="skip") == ["good"]
    assert texts_of(path, separator="|", on_decode_error="replace") == [
        "good",
        "bad \ufffd x",
        "good too\ufffd",
    ]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("no mark".encode("utf-16-le"), r"a\.txt: byte 1 is NUL, as in a binary file or in UTF-16 without"),
        (gzip.compress(b"text", mtime=0), "it looks like gzip data: name it .gz"),
        (b"%PDF-1.4 \xff", "it looks like a PDF"),
        (b"\x7fELF\0\0", "it looks like a program"),
    ],
)
def test_what_is_no_text_under_a_texts_name(tmp_path, data, message):
    with pytest.raises(UserError, match=message):
        read(written(tmp_path, "a.txt", data))
    options = ReadOptions(on_decode_error="skip")
    assert read(written(tmp_path, "a.txt", data), options) == []
    assert options.dropped == {"undecodable": 1}
