"""What a preparation remembers of finished work, and when it may be believed.

Comes in: what `prepare` counted and what `shards` wrote. Goes out: the same, to the run that continues an
interrupted one, or the reason why it cannot be used and the work is done again.

``.prepare/`` in the output folder holds, until the manifest is written::

    survey.json          counts of the first pass, and the SHA-256 of the tokenizer
    train-00000.json     a finished shard, as the manifest will describe it
    train-00000.rows     its rows of the index

Nothing here is taken on trust. Each note carries the checksum of its contents, and a shard counts as finished
when its tar has the noted SHA-256, its rows are possible, each of them points at an array of the length that
it states, and the tokenizer is still the one that made the ids.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import mmap
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dualroute.data.index import INDEX_COLUMNS, ROW_BYTES, check_rows
from dualroute.data.manifest import Shard, canonical_json, parse_json, shard_from_json
from dualroute.errors import UserError, other_remedy
from dualroute.files import file_sha256, read_limited, require_regular, write_bytes_atomically

STATE_FOLDER = ".prepare"
SPLITS = ("train", "val")
SURVEY_FILE = "survey.json"
_MAX_NOTE_BYTES = 64 << 20
_MAX_PLAN_BYTES = 1 << 30  # 50 bytes an input file
_MAX_ROWS_BYTES = 4 << 30


class Unusable(Exception):
    """A note, or what it speaks of, is not as it was written; the message says how, without a path."""


def npy_bytes(ids: np.ndarray) -> tuple[bytes, int]:
    """A 1-D array as a .npy file, and the offset of its first element therein."""
    header = _npy_header(ids.dtype.str, len(ids))
    return header + ids.tobytes(), len(header)


@functools.lru_cache(1 << 14)
def _npy_header(dtype: str, count: int) -> bytes:
    stream = io.BytesIO()
    description = {"descr": dtype, "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(stream, description)
    return stream.getvalue()


def write_note(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` with its checksum, by rename, over whatever was there."""
    clear(path)
    note = {"content": content, "sha256": hashlib.sha256(canonical_json(content)).hexdigest()}
    write_bytes_atomically(path, json.dumps(note).encode())


def read_note(path: Path) -> dict[str, Any] | None:
    """What `write_note` wrote; None if there is nothing.

    Raises:
        Unusable: it cannot be read, or is not what was written.
    """
    if not os.path.lexists(path):
        return None
    try:
        note = parse_json(read_limited(path, _MAX_NOTE_BYTES))
    except ValueError as error:  # a UserError too
        raise Unusable(f"its note {path.name} cannot be read") from error
    content = note.get("content") if isinstance(note, dict) else None
    if not isinstance(content, dict):
        raise Unusable(f"its note {path.name} is none of this version")
    if hashlib.sha256(canonical_json(content)).hexdigest() != note.get("sha256"):
        raise Unusable(f"its note {path.name} is damaged")
    return content


def clear(path: Path) -> None:
    """Make way for a file inside the state folder; what is there is ours, whatever became of it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)


def read_plan(path: Path) -> dict[str, Any]:
    """The plan of an earlier run, of the types that a comparison relies on."""
    try:
        plan = parse_json(read_limited(path, _MAX_PLAN_BYTES))
    except UserError as error:
        raise other_remedy(error, "use --force true to start again") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); use --force true to start again") from error
    inputs = plan.get("inputs") if isinstance(plan, dict) else None
    sound = isinstance(inputs, list) and all(isinstance(entry, list) and entry for entry in inputs)
    if not sound or not isinstance(plan.get("options"), dict):
        raise UserError(f"{path}: no record of a preparation; use --force true to start again")
    if not all(isinstance(entry[0], str) for entry in plan["inputs"]):
        raise UserError(f"{path}: no record of a preparation; use --force true to start again")
    return plan


def read_survey(folder: Path, tokenizer_file: Path, plan: str) -> dict[str, Any] | None:
    """The survey of an earlier run, whose tokenizer is still there; None if there is none.

    Args:
        folder: of the data set.
        tokenizer_file: the tokenizer that the survey ended with.
        plan: SHA-256 of options and inputs; a survey of another plan is not used.

    Raises:
        Unusable: there is one, but it or the tokenizer cannot be used.
    """
    survey = read_note(folder / STATE_FOLDER / SURVEY_FILE)
    if survey is None:
        return None
    splits: Any = survey.get("splits")
    sound = isinstance(splits, dict) and set(splits) == set(SPLITS) and _are_counts(survey.get("dropped"))
    if not sound or not all(_are_counts(splits[split], "documents", "bytes") for split in SPLITS):
        raise Unusable(f"its note {SURVEY_FILE} is none of this version")
    if survey.get("plan") != plan:
        raise Unusable(f"its note {SURVEY_FILE} is of another preparation")
    try:
        require_regular(tokenizer_file)
        found = file_sha256(tokenizer_file)
    except (UserError, OSError) as error:
        raise Unusable(f"{tokenizer_file.name} cannot be read") from error
    if found != survey.get("tokenizer_sha256"):
        raise Unusable(f"{tokenizer_file.name} is not the one that was made")
    return survey


def _are_counts(value: Any, *keys: str) -> bool:
    """Whether ``value`` is a table of whole numbers from 0 on, with exactly these keys if there are any."""
    return (
        isinstance(value, dict)
        and (not keys or set(value) == set(keys))
        and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in value.values())
    )


def write_shard_note(
    folder: Path, split: str, number: int, shard: Shard, rows: NDArray[np.int64], dtype: str, origin: str
) -> None:
    """Note a finished shard.

    Args:
        rows: of the index, (documents, 4).
        dtype: of the ids, as numpy spells it (``<u2``).
        origin: what the ids were made from and with, to be compared.
    """
    note, rows_file = _paths(folder, split, number)
    data = rows.astype("<i8").tobytes()
    clear(rows_file)
    write_bytes_atomically(rows_file, data)
    content = {"rows_sha256": hashlib.sha256(data).hexdigest(), "dtype": dtype, "origin": origin}
    write_note(note, {"shard": asdict(shard), **content})


def finished_shard(folder: Path, split: str, number: int, dtype: str, origin: str) -> Shard | None:
    """The shard, if an earlier run finished it; None if none did. Reads the whole tar.

    Args:
        dtype, origin: see `write_shard_note`; what this run would write with.

    Raises:
        Unusable: there is a note of it, but note, rows or tar are not what was written.
    """
    note, _ = _paths(folder, split, number)
    content = read_note(note)
    if content is None:
        return None
    itemsize = np.dtype(dtype).itemsize
    try:
        shard = shard_from_json(note, content.get("shard"), itemsize)
    except UserError as error:
        raise Unusable(f"its note {note.name} is none of this version") from error
    if shard.file != f"{split}-{number:05d}.tar":
        raise Unusable(f"its note {note.name} is that of another shard")
    if (content.get("dtype"), content.get("origin")) != (dtype, origin):
        raise Unusable("it is of another preparation, or was written with another tokenizer")
    rows = _read_rows(folder, split, number, shard, content.get("rows_sha256"))
    try:
        check_rows(rows, number, shard.tokens, shard.bytes, shard.size, itemsize)
    except ValueError as error:
        raise Unusable(f"its rows of the index are impossible ({error})") from error
    tar = folder / shard.file
    try:
        require_regular(tar)
        if (size := tar.stat().st_size) != shard.size:
            raise Unusable(f"it has {size} bytes, {shard.size} were written")
        if file_sha256(tar) != shard.sha256:
            raise Unusable("its contents are not what was written")
        if (document := _stray_row(tar, rows, dtype)) is not None:
            raise Unusable(f"document {document} is not where the index has it")
    except (UserError, OSError) as error:
        raise Unusable("it is gone, or cannot be read") from error
    return shard


def shard_rows(folder: Path, split: str, number: int, shard: Shard) -> NDArray[np.int64]:
    """Rows of the index of a finished shard, (documents, 4).

    Raises:
        UserError: they have been damaged since the shard was looked at.
    """
    note, _ = _paths(folder, split, number)
    try:
        return _read_rows(folder, split, number, shard, (read_note(note) or {}).get("rows_sha256"))
    except Unusable as error:
        raise UserError(f"{folder / shard.file}: {error}; run `dualroute prepare` again") from error


def _read_rows(folder: Path, split: str, number: int, shard: Shard, sha256: Any) -> NDArray[np.int64]:
    _, path = _paths(folder, split, number)
    try:
        data = read_limited(path, _MAX_ROWS_BYTES)
    except UserError as error:
        raise Unusable(f"its rows of the index, {path.name}, cannot be read") from error
    if len(data) != ROW_BYTES * shard.documents or hashlib.sha256(data).hexdigest() != sha256:
        raise Unusable(f"its rows of the index, {path.name}, are damaged")
    return np.frombuffer(data, dtype="<i8").reshape(-1, len(INDEX_COLUMNS))


def _stray_row(tar: Path, rows: NDArray[np.int64], dtype: str) -> int | None:
    """The first row that does not point behind the header of an array of its length, if there is one."""
    with open(tar, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for place, (_, offset, count, _) in enumerate(rows.tolist()):
            header = _npy_header(dtype, count)
            if offset < len(header) or data[offset - len(header) : offset] != header:
                return place
    return None


def _paths(folder: Path, split: str, number: int) -> tuple[Path, Path]:
    """Where the note of a shard and its rows are."""
    base = folder / STATE_FOLDER / f"{split}-{number:05d}"
    return base.with_suffix(".json"), base.with_suffix(".rows")
