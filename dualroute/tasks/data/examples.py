"""Encoded examples, held as a few long arrays.

In: what a kind makes of rows, one :class:`Example` after the other.  Here: fields laid end to end, with the
numbers that packing needs; their hash is the data's fingerprint.  Next: :mod:`~dualroute.tasks.data.packing`
plans windows from ``lengths`` and ``targets``, :mod:`~dualroute.tasks.data.module` reads the examples of a
window.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from dualroute.data.plan import Int64
from dualroute.data.reader import IGNORE_INDEX

Fields = dict[str, NDArray[Any]]


@dataclass
class Example:
    """One text, image or recording as the model reads it.

    Attributes:
        fields: Arrays with one entry (or one row) for each of its tokens, all of one length:
            ``input_ids`` (or what a frontend reads), ``labels`` int64 with ``IGNORE_INDEX`` where nothing is
            to be learnt (may be absent, in a prediction), ``outputs`` bool, where the head's output is wanted
            (absent: nowhere), and whatever else the kind's loss needs.
        targets: What the summed loss is divided by; null counts the labels that are not ignored.
        note: What the kind remembers for decoding (the characters that a token stands for); not batched.
    """

    fields: dict[str, NDArray[Any]]
    targets: int | None = None
    note: Any = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(next(iter(self.fields.values())))

    def count_targets(self) -> int:
        """See ``targets``."""
        if self.targets is not None:
            return self.targets
        labels = self.fields.get("labels")
        return 0 if labels is None else int((labels != IGNORE_INDEX).sum())


class Examples:
    """Many examples; a sequence of `Example`.

    Args:
        parts: (number of the row that it comes from, example), in order.

    Attributes:
        lengths, targets, rows: (examples,) tokens, targets and the row of each.
        fields: {name: array of all tokens}.
    """

    def __init__(self, parts: Iterable[tuple[int, Example]]) -> None:
        lengths, targets, rows = [], [], []
        arrays: dict[str, list[NDArray[Any]]] = {}
        notes: list[Any] = []
        for row, example in parts:
            if arrays and arrays.keys() != example.fields.keys():
                raise ValueError(f"an example has the fields {sorted(example.fields)}, not {sorted(arrays)}")
            for name, values in example.fields.items():
                arrays.setdefault(name, []).append(values)
            lengths.append(len(example))
            targets.append(example.count_targets())
            rows.append(row)
            notes.append(example.note)
        fields = {name: np.concatenate(values) for name, values in arrays.items()}
        self._lay(lengths, targets, rows, fields, notes)

    def _lay(self, lengths: Any, targets: Any, rows: Any, fields: Fields, notes: list[Any] | None) -> None:
        self.lengths: Int64 = np.asarray(lengths, dtype=np.int64)
        self.targets: Int64 = np.asarray(targets, dtype=np.int64)
        self.rows: Int64 = np.asarray(rows, dtype=np.int64)
        self.starts: Int64 = np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64)
        self.fields, self.notes = fields, notes

    @classmethod
    def laid_out(cls, lengths: Int64, targets: Int64, rows: Int64, fields: Fields) -> Self:
        """Examples whose arrays are there already (memory maps of files, say); without notes."""
        made = cls.__new__(cls)
        made._lay(lengths, targets, rows, fields, None)
        return made

    @classmethod
    def joined(cls, parts: Sequence[Examples], rows: Sequence[int]) -> Examples:
        """The examples of several parts, one after the other; ``rows`` are how many rows each has."""
        if len(parts) == 1:
            return parts[0]
        before = [sum(rows[:number]) for number in range(len(rows))]
        return cls(
            (int(part.rows[number]) + first, part[number])
            for part, first in zip(parts, before, strict=True)
            for number in range(len(part))
        )

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, number: int) -> Example:
        if not -len(self) <= number < len(self):
            raise IndexError(number)
        number %= len(self)
        here = slice(int(self.starts[number]), int(self.starts[number + 1]))
        fields = {name: values[here] for name, values in self.fields.items()}
        note = None if self.notes is None else self.notes[number]
        return Example(fields, int(self.targets[number]), note)

    def fingerprint(self) -> str:
        """sha256 of all fields and lengths, hexadecimal."""
        digest = hashlib.sha256(b"dualroute-examples-1")
        digest.update(self.lengths.astype("<i8").tobytes())
        digest.update(self.targets.astype("<i8").tobytes())
        for name in sorted(self.fields):
            values = self.fields[name]
            digest.update(f"{name} {values.dtype.str} {values.shape}".encode())
            digest.update(np.ascontiguousarray(values).data)
        return digest.hexdigest()
