"""A document, how documents are to be read, and the rules that all formats share.

`formats` opens a file and picks the reader: text itself, `records` (JSON, CSV), `columns` (Parquet, Arrow),
`archives` (tar, zip). Whatever the reader, a line or record is never longer than ``max_document_bytes``, and
text that is not UTF-8 meets ``on_decode_error``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import IO, Literal

from data_prep.readers.chats import NoMessages, chat_text
from data_prep.tally import Tally, readable
from dualroute.data.chat.messages import NoChat
from dualroute.errors import UserError

DecodeErrors = Literal["error", "replace", "skip"]
BadFiles = Literal["error", "skip"]
UTF8_MARK = b"\xef\xbb\xbf"

_REMEDY = "convert the file, or set on_decode_error to 'replace' or 'skip'"
#: First bytes of what is found under a text's name by mistake.
_SIGNATURES = (
    (b"\x1f\x8b", "gzip data: name it .gz"),
    (b"\xfd7zXZ", "xz data: name it .xz"),
    (b"BZh", "bzip2 data: name it .bz2"),
    (b"\x28\xb5\x2f\xfd", "zstd data: name it .zst"),
    (b"PK\x03\x04", "a zip archive: name it .zip"),
    (b"PAR1", "Parquet: name it .parquet"),
    (b"ARROW1", "Arrow: name it .arrow"),
    (b"%PDF", "a PDF, which must be converted first"),
    (b"\x89PNG", "a picture"),
    (b"\xff\xd8\xff", "a picture"),
    (b"\x7fELF", "a program"),
)


@dataclass(frozen=True)
class Document:
    """A text and where it came from (``file``, ``archive!member``, ``file:line``)."""

    name: str
    text: str
    language: str | None = None  # where one has been found out


@dataclass
class ReadOptions:
    """How to read.

    Attributes:
        text_key: the key (JSON) or column (CSV, Parquet, Arrow) that holds the text.
        separator: cut text files into documents at this string; None: one file, one document.
        heading: cut at lines that match, each line starting a document (WikiText); instead of ``separator``.
        on_decode_error: what to do with bytes that are not UTF-8.
        on_bad_file: what to do with a file that is damaged or not what its name says.
        max_document_bytes: longest document, line, record or JSON file.
        text_endings: further endings of names that hold plain text; "" for names without one.
        exclude: globs of files and members of archives to pass over.
        follow_links: follow links that lead out of a corpus folder.
        all_text: of a record take every text, whatever its key.
        chats: ``text_key`` holds the messages of a chat, whose JSON is the document; see `chats`.
        dropped: counts of documents dropped here, by reason.
        files: counts of files read and passed over.
    """

    text_key: str = "text"
    separator: str | None = None
    heading: re.Pattern[str] | None = None
    on_decode_error: DecodeErrors = "error"
    on_bad_file: BadFiles = "error"
    max_document_bytes: int = 256_000_000
    text_endings: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    follow_links: bool = False
    all_text: bool = False
    chats: bool = False
    dropped: Counter[str] = field(default_factory=Counter)
    files: Tally = field(default_factory=Tally)


class NoTextKey(UserError):
    """A JSON or CSV file whose first record lacks the text key: in a folder, one that holds no corpus."""

    def __init__(self, where: str, key: str, there: Iterable[object], what: str = "key") -> None:
        names = [readable(name)[:40] for name in there]
        listed = ", ".join(names[:10]) + (", …" if len(names) > 10 else "")
        self.there = ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
        table = what == "column"
        are, remedy = ("there are", ", to its number if they have no names") if table else ("there is", "")
        super().__init__(f"{where}: no {what} {key!r} ({are}: {listed}); set text_key{remedy}")


def too_long(where: str, what: str, options: ReadOptions) -> UserError:
    """For a line, record or text that does not end within the limit."""
    return UserError(
        f"{where}: {what} of more than {options.max_document_bytes / 1e6:g} MB; raise max_document_mb if it "
        f"is meant to be so long"
    )


def lines_of(stream: IO[bytes], name: str, options: ReadOptions) -> Iterator[tuple[int, bytes]]:
    """(byte offset, line) of every line, its end included; one that does not end is an error."""
    offset, limit = 0, options.max_document_bytes
    while line := stream.readline(limit + 1):
        if len(line) > limit:
            raise too_long(f"{name}: byte {offset}", "a line", options)
        yield offset, line.removeprefix(UTF8_MARK) if offset == 0 else line
        offset += len(line)


def decode(
    data: bytes, name: str, offset: int, options: ReadOptions, nul_is_text: bool = False
) -> str | None:
    """Text of ``data``, which begins ``offset`` bytes into ``name``; None when it is to be skipped.

    A NUL byte is valid UTF-8, but stands in no text file: it tells of a binary one, or of UTF-16 without a
    mark.
    """
    text = None
    try:
        text = data.decode("utf-8")
        bad = -1 if nul_is_text else data.find(b"\0")
        if bad < 0:
            return text
        why = f"byte {offset + bad} is NUL, as in a binary file or in UTF-16 without its mark"
    except UnicodeDecodeError as error:
        why = f"byte {offset + error.start} (0x{data[error.start]:02x}) is not UTF-8"
    if options.on_decode_error == "replace":
        options.dropped["repaired (kept)"] += 1
        return text if text is not None else data.decode("utf-8", "replace")
    if options.on_decode_error == "skip":
        options.dropped["undecodable"] += 1
        return None
    looks = next((what for mark, what in _SIGNATURES if offset == 0 and data.startswith(mark)), None)
    raise UserError(f"{name}: {why}" + (f", it looks like {looks}" if looks else "") + f"; {_REMEDY}")


def document_of(value: object, where: str, options: ReadOptions) -> Iterator[Document]:
    """The document of one record; JSON can spell lone surrogates, which no UTF-8 file can hold."""
    if value is None:
        options.dropped["empty"] += 1
        return
    if options.chats and not options.all_text:
        try:
            value, joined = chat_text(value)
            if joined:
                options.dropped["turns of one side joined (kept)"] += 1
        except NoMessages as error:
            raise UserError(
                f"{where}: {options.text_key!r} is {error}, not the messages of a chat; set text_key"
            ) from error
        except NoChat as error:
            options.dropped[f"no chat: {str(error).partition(' (')[0]}"] += 1
            return
    if not isinstance(value, str):
        raise UserError(f"{where}: {options.text_key!r} is {type(value).__name__}, not text; set text_key")
    if len(value) > options.max_document_bytes:
        raise too_long(where, "a document", options)
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


def texts_within(value: object) -> Iterator[str]:
    """Every text in a value of JSON, keys left out, in the order in which it stands there."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            waiting.extend(reversed(value.values()))
        elif isinstance(value, list):
            waiting.extend(reversed(value))
