"""WARC and WET: pages become documents, damage is told, nothing is read without a limit."""

from __future__ import annotations

import gzip
import io

import pytest

from dualroute.errors import UserError
from tests.data_prep.samples import read, texts_of, written

pytest.importorskip("warcio", reason="WARC needs warcio (extra prepare)")

from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

PAGE = """<html><head><title>T</title><script>alert(1)</script></head><body><nav><a href=/>Home</a></nav>
<main><h1>Title</h1><p>Hello <b>world</b>, this is the text.</p><p>你好，世界。</p></main></body></html>"""


def crawl(records, compressed: bool = True) -> bytes:
    """Records of (type, address, HTTP status and type or None, body)."""
    stream = io.BytesIO()
    writer = WARCWriter(stream, gzip=compressed)
    for kind, address, http, body in records:
        headers = None
        if http is not None:
            status, content_type = http
            headers = StatusAndHeaders(status, [("Content-Type", content_type)], protocol="HTTP/1.0")
        record = writer.create_warc_record(
            address, kind, payload=io.BytesIO(body), http_headers=headers, warc_content_type="text/plain"
        )
        writer.write_record(record)
    return stream.getvalue()


RECORDS = [
    ("warcinfo", None, None, b"software: x"),
    ("response", "https://a.org/1", ("200 OK", "text/html; charset=utf-8"), PAGE.encode()),
    (
        "response",
        "https://a.org/gbk",
        ("200 OK", "text/html"),
        PAGE.replace("<head>", "<head><meta charset=gbk>").encode("gbk"),
    ),
    ("response", "https://a.org/gone", ("404 Not Found", "text/html"), b"<p>gone</p>"),
    ("response", "https://a.org/picture", ("200 OK", "image/png"), b"\x89PNG"),
    ("response", "https://a.org/plain", ("200 OK", "text/plain"), b"plain text"),
    ("request", "https://a.org/1", None, b"GET / HTTP/1.0\r\n\r\n"),
]


@pytest.mark.parametrize("compressed", [True, False])
def test_pages_of_a_crawl(compressed, tmp_path) -> None:
    pytest.importorskip("resiliparse")
    path = written(tmp_path, "c.warc" + ".gz" * compressed, crawl(RECORDS, compressed))
    documents = read(path)
    assert [document.name.partition(":")[2] for document in documents] == [
        "https://a.org/1",
        "https://a.org/gbk",
        "https://a.org/plain",
    ]
    for document in documents[:2]:
        assert "Hello world, this is the text." in document.text
        assert "你好，世界。" in document.text
        assert "alert" not in document.text
        assert "Home" not in document.text
    assert documents[2].text == "plain text"


def test_texts_of_wet(tmp_path) -> None:
    texts = [f"Page {number}\n你好" for number in range(5)]
    records = [
        ("conversion", f"https://a.org/{number}", None, text.encode()) for number, text in enumerate(texts)
    ]
    assert texts_of(written(tmp_path, "CC-MAIN-1.warc.wet.gz", crawl(records))) == texts


@pytest.mark.parametrize("cut", [30, 200, 700, 1500])
def test_a_crawl_that_is_cut_off_is_damaged(cut, tmp_path) -> None:
    data = crawl(
        [
            ("conversion", "https://a.org/1", None, b"x" * 900),
            ("conversion", "https://a.org/2", None, b"y" * 900),
        ],
        False,
    )
    with pytest.raises(UserError, match=r"c\.wet.*(damaged|cut off|shorter)"):
        texts_of(written(tmp_path, "c.wet", data[: len(data) - cut]))


def test_a_wrong_length_is_damage(tmp_path) -> None:
    data = crawl([("conversion", f"https://a.org/{n}", None, b"x" * 90) for n in range(3)], False)
    with pytest.raises(UserError, match=r"c\.wet: the file is damaged"):
        texts_of(written(tmp_path, "c.wet", data.replace(b"Content-Length: 90", b"Content-Length: 50", 1)))


def test_headers_without_end_are_refused(tmp_path) -> None:
    data = b"WARC/1.0\r\nWARC-Type: conversion\r\nX: " + b"a" * (3 << 20)
    with pytest.raises(UserError, match="headers of more than 1 MiB"):
        texts_of(written(tmp_path, "c.wet", data))


def test_a_page_beyond_the_limit_is_refused(tmp_path) -> None:
    pytest.importorskip("resiliparse")
    body = gzip.compress(b"a" * 3_000_000)
    record = ("response", "https://a.org/1", ("200 OK", "text/plain\r\nContent-Encoding: gzip"), body)
    with pytest.raises(UserError, match="a page of more than 1 MB"):
        texts_of(written(tmp_path, "c.warc", crawl([record], False)), max_document_bytes=1_000_000)


@pytest.mark.parametrize("data", [b"not a crawl\n" * 9, b"WARC/1.0\r\n\r\n", b"\0" * 3000])
def test_what_is_no_crawl(data, tmp_path) -> None:
    with pytest.raises(UserError, match=r"c\.warc"):
        list(texts_of(written(tmp_path, "c.warc", data))) or pytest.fail("nothing was said")
