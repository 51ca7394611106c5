"""Rows of images and recordings: arrays in an .npz file, and folders of files.

In: a file or folder.  Out: ``(place, row)`` for :mod:`~dualroute.tasks.data.rows`.

An .npz holds arrays of one length, and a row is an entry of each (``x`` an image, ``y`` its class).  In a
folder of files a row has ``image`` or ``audio``, the file, and ``label``, the folder that it lies in, where
they lie in folders of classes.
"""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dualroute.errors import UserError

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")
RECORDINGS = (".wav", ".flac", ".ogg")
#: Bytes of the arrays of a file, which are held in memory.
MOST_BYTES = 8 << 30

Row = dict[str, Any]


def holds_media(source: str) -> bool:
    """Whether a source is a folder with images or recordings in it."""
    return Path(source).is_dir() and bool(media_files(Path(source)))


def media_files(folder: Path) -> list[Path]:
    """Images and recordings in a folder and those in it, by name."""
    named = (file for file in folder.rglob("*") if file.suffix.lower() in IMAGES + RECORDINGS)
    return sorted(file for file in named if not file.is_dir())


def folder_rows(folder: Path) -> Iterator[tuple[str, Row]]:
    """A row for each file, by its path in ``folder``, so that what follows from rows does not follow from
    where they lie; the class is the folder that it lies in."""
    for file in media_files(folder):
        row: Row = {"image" if file.suffix.lower() in IMAGES else "audio": str(file.relative_to(folder))}
        if file.parent != folder:
            row["label"] = file.parent.name
        yield str(file), row


def array_rows(file: Path) -> Iterator[tuple[str, Row]]:
    """A row for each entry of the arrays of an .npz file; numbers are Python's.

    Raises:
        UserError: The file is damaged, holds objects or too much, or its arrays are of different lengths.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > MOST_BYTES:
            raise UserError(
                f"{file} holds {size:,} bytes, more than {MOST_BYTES:,}: divide it into several files"
            )
        with np.load(file, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(
            f"{file} cannot be read as arrays ({error}): copy it again, or write it with np.savez"
        ) from (error)
    lengths = {name: len(values) if values.ndim else 0 for name, values in arrays.items()}
    if len(set(lengths.values())) != 1 or not all(lengths.values()):
        raise UserError(f"{file} holds arrays of lengths {lengths}: give arrays with one entry for each row")
    for number in range(next(iter(lengths.values()))):
        row = {name: values[number] for name, values in arrays.items()}
        yield f"{file}[{number}]", {n: v.item() if v.ndim == 0 else v for n, v in row.items()}


def said(value: Any) -> str:
    """What tells one value from another: of an array the hash of its content."""
    if isinstance(value, np.ndarray):
        return hashlib.sha256(f"{value.dtype.str} {value.shape}".encode() + value.tobytes()).hexdigest()
    return str(value)


def path_in(row: Row, value: Any) -> Path | None:
    """The file that a value of a row names, from the folder of the row's own file; null where it is no
    text."""
    if not isinstance(value, str) or not value:
        return None
    return Path(getattr(row, "folder", ".")) / value
