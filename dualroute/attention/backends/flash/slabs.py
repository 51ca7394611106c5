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
import math
from typing import NamedTuple

import torch
from torch import Tensor

from dualroute.attention.core.layout import Stream

MEMORY_SHARE = (
    1 / 16
)  # of the device, for the largest matrix; a slab more is 30 launches more forward, 19 backward
LEAST_ENTRIES = 1 << 26  # numbers, 256 MiB in float32, on however small a device


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
        """(X, S, ...) -> (X, documents, slots, ...), the slab's rows; a view."""
        parts = rows.unflatten(1, (self.documents, self.blocks, -1))
        return parts[:, :, slice(*self.rows)].flatten(2, 3)

    def of_columns(self, blocks: Tensor) -> Tensor:
        """(H_kv, nb, ...) -> (H_kv * documents, columns, ...)."""
        return blocks.unflatten(1, (self.documents, self.blocks)).flatten(0, 1)[:, slice(*self.columns)]


def slabs(stream: Stream, entries: int) -> list[Slab]:
    """Cover the stream with `entries` float32 numbers for each pair of slot and block, as many at once as the
    device's memory allows."""
    return stream.cached(("slabs", entries), lambda: _slabs(stream, entries))


@functools.cache
def max_entries(device: torch.device) -> int:
    """float32 numbers of one matrix on this device."""
    if device.type != "cuda":
        return LEAST_ENTRIES
    memory = torch.cuda.get_device_properties(device).total_memory
    return max(LEAST_ENTRIES, int(memory * MEMORY_SHARE) // 4)


def _slabs(stream: Stream, entries: int) -> list[Slab]:
    documents, blocks = _rectangle(stream)
    most = max_entries(stream.device) // (documents * stream.block * entries)  # pairs of blocks
    owners = [
        first for first, count, size in stream.buckets for first in range(first, first + count * size, size)
    ]
    result = []
    begin = 0
    while begin < blocks:
        # what lies before a text's end is a triangle: the first slabs, which see few blocks, have more rows
        first = 0 if documents > 1 else owners[bisect.bisect_right(owners, begin) - 1]
        seen = begin - first  # (end - begin) * (end - first) <= most
        end = begin + max(1, (math.isqrt(seen * seen + 4 * most) - seen) // 2)
        end = min(end, blocks)
        result.append(Slab(documents, blocks, (begin, end), (first, end)))
        begin = end
    return result


def _rectangle(stream: Stream) -> tuple[int, int]:
    """(documents, blocks of each); a stream of several sizes is one document."""
    if len(stream.buckets) == 1:
        return stream.buckets[0].documents, stream.buckets[0].blocks
    return 1, stream.num_blocks


def first_of_documents(stream: Stream) -> Tensor:
    """(documents, 1, 1) int32 the block with which each document of a stream of one size begins."""
    return stream.first_blocks()[:: stream.buckets[0].blocks, None, None]


def first_of_slots(stream: Stream) -> Tensor:
    """(S, 1) int64 the first block of the document of each slot."""

    def compute() -> Tensor:
        first = stream.first_blocks().long()
        return first.repeat_interleave(stream.block, output_size=stream.num_slots)[:, None]

    return stream.cached("first of slots", compute)


def _closed(stream: Stream, slab: Slab) -> Tensor:
    """(rows, 1, columns) True where tokens of a block must not read another one through router or summary.

    Open are the blocks between the first of the document, which is read anyway, and the token's own.
    """
    own = torch.arange(*slab.rows, device=stream.device)[:, None]
    column = torch.arange(*slab.columns, device=stream.device)
    first = stream.first_blocks()[slice(*slab.rows)][:, None]  # of documents of one size: those of the first
    return ((column <= first) | (column >= own))[:, None]


def fill_closed(rows: Tensor, stream: Stream, slab: Slab, value: float) -> None:
    """Put `value` where `_closed` says so in rows (X, slots * n, columns), in place."""
    closed = stream.cached(("closed", slab), lambda: _closed(stream, slab))
    rows.unflatten(1, (slab.rows[1] - slab.rows[0], -1)).masked_fill_(closed, value)
