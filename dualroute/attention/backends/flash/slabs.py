"""What is worked on at once where every token meets every block: rectangles of slots by blocks.

In: a stream. Out: `slabs` cuts it into as few rectangles as the memory allows, one as a rule; `fill_closed`
marks what a row of a rectangle may not read.

Documents of one size are a batch of rectangles. A stream of several sizes is *one* rectangle, in which the
blocks of other documents are closed: the number of launches must not depend on the documents of a batch, and
a block stands for `block` keys, so the rectangle is small.
"""

from __future__ import annotations

import bisect
import functools
from typing import NamedTuple

import torch
from torch import Tensor

from dualroute.attention.core.layout import Stream

MEMORY_SHARE = 1 / 12  # of the device, for the largest matrix; two of them exist at once
LEAST_ENTRIES = 1 << 26  # numbers, 256 MiB in float32, on however small a device
EVEN = 8  # columns: rows of a matrix begin where a product can load many numbers at once


class Slab(NamedTuple):
    """Blocks `rows` of each of `documents` and the blocks that they can read, numbered inside documents."""

    documents: int
    blocks: int  # of each document
    rows: tuple[int, int]
    columns: tuple[int, int]

    @property
    def width(self) -> int:
        return self.columns[1] - self.columns[0]

    def of_rows(self, rows: Tensor) -> Tensor:
        """(X, S, ...) -> (X * documents, slots, ...), the slab's rows; a view of contiguous rows."""
        parts = rows.unflatten(1, (self.documents, self.blocks, -1))[:, :, slice(*self.rows)]
        return parts.flatten(2, 3).flatten(0, 1)

    def of_columns(self, blocks: Tensor) -> Tensor:
        """(X, nb, ...) -> (X * documents, columns, ...); a view of contiguous ones."""
        return blocks.unflatten(1, (self.documents, self.blocks)).flatten(0, 1)[:, slice(*self.columns)]


def slabs(stream: Stream, entries: int, causal: bool = True) -> list[Slab]:
    """Cover the stream with `entries` float32 numbers for each pair of slot and block, as many at once as the
    device's memory allows."""
    return stream.cached(("slabs", entries, causal), lambda: _slabs(stream, entries, causal))


@functools.cache
def max_entries(device: torch.device) -> int:
    """float32 numbers of one matrix on this device."""
    if device.type != "cuda":
        return LEAST_ENTRIES
    memory = torch.cuda.get_device_properties(device).total_memory
    return max(LEAST_ENTRIES, int(memory * MEMORY_SHARE) // 4)


def _slabs(stream: Stream, entries: int, causal: bool) -> list[Slab]:
    documents, blocks = rectangle(stream)
    most = max_entries(stream.device) // (documents * stream.block * entries)  # pairs of blocks
    starts = [0]
    if documents == 1:
        starts = [start for first, count, size in stream.buckets for start in _every(first, count, size)]

    def columns(begin: int, end: int) -> tuple[int, int]:
        """The blocks that rows `begin` to `end` can read."""
        after = bisect.bisect_left(starts, end)  # the first document that has none of these rows
        last = blocks if after == len(starts) else starts[after]
        return starts[bisect.bisect_right(starts, begin) - 1], end if causal else last

    def area(begin: int, end: int) -> int:
        first, last = columns(begin, end)
        return (end - begin) * (last - first)

    result = []
    begin = 0
    while begin < blocks:
        # what lies before a text's end is a triangle: the first slabs, which see few blocks, have more rows
        ends = range(begin + 1, blocks + 1)
        end = begin + max(1, bisect.bisect_right(ends, most, key=functools.partial(area, begin)))
        first, last = columns(begin, end)
        if causal and end < blocks and end - (last - first) % EVEN > begin:
            end -= (last - first) % EVEN
        result.append(Slab(documents, blocks, (begin, end), columns(begin, end)))
        begin = end
    return result


def _every(first: int, count: int, size: int) -> range:
    return range(first, first + count * size, size)


def rectangle(stream: Stream) -> tuple[int, int]:
    """(documents, blocks of each); a stream of several sizes is one document."""
    if len(stream.buckets) == 1:
        return stream.buckets[0].documents, stream.buckets[0].blocks
    return 1, stream.num_blocks


def first_of_slots(stream: Stream) -> Tensor:
    """(S, 1) int64 the first block of the document of each slot."""

    def compute() -> Tensor:
        first = stream.first_blocks().long()
        return first.repeat_interleave(stream.block, output_size=stream.num_slots)[:, None]

    return stream.cached("first of slots", compute)


def first_columns(stream: Stream, parts: list[Slab]) -> Tensor | None:
    """(S, 1) int64 the block of the stream that is column 0 for each slot; None = block 0 for all."""
    if parts[0].documents > 1:
        return first_of_slots(stream)
    if not any(part.columns[0] for part in parts):
        return None

    def compute() -> Tensor:
        sizes = [(part.rows[1] - part.rows[0]) * stream.block for part in parts]
        firsts = [
            torch.full((size, 1), part.columns[0], device=stream.device)
            for size, part in zip(sizes, parts, strict=True)
        ]
        return torch.cat(firsts)

    return stream.cached(("first columns", *parts), compute)


def _closed(stream: Stream, slab: Slab, causal: bool) -> Tensor:
    """(rows, 1, columns) True where tokens of a block must not read another one through router or summary.

    Open are the blocks of the document but for the token's own and the first one, which is read anyway;
    causal, those before the token's own.
    """
    own = torch.arange(*slab.rows, device=stream.device)[:, None]
    column = torch.arange(*slab.columns, device=stream.device)
    rows = slice(*slab.rows)  # of documents of one size: those of the first
    first = stream.first_blocks()[rows, None]
    if causal:
        return ((column <= first) | (column >= own))[:, None]
    end = first + stream.blocks_in_document()[rows, None]
    return ((column <= first) | (column >= end) | (column == own))[:, None]


def fill_closed(rows: Tensor, stream: Stream, slab: Slab, causal: bool, value: float) -> None:
    """Put `value` where `_closed` says so in rows (X, slots * n, columns), in place."""
    closed = stream.cached(("closed", slab, causal), lambda: _closed(stream, slab, causal))
    rows.unflatten(1, (slab.rows[1] - slab.rows[0], -1)).masked_fill_(closed, value)
