"""Where the tokens of a batch lie: documents and padding turned into one stream of blocks.

In: the shape of a batch, `segment_ids` (which document a token belongs to) and `attention_mask` (False =
padding). Out: a `Layout`, computed once per batch and handed to every layer, which moves rows of features
between the batch, (B, n, width), and a `Stream`, (S, width). The routes (`local_route`, `global_route`) know
streams only.

A stream is every document of the batch, padding dropped, each padded at its end to a multiple of `block` and
laid one after the other. No block ever crosses a document, so packing and padding cannot change a result.

The documents are sorted by their number of blocks. Documents of equal size then form a
`Bucket`, a plain (documents, blocks * block) rectangle, which attention can treat as an ordinary batch: no
mask of documents is ever built, and a batch of short documents costs what its documents cost.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dualroute.attention.core.precision import outside_inference_mode
from dualroute.attention.core.rope import RopeScaling, rotary_table


class Bucket(NamedTuple):
    """`documents` neighbouring documents of `blocks` blocks each, from block `first_block` of a stream on."""

    first_block: int
    documents: int
    blocks: int


@dataclass
class Stream:
    """A line of S = num_blocks * block slots that holds whole documents, shortest (in blocks) first.

    `slot_valid` (S,) is False at the slots that fill up the last block of a document, and None when there
    are none.

    Raises:
        ValueError: the buckets do not follow each other, or `slot_valid` is not of their slots.
    """

    block: int
    buckets: tuple[Bucket, ...]
    slot_valid: Tensor | None
    device: torch.device
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

    def blocks_in_document(self) -> Tensor:
        """(num_blocks,) how many blocks the document of each block has."""
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
        numbers = {"dtype": torch.int32, "device": self.device}
        parts = [
            torch.arange(b.first_block, b.first_block + b.documents * b.blocks, b.blocks, **numbers)
            for b in self.buckets
        ]
        starts = torch.cat([*parts, torch.full((1,), self.num_blocks, **numbers)])  # in blocks
        if not tokens_only:
            return starts * self.block
        ends = (starts[1:] - 1) * self.block + self.tokens_in_block()[starts[1:] - 1].to(torch.int32)
        inner = torch.stack([starts[:-1] * self.block, ends], dim=1).flatten()
        return torch.cat([inner, starts[-1:] * self.block])

    def tokens_in_block(self) -> Tensor:
        """(num_blocks,) how many slots of each block hold a token, at least 1."""
        if self.slot_valid is None:
            return torch.full((self.num_blocks,), self.block, device=self.device)
        return self.cached("tokens_in_block", lambda: self._valid().view(-1, self.block).sum(1))

    def _valid(self) -> Tensor:
        if self.slot_valid is None:
            return torch.ones(self.num_slots, dtype=torch.bool, device=self.device)
        return self.slot_valid

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
        if valid is not None and bool(valid.all()):
            valid = None
        return Stream(self.block, buckets, valid, self.device)


class _Rows(torch.autograd.Function):
    """Row r of the result is row source[r] of `rows`, and 0 where source[r] < 0.

    `source` and `target` are each other's inverse, so the gradient is the same gather the other way round: no
    scatter-add, and no order of summation that could differ from run to run.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, source: Tensor, target: Tensor) -> Tensor:
        ctx.save_for_backward(source, target)
        gathered = rows.index_select(0, source.clamp_min(0))
        return gathered.masked_fill_((source < 0)[:, None], 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        source, target = ctx.saved_tensors
        return _Rows.apply(grads[0], target, source), None, None


@dataclass
class Layout:
    """The places of a (batch, length) batch of tokens on its stream. Make one with `Layout.build`.

    `positions` (B, n) is the position of each token inside its document (0 at padding); `documents` (B, n)
    the number of its document, unique over the batch (-1 at padding). `slot_token` (S,) and `token_slot`
    (B*n,) lead from slots to tokens and back, -1 = none; both are None in the trivial case, where the batch
    already *is* the stream.
    """

    batch: int
    length: int
    stream: Stream
    positions: Tensor
    documents: Tensor
    slot_token: Tensor | None
    token_slot: Tensor | None

    @property
    def block(self) -> int:
        return self.stream.block

    @classmethod
    @outside_inference_mode
    def build(
        cls,
        batch: int,
        length: int,
        block: int,
        segment_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> Layout:
        """Lay out a batch.

        Args:
            batch, length: the shape (B, n) of the batch.
            block: tokens per block, the `block` of the layers that will use the layout.
            segment_ids: (B, n) integers; in a row, neighbouring tokens with the same number are one document.
            attention_mask: (B, n), nonzero = token, 0 = padding. Padding may lie anywhere; it is dropped
                first.
            device: where the layout is needed; that of the given tensors by default.

        Raises:
            ValueError: a shape does not fit, or `block` or the batch is empty.
        """
        if min(batch, length, block) < 1:
            raise ValueError(f"batch {batch}, length {length} and block {block} must all be at least 1")
        for name, given in (("segment_ids", segment_ids), ("attention_mask", attention_mask)):
            if given is not None and tuple(given.shape) != (batch, length):
                raise ValueError(
                    f"{name} has shape {tuple(given.shape)}, the batch is ({batch}, {length}): "
                    "give one number per token"
                )
            if (
                given is not None
                and name == "segment_ids"
                and (given.is_floating_point() or given.is_complex())
            ):
                raise TypeError(f"segment_ids has dtype {given.dtype}: give whole numbers")
            if given is not None and device is None:
                device = given.device
        device = torch.device(device or "cpu")
        if attention_mask is not None:
            attention_mask = attention_mask.to(device=device, dtype=torch.bool)
            if bool(attention_mask.all()):
                attention_mask = None
        if segment_ids is not None:
            segment_ids = segment_ids.to(device)
            if bool((segment_ids == segment_ids[:, :1]).all()):
                segment_ids = None
        if segment_ids is None and attention_mask is None and length % block == 0:
            return cls._trivial(batch, length, block, device)
        return cls._general(batch, length, block, segment_ids, attention_mask, device)

    @classmethod
    def of_batch(
        cls,
        given: Layout | None,
        batch: int,
        length: int,
        block: int,
        segment_ids: Tensor | None,
        attention_mask: Tensor | None,
        device: torch.device,
    ) -> Layout:
        """The layout that was `given`, if it fits the batch; else a new one of the other arguments.

        Raises:
            ValueError: it is for another batch, or both were given.
        """
        if given is None:
            return cls.build(batch, length, block, segment_ids, attention_mask, device=device)
        if segment_ids is not None or attention_mask is not None:
            raise ValueError("layout already holds segment_ids and attention_mask: give either it or them")
        if (given.batch, given.length, given.block) != (batch, length, block):
            raise ValueError(
                f"layout is for batch {given.batch}, length {given.length}, block {given.block}; "
                f"the layer got batch {batch}, length {length} and has block={block}: build it for these"
            )
        return given

    @classmethod
    def _trivial(cls, batch: int, length: int, block: int, device: torch.device) -> Layout:
        stream = Stream(block, (Bucket(0, batch, length // block),), None, device)
        positions = torch.arange(length, device=device).expand(batch, length)
        documents = torch.arange(batch, device=device)[:, None].expand(batch, length)
        return cls(batch, length, stream, positions, documents, None, None)

    @classmethod
    def _general(
        cls,
        batch: int,
        length: int,
        block: int,
        segment_ids: Tensor | None,
        attention_mask: Tensor | None,
        device: torch.device,
    ) -> Layout:
        total = batch * length
        if attention_mask is None:
            tokens = torch.arange(total, device=device)
        else:
            tokens = attention_mask.flatten().nonzero()[:, 0]  # (T,) tokens that are not padding, in order
        if len(tokens) == 0:
            return cls._empty(batch, length, block, device)
        key = tokens // length  # documents never cross rows
        starts = torch.ones_like(tokens, dtype=torch.bool)
        starts[1:] = key[1:] != key[:-1]
        if segment_ids is not None:
            segment = segment_ids.flatten()[tokens]
            starts[1:] |= segment[1:] != segment[:-1]
        document = starts.cumsum(0) - 1  # (T,)
        first = starts.nonzero()[:, 0]  # (documents,)
        position = torch.arange(len(tokens), device=device) - first[document]
        sizes = (torch.bincount(document) + block - 1) // block  # blocks of each document
        order = torch.argsort(sizes, stable=True)
        sorted_sizes = sizes[order]
        offset = torch.empty_like(sizes)
        offset[order] = sorted_sizes.cumsum(0) - sorted_sizes  # first block of each document on the stream
        slot = offset[document] * block + position  # (T,)

        slots = int(sizes.sum()) * block
        slot_token = torch.full((slots,), -1, device=device)
        slot_token[slot] = tokens
        token_slot = torch.full((total,), -1, device=device)
        token_slot[tokens] = slot
        positions = torch.zeros(total, dtype=torch.long, device=device)
        positions[tokens] = position
        documents = torch.full((total,), -1, device=device)
        documents[tokens] = document

        blocks, counts = torch.unique_consecutive(sorted_sizes, return_counts=True)
        buckets: list[Bucket] = []
        first_block = 0
        for size, count in zip(blocks.tolist(), counts.tolist(), strict=True):
            buckets.append(Bucket(first_block, count, size))
            first_block += size * count
        valid = None if slots == len(tokens) else slot_token >= 0
        stream = Stream(block, tuple(buckets), valid, device)
        shape = (batch, length)
        return cls(
            batch, length, stream, positions.view(shape), documents.view(shape), slot_token, token_slot
        )

    @classmethod
    def _empty(cls, batch: int, length: int, block: int, device: torch.device) -> Layout:
        """Nothing but padding: one imaginary token keeps every route, and its gradients, defined."""
        valid = torch.zeros(block, dtype=torch.bool, device=device)
        valid[0] = True
        none = torch.full((batch * length,), -1, device=device)
        return cls(
            batch,
            length,
            Stream(block, (Bucket(0, 1, 1),), valid if block > 1 else None, device),
            torch.zeros(batch, length, dtype=torch.long, device=device),
            none.view(batch, length),
            torch.full((block,), -1, device=device),
            none,
        )

    def to_stream(self, rows: Tensor) -> Tensor:
        """(B, n, width) -> (S, width); slots without a token become 0.

        Raises:
            ValueError: rows of another batch.
        """
        if rows.ndim != 3 or tuple(rows.shape[:2]) != (self.batch, self.length):
            raise ValueError(
                f"rows have shape {tuple(rows.shape)}: the layout is of ({self.batch}, {self.length}, width)"
            )
        rows = rows.reshape(self.batch * self.length, -1)
        if self.slot_token is None or self.token_slot is None:
            return rows
        return _Rows.apply(rows, self.slot_token, self.token_slot)

    def rotary_table(
        self,
        positions: Tensor | None,
        head_dim: int,
        theta: float,
        dtype: torch.dtype,
        scaling: RopeScaling | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the slots, for positions (B, n) or the layout's own; kept for all layers.

        Positions that were made in inference mode count no versions: whether they have changed cannot be
        told, so nothing is kept for them.
        """
        if positions is None:
            positions = self.positions
        if positions.is_inference():
            return self._rotary_table(positions, head_dim, theta, dtype, scaling)
        # The tensor itself is kept beside its table: as long as it lives, no other one can have its id.
        key = ("rotary", id(positions), positions._version, head_dim, theta, dtype, scaling)
        return self.stream.cached(
            key, lambda: (self._rotary_table(positions, head_dim, theta, dtype, scaling), positions)
        )[0]

    def _rotary_table(
        self,
        positions: Tensor,
        head_dim: int,
        theta: float,
        dtype: torch.dtype,
        scaling: RopeScaling | None,
    ) -> tuple[Tensor, Tensor]:
        of_slot = positions.expand(self.batch, self.length).flatten().to(self.stream.device)
        if self.slot_token is not None:
            of_slot = of_slot[self.slot_token.clamp_min(0)]
        return rotary_table(of_slot, head_dim, theta, dtype, scaling)

    def from_stream(self, rows: Tensor) -> Tensor:
        """(S, width) -> (B, n, width); padding becomes 0.

        Raises:
            ValueError: rows of another stream.
        """
        if rows.ndim != 2 or len(rows) != self.stream.num_slots:
            raise ValueError(
                f"rows have shape {tuple(rows.shape)}: the stream is of ({self.stream.num_slots}, width)"
            )
        if self.slot_token is not None and self.token_slot is not None:
            rows = _Rows.apply(rows, self.token_slot, self.slot_token)
        return rows.reshape(self.batch, self.length, -1)

    def text_rows(self, rows: Tensor) -> Tensor:
        """(H, S, d) of a stream whose documents are the B rows of the batch -> (B * H, n, d)."""
        documents = rows.unflatten(1, (self.batch, -1))[:, :, : self.length]
        return documents.transpose(0, 1).flatten(0, 1)


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


def query_chunks(blocks: int, cost_per_block: int, budget: int) -> Iterator[tuple[int, int]]:
    """Cut the `blocks` query blocks of a document into ranges (first, end) of at most `budget` work.

    At least sixteen ranges where there are that many blocks: a causal range only looks at the blocks before
    its end, so more ranges mean less work above the diagonal.
    """
    step = max(1, min(-(-blocks // 16), budget // max(cost_per_block, 1)))
    for first in range(0, blocks, step):
        yield first, min(first + step, blocks)
