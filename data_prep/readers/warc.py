"""Crawls to documents: WARC, and WET, which holds the text of its pages already. Records are parsed by
`warcio`.

- ``conversion`` records (WET): the text as it is.
- ``response`` and ``resource`` records (WARC): plain text as it is; of HTML the main content, by
  `resiliparse`, which DCLM and OLMo use. Pages with another status than 200, and all that is no text, are
  counted and passed over.
- Everything else (requests, metadata) is no page.

No header is read beyond 1 MiB, no page beyond ``max_document_bytes``. A record that is shorter than its
Content-Length says is damage; the library takes it for a whole one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, Any

from data_prep.readers.documents import Document, ReadOptions, decode, document_of, too_long
from data_prep.readers.streams import DamagedStream
from data_prep.tally import readable
from dualroute.errors import UserError

WARC_ENDINGS = (".warc", ".wet")
_MAX_HEADERS = 1 << 20
_BLOCK = 1 << 16
_HTML = ("text/html", "application/xhtml+xml")


class _Bounded:
    """A stream that refuses to go on where headers do not end; `warcio` reads lines of any length."""

    def __init__(self, stream: IO[bytes], name: str) -> None:
        self._stream, self._name = stream, name
        self.left: int | None = None  # bytes that may still be read; None while a record's own are
        self.offset = 0

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(_BLOCK if size is None or size < 0 else size)
        self.offset += len(data)
        if self.left is not None:
            self.left -= len(data)
            if self.left < 0:
                raise UserError(
                    f"{self._name}: headers of more than 1 MiB near byte {self.offset}; fetch the file "
                    f"again, or "
                    f"leave it out with exclude"
                )
        return data

    def tell(self) -> int:
        return self.offset


def read_warc(stream: IO[bytes], name: str, options: ReadOptions) -> Iterator[Document]:
    """A document for each page, called by its address."""
    try:
        from warcio.archiveiterator import ArchiveIterator
    except ImportError as error:
        raise UserError(f"{name}: WARC and WET need warcio: pip install -e '.[prepare]'") from error
    bounded = _Bounded(stream, name)
    records = ArchiveIterator(bounded)
    number = 0
    while True:
        bounded.left = _MAX_HEADERS + 2 * _BLOCK
        record = _next(records)
        if record is None:
            return
        number += 1
        bounded.left = None
        if record.rec_headers.get_header("Content-Length") is None:
            raise DamagedStream(f"record {number} has no Content-Length")
        where = f"{name}:{readable(record.rec_headers.get_header('WARC-Target-URI') or number)[:500]}"
        yield from _document(record, where, options)
        while record.raw_stream.read(_BLOCK):
            pass
        if getattr(record.raw_stream, "limit", 0):
            raise DamagedStream(f"record {number} is shorter than its Content-Length says")


def _next(records: Any) -> Any:
    try:
        record = next(records, None)
    except (UserError, OSError, EOFError):
        raise
    except Exception as error:  # of a damaged header the library raises what it stumbles over
        raise DamagedStream(readable(error).strip()[:200] or type(error).__name__) from error
    if records.err_count:
        raise DamagedStream("a record is longer than its Content-Length says")
    return record


def _document(record: Any, where: str, options: ReadOptions) -> Iterator[Document]:
    if record.rec_type == "conversion":
        text = decode(_content(record, where, options), where, 0, options)
        if text is not None:
            yield Document(where, text)
        return
    if record.rec_type not in ("response", "resource"):
        return
    headers = record.http_headers or record.rec_headers
    status = record.http_headers.get_statuscode() if record.http_headers else "200"
    kind = (headers.get_header("Content-Type") or "").partition(";")[0].strip().lower()
    if status != "200":
        options.dropped["page without success (WARC)"] += 1
    elif kind in _HTML:
        yield from document_of(_main_content(_content(record, where, options)), where, options)
    elif kind == "text/plain":
        text = decode(_content(record, where, options), where, 0, options)
        if text is not None:
            yield Document(where, text)
    else:
        options.dropped["page that is no text (WARC)"] += 1


def _content(record: Any, where: str, options: ReadOptions) -> bytes:
    """The page's bytes, without compression and chunks of HTTP."""
    stream, parts, size = record.content_stream(), [], 0
    try:
        while block := stream.read(_BLOCK):
            parts.append(block)
            size += len(block)
            if size > options.max_document_bytes:
                raise too_long(where, "a page", options)
    except (UserError, OSError, EOFError):
        raise
    except Exception as error:
        raise DamagedStream(f"{where}: {readable(error)[:200] or type(error).__name__}") from error
    return b"".join(parts)


def _main_content(html: bytes) -> str:
    try:
        from resiliparse.extract.html2text import extract_plain_text
        from resiliparse.parse.encoding import bytes_to_str, detect_encoding
    except ImportError as error:
        raise UserError("HTML in WARC files needs resiliparse: pip install -e '.[prepare]'") from error
    text: str = extract_plain_text(
        bytes_to_str(html, detect_encoding(html, from_html_meta=True) or "utf-8"), main_content=True
    )
    return text
