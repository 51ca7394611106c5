"""Documents in rows: whole where they fit, one or several to a row, padded. A plan beside `BatchPlan`.

In: the lengths of the documents. Out: `PackedRows`, a `SamplePlan` and `WindowPlan` whose samples are rows.

1. A document longer than ``context`` is cut into pieces of ``context`` tokens and a rest; no other is cut.
2. ``one_per_row``: each piece has a row of its own.
   ``best_fit``: full pieces have one, and the others are packed, longest first, each into the fullest row
   that has room for it (best-fit-decreasing; Ding et al. 2024, https://arxiv.org/abs/2404.10830, found that
   models learn better from text that is not cut).
3. Packing is done in groups of neighbouring documents, about `ROWS_IN_GROUP` rows each, so that the row of
   any number is found by packing its group alone. Held are two bytes a row: how many labels it lacks; of many
   documents they are kept beside the data, so that the next start need not pack all groups again.
4. Epoch e visits all rows once, in the order of a keyed permutation, as `BatchPlan` visits windows.
"""

from __future__ import annotations

import bisect
import hashlib
import math
from collections import OrderedDict
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dualroute.data.order.document_stream import DocumentStream, Int64
from dualroute.data.order.kept_arrays import Arrays, kept_arrays
from dualroute.data.order.permutation import Shuffle, visited
from dualroute.errors import UserError

Packing = Literal["concatenate", "best_fit", "one_per_row"]
ROWS_IN_GROUP = 128
_FEWEST_IN_GROUP = 64  # documents; the most are as many as a row has slots, so that a token costs the same
_ROW_BITS = 32
_GROUPS_HELD = 64
_TARGETS_AT_ONCE = 4096
#: Documents from which on the rows' numbers are kept: a second or two of packing.
KEPT_FROM = 200_000
_VERSION = 1


class Rows(NamedTuple):
    """The rows of a group of documents.

    Attributes:
        pieces: (pieces, 4) as `DocumentStream.pieces` has them, row after row.
        bounds: (rows + 1,) where each row begins in ``pieces``.
    """

    pieces: Int64
    bounds: Int64


def best_fit(lengths: Int64, room: int) -> list[list[int]]:
    """Rows of items: the longest first, each into the fullest row that has room for it.

    Args:
        lengths: (items,), from 1 to ``room``.

    Returns:
        Numbers of the items of each row, in the order in which they were put there.
    """
    order = np.argsort(-lengths, kind="stable")
    rooms: list[int] = []  # ascending: the room that a row has left, and the row's number in the lower bits
    rows: list[list[int]] = []
    for item, size in zip(order.tolist(), lengths[order].tolist(), strict=True):
        place = bisect.bisect_left(rooms, size << _ROW_BITS)
        if place < len(rooms):
            left, row = divmod(rooms.pop(place), 1 << _ROW_BITS)
            rows[row].append(item)
        else:
            left, row = room, len(rows)
            rows.append([item])
        if left > size:
            bisect.insort(rooms, (left - size << _ROW_BITS) + row)
    return rows


@dataclass(frozen=True, eq=False)
class PackedRows:
    """The order of a training on rows of whole documents.

    Attributes:
        stream: the training documents.
        fingerprint: of the manifest, so that other data mean another order.
        seed: any integer.
        context: slots of a row.
        samples_per_batch: rows per optimizer step, over all ranks.
        packing: see the module's docstring.
        kept_in: a folder for the rows' numbers; null keeps none.
        decided_by: what besides the other fields decides the lengths of the documents.
        shuffle: among how much of the data the order is random; null is all.

    Raises:
        UserError: a number below 1.
    """

    stream: DocumentStream
    fingerprint: str
    seed: int
    context: int
    samples_per_batch: int
    packing: Literal["best_fit", "one_per_row"]
    kept_in: Path | None = None
    decided_by: str = ""
    shuffle: Shuffle | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("context", "samples_per_batch"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")
        object.__setattr__(self, "_cache", OrderedDict())

    def __getstate__(self) -> dict[str, object]:
        state = {**self.__dict__, "_cache": OrderedDict()}
        if isinstance(state.get("_table", (0, 0))[1], np.memmap):  # which a copy maps for itself
            del state["_table"]
        return state

    # ------------------------------------------------------------------ rows

    @cached_property
    def group(self) -> int:
        """Documents of a group; a power of two."""
        wanted = ROWS_IN_GROUP * self.context * self.stream.documents / self.stream.tokens
        return max(1 << round(math.log2(max(min(wanted, self.context), 1))), _FEWEST_IN_GROUP)

    @cached_property
    def _table(self) -> tuple[Int64, NDArray[np.unsignedinteger[Any]]]:
        """(groups + 1,) rows before each group; (rows,) slots of each row that have no target."""
        if self.kept_in is None or self.stream.documents < KEPT_FROM:
            arrays = self._counted()
        else:
            said = (_VERSION, self.fingerprint, self.decided_by, self.packing, self.context, self.group)
            name = hashlib.sha256(repr(said).encode()).hexdigest()[:32]
            arrays = kept_arrays(self.kept_in / name, self._counted)
        return arrays["rows"], arrays["without"]  # type: ignore[return-value]

    def _counted(self) -> Arrays:
        groups = -(-self.stream.documents // self.group)
        small = np.uint16 if self.context < 1 << 16 else np.uint32
        rows, without = [0], [np.zeros(0, dtype=small)]
        for number in range(groups):
            pieces, bounds = self._pack(number)
            before = np.concatenate([[0], np.cumsum(pieces[:, 3])])
            rows.append(len(bounds) - 1)
            without.append((self.context - np.diff(before[bounds])).astype(small))
        return {"rows": np.cumsum(rows, dtype=np.int64), "without": np.concatenate(without)}

    def _lengths(self, group: int) -> Int64:
        lengths = self.stream.lengths.blocks(np.array([group]), self.group)[0]
        return lengths[: self.stream.documents - group * self.group].astype(np.int64)

    def rows_of(self, group: int) -> Rows:
        """The rows of a group; the last ones asked for are kept."""
        cache: OrderedDict[int, Rows] = self._cache  # type: ignore[attr-defined]
        if group in cache:
            cache.move_to_end(group)
            return cache[group]
        cache[group] = self._pack(group)
        if len(cache) > _GROUPS_HELD:
            cache.popitem(last=False)
        return cache[group]

    def _pack(self, group: int) -> Rows:
        lengths = self._lengths(group)
        pieces = -(-lengths // self.context)
        of = np.repeat(np.arange(len(lengths)), pieces)
        number = np.arange(len(of)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        starts = number * self.context
        tokens = np.minimum(lengths[of] - starts, self.context)
        targets = np.minimum(tokens, lengths[of] - starts - 1)
        table = np.stack([of + group * self.group, starts, tokens, targets], axis=1)
        if self.packing == "one_per_row":
            return Rows(table, np.arange(len(table) + 1))
        full, rest = np.flatnonzero(tokens == self.context), np.flatnonzero(tokens < self.context)
        packed = [rest[row] for row in best_fit(tokens[rest], self.context)]
        sizes = np.concatenate([np.ones(len(full), dtype=np.int64), [len(row) for row in packed]])
        members = np.concatenate([full, *packed])
        return Rows(table[members], np.cumsum(np.concatenate([[0], sizes]), dtype=np.int64))

    def pieces(self, sample: int) -> Int64:
        """See `WindowPlan.pieces`."""
        row = sample % self.windows_per_epoch
        firsts = self._table[0]
        group = int(np.searchsorted(firsts, row, side="right")) - 1
        rows, at = self.rows_of(group), row - int(firsts[group])
        return rows.pieces[rows.bounds[at] : rows.bounds[at + 1]]

    # ------------------------------------------------------------------ order

    @property
    def windows_per_epoch(self) -> int:
        """Rows."""
        return len(self._table[1])

    def epochs(self, samples: int) -> float:
        """See `SamplePlan.epochs`."""
        return samples / self.windows_per_epoch

    def samples_in(self, epochs: float) -> int:
        """See `SamplePlan.samples_in`."""
        return math.ceil(round(epochs * self.windows_per_epoch, 6))

    def ids(self, numbers: Int64) -> Int64:
        """See `SamplePlan.ids`."""
        key = (self.fingerprint, self.seed, self.packing)
        return visited(numbers, self.windows_per_epoch, *key, shuffle=self.shuffle)

    def num_targets(self, samples: ArrayLike) -> int:
        """See `SamplePlan.num_targets`."""
        rows = np.asarray(samples, dtype=np.int64).reshape(-1) % self.windows_per_epoch
        return self.context * len(rows) - int(self._table[1][rows].sum(dtype=np.int64))


class Use(NamedTuple):
    """What a packing makes of a text, as shares.

    Attributes:
        padding: of the slots, without a token.
        cut: of the documents, that do not stay in one piece.
        longer: of the documents, that no row has room for.
        unread: of the tokens, that an epoch leaves out.
    """

    padding: float
    cut: float
    longer: float
    unread: float


def use_of(stream: DocumentStream, context: int, packing: Packing, rows: int) -> Use:
    """What ``rows`` rows an epoch make of a stream; of `concatenate` the expectation over its offsets."""
    longer, cut = 0, 0.0
    for number in range(-(-stream.documents // _TARGETS_AT_ONCE)):
        lengths = stream.lengths.blocks(np.array([number]), _TARGETS_AT_ONCE)[0]
        lengths = lengths[: stream.documents - number * _TARGETS_AT_ONCE]
        longer += int((lengths > context).sum())
        cut += float(np.minimum(lengths - 1, context).sum()) / context
    documents = stream.documents
    if packing == "concatenate":
        return Use(0.0, cut / documents, longer / documents, 1 - rows * context / stream.tokens)
    return Use(1 - stream.tokens / (rows * context), longer / documents, longer / documents, 0.0)


def use_line(use: Use, packing: Packing) -> str:
    """The same for people."""
    if packing == "concatenate":
        return (
            f"packing concatenate: no padding; {use.cut:.1%} of the documents are cut ({use.longer:.1%} are "
            f"longer than the context); {use.unread:.2%} of the tokens are left out in an epoch"
        )
    return (
        f"packing {packing}: {use.padding:.1%} padding; {use.cut:.1%} of the documents are cut, which are "
        "longer than the context"
    )
