"""The stream of blocks that the routes read: whole documents, one after the other, sorted by size.

In: buckets of documents, as `Layout.build` finds them. Out: a `Stream`, its tables for the back ends (made
once for all layers, see `Stream.cached`), and its parts by length.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dualroute.attention.core.grid import Grid
from dualroute.attention.core.precision import outside_inference_mode


class Bucket(NamedTuple):
    """`documents` neighbouring documents of `blocks` blocks each, from block `first_block` of a stream on."""

    first_block: int
    documents: int
    blocks: int


@dataclass
class Stream:
    """A line of S = num_blocks * block slots that holds whole documents, shortest (in blocks) first.

    `slot_valid` (S,) is False at the slots that fill up the last block of a document, and None when there
    are none. With a `grid` every document is an image of that size, whose blocks are regions; there any block
    but the first of a document may have slots without a patch, at its end.

    `copies` and `spans` are for what `core.clusters.spread` gives: of each bucket, how many blocks behind the
    first one of a document are copies of spans, for spans of each number of blocks, the longest first. They
    hold keys, and nobody asks from there.

    Raises:
        ValueError: the buckets do not follow each other, or `slot_valid` is not of their slots, or the blocks
        are not the regions of the grid.
    """

    block: int
    buckets: tuple[Bucket, ...]
    slot_valid: Tensor | None
    device: torch.device
    grid: Grid | None = None
    copies: tuple[tuple[int, ...], ...] = ()
    spans: tuple[int, ...] = ()
    _cache: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.block < 1:
            raise ValueError(f"block={self.block} is too small: it must be at least 1")
        end = blocks = 0
        for bucket in self.buckets:
            if bucket.first_block != end or bucket.documents < 1 or bucket.blocks <= blocks:
                raise ValueError(
                    f"buckets={self.buckets}: each must begin where the one before ends, at 0 the first, and "
                    "hold documents with more blocks"
                )
            end, blocks = end + bucket.documents * bucket.blocks, bucket.blocks
        grid = self.grid
        if grid is not None:
            regions = grid.regions[0] * grid.regions[1]
            if grid.block != self.block or any(bucket.blocks != regions for bucket in self.buckets):
                raise ValueError(f"block={self.block} and buckets={self.buckets} are not regions of {grid}")
        valid = self.slot_valid
        if valid is not None and (valid.dtype != torch.bool or tuple(valid.shape) != (self.num_slots,)):
            raise ValueError(
                f"slot_valid is {valid.dtype} {tuple(valid.shape)}: give a boolean for each of "
                f"{self.num_slots} slots"
            )

    @property
    def num_blocks(self) -> int:
        return sum(bucket.documents * bucket.blocks for bucket in self.buckets)

    @property
    def num_slots(self) -> int:
        return self.num_blocks * self.block

    def cached(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """What `compute()` gives, computed once for all layers that ask under the same `key`.

        It may be computed in inference mode and used in training later, or the other way round.
        """
        if key not in self._cache:
            self._cache[key] = outside_inference_mode(compute)()
        return self._cache[key]

    def block_in_document(self) -> Tensor:
        """(num_blocks,) number of each block inside its document, from 0."""
        return self.cached("block_in_document", self._block_in_document)

    def _block_in_document(self) -> Tensor:
        parts = [torch.arange(b.blocks, device=self.device).repeat(b.documents) for b in self.buckets]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.long, device=self.device)

    def first_blocks(self) -> Tensor:
        """(num_blocks,) int32: the first block of the document of each block."""
        return self.cached("first_blocks", self._first_blocks)

    def _first_blocks(self) -> Tensor:
        parts = []
        for first, documents, blocks in self.buckets:
            end = first + documents * blocks
            starts = torch.arange(first, end, blocks, dtype=torch.int32, device=self.device)
            parts.append(starts[:, None].expand(-1, blocks).contiguous().view(-1))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def hidden_blocks(self) -> Tensor:
        """(1 + 2 sizes, num_blocks) int32, of a stream with copies: whether each block is one; and for each
        size of spans the blocks begin..end-1 that its tokens do not read although they lie before it.

        Those are the copies from the token's own span on, which come too early, and what stands behind them
        in an other form: copies of shorter spans, or the text, of what is read as a longer one.
        """
        return self.cached("hidden_blocks", self._hidden_blocks)

    def _hidden_blocks(self) -> Tensor:
        number = self.block_in_document()
        repeats = torch.tensor([b.documents * b.blocks for b in self.buckets], device=self.device)
        extra = torch.tensor(self.copies, device=self.device)  # (buckets, sizes)
        extra = extra.repeat_interleave(repeats, 0, output_size=self.num_blocks)
        total = extra.sum(1)
        past = number - 1 - total  # blocks of the text between the first one and this one
        rows = [(number > 0) & (past < 0)]
        begin = self.first_blocks() + 1  # of the copies of a size
        for level, size in enumerate(self.spans):
            hidden = begin + past // size * size
            begin = begin + extra[:, level]
            rows += [torch.where(past < 0, 0, part) for part in (hidden, hidden + extra[:, level])]
        return torch.stack([row.to(torch.int32) for row in rows])

    def hides(self, bucket: Bucket, own: Tensor, number: Tensor) -> Tensor:
        """Whether tokens of blocks `own` do not read blocks `number`, of those before; both count inside a
        document of the bucket, and broadcast."""
        here = self.hidden_blocks()[1:, bucket.first_block : bucket.first_block + bucket.blocks].long()
        hidden = torch.zeros((), dtype=torch.bool, device=self.device)
        for begin, end in (here - bucket.first_block).unflatten(0, (-1, 2)):
            hidden = hidden | ((number >= begin[own]) & (number < end[own]))
        return hidden

    def blocks_in_document(self) -> Tensor:
        """(num_blocks,) how many blocks the document of each block has."""
        return self.cached("blocks_in_document", self._blocks_in_document)

    def _blocks_in_document(self) -> Tensor:
        sizes = [(b.blocks, b.documents * b.blocks) for b in self.buckets]
        values = torch.tensor([blocks for blocks, _ in sizes], dtype=torch.long, device=self.device)
        repeats = torch.tensor([count for _, count in sizes], dtype=torch.long, device=self.device)
        return values.repeat_interleave(repeats, output_size=self.num_blocks)

    def document_slots(self, *, tokens_only: bool = False) -> Tensor:
        """(documents + 1,) int32: where each document begins, and the end of the stream (`cu_seqlens`).

        `tokens_only`: (2 * documents + 1,), with the end of each document's tokens in between; what lies
        behind it fills up the last block.
        """
        return self.cached(("document_slots", tokens_only), lambda: self._document_slots(tokens_only))

    def _document_slots(self, tokens_only: bool) -> Tensor:
        kind, device = torch.int32, self.device
        parts = [
            torch.arange(first, first + documents * blocks, blocks, dtype=kind, device=device)
            for first, documents, blocks in self.buckets
        ]
        starts = torch.cat([*parts, torch.full((1,), self.num_blocks, dtype=kind, device=device)])  # blocks
        if not tokens_only:
            return starts * self.block
        ends = (starts[1:] - 1) * self.block + self.tokens_in_block()[starts[1:] - 1].to(torch.int32)
        inner = torch.stack([starts[:-1] * self.block, ends], dim=1).flatten()
        return torch.cat([inner, starts[-1:] * self.block])

    def tokens_in_block(self) -> Tensor:
        """(num_blocks,) how many slots of each block hold a token, at least 1."""
        valid = self.slot_valid
        if valid is None:
            return torch.full((self.num_blocks,), self.block, device=self.device)
        return self.cached("tokens_in_block", lambda: valid.view(-1, self.block).sum(1))

    def split(self, max_blocks: int) -> tuple[Stream, Stream]:
        """The documents of at most `max_blocks` blocks, and the longer ones that follow: two streams."""
        return self.cached(("split", max_blocks), lambda: self._split(max_blocks))

    def _split(self, max_blocks: int) -> tuple[Stream, Stream]:
        short = tuple(b for b in self.buckets if b.blocks <= max_blocks)
        middle = sum(b.documents * b.blocks for b in short)
        long = tuple(b._replace(first_block=b.first_block - middle) for b in self.buckets[len(short) :])
        slots = middle * self.block
        return self._part(short, slice(0, slots)), self._part(long, slice(slots, None))

    def _part(self, buckets: tuple[Bucket, ...], slots: slice) -> Stream:
        if buckets == self.buckets:
            return self
        valid = None if self.slot_valid is None else self.slot_valid[slots]
        # a mask of nothing costs less than waiting for a GPU to say so
        if valid is not None and self.device.type == "cpu" and bool(valid.all()):
            valid = None
        return Stream(self.block, buckets, valid, self.device, self.grid)

    def prepare(self, limits: Iterable[int] = ()) -> None:
        """Make what every layer will ask for: tables of the documents, and the parts by these `max_blocks`.

        On a CPU, before the stream goes to a GPU (see `map_tensors`): there, parts would be made with masks
        that hide nothing, and tables by a launch for each size of documents.
        """
        parts = {id(part): part for limit in limits for part in self.split(limit) if part.buckets}
        for stream in {id(self): self, **parts}.values():
            stream.first_blocks()
            stream.block_in_document()
            stream.blocks_in_document()
            stream.tokens_in_block()
            stream.document_slots()

    def map_tensors(self, move: Callable[[Tensor], Tensor], device: torch.device | None = None) -> Stream:
        """The same stream, each of its tensors through `move`, those of its tables and parts too."""
        return _map_stream(self, move, device or self.device, {})


def _map_stream(
    stream: Stream, move: Callable[[Tensor], Tensor], device: torch.device, done: dict[int, Stream]
) -> Stream:
    if id(stream) in done:  # a part may be the whole
        return done[id(stream)]
    valid = None if stream.slot_valid is None else move(stream.slot_valid)
    moved = done[id(stream)] = Stream(
        stream.block, stream.buckets, valid, device, stream.grid, stream.copies, stream.spans
    )

    def through(value: Any) -> Any:
        if isinstance(value, Tensor):
            return move(value)
        if isinstance(value, Stream):
            return _map_stream(value, move, device, done)
        if type(value) in (tuple, list):
            return type(value)(map(through, value))
        if isinstance(value, tuple):  # a named one
            return type(value)(*map(through, value))
        return value

    for key, value in stream._cache.items():
        moved._cache[key] = through(value)
    return moved


def attend_by_length(
    short_rows: Callable[[Tensor, Tensor, Tensor, Stream], Tensor],
    long_rows: Callable[[Tensor, Tensor, Tensor, Stream], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    stream: Stream,
    max_blocks: int,
) -> Tensor:
    """(H, S, d): documents of at most `max_blocks` blocks through `short_rows`, the others through
    `long_rows`. Both take query, key, value and their part of the stream."""
    short, long = stream.split(max_blocks)
    sizes = [short.num_slots, long.num_slots]
    if sizes[1] == 0:
        return short_rows(query, key, value, short)
    if sizes[0] == 0:
        return long_rows(query, key, value, long)
    q, k, v = (rows.split(sizes, dim=1) for rows in (query, key, value))
    return torch.cat([short_rows(q[0], k[0], v[0], short), long_rows(q[1], k[1], v[1], long)], dim=1)


def query_chunks(blocks: int, cost_per_block: int, budget: int, least: int = 16) -> Iterator[tuple[int, int]]:
    """Cut the `blocks` query blocks of a document into ranges (first, end) of at most `budget` work.

    At least `least` ranges where there are that many blocks: a causal range only looks at the blocks before
    its end, so more ranges mean less work above the diagonal.
    """
    step = max(1, min(-(-blocks // least), budget // max(cost_per_block, 1)))
    for first in range(0, blocks, step):
        yield first, min(first + step, blocks)
