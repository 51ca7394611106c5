"""Records of text files to documents: JSON Lines, JSON, CSV and TSV.

A ``.json`` file is one object, a list of objects, ``{"data": [objects]}``, or JSON Lines under another name
(C4 and others are published so). CSV follows RFC 4180; TSV has no quoting, as it is registered. The first
line names the columns, unless ``text_key`` is a number: then it is the column's place, from 1, and there is
no such line.

JSON and CSV are written for many purposes. A file whose first record lacks the text key raises `NoTextKey`,
and whoever reads a folder of files counts it and goes on; a later record that lacks it is an error.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from itertools import chain
from typing import IO, Any

from data_prep.readers.documents import (
    Document,
    NoTextKey,
    ReadOptions,
    decode,
    document_of,
    lines_of,
    texts_within,
    too_long,
)
from data_prep.tally import readable
from dualroute.errors import UserError

_MEND = "mend it, or leave it out with exclude"
_MAX_VALUES = 20_000_000  # in one piece of JSON, of which only a text is wanted


def read_jsonl(stream: IO[bytes], name: str, options: ReadOptions) -> Iterator[Document]:
    """One object a line; blank lines are none."""
    for number, (offset, line) in enumerate(lines_of(stream, name, options), start=1):
        yield from _json_line(line, f"{name}:{number}", name, offset, options)


def _json_line(
    line: bytes, where: str, name: str, offset: int, options: ReadOptions, first: bool = False
) -> Iterator[Document]:
    text = decode(line, name, offset, options)
    if text is not None and text.strip():
        record = _parsed(text, where, "each line must hold one JSON object")
        yield from _record(record, where, options, first)


def _parsed(text: str, where: str, remedy: str) -> Any:
    if len(text) > _MAX_VALUES and sum(map(text.count, "[{,")) > _MAX_VALUES:  # a byte or two may become 64
        raise UserError(f"{where}: JSON of more than {_MAX_VALUES:,} lists, objects and values; {_MEND}")
    try:
        return json.loads(text)
    except RecursionError as error:
        raise UserError(f"{where}: lists or objects nested too deeply to be read; {_MEND}") from error
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({readable(error)}); {remedy}") from error


def _record(record: Any, where: str, options: ReadOptions, first: bool) -> Iterator[Document]:
    if options.all_text:
        yield from document_of("\n".join(texts_within(record)), where, options)
        return
    if not isinstance(record, dict) or options.text_key not in record:
        there = sorted(record) if isinstance(record, dict) else [type(record).__name__]
        missing = NoTextKey(where, options.text_key, there)
        raise missing if first else UserError(f"{missing}, or leave the file out with exclude")
    yield from document_of(record[options.text_key], where, options)


def read_json(stream: IO[bytes], name: str, options: ReadOptions) -> Iterator[Document]:
    """One value in the whole file, or one object on each line."""
    numbered = (
        (number, offset, line)
        for number, (offset, line) in enumerate(lines_of(stream, name, options), start=1)
        if line.strip()
    )
    first = next(numbered, None)
    if first is None:
        return
    second = next(numbered, None)
    if second is not None and _is_object(first[2]):
        for number, offset, line in chain([first, second], numbered):
            yield from _json_line(line, f"{name}:{number}", name, offset, options, number == first[0])
        return
    data = bytearray()
    for _, offset, line in chain([first], [] if second is None else [second], numbered):
        data += b"\n" * (offset - len(data)) + line  # blank lines were left out; a byte keeps its place
        if len(data) > options.max_document_bytes:
            raise UserError(
                f"{name}: a JSON value of more than {options.max_document_bytes / 1e6:g} MB; write JSON "
                f"Lines, or raise max_document_mb"
            )
    text = decode(bytes(data), name, 0, options)
    if text is not None:
        yield from _json_value(_parsed(text, name, _MEND), name, options)


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(_parsed(line.decode("utf-8", "replace"), "", ""), dict)
    except UserError:
        return False


def _json_value(value: Any, name: str, options: ReadOptions) -> Iterator[Document]:
    if isinstance(value, dict) and options.text_key not in value and isinstance(value.get("data"), list):
        value = value["data"]
    if not isinstance(value, list):
        yield from _record(value, name, options, first=True)
        return
    for number, record in enumerate(value, start=1):
        yield from _record(record, f"{name}:{number}", options, number == 1)


def read_csv(stream: IO[bytes], name: str, options: ReadOptions) -> Iterator[Document]:
    """Comma-separated; a quoted field may hold commas and line breaks."""
    yield from _read_table(stream, name, options, {"delimiter": ",", "strict": True})


def read_tsv(stream: IO[bytes], name: str, options: ReadOptions) -> Iterator[Document]:
    """Tab-separated; quotation marks mean nothing."""
    yield from _read_table(stream, name, options, {"delimiter": "\t", "quoting": csv.QUOTE_NONE})


class _CsvLines:
    """Text lines for the `csv` module, which asks for as many as a record takes.

    A quotation mark that is never closed would take the whole file: the bytes of one record are counted.
    Bytes that are not UTF-8 stay in the text as lone surrogates, so that a record is dropped and not a line.
    """

    def __init__(self, stream: IO[bytes], name: str, options: ReadOptions) -> None:
        self._lines, self._name, self._options = lines_of(stream, name, options), name, options
        self.record_bytes = 0

    def __iter__(self) -> Iterator[str]:
        for offset, line in self._lines:
            self.record_bytes += len(line)
            if self.record_bytes > self._options.max_document_bytes:
                raise too_long(f"{self._name}: byte {offset}", "a record", self._options)
            if b"\0" in line or self._options.on_decode_error == "error":
                text = decode(line, self._name, offset, self._options)
                if text is not None:
                    yield text
            else:
                yield line.decode("utf-8", "surrogateescape")


def _read_table(
    stream: IO[bytes], name: str, options: ReadOptions, dialect: dict[str, Any]
) -> Iterator[Document]:
    csv.field_size_limit(max(csv.field_size_limit(), options.max_document_bytes))  # of the whole process
    lines = _CsvLines(stream, name, options)
    rows = csv.reader(lines, **dialect)
    column, width = -1, 0
    while True:
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise UserError(f"{name}:{rows.line_num}: not CSV ({error}); {_MEND}") from error
        lines.record_bytes = 0
        if row is None:
            return
        if not row or not any(row):
            continue  # a blank line
        where = f"{name}:{rows.line_num}"
        if options.all_text:
            yield from document_of("\n".join(row), where, options)
            continue
        if not width:
            width, column = len(row), _column(row, where, options)
            if options.text_key in row:
                continue  # the names of the columns
        if len(row) != width:
            raise UserError(f"{where}: {len(row)} columns, where line 1 has {width}; {_MEND}")
        yield from document_of(row[column], where, options)


def _column(first: list[str], where: str, options: ReadOptions) -> int:
    if options.text_key in first:
        return first.index(options.text_key)
    place = options.text_key
    if place.isascii() and place.isdigit() and 1 <= int(place) <= len(first):
        return int(place) - 1
    raise NoTextKey(where, place, first, "column")
