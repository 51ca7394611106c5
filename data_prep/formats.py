"""Bytes of one file to documents, in bounded memory.

Comes in: an open file and its name. The name's endings say what it is, from the outside in: compression
(.gz .xz .bz2 .zst), archive (.tar .zip), then text (.txt .md .text .raw .tokens .py), .jsonl or .parquet.
Goes out: `Document` (name, text), in the order of the file, to `clean`.

A tar that was cut at a block boundary, or whose next header is damaged, simply stops and
Python's reader reports success; here both are errors, as is every other file that ends too early (`streams`).
"""

from __future__ import annotations

import json
import re
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal, cast

from data_prep.streams import COMPRESSION_ENDINGS, DAMAGE, WatchedStream, decompress
from dualroute.errors import UserError

TEXT_ENDINGS = (".txt", ".md", ".text", ".raw", ".tokens", ".py")
RECORD_ENDINGS = (".jsonl", ".parquet")
ARCHIVE_ENDINGS = (".tar", ".zip")
_SHORTHANDS = {".tgz": ".tar.gz", ".txz": ".tar.xz", ".tbz2": ".tar.bz2"}
_BLOCK = 1 << 20
_MAX_DOCUMENT_BYTES = 1 << 30

DecodeErrors = Literal["error", "replace", "skip"]


@dataclass(frozen=True)
class Document:
    """A text and where it came from (``file``, ``archive!member``, ``file:line``)."""

    name: str
    text: str


@dataclass
class ReadOptions:
    """How to read.

    Attributes:
        text_key: the key (jsonl) or column (parquet) that holds the text.
        separator: cut text files into documents at this string; None: one file, one document.
        heading: cut at lines that match, each line starting a document (WikiText); instead of ``separator``.
        on_decode_error: what to do with bytes that are not UTF-8.
        dropped: counts of documents dropped here, by reason.
    """

    text_key: str = "text"
    separator: str | None = None
    heading: re.Pattern[str] | None = None
    on_decode_error: DecodeErrors = "error"
    dropped: Counter[str] = field(default_factory=Counter)


def supported(name: str) -> bool:
    """Whether `read_documents` knows what a file of this name holds."""
    kind, _ = _kind(name)
    return kind in (*TEXT_ENDINGS, *RECORD_ENDINGS, *ARCHIVE_ENDINGS)


def known_endings() -> str:
    """For messages: what `supported` accepts."""
    kinds = " ".join(TEXT_ENDINGS + RECORD_ENDINGS + ARCHIVE_ENDINGS)
    return f"{kinds}, each also with {' '.join(COMPRESSION_ENDINGS)}"


def read_documents(path: Path, name: str, options: ReadOptions) -> Iterator[Document]:
    """Documents of the file ``path``, called ``name`` in messages and in the documents' names.

    Raises:
        UserError: the file is missing, damaged, cut off, not UTF-8 (names the byte), or lacks the text key.
    """
    try:
        with open(path, "rb") as stream:
            yield from _read(stream, name, options)
    except OSError as error:
        if isinstance(error, DAMAGE):
            raise _damaged(name, error) from error
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except DAMAGE as error:
        raise _damaged(name, error) from error


def _damaged(name: str, error: BaseException) -> UserError:
    return UserError(f"{name}: the file is damaged or cut off ({error}); fetch or make it again")


def _kind(name: str) -> tuple[str, list[str]]:
    """The kind's ending, and the compressions around it from the outside in."""
    name = name.lower()
    for short, long in _SHORTHANDS.items():
        if name.endswith(short):
            name = name.removesuffix(short) + long
    compressions = []
    while (ending := Path(name).suffix) in COMPRESSION_ENDINGS:
        compressions.append(ending)
        name = name.removesuffix(ending)
    return ending, compressions


def _read(stream: IO[bytes], name: str, options: ReadOptions) -> Iterator[Document]:
    kind, compressions = _kind(name)
    for ending in compressions:
        stream = decompress(stream, ending)
    if kind == ".tar":
        yield from _read_tar(stream, name, options)
    elif kind == ".zip":
        yield from _read_zip(stream, name, options)
    elif kind == ".jsonl":
        yield from _read_jsonl(stream, name, options)
    elif kind == ".parquet":
        yield from _read_parquet(stream, name, options)
    elif kind in TEXT_ENDINGS:
        yield from _read_text(stream, name, options)
    else:
        raise UserError(f"{name}: unknown kind of file; known are {known_endings()}")


def _read_tar(stream: IO[bytes], name: str, options: ReadOptions) -> Iterator[Document]:
    watched = WatchedStream(stream)
    with tarfile.open(fileobj=cast(IO[bytes], watched), mode="r|") as archive:
        for member in archive:
            if member.isfile() and supported(member.name) and not _hidden(member.name):
                content = archive.extractfile(member)
                if content is not None:
                    yield from _read(content, f"{name}!{member.name}", options)
        while watched.read(_BLOCK):
            pass
        # tarfile stops without a word at a header it cannot parse, and at the end of a file that was cut
        if watched.content_end > archive.offset:
            raise tarfile.ReadError(f"unreadable member header at byte {archive.offset}")
        if watched.length <= archive.offset:
            raise tarfile.ReadError("the mark of the archive's end is missing")


def _read_zip(stream: IO[bytes], name: str, options: ReadOptions) -> Iterator[Document]:
    if not _random_access(stream):
        raise UserError(f"{name}: a zip inside another archive cannot be read; unpack it first")
    with zipfile.ZipFile(stream) as archive:
        for member in archive.infolist():
            if not member.is_dir() and supported(member.filename) and not _hidden(member.filename):
                with archive.open(member) as content:
                    yield from _read(content, f"{name}!{member.filename}", options)


def _random_access(stream: IO[bytes]) -> bool:
    """Whether one may jump about; a member of a streamed tar says so, but cannot."""
    return not isinstance(stream, tarfile.ExFileObject) and stream.seekable()


def _hidden(member: str) -> bool:
    return any(part.startswith(".") and part not in (".", "..") for part in Path(member).parts)


def _decode(data: bytes, name: str, offset: int, options: ReadOptions) -> str | None:
    """Text of ``data``, which begins ``offset`` bytes into ``name``; None when it is to be skipped."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        if options.on_decode_error == "replace":
            options.dropped["repaired (kept)"] += 1
            return data.decode("utf-8", "replace")
        if options.on_decode_error == "skip":
            options.dropped["undecodable"] += 1
            return None
        raise UserError(
            f"{name}: byte {offset + error.start} (0x{data[error.start]:02x}) is not UTF-8; convert the "
            f"file, or set on_decode_error to 'replace' or 'skip'"
        ) from error


def _read_text(stream: IO[bytes], name: str, options: ReadOptions) -> Iterator[Document]:
    if options.heading is not None:
        yield from group_by_heading(_lines(stream, name, options), name, options.heading)
        return
    for number, (offset, data) in enumerate(_parts(stream, name, options.separator)):
        text = _decode(data.removeprefix(b"\xef\xbb\xbf") if offset == 0 else data, name, offset, options)
        if text is not None:
            yield Document(name if options.separator is None else f"{name}:{number + 1}", text)


def _parts(stream: IO[bytes], name: str, separator: str | None) -> Iterator[tuple[int, bytes]]:
    """(byte offset, bytes) of the pieces between separators; no more than one piece is held."""
    mark = separator.encode() if separator is not None else None
    held, offset, searched = bytearray(), 0, 0
    while block := stream.read(_BLOCK):
        held += block
        if mark is not None:
            while (found := held.find(mark, searched)) >= 0:
                yield offset, bytes(held[:found])
                del held[: found + len(mark)]
                offset += found + len(mark)
                searched = 0
            searched = max(0, len(held) - len(mark) + 1)
        if len(held) > _MAX_DOCUMENT_BYTES:
            raise UserError(
                f"{name}: a single document of more than {_MAX_DOCUMENT_BYTES >> 20} MiB; set separator to "
                f"the text that stands between documents"
            )
    if held or mark is None:
        yield offset, bytes(held)


def _lines(stream: IO[bytes], name: str, options: ReadOptions) -> Iterator[str]:
    offset = 0
    for line in stream:
        text = _decode(line, name, offset, options)
        offset += len(line)
        if text is not None:
            yield text


def group_by_heading(lines: Iterator[str], name: str, heading: re.Pattern[str]) -> Iterator[Document]:
    """Documents from lines, each beginning at a line that matches ``heading``."""
    title, held = "", list[str]()
    for line in lines:
        if heading.fullmatch(line.rstrip("\n")):
            if held:
                yield Document(f"{name}:{title}" if title else name, "".join(held))
            title, held = line.strip(" =\n"), []
        held.append(line)
    if held:
        yield Document(f"{name}:{title}" if title else name, "".join(held))


def _read_jsonl(stream: IO[bytes], name: str, options: ReadOptions) -> Iterator[Document]:
    offset = 0
    for number, line in enumerate(stream, start=1):
        where = f"{name}:{number}"
        data = line.removeprefix(b"\xef\xbb\xbf") if offset == 0 else line
        text = _decode(data, name, offset, options)
        offset += len(line)
        if text is None or not text.strip():
            continue
        try:
            record = json.loads(text)
        except ValueError as error:
            raise UserError(f"{where}: not JSON ({error}); each line must hold one JSON object") from error
        if not isinstance(record, dict) or options.text_key not in record:
            keys = ", ".join(sorted(record)[:10]) if isinstance(record, dict) else type(record).__name__
            raise UserError(f"{where}: no key {options.text_key!r} (there is: {keys}); set text_key")
        yield from _record(record[options.text_key], where, options)


def _read_parquet(stream: IO[bytes], name: str, options: ReadOptions) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    if not _random_access(stream):
        raise UserError(f"{name}: a parquet file inside an archive cannot be read; unpack it first")
    try:
        table = pyarrow.parquet.ParquetFile(stream)
        if options.text_key not in table.schema_arrow.names:
            columns = ", ".join(table.schema_arrow.names[:10])
            raise UserError(f"{name}: no column {options.text_key!r} (there are: {columns}); set text_key")
        number = 0
        for batch in table.iter_batches(batch_size=256, columns=[options.text_key]):
            for value in batch.column(0).to_pylist():
                number += 1
                yield from _record(value, f"{name}:{number}", options)
    except pyarrow.ArrowException as error:
        raise _damaged(name, error) from error


def _record(value: object, where: str, options: ReadOptions) -> Iterator[Document]:
    """The document of one record; JSON can spell lone surrogates, which no UTF-8 file can hold."""
    if value is None:
        options.dropped["empty"] += 1
        return
    if not isinstance(value, str):
        raise UserError(f"{where}: {options.text_key!r} is {type(value).__name__}, not text; set text_key")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        if options.on_decode_error == "error":
            raise UserError(
                f"{where}: character {error.start} is a lone surrogate; mend the record, or set "
                f"on_decode_error to 'replace' or 'skip'"
            ) from error
        if options.on_decode_error == "skip":
            options.dropped["undecodable"] += 1
            return
        options.dropped["repaired (kept)"] += 1
        value = value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    yield Document(where, value)
