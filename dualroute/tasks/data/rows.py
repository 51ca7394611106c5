"""Rows of a user's data: from files, folders and the Hugging Face hub, one at a time.

In: a path, or a name on the hub.  Here: :func:`read_rows` yields ``(place, row)``, a row being a dict; lines
that are none are counted by what is wrong with them, with the first places (:class:`Problems`), and refused
above a share.  Next: a kind encodes the rows (:mod:`~dualroute.tasks.data.encode`).

Files: .csv (quoted), .tsv and .txt (tabs, nothing quoted), .jsonl (.ndjson), .json (a list of objects, or
SQuAD's), .parquet, .conll, .npz (arrays, a row of each), .dat and .data (MovieLens); each but parquet and npz
also as .gz, .xz or .bz2.  A folder is all such files in it, by name, or the images or recordings in it
(:mod:`~dualroute.tasks.data.media_rows`).  A row from a file knows the file's folder, where paths in it
begin.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import hashlib
import io
import json
import lzma
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any

from dualroute.errors import UserError
from dualroute.files import require_regular
from dualroute.tasks.data import media_rows
from dualroute.tasks.kind import Row

#: Characters of one row; more is no text of a task.
MOST_CHARACTERS = 16 << 20
#: Bytes of a .json file, which is read whole.
MOST_JSON_BYTES = 1 << 30
_OPENERS: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
_FORMATS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".conll": "conll",
    ".npz": "npz",
    ".data": "ratings",
    ".dat": "ratings",
}
#: What is wrong with a row in which JSON spells half a character.
HALF = "half a character (a surrogate alone)"
_SHOWN = 3


class FileRow(dict[str, Any]):
    """A row that knows the folder of its file, where the paths in it begin.

    Attributes:
        folder: Of the file.
    """

    def __init__(self, row: Row, folder: Path) -> None:
        super().__init__(row)
        self.folder = folder


@dataclass
class Problems:
    """Rows that could not be used, by reason.

    Attributes:
        rows: Rows so far, the unusable ones among them.
        counts: {reason: how many}.
        places: {reason: the first of them}.
    """

    rows: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, place: str) -> None:
        self.counts[reason] += 1
        shown = self.places.setdefault(reason, [])
        if len(shown) < _SHOWN:
            shown.append(place)

    @property
    def bad(self) -> int:
        """Rows that were left out."""
        return sum(self.counts.values())

    def lines(self, source: str) -> Iterator[str]:
        """What was left out, a line for each reason."""
        for reason, count in self.counts.most_common():
            places = ", ".join(self.places[reason])
            more = ", …" if count > len(self.places[reason]) else ""
            yield f"{source}: {count:,} of {self.rows:,} rows are left out: {reason} ({places}{more})"

    def refuse_above(self, share: float, source: str) -> None:
        """Refuse data of which more than ``share`` could not be used.

        Raises:
            UserError: Naming the commonest reason and its first places.
        """
        if self.bad > share * self.rows:
            reason, _ = self.counts.most_common(1)[0]
            raise UserError(
                f"{source}: {self.bad:,} of {self.rows:,} rows cannot be used, first of all: {reason} "
                f"({', '.join(self.places[reason])}); mend them, or raise data.max_bad_rows ({share:g})"
            )


def read_rows(
    source: str,
    problems: Problems,
    *,
    format: str = "auto",
    column_names: list[str] | None = None,
    hub_config: str | None = None,
    limit: int | None = None,
) -> Iterator[tuple[str, Row]]:
    """Rows with their places, ``file:line``.

    Args:
        source: A file or folder, or NAME[#SPLIT] on the Hugging Face hub.
        problems: Counts what is no row.
        format: Of files; ``auto`` goes by the name's ending.
        column_names: Of csv and tsv files without a line of names, and of conll files.
        hub_config: Of a data set on the hub.
        limit: The first so many rows.

    Raises:
        UserError: The source is not there, cannot be read, or is empty.
    """
    rows: Iterator[tuple[str, Row]]
    if is_local(source):
        if media_rows.holds_media(source) and not _row_files(Path(source)):
            folder = Path(source)
            rows = ((place, FileRow(row, folder)) for place, row in media_rows.folder_rows(folder))
        else:
            rows = (
                (place, FileRow(row, file.parent))
                for file in files_of(source)
                for place, row in _file_rows(file, problems, format, column_names)
            )
    else:
        rows = _hub_rows(source, hub_config)
    for place, row in islice(rows, limit):
        problems.rows += 1
        yield place, row


def is_local(source: str) -> bool:
    """Whether a source is a path, rather than a name on the hub."""
    return (
        os.path.lexists(source) or bool(Path(source).suffix in {*_FORMATS, *_OPENERS}) or source[:1] in "./~"
    )


def files_of(source: str) -> list[Path]:
    """The files of a source, in the order of their names.

    Raises:
        UserError: It is not there, or a folder without any.
    """
    path = Path(source)
    if not path.exists():
        raise UserError(f"{source} is not there: give a file or folder of rows, or a name on the hub")
    if not path.is_dir():
        require_regular(path)
        return [path]
    found = _row_files(path)
    if not found:
        found = media_rows.media_files(path)
    if not found:
        raise UserError(f"{source} holds no file of rows: it reads {', '.join(_FORMATS)}")
    return found


def _row_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file() and format_of(file) is not None)


def format_of(file: Path) -> str | None:
    """The format that the name of a file says."""
    name = Path(file.stem) if file.suffix in _OPENERS else file
    return _FORMATS.get(name.suffix)


def source_digest(source: str) -> str:
    """What tells one state of a source from another, cheaply: names, sizes and times of its files."""
    if not is_local(source):
        return source
    said = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files_of(source)]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def _file_rows(
    file: Path, problems: Problems, format: str, column_names: list[str] | None
) -> Iterator[tuple[str, Row]]:
    kind = format_of(file) if format == "auto" else format
    if kind is None:
        raise UserError(
            f"{file}: what is in a file of this name is not known: call it {', '.join(_FORMATS)}, or set "
            f"data.format"
        )
    if not file.stat().st_size:
        raise UserError(f"{file} is empty: give a file with rows")
    with _reading(file):
        if kind == "parquet":
            yield from _parquet_rows(file)
        elif kind in ("csv", "tsv"):
            yield from _table_rows(file, problems, kind, column_names)
        elif kind == "npz":
            yield from media_rows.array_rows(file)
        elif kind == "ratings":
            yield from _ratings_rows(file, problems)
        elif kind == "jsonl":
            yield from _jsonl_rows(file, problems)
        elif kind == "json":
            yield from _json_rows(file, problems)
        else:
            yield from _conll_rows(file, problems, column_names)


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"{file} cannot be read ({error}): copy it again, or give another file") from error


@contextmanager
def _open(file: Path) -> Iterator[IO[str]]:
    """The text of a file; bytes that are no UTF-8 become surrogates, which :func:`_is_text` finds."""
    binary = _OPENERS.get(file.suffix, open)(file, "rb")
    with binary, io.TextIOWrapper(binary, "utf-8-sig", errors="surrogateescape", newline="") as stream:
        yield stream


def _is_text(text: str) -> bool:
    return not any("\udc80" <= character <= "\udcff" for character in text) if not text.isascii() else True


def _lines(stream: IO[str], file: Path, problems: Problems) -> Iterator[tuple[str, str]]:
    """(place, line) without its end; lines that are no text, or too long, are counted."""
    number = 0
    while line := stream.readline(MOST_CHARACTERS):
        number += 1
        place = f"{file}:{number}"
        if len(line) == MOST_CHARACTERS and not line.endswith("\n"):
            while (rest := stream.readline(MOST_CHARACTERS)) and not rest.endswith("\n"):
                pass
            _bad(problems, f"longer than {MOST_CHARACTERS:,} characters", place)
        elif not _is_text(line):
            _bad(problems, "not UTF-8", place)
        else:
            yield place, line.rstrip("\r\n")


def _bad(problems: Problems, reason: str, place: str) -> None:
    """A row that is none: it counts among the rows."""
    problems.rows += 1
    problems.add(reason, place)


def _table_rows(
    file: Path, problems: Problems, kind: str, column_names: list[str] | None
) -> Iterator[tuple[str, Row]]:
    csv.field_size_limit(MOST_CHARACTERS)
    with _open(file) as stream:
        if kind == "csv":
            reader = csv.reader(stream)
        else:
            reader = csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE, quotechar=None)
        names, fields = column_names, list[str]()
        while True:
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                _bad(problems, f"malformed ({error})", f"{file}:{reader.line_num}")
                continue
            place = f"{file}:{reader.line_num}"
            if not fields:
                continue
            if names is None:
                names = [name.strip() for name in fields]
                _check_names(names, file)
            elif len(fields) != len(names):
                _bad(problems, f"{len(fields)} fields where there are {len(names)} columns", place)
            elif not all(map(_is_text, fields)):
                _bad(problems, "not UTF-8", place)
            else:
                yield place, dict(zip(names, fields, strict=True))


def _check_names(names: list[str], file: Path) -> None:
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        raise UserError(
            f"{file} has two columns called {twice!r}: rename one, or name all of them (data.column_names) "
            f"if its first line is a row already"
        )


def _jsonl_rows(file: Path, problems: Problems) -> Iterator[tuple[str, Row]]:
    with _open(file) as stream:
        for place, line in _lines(stream, file, problems):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                _bad(problems, "no JSON", place)
                continue
            if not isinstance(row, dict):
                _bad(problems, "no JSON object", place)
            elif _spells_no_text(line, row):
                _bad(problems, HALF, place)
            else:
                yield place, row


def _spells_no_text(json_text: str, value: Any) -> bool:
    """Whether JSON spells half a character (a ``\\ud83d`` alone), which no tokenizer and no file takes."""
    if "\\ud" not in json_text and "\\uD" not in json_text:
        return False
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def _json_rows(file: Path, problems: Problems) -> Iterator[tuple[str, Row]]:
    with _open(file) as stream:
        text = stream.read(MOST_JSON_BYTES + 1)
    if len(text) > MOST_JSON_BYTES:
        raise UserError(f"{file} has more than {MOST_JSON_BYTES:,} characters: write it as jsonl")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is no JSON ({str(error)[:100]}): mend it, or give another file") from error
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        rows = _squad_rows(value["data"], file, problems)
    elif isinstance(value, list):
        rows = _listed_rows(value, file, problems)
    else:
        raise UserError(f"{file} is no list of rows, and not in SQuAD's form: write it as jsonl")
    for place, row in rows:
        if _spells_no_text(text, row):
            _bad(problems, HALF, place)
        else:
            yield place, row


def _listed_rows(value: list[Any], file: Path, problems: Problems) -> Iterator[tuple[str, Row]]:
    for number, row in enumerate(value):
        if isinstance(row, dict):
            yield f"{file}[{number}]", row
        else:
            _bad(problems, "no JSON object", f"{file}[{number}]")


def _ratings_rows(file: Path, problems: Problems) -> Iterator[tuple[str, Row]]:
    """MovieLens: user, item, rating and time between tabs (100K: u.data) or '::' (1M, 10M: ratings.dat)."""
    with _open(file) as stream:
        for place, line in _lines(stream, file, problems):
            if not line.strip():
                continue
            fields = line.split("::" if "::" in line else "\t")
            if len(fields) != 4:
                _bad(problems, "not user, item, rating and time between tabs or '::'", place)
                continue
            yield place, dict(zip(("user", "item", "rating", "time"), fields, strict=True))


def _squad_rows(data: list[Any], file: Path, problems: Problems) -> Iterator[tuple[str, Row]]:
    """SQuAD 1.1's nesting as rows: id, title, context, question, answers [{text, answer_start}]."""
    for number, article in enumerate(data):
        try:
            title = article.get("title", "")
            pairs = [(part["context"], qa) for part in article["paragraphs"] for qa in part["qas"]]
        except (TypeError, KeyError, AttributeError):
            _bad(problems, "no paragraphs with questions", f"{file}[{number}]")
            continue
        for context, qa in pairs:
            place = f"{file} {qa.get('id', '?') if isinstance(qa, dict) else '?'}"
            if not isinstance(qa, dict) or not isinstance(qa.get("question"), str):
                _bad(problems, "no question", place)
                continue
            said = {"id": qa.get("id"), "title": title, "context": context, "question": qa["question"]}
            yield place, {**said, "answers": qa.get("answers", [])}


def _conll_rows(file: Path, problems: Problems, column_names: list[str] | None) -> Iterator[tuple[str, Row]]:
    """Sentences between empty lines, a token a line: ``tokens`` is the first column, ``tags`` the last."""
    with _open(file) as stream:
        first, words = "", list[list[str]]()
        for place, line in _lines(stream, file, problems):
            fields = line.split("\t") if "\t" in line else line.split()
            if not line.strip() or line.startswith("-DOCSTART-"):
                if words:
                    yield from _sentence(words, first, problems, column_names)
                words = []
                continue
            first = first if words else place
            words.append(fields)
        if words:
            yield from _sentence(words, first, problems, column_names)


def _sentence(
    words: list[list[str]], place: str, problems: Problems, column_names: list[str] | None
) -> Iterator[tuple[str, Row]]:
    widths = {len(fields) for fields in words}
    if len(widths) > 1 or (column_names is not None and widths != {len(column_names)}):
        _bad(problems, "lines of different numbers of columns", place)
        return
    columns = [list(column) for column in zip(*words, strict=True)]
    names = column_names
    if names is None:
        names = ["tokens", *(f"column_{k}" for k in range(2, len(columns))), "tags"][: len(columns)]
    yield place, dict(zip(names, columns, strict=True))


def _parquet_rows(file: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(1024):
            for row in batch.to_pylist():
                yield f"{file} row {number}", row
                number += 1
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:  # the latter: a text that is no UTF-8
        said = (str(error).splitlines() or [""])[0][:200]
        raise UserError(f"{file} cannot be read as parquet ({said}): copy it again") from error


def _hub_rows(source: str, config: str | None) -> Iterator[tuple[str, Row]]:
    """Rows of a data set on the Hugging Face hub; numbers of classes become their names."""
    from dualroute.tasks.metrics import library

    datasets = library("datasets")
    name, _, split = source.partition("#")
    try:
        found = datasets.load_dataset(name, config, split=split or "train")
    except Exception as error:  # the library raises its own, its hub's and its connection's
        said = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f"data set {source!r} on the Hugging Face hub cannot be read ({said}): check its name and the "
            f"connection, or give a file or folder that is here"
        ) from error
    classes = {
        name: feature.names
        for name, feature in found.features.items()
        if type(feature).__name__ == "ClassLabel"
    }
    for number, row in enumerate(found):
        for name, names in classes.items():
            value = row[name]
            row[name] = names[value] if isinstance(value, int) and 0 <= value < len(names) else None
        yield f"{source} row {number}", row


def divided(
    rows: Iterable[tuple[str, Row]], share: float, group: str | None
) -> tuple[list[tuple[str, Row]], list[tuple[str, Row]]]:
    """Training and validation rows, by a hash of each row or of its ``group``; equal ones on one side.

    Raises:
        UserError: A row has no such column.
    """
    train, validation = list[tuple[str, Row]](), list[tuple[str, Row]]()
    for place, row in rows:
        if group is not None and group not in row:
            columns = ", ".join(map(repr, row))
            raise UserError(f"data.group is {group!r}, and {place} has only {columns}: name one of these")
        said = row if group is None else row[group]
        text = json.dumps(said, sort_keys=True, ensure_ascii=False, default=media_rows.said)
        draw = int.from_bytes(hashlib.sha256(text.encode("utf-8", "replace")).digest()[:8], "big") / 2**64
        (validation if draw < share else train).append((place, row))
    return train, validation
