"""Bytes of one file to documents, in bounded memory.

Comes in: a path and its name. The name's endings say what it is, from the outside in: compression
(.gz .xz .bz2 .zst), archive (.tar .zip), then text, records (.jsonl .json .csv .tsv), columns (.parquet
.arrow .feather) or crawls (.warc .wet). Goes out: `Document` (name, text), in the order of the file, to
`clean`.

A file that ends too early, or is not what its name says, is an error that names it: nothing is guessed.
What does not belong to a corpus by its name is counted and passed over (`tally`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from posixpath import basename, splitext
from typing import IO

from data_prep.readers import archives, columns, records, warc
from data_prep.readers.documents import (
    UTF8_MARK,
    DecodeErrors,
    Document,
    NoTextKey,
    ReadOptions,
    decode,
    lines_of,
    too_long,
)
from data_prep.readers.streams import COMPRESSION_ENDINGS, DAMAGE, Expansion, decompress, utf8
from data_prep.tally import UNKNOWN, readable
from dualroute.errors import UserError
from dualroute.files import require_regular

__all__ = ["DecodeErrors", "Document", "ReadOptions", "known_endings", "read_documents", "supported"]

PROSE_ENDINGS = """
    .txt .text .md .markdown .mdx .rst .adoc .asciidoc .org .tex .texi .textile .rmd .qmd .raw .tokens
""".split()
CODE_ENDINGS = """
    .py .pyi .pyx .pxd .c .h .cc .cpp .cxx .hpp .hh .hxx .cu .cuh .java .kt .scala .groovy .js .mjs .cjs
    .jsx .ts .tsx .go .rs .rb .pl .pm .php .cs .fs .swift .m .mm .r .jl .lua .sh .bash .zsh .fish .ps1
    .sql .hs .ml .mli .ex .exs .erl .clj .lisp .el .scm .f .f90 .f95 .pas .adb .ads .vhd .v .sv .asm .s
    .tcl .vim .nim .zig .dart .cmake .proto .awk .sed .bat
""".split()
#: Names without an ending that everywhere are text.
PLAIN_NAMES = """
    readme license licence copying copyright notice news changelog changes authors contributors
    maintainers credits thanks todo install faq makefile dockerfile history
""".split()
_TEXT = frozenset(PROSE_ENDINGS + CODE_ENDINGS)
RECORD_ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".feather")
CRAWL_ENDINGS = warc.WARC_ENDINGS
ARCHIVE_ENDINGS = (".tar", ".zip")
_SHORTHANDS = {".tgz": ".tar.gz", ".txz": ".tar.xz", ".tbz2": ".tar.bz2", ".tzst": ".tar.zst"}
_BLOCK = 1 << 20
_MAX_DEPTH = 4  # of archives in archives
_MAX_COMPRESSIONS = 3  # one around another


def supported(name: str, options: ReadOptions | None = None) -> bool:
    """Whether `read_documents` knows what a file of this name holds."""
    return unknown_kind(name, options or ReadOptions()) is None


def unknown_kind(name: str, options: ReadOptions) -> str | None:
    """Why a file of this name is not read, as a reason to be counted; None if it is."""
    kind, compressions = _kind(name, options)
    if len(compressions) > _MAX_COMPRESSIONS:
        return "compressed again and again"
    if kind in (".txt", *RECORD_ENDINGS, *CRAWL_ENDINGS, *ARCHIVE_ENDINGS) or kind in _TEXT:
        return None
    if not kind:
        return f"{UNKNOWN}(no ending)"
    usual = len(kind) <= 12 and re.fullmatch(r"\.[a-z0-9_+-]*[a-z][a-z0-9_+-]*", kind)
    return UNKNOWN + (kind if usual else "(other)")


def known_endings() -> str:
    """For messages: what `supported` accepts."""
    kinds = " ".join([*PROSE_ENDINGS[:5], *RECORD_ENDINGS, *CRAWL_ENDINGS, *ARCHIVE_ENDINGS])
    return f"{kinds}, source code, each also with {' '.join(COMPRESSION_ENDINGS)}; text_endings adds to them"


def read_documents(path: Path, name: str, options: ReadOptions) -> Iterator[Document]:
    """Documents of the file ``path``, called ``name`` in messages and in the documents' names.

    Raises:
        UserError: the file is missing or not a regular file, damaged, cut off, not UTF-8 (names the byte),
            longer in one piece than ``max_document_bytes``, a decompression bomb, or lacks the text key
            (`NoTextKey` if it is of a kind that often is no corpus).
    """
    try:
        size = require_regular(path).stat().st_size
    except UserError as error:
        raise UserError(readable(error)) from error
    try:
        with open(path, "rb") as stream:
            yield from _Reader(options, Expansion(name, size)).read(stream, name, 0)
    except OSError as error:
        if isinstance(error, DAMAGE) or error.errno is None:
            raise _damaged(name, error) from error
        raise UserError(f"{readable(path)}: cannot be read ({error.strerror or error})") from error
    except DAMAGE as error:
        raise _damaged(name, error) from error


def _damaged(name: str, error: BaseException) -> UserError:
    why = readable(error)[:200]
    return UserError(
        f"{name}: the file is damaged or cut off ({why}); fetch or make it again, or set on_bad_file to skip"
    )


def _kind(name: str, options: ReadOptions) -> tuple[str, list[str]]:
    """The kind's ending (.txt for a name that is known to be text), and compressions from the outside in."""
    name = name.lower()
    for short, long in _SHORTHANDS.items():
        if name.endswith(short):
            name = name.removesuffix(short) + long
    compressions = []
    while (ending := splitext(name)[1]) in COMPRESSION_ENDINGS:
        compressions.append(ending)
        name = name.removesuffix(ending)
    if ending in options.text_endings or (not ending and basename(name) in PLAIN_NAMES):
        return ".txt", compressions
    return ending, compressions


@dataclass
class _Reader:
    """What is the same for a file and all that is inside it."""

    options: ReadOptions
    expansion: Expansion

    def read(self, stream: IO[bytes], name: str, depth: int) -> Iterator[Document]:
        """Documents of a stream, which lies in ``depth`` archives."""
        kind, compressions = _kind(name, self.options)
        if unknown_kind(name, self.options) is not None:
            raise UserError(f"{name}: unknown kind of file; known are {known_endings()}")
        if depth > _MAX_DEPTH:
            raise UserError(f"{name}: archives in archives, more than {_MAX_DEPTH} deep; unpack them first")
        for ending in compressions:
            stream = decompress(stream, ending, self.expansion)
        found = False
        for document in self._documents(stream, name, kind, depth):
            if not found:
                found = True
                self.options.files.read[kind] += 1
            yield document
        if not found:
            self.options.files.skip("without a document", name)

    def _documents(self, stream: IO[bytes], name: str, kind: str, depth: int) -> Iterator[Document]:
        options = self.options
        unknown = partial(unknown_kind, options=options)
        if kind == ".tar":
            yield from archives.read_tar(stream, name, options, partial(self._member, depth), unknown)
        elif kind == ".zip":
            member = partial(self._member, depth)
            yield from archives.read_zip(stream, name, options, member, unknown, self.expansion)
        elif kind == ".parquet":
            yield from columns.read_parquet(stream, name, options)
        elif kind in CRAWL_ENDINGS:
            yield from warc.read_warc(stream, name, options)
        elif kind in (".arrow", ".feather"):
            yield from columns.read_arrow(stream, name, options)
        else:
            stream, _ = utf8(stream)
            read = {
                ".jsonl": records.read_jsonl,
                ".ndjson": records.read_jsonl,
                ".json": records.read_json,
                ".csv": records.read_csv,
                ".tsv": records.read_tsv,
            }.get(kind, _read_text)
            yield from read(stream, name, options)

    def _member(self, depth: int, stream: IO[bytes], name: str) -> Iterator[Document]:
        try:
            yield from self.read(stream, name, depth + 1)
        except NoTextKey as error:
            pass_over_table(error, name, self.options)


def pass_over_table(error: NoTextKey, name: str, options: ReadOptions) -> None:
    """Count a JSON or CSV file that holds something other than texts."""
    options.files.skip(f"without the text_key {options.text_key!r}", f"{name} (it has: {error.there})")


def _read_text(stream: IO[bytes], name: str, options: ReadOptions) -> Iterator[Document]:
    if options.chats and not options.all_text:
        raise NoTextKey(name, options.text_key, ["plain text"])
    if options.heading is not None:
        yield from _by_heading(stream, name, options, options.heading)
        return
    for number, (offset, data) in enumerate(_parts(stream, name, options)):
        text = decode(data.removeprefix(UTF8_MARK) if offset == 0 else data, name, offset, options)
        if text is not None:
            yield Document(name if options.separator is None else f"{name}:{number + 1}", text)


def _parts(stream: IO[bytes], name: str, options: ReadOptions) -> Iterator[tuple[int, bytes]]:
    """(byte offset, bytes) of the pieces between separators; no more than one piece is held."""
    mark = options.separator.encode() if options.separator is not None else None
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
        if len(held) > options.max_document_bytes:
            raise UserError(
                f"{name}: a single document of more than {options.max_document_bytes / 1e6:g} MB; set "
                f"separator to the text that stands between documents, or raise max_document_mb"
            )
    if held or mark is None:
        yield offset, bytes(held)


def _by_heading(
    stream: IO[bytes], name: str, options: ReadOptions, heading: re.Pattern[str]
) -> Iterator[Document]:
    """Documents from lines, each beginning at a line that matches ``heading``."""
    title, held, size = "", list[str](), 0
    for offset, line in lines_of(stream, name, options):
        text = decode(line, name, offset, options)
        if text is None:
            continue
        if heading.fullmatch(text.rstrip("\n")):
            if held:
                yield Document(f"{name}:{title}" if title else name, "".join(held))
            title, held, size = readable(text.strip(" =\n")), [], 0
        held.append(text)
        size += len(line)
        if size > options.max_document_bytes:
            raise too_long(f"{name}: byte {offset}", "a document", options)
    if held:
        yield Document(f"{name}:{title}" if title else name, "".join(held))
