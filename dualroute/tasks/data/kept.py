"""Encoded training examples in files, shared by the processes of a machine and read again by the next start.

In: ``data.encoded``, a folder, and what decides which examples there are.  Here: one process encodes the
rows, without ever holding all of them; what it has written appears by rename, and processes that want it
meanwhile wait.  Out: :class:`~dualroute.tasks.data.examples.Examples` over memory maps.

A folder in it, named by the hash of all that decides: ``lengths.bin``, ``targets.bin``, ``rows.bin``
(int64), ``field-NAME.bin`` for each field, and ``examples.json``, which says types, sizes, the examples'
fingerprint and what else the one who encodes has to tell.  The fingerprint is compared at each start, so that
a damaged file is not learnt from.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dualroute.data.manifest import canonical_json
from dualroute.errors import UserError
from dualroute.files import file_sha256, found_or_made, read_json
from dualroute.tasks.data.examples import Example, Examples, Fields

_FORMAT, _VERSION, _NOTE = "dualroute-examples", 1, "examples.json"
_KEY = "data.encoded"
_NUMBERS = ("lengths", "targets", "rows")


class ExamplesWriter:
    """Writes examples one after the other into files of a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._files = folder, ExitStack()
        self._numbers = [self._open(name) for name in _NUMBERS]
        self._fields: dict[str, tuple[BinaryIO, np.dtype[Any], tuple[int, ...]]] = {}
        self.examples = self.tokens = 0

    def _open(self, name: str) -> BinaryIO:
        return self._files.enter_context((self._folder / f"{name}.bin").open("wb"))

    def add(self, row: int, example: Example) -> None:
        """Append one; ``row`` is the number of the row that it comes from."""
        if not self.examples:
            self._fields = {
                name: (self._open(f"field-{name}"), values.dtype, values.shape[1:])
                for name, values in sorted(example.fields.items())
            }
        kinds = {name: (values.dtype, values.shape[1:]) for name, values in example.fields.items()}
        known = {name: (dtype, shape) for name, (_, dtype, shape) in self._fields.items()}
        if kinds != known:
            raise UserError(
                f"{_KEY}: an example has the fields {kinds}, and one before it {known}: have the kind of "
                f"task give all examples fields of one type, or leave {_KEY} out"
            )
        for name, values in example.fields.items():
            self._fields[name][0].write(np.ascontiguousarray(values).data)
        numbers = (len(example), example.count_targets(), row)
        for stream, number in zip(self._numbers, numbers, strict=True):
            stream.write(np.int64(number).tobytes())
        self.examples, self.tokens = self.examples + 1, self.tokens + len(example)

    def close(self, told: dict[str, Any]) -> None:
        """Finish; ``told`` (JSON) is given back by :func:`kept_examples`."""
        self._files.close()
        note = {
            "format": _FORMAT,
            "version": _VERSION,
            "examples": self.examples,
            "tokens": self.tokens,
            "fields": {name: [dtype.str, list(shape)] for name, (_, dtype, shape) in self._fields.items()},
            "rows": file_sha256(self._folder / "rows.bin"),
            "told": told,
        }
        note["fingerprint"] = Examples.fingerprint(_mapped(self._folder, note))
        note["sha256"] = _sealed(note)
        (self._folder / _NOTE).write_text(json.dumps(note), encoding="ascii")

    def abandon(self) -> None:
        """Close the files of what was not finished."""
        self._files.close()


def key_of(what: Any) -> str:
    """Name of the folder for examples that ``what`` (JSON) decides."""
    return hashlib.sha256(canonical_json([_VERSION, what])).hexdigest()[:32]


def kept_examples(
    folder: str | Path, key: str, encode: Callable[[ExamplesWriter], dict[str, Any]]
) -> tuple[Examples, dict[str, Any], bool]:
    """The examples that are kept under a name, encoded by the first who asks for them.

    Args:
        folder: Made where it is not there.
        key: See :func:`key_of`.
        encode: Adds all examples to a writer; what it gives back is told to those who find them.

    Returns:
        The examples, what was told of them, and whether they were encoded by this call.

    Raises:
        UserError: The folder cannot be written, or what is there cannot be read.
    """
    place = Path(folder) / key

    def make(aside: Path) -> None:
        writer = ExamplesWriter(aside)
        try:
            writer.close(encode(writer))
        finally:
            writer.abandon()

    (examples, told), made = found_or_made(place, lambda: _kept(place), make, _KEY)
    return examples, told, made


def _kept(place: Path) -> tuple[MappedExamples, dict[str, Any]] | None:
    """What is kept at a place, null where that is nothing or damaged.

    Raises:
        UserError: It cannot be read.
    """
    try:
        note = read_json(place / _NOTE)
        if (note["format"], note["version"], note["sha256"]) != (_FORMAT, _VERSION, _sealed(note)):
            return None
        found = _mapped(place, note)
        if Examples.fingerprint(found) != note["fingerprint"]:
            return None
        return (found, note["told"]) if file_sha256(place / "rows.bin") == note["rows"] else None
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, AttributeError):
        return None
    except OSError as error:
        raise UserError(f"{_KEY} {place} cannot be read ({error}): mend that, or name another") from error


def _sealed(note: dict[str, Any]) -> str:
    """The note's own sha256."""
    return hashlib.sha256(canonical_json({k: v for k, v in note.items() if k != "sha256"})).hexdigest()


class MappedExamples(Examples):
    """Examples over memory maps; a copy in another process maps the same files.

    Attributes:
        origin: The folder and what its note says.
    """

    origin: tuple[Path, dict[str, Any]]

    def fingerprint(self) -> str:
        """What the files were compared with when they were opened."""
        if all(isinstance(values, np.memmap) for values in self.fields.values()):
            return str(self.origin[1]["fingerprint"])
        return super().fingerprint()

    def __reduce__(self) -> tuple[Any, ...]:
        added = {name: values for name, values in self.fields.items() if not isinstance(values, np.memmap)}
        return _mapped, (*self.origin, added)


def _mapped(folder: Path, note: dict[str, Any], added: Fields | None = None) -> MappedExamples:
    def of(name: str, dtype: str, shape: Iterable[int]) -> np.ndarray[Any, np.dtype[Any]]:
        path, expected = folder / f"{name}.bin", tuple(shape)
        size = math.prod(expected) * np.dtype(dtype).itemsize
        if path.stat().st_size != size:
            raise ValueError(f"{path} has {path.stat().st_size:,} bytes, not {size:,}")
        return np.memmap(path, dtype, "r", shape=expected)

    numbers = [of(name, "<i8", (note["examples"],)) for name in _NUMBERS]
    fields = {
        name: of(f"field-{name}", dtype, (note["tokens"], *shape))
        for name, (dtype, shape) in note["fields"].items()
    }
    lengths, targets, rows = (np.array(values) for values in numbers)
    made = MappedExamples.laid_out(lengths, targets, rows, {**fields, **(added or {})})
    made.origin = folder, note
    return made
