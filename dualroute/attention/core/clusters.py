"""Blocks of similar keys: what is past is read by what its keys are, not by where they stand.

In: keys (H_kv, S, d) of a stream, and the longest span. Out: `spread` gives a stream in which past spans lie
once more, regrouped into blocks of similar keys; `gather_rows` and `gather_keys` bring rows there, and
`gather_rows` with the places exchanged brings results back. The cache holds only the regrouped form, see
`core.cache`.

The softmax does not mind the order of what it reads. But a bound, a mean and a variance describe similar keys
better than neighbouring ones: what a query looks for lies together in one block, which is chosen as a whole,
and blocks that are not read are summed up more truly. Each head has an order of its own.

Behind the first block of a document, which stays what it is, come spans of `cluster_span` tokens. A token
reads the spans that are wholly past in their regrouped form; of its own span the quarters that are past, of
its own quarter their quarters, and so on down to single blocks, in which only the bounds of the router know
of the order. (Merging what is past into ever longer pieces is how a log-structured merge tree keeps an index:
O'Neil et al. 1996.)

Cells are halved, again and again, at the median of the channel whose keys vary most (a
k-d tree: Bentley 1975). All end with as many keys, so blocks stay blocks. And nothing is moved before the
whole span is past, so no token sees what comes after it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dualroute.attention.core.stream import Bucket, Stream

SHORTER = 4  # a span consists of so many of the next shorter ones


def cell_size(router: str, block: int, sub_block: int) -> int:
    """Keys of the smallest cell: those of a bound of the minmax router, else of a block."""
    return sub_block if router == "minmax" else block


def span_sizes(span: int) -> tuple[int, ...]:
    """Blocks of the spans that are regrouped, the longest first: `span`, a quarter of it, ..., 1."""
    sizes = [span]
    while sizes[-1] > 1:
        sizes.append(max(1, sizes[-1] // SHORTER))
    return tuple(sizes)


@torch.no_grad()
def similar_order(keys: Tensor, cells: int) -> Tensor:
    """Order (..., n) int64 of keys (..., n, d) that puts similar ones into `cells` neighbouring cells.

    `cells` is a power of two that divides n. Of equal values the earlier key comes first, and each cell is in
    the order of the text. Variances are summed in float64, so that all back ends halve the same channel.
    """
    shape, dim = keys.shape[:-1], keys.shape[-1]
    rows = keys.reshape(-1, dim).to(torch.float64)
    order = torch.arange(len(rows), device=keys.device)
    size = shape[-1]
    while size > shape[-1] // cells:
        channel = rows.view(-1, size, dim).var(1, unbiased=False).argmax(-1)  # (cells,)
        values = rows.view(-1, size, dim).gather(2, channel[:, None, None].expand(-1, size, 1))[..., 0]
        turn = values.argsort(dim=-1, stable=True).unflatten(1, (2, -1)).sort(-1).values.flatten(1)
        turn = (turn + torch.arange(0, len(rows), size, device=keys.device)[:, None]).flatten()
        rows, order = rows.index_select(0, turn), order.index_select(0, turn)
        size //= 2
    return order.view(shape) % shape[-1]


Order = Callable[[Tensor, int], Tensor]  # `similar_order`, or what a back end has for it


class Copies(NamedTuple):
    """Spans of one size: spans (N,) the first slot of each in the text, slots (N * n,) where copies lie."""

    tokens: int  # n, of a span
    spans: Tensor
    slots: Tensor


class Spread(NamedTuple):
    """A stream of S slots with copies: S' slots, in each document the first block, the copies of the spans of
    each size, the longest first, and then the other blocks.

    source (S',) is the slot of the S that lies here, -1 in copies; place (S,) where each of the S lies.
    """

    stream: Stream
    source: Tensor
    place: Tensor
    copies: tuple[Copies, ...]


def spread(stream: Stream, span: int) -> Spread | None:
    """The stream with copies of past spans of up to `span` blocks; None where no document has one."""
    sizes = tuple(size for size in span_sizes(span) if size > 1)
    if not sizes or all(bucket.blocks < sizes[-1] + 2 for bucket in stream.buckets):
        return None
    return stream.cached(("spread", span), lambda: _spread(stream, sizes))


def _spread(stream: Stream, sizes: tuple[int, ...]) -> Spread:
    block, device = stream.block, stream.device
    buckets, copied, sources = [], [], []
    spans: list[list[Tensor]] = [[] for _ in sizes]
    begin = 0
    for first, documents, blocks in stream.buckets:
        extra = [max(0, (blocks - 2) // size) * size for size in sizes]
        buckets.append(Bucket(begin, documents, blocks + sum(extra)))
        copied.append(tuple(extra))
        base = first + blocks * torch.arange(documents, device=device)[:, None]
        own = base + torch.arange(blocks, device=device)  # (documents, blocks)
        parts = [own.new_full((documents, count), -1 - level) for level, count in enumerate(extra)]
        sources.append(torch.cat([own[:, :1], *parts, own[:, 1:]], 1).flatten())
        for level, (size, count) in enumerate(zip(sizes, extra, strict=True)):
            spans[level].append((base + 1 + torch.arange(0, count, size, device=device)).flatten() * block)
        begin += documents * buckets[-1].blocks
    source_block = torch.cat(sources)[:, None]
    offset = torch.arange(block, device=device)
    source = torch.where(source_block < 0, source_block, source_block * block + offset).flatten()
    copies = tuple(
        Copies(size * block, torch.cat(spans[level]), (source == -1 - level).nonzero()[:, 0])
        for level, size in enumerate(sizes)
    )
    there = (source >= 0).nonzero()[:, 0]
    place = torch.empty(stream.num_slots, dtype=torch.long, device=device)
    place[source[there]] = there
    valid = None
    if stream.slot_valid is not None:  # copies are of whole blocks
        valid = stream.slot_valid[source.clamp_min(0)] | (source < 0)
    wider = Stream(block, tuple(buckets), valid, device, stream.grid, tuple(copied), sizes)
    return Spread(wider, source.clamp_min(-1), place, copies)


def regrouped(
    query: Tensor, key: Tensor, value: Tensor, stream: Stream, span: int, cell: int, order: Order
) -> tuple[Tensor, Tensor, Tensor, Spread | None]:
    """Queries (H, S', d), keys and values (H_kv, S', d) on the stream with copies of past spans of up to
    `span` tokens, and that stream; where no document has one, what was given, and None."""
    wider = spread(stream, span // stream.block)
    if wider is None:
        return query, key, value, None
    found = orders(key.detach(), wider, cell, order)
    key, value = (gather_keys(rows, wider, found) for rows in (key, value))
    return gather_rows(query, wider.source, wider.place), key, value, wider


def gather_rows(rows: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """(H, X, d) -> (H, X', d): row source[i] at i, 0 where it is -1. `target` (X,) is where each row goes."""
    return _Gathered.apply(rows, source, target)


def gather_keys(rows: Tensor, spread: Spread, orders: list[Tensor]) -> Tensor:
    """Keys or values (H_kv, S, d) at their places (H_kv, S', d) and in the copies; `orders` (H_kv, N, n) for
    the spans of each size."""
    return _Copied.apply(rows, spread, *orders)


def orders(keys: Tensor, spread: Spread, cell: int, order: Order) -> list[Tensor]:
    """The order (H_kv, N, n) of the keys (H_kv, S, d) of the spans of each size, in cells of `cell` keys."""
    return [
        order(keys.index_select(1, _slots(copies)).unflatten(1, (-1, copies.tokens)), copies.tokens // cell)
        for copies in spread.copies
    ]


def ordered_in_blocks(keys: Tensor, block: int, cell: int, order: Order) -> Tensor:
    """Keys (H_kv, S, d) with those of each block in cells of `cell` similar ones."""
    if cell == block:
        return keys
    blocks = keys.unflatten(1, (-1, block))
    place = order(blocks, block // cell) + torch.arange(0, keys.shape[1], block, device=keys.device)[:, None]
    place = place + torch.arange(len(keys), device=keys.device)[:, None, None] * keys.shape[1]
    return keys.flatten(0, 1).index_select(0, place.flatten()).view(keys.shape)


def _slots(copies: Copies) -> Tensor:
    """(N * n,) the slots of the text that are copied."""
    inside = torch.arange(copies.tokens, device=copies.spans.device)
    return (copies.spans[:, None] + inside).flatten()


class _Gathered(torch.autograd.Function):
    """`source` and `target` are each other's inverse where both are, so the gradient is a gather too."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, source: Tensor, target: Tensor) -> Tensor:
        ctx.save_for_backward(source, target)
        return _pick(rows, source)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        _, target = ctx.saved_tensors
        return _pick(grads[0], target), None, None


def _pick(rows: Tensor, source: Tensor) -> Tensor:
    picked = rows.index_select(1, source.clamp_min(0))
    return picked.masked_fill_((source < 0)[:, None], 0)


class _Copied(torch.autograd.Function):
    """Rows at their places, and in the copies once more: the gradient is the sum of all."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, spread: Spread, *orders: Tensor) -> Tensor:
        ctx.spread = spread
        ctx.save_for_backward(*orders)
        out = _pick(rows, spread.source)
        for copies, order in zip(spread.copies, orders, strict=True):
            copied = rows.flatten(0, 1).index_select(0, _rows(rows, copies, order))
            out.index_copy_(1, copies.slots, copied.view(len(rows), -1, rows.shape[2]))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        spread, grad = ctx.spread, grads[0]
        rows = grad.index_select(1, spread.place)
        for copies, order in zip(spread.copies, ctx.saved_tensors, strict=True):
            copied = grad.index_select(1, copies.slots).flatten(0, 1)
            # each row at most once, so in no order
            rows.view(-1, rows.shape[2]).index_add_(0, _rows(rows, copies, order), copied)
        return rows, None, *[None] * len(spread.copies)


def _rows(rows: Tensor, copies: Copies, order: Tensor) -> Tensor:
    """(H_kv * N * n,) the row of (H_kv * S, d) that each copy is of."""
    heads = torch.arange(len(rows), device=rows.device)[:, None, None] * rows.shape[1]
    return (heads + copies.spans[:, None] + order).flatten()
