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

import itertools
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dualroute.attention.core.grid import Grid
from dualroute.attention.core.held import hold
from dualroute.attention.core.precision import accumulation_dtype, outside_inference_mode
from dualroute.attention.core.rope import Rope, Table
from dualroute.attention.core.stream import Bucket as Bucket
from dualroute.attention.core.stream import Stream as Stream
from dualroute.attention.core.stream import attend_by_length as attend_by_length
from dualroute.attention.core.stream import query_chunks as query_chunks


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


class Layout:
    """The places of a (batch, length) batch of tokens on its stream. Make one with `Layout.build`.

    `positions` (B, n) is the position of each token inside its document (0 at padding); `documents` (B, n)
    the number of its document, unique over the batch (-1 at padding). `slot_token` (S,) and `token_slot`
    (B*n,) lead from slots to tokens and back, -1 = none; both are None in the trivial case, where the batch
    already *is* the stream. `handle` stands for the stream in a compiled graph, see `core.held`.

    No dataclass: trainers walk through the fields of those in a batch and convert their tensors' types.
    """

    def __init__(
        self,
        batch: int,
        length: int,
        stream: Stream,
        positions: Tensor,
        documents: Tensor,
        slot_token: Tensor | None,
        token_slot: Tensor | None,
    ) -> None:
        self.batch, self.length, self.stream = batch, length, stream
        self.positions, self.documents = positions, documents
        self.slot_token, self.token_slot = slot_token, token_slot
        self._tables: dict[Hashable, Table] = {}
        self.handle: Tensor
        if not torch.compiler.is_compiling():  # there it is given, see `attention.compiled`
            self.handle = hold(stream)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "handle": None, "_tables": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.handle = hold(self.stream)

    @property
    def block(self) -> int:
        return self.stream.block

    def map_tensors(self, move: Callable[[Tensor], Tensor], device: torch.device | None = None) -> Layout:
        """The same layout, each of its tensors through `move`."""
        parts = (self.positions, self.documents, self.slot_token, self.token_slot)
        moved = (None if part is None else move(part) for part in parts)
        return Layout(self.batch, self.length, self.stream.map_tensors(move, device), *moved)  # type: ignore[arg-type]

    def to(self, device: torch.device | str) -> Layout:
        """On another device; without waiting, where the tensors are pinned (see `pin_memory`)."""
        device = torch.device(device)
        return self.map_tensors(lambda tensor: tensor.to(device, non_blocking=True), device)

    def pin_memory(self) -> Layout:
        """In memory that a GPU can read by itself; a `DataLoader` asks for it by this name."""
        return self.map_tensors(lambda tensor: tensor.pin_memory())

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
        grid: Grid | None = None,
    ) -> Layout:
        """Lay out a batch.

        Args:
            batch, length: the shape (B, n) of the batch.
            block: tokens per block, the `block` of the layers that will use the layout.
            segment_ids: (B, n) integers; in a row, neighbouring tokens with the same number are one document.
            attention_mask: (B, n), nonzero = token, 0 = padding. Padding may lie anywhere; it is dropped
                first.
            device: where the layout is needed; that of the given tensors by default.
            grid: every document is an image of this size, its patches in raster order; they are laid out by
                region.

        Raises:
            ValueError: a shape does not fit, or `block` or the batch is empty, or a document has another
            number of tokens than the grid has patches.
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
        if grid is None and segment_ids is None and attention_mask is None and length % block == 0:
            return cls._trivial(batch, length, block, device)
        if grid is None and segment_ids is None and attention_mask is None:
            return cls._whole_rows(batch, length, block, device)
        return cls._general(batch, length, block, segment_ids, attention_mask, device, grid)

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
        grid: Grid | None = None,
    ) -> Layout:
        """The layout that was `given`, if it fits the batch; else a new one of the other arguments.

        Raises:
            ValueError: it is for another batch, or both were given.
        """
        if given is None:
            return cls.build(batch, length, block, segment_ids, attention_mask, device=device, grid=grid)
        if segment_ids is not None or attention_mask is not None:
            raise ValueError("layout already holds segment_ids and attention_mask: give either it or them")
        if (given.batch, given.length, given.block) != (batch, length, block):
            raise ValueError(
                f"layout is for batch {given.batch}, length {given.length}, block {given.block}; "
                f"the layer got batch {batch}, length {length} and has block={block}: build it for these"
            )
        if given.stream is not None and given.stream.grid != grid:
            raise ValueError(
                f"layout is for {given.stream.grid}, the layer has grid={grid}: build it for this"
            )
        return given

    @classmethod
    def _trivial(cls, batch: int, length: int, block: int, device: torch.device) -> Layout:
        stream = Stream(block, (Bucket(0, batch, length // block),), None, device)
        positions = torch.arange(length, device=device).expand(batch, length)
        documents = torch.arange(batch, device=device)[:, None].expand(batch, length)
        return cls(batch, length, stream, positions, documents, None, None)

    @classmethod
    def _whole_rows(cls, batch: int, length: int, block: int, device: torch.device) -> Layout:
        """Each row one document that ends inside of a block: the shape says all, and no device is asked."""
        blocks = -(-length // block)
        rows = torch.arange(batch, device=device)[:, None]
        places = torch.arange(blocks * block, device=device)
        slot_token = torch.where(places < length, rows * length + places, -1).flatten()
        token_slot = (rows * blocks * block + places[:length]).flatten()
        stream = Stream(block, (Bucket(0, batch, blocks),), slot_token >= 0, device)
        positions, documents = places[:length].expand(batch, length), rows.expand(batch, length)
        return cls(batch, length, stream, positions, documents, slot_token, token_slot)

    @classmethod
    def _general(
        cls,
        batch: int,
        length: int,
        block: int,
        segment_ids: Tensor | None,
        attention_mask: Tensor | None,
        device: torch.device,
        grid: Grid | None,
    ) -> Layout:
        total = batch * length
        if attention_mask is None:
            tokens = torch.arange(total, device=device)
        else:
            tokens = attention_mask.flatten().nonzero()[:, 0]  # (T,) tokens that are not padding, in order
        if len(tokens) == 0:
            return cls._empty(batch, length, block, device, grid)
        key = tokens // length  # documents never cross rows
        starts = torch.ones_like(tokens, dtype=torch.bool)
        starts[1:] = key[1:] != key[:-1]
        if segment_ids is not None:
            segment = segment_ids.flatten()[tokens]
            starts[1:] |= segment[1:] != segment[:-1]
        document = starts.cumsum(0) - 1  # (T,)
        first = starts.nonzero()[:, 0]  # (documents,)
        position = torch.arange(len(tokens), device=device) - first[document]
        lengths = torch.bincount(document)
        if grid is not None:
            _check_images(lengths, block, grid)
            lengths = torch.full_like(lengths, grid.slots)
            place = grid.slot_of_patch(device)[position]
        else:
            place = position
        sizes = (lengths + block - 1) // block  # blocks of each document
        order = torch.argsort(sizes, stable=True)
        sorted_sizes = sizes[order]
        offset = torch.empty_like(sizes)
        offset[order] = sorted_sizes.cumsum(0) - sorted_sizes  # first block of each document on the stream
        slot = offset[document] * block + place  # (T,)

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
        stream = Stream(block, tuple(buckets), valid, device, grid)
        shape = (batch, length)
        return cls(
            batch, length, stream, positions.view(shape), documents.view(shape), slot_token, token_slot
        )

    @classmethod
    def _empty(cls, batch: int, length: int, block: int, device: torch.device, grid: Grid | None) -> Layout:
        """Nothing but padding: one imaginary token, or image, keeps every route and gradient defined."""
        slots = block if grid is None else grid.slots
        valid = torch.zeros(slots, dtype=torch.bool, device=device)
        valid[0 if grid is None else grid.slot_of_patch(device)] = True
        none = torch.full((batch * length,), -1, device=device)
        return cls(
            batch,
            length,
            Stream(block, (Bucket(0, 1, slots // block),), valid if slots > 1 else None, device, grid),
            torch.zeros(batch, length, dtype=torch.long, device=device),
            none.view(batch, length),
            torch.full((slots,), -1, device=device),
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

    def rotary_table(self, positions: Tensor | None, rope: Rope, dtype: torch.dtype) -> Table | None:
        """Cosines and sines of the slots, for positions (B, n) or the layout's own; kept for all layers.
        None where the embedding turns nothing.

        Positions that were made in inference mode count no versions: whether they have changed cannot be
        told, so nothing is kept for them. Nor does a compiled graph keep anything: there a table is one that
        was kept before by the same layout, or part of the graph.
        """
        if rope.channels == 0:
            return None
        dtype = accumulation_dtype(dtype)
        if positions is None:
            key: Hashable = (*rope.numbers, dtype)
            if key in self._tables:
                return self._tables[key]
            if torch.compiler.is_compiling():
                return self._rotary_table(self.positions, rope, dtype)
            compute = outside_inference_mode(self._rotary_table)
            self._tables[key] = compute(self.positions, rope, dtype)
            return self._tables[key]
        if torch.compiler.is_compiling() or positions.is_inference():
            return self._rotary_table(positions, rope, dtype)
        # The tensor itself is kept beside its table: as long as it lives, no other one can have its id.
        key = ("rotary", id(positions), positions._version, rope, dtype)
        return self.stream.cached(key, lambda: (self._rotary_table(positions, rope, dtype), positions))[0]

    def sized_by_packing(self) -> list[Tensor]:
        """What is kept whose first dimension is the S of this batch; none where no packing changes it."""
        if self.slot_token is None:
            return []
        return [self.slot_token, *itertools.chain(*self._tables.values())]

    def at_positions(self, positions: Tensor | None) -> Layout:
        """The same layout for tokens at other positions (B, n); these are kept, and must not change."""
        if positions is None:
            return self
        places = self.documents, self.slot_token, self.token_slot
        moved = Layout(self.batch, self.length, self.stream, positions, *places)
        if torch.compiler.is_compiling():
            moved.handle = self.handle
        return moved

    def _rotary_table(self, positions: Tensor, rope: Rope, dtype: torch.dtype) -> Table:
        of_slot = positions.expand(self.batch, self.length).flatten().to(self.positions.device)
        if self.slot_token is not None:
            of_slot = of_slot[self.slot_token.clamp_min(0)]
        grid = None if self.stream is None else self.stream.grid  # none: made inside of a graph
        if grid is not None:
            return rope.grid_table(*grid.row_and_column(of_slot), dtype)
        return rope.table(of_slot, dtype)

    def from_stream(self, rows: Tensor) -> Tensor:
        """(S, width) -> (B, n, width); padding becomes 0.

        Raises:
            ValueError: rows of another stream.
        """
        slots = self.batch * self.length if self.slot_token is None else len(self.slot_token)
        if rows.ndim != 2 or len(rows) != slots:
            raise ValueError(f"rows have shape {tuple(rows.shape)}: the stream is of ({slots}, width)")
        if self.slot_token is not None and self.token_slot is not None:
            rows = _Rows.apply(rows, self.token_slot, self.slot_token)
        return rows.reshape(self.batch, self.length, -1)

    def text_rows(self, rows: Tensor) -> Tensor:
        """(H, S, d) of a stream whose documents are the B rows of the batch -> (B * H, n, d)."""
        documents = rows.unflatten(1, (self.batch, -1))[:, :, : self.length]
        return documents.transpose(0, 1).flatten(0, 1)


def _check_images(lengths: Tensor, block: int, grid: Grid) -> None:
    """Whether documents of these lengths are images of the grid."""
    if grid.block != block:
        raise ValueError(f"block={block} is not the {grid.block} patches of a region of {grid}")
    other = lengths[lengths != grid.patches]
    if len(other):
        raise ValueError(
            f"a document has {int(other[0])} tokens: an image of {grid.height} x {grid.width} patches has "
            f"{grid.patches}"
        )


class LayoutPlan(NamedTuple):
    """What a model wants to know of a batch's documents: worked out ahead, by the processes that load data.

    `block` is that of its layers, `limits` the numbers of blocks up to which one of them reads documents in
    another way than longer ones. With a `grid` documents are images of that size. Rows are filled up with
    padding to a multiple of `parts` tokens, for ranks that share them.
    """

    block: int
    limits: tuple[int, ...] = ()
    grid: Grid | None = None
    parts: int = 1

    def build(self, segment_ids: Tensor) -> Layout:
        """The layout of a batch on a CPU; segment_ids (B, n), 0 = padding."""
        segment_ids = torch.nn.functional.pad(segment_ids, (0, -segment_ids.shape[1] % self.parts))
        batch, length = segment_ids.shape
        layout = Layout.build(batch, length, self.block, segment_ids, segment_ids != 0, grid=self.grid)
        layout.stream.prepare(self.limits)
        return layout
