"""Rows of a user's data: from files, folders and the Hugging Face hub, one at a time.

In: a path, or a name on the hub.  Here: :func:`read_rows` yields ``(place, row)``, a row being a dict; lines
that are none are counted (:class:`~dualroute.tasks.data.problems.Problems`).  Next: a kind encodes the rows
(:mod:`~dualroute.tasks.data.encode`).

The formats of files are those of :mod:`~dualroute.tasks.data.row_files`.  A folder is all such files in it,
by name, or the images or recordings in it (:mod:`~dualroute.tasks.data.media_rows`).  A row from a file knows
the file's folder, where paths in it begin.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from dualroute.errors import UserError
from dualroute.files import require_regular
from dualroute.tasks.data import media_rows
from dualroute.tasks.data.problems import Problems
from dualroute.tasks.data.row_files import FORMATS, OPENERS, file_rows, format_of
from dualroute.tasks.kind import Row


class FileRow(dict[str, Any]):
    """A row that knows the folder of its file, where the paths in it begin.

    Attributes:
        folder: Of the file.
    """

    def __init__(self, row: Row, folder: Path) -> None:
        super().__init__(row)
        self.folder = folder


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
        if _is_of_media(Path(source)):
            folder = Path(source)
            rows = ((place, FileRow(row, folder)) for place, row in media_rows.folder_rows(folder))
        else:
            rows = (
                (place, FileRow(row, file.parent))
                for file in files_of(source)
                for place, row in file_rows(file, problems, format, column_names)
            )
    else:
        rows = _hub_rows(source, hub_config)
    for place, row in islice(rows, limit):
        problems.rows += 1
        yield place, row


def is_local(source: str) -> bool:
    """Whether a source is a path, rather than a name on the hub."""
    return os.path.lexists(source) or bool(Path(source).suffix in {*FORMATS, *OPENERS}) or source[:1] in "./~"


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
    found = media_rows.media_files(path) if _is_of_media(path) else _row_files(path)
    if not found:
        raise UserError(f"{source} holds no file of rows: it reads {', '.join(FORMATS)}")
    return found


def _is_of_media(folder: Path) -> bool:
    """Whether a folder's rows are its images or recordings: no file in it but notes (.txt) has rows."""
    said = [file for file in _row_files(folder) if file.suffix != ".txt"] if folder.is_dir() else []
    return not said and media_rows.holds_media(str(folder))


def _row_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file() and format_of(file) is not None)


def source_digest(source: str) -> str:
    """What tells one state of a source from another, cheaply: names, sizes and times of its files."""
    return _files_digest(files_of(source)) if is_local(source) else source


def kept_digest(source: str, hub_config: str | None) -> str:
    """The same; of a data set on the hub it is of the files that the library has made of it here."""
    if not is_local(source):
        found = _of_hub(source, hub_config)
        files = _files_digest([Path(file["filename"]) for file in found.cache_files])
        return f"{files} {getattr(found, '_fingerprint', '')}"
    return source_digest(source)


def holds_its_media(source: str) -> bool:
    """Whether the images or recordings of a source are its own files, rather than files that rows name."""
    return Path(source).suffix == ".npz" or (is_local(source) and _is_of_media(Path(source)))


def _files_digest(files: list[Path]) -> str:
    said = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def _of_hub(source: str, config: str | None) -> Any:
    """A split of a data set on the Hugging Face hub.

    Raises:
        UserError: It cannot be had.
    """
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
    return found


def _hub_rows(source: str, config: str | None) -> Iterator[tuple[str, Row]]:
    """Rows of a data set on the Hugging Face hub; numbers of classes become their names."""
    found = _of_hub(source, config)
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
    """Training and validation rows; see :func:`is_held_out`."""
    train, validation = list[tuple[str, Row]](), list[tuple[str, Row]]()
    for place, row in rows:
        (validation if is_held_out(place, row, share, group) else train).append((place, row))
    return train, validation


def is_held_out(place: str, row: Row, share: float, group: str | None) -> bool:
    """Whether a row is for validation, by a hash of it or of its ``group``; equal ones are on one side.

    Raises:
        UserError: The row, which is at ``place``, has no such column.
    """
    if group is not None and group not in row:
        columns = ", ".join(map(repr, row))
        raise UserError(f"data.group is {group!r}, and {place} has only {columns}: name one of these")
    said = row if group is None else row[group]
    text = json.dumps(said, sort_keys=True, ensure_ascii=False, default=media_rows.said)
    draw = int.from_bytes(hashlib.sha256(text.encode("utf-8", "replace")).digest()[:8], "big") / 2**64
    return draw < share
