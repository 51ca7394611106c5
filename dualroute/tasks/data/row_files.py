"""The rows of one file, by its format.

In: a file.  Out: ``(place, row)``, a row being a dict; lines that are none go to
:class:`~dualroute.tasks.data.problems.Problems`.  Next: :mod:`~dualroute.tasks.data.rows`.

Files: .csv (quoted), .tsv and .txt (tabs, nothing quoted), .jsonl (.ndjson), .json (a list of objects, or
SQuAD's), .parquet, .conll, .npz (arrays, a row of each), .dat and .data (MovieLens); each but parquet and npz
also as .gz, .xz or .bz2.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from dualroute.errors import UserError
from dualroute.tasks.data import media_rows
from dualroute.tasks.data.problems import Problems
from dualroute.tasks.kind import Row

#: Characters of one row; more is no text of a task.
MOST_CHARACTERS = 16 << 20
#: Bytes of a .json file, which is read whole.
MOST_JSON_BYTES = 1 << 30
OPENERS: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
FORMATS = {
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


def format_of(file: Path) -> str | None:
    """The format that the name of a file says."""
    name = Path(file.stem) if file.suffix in OPENERS else file
    return FORMATS.get(name.suffix)


def file_rows(
    file: Path, problems: Problems, format: str, column_names: list[str] | None
) -> Iterator[tuple[str, Row]]:
    """Rows of a file with their places; see :func:`~dualroute.tasks.data.rows.read_rows`.

    Raises:
        UserError: Its format is not known, it is empty, or cannot be read.
    """
    kind = format_of(file) if format == "auto" else format
    if kind is None:
        raise UserError(
            f"{file}: what is in a file of this name is not known: call it {', '.join(FORMATS)}, or set "
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
    binary = OPENERS.get(file.suffix, open)(file, "rb")
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
