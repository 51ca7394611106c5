"""Blocks of similar keys: a past span of a document is read by what its keys are, not by where they stand.

In: keys (H_kv, S, d) of a stream, and how long a span is. Out: `spread` gives a stream in which every span
that some token has wholly behind itself lies twice: as it stands in the text, for the tokens inside of it, and
regrouped into blocks of similar keys, for those behind it. `gather_rows`, `gather_keys` bring rows there,
`gather_rows` with the places exchanged brings results back. The cache keeps the second form only, see
`core.cache`.

The softmax does not mind the order of what is read. But a bound, a mean and a variance describe similar keys
better than neighbouring ones: keys that look alike to a query lie in one block, which is chosen as a whole,
and the blocks that are not read are summed up more truly. Each head has an order of its own.

Cells are halved, again and again, at the median of the channel whose keys vary most (a
k-d tree: Bentley 1975). All cells end with as many keys, so blocks stay blocks, and equal keys give equal
cells. Nothing is moved before the whole span is past; so no token sees what comes after it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dualroute.attention.core.precision import accumulation_dtype
from dualroute.attention.core.stream import Bucket, Stream


def cell_size(router: str, block: int, sub_block: int) -> int:
    """Keys of the smallest cell: those of a bound of the minmax router, else of a block."""
    return sub_block if router == "minmax" else block


@torch.no_grad()
def similar_order(keys: Tensor, cells: int) -> Tensor:
    """Order (..., n) int64 of keys (..., n, d) that puts similar ones into `cells` neighbouring cells.

    `cells` is a power of two that divides n. Of equal values the earlier key comes first.
    """
    shape, dim = keys.shape[:-1], keys.shape[-1]
    rows = keys.reshape(-1, dim).to(accumulation_dtype(keys.dtype))
    order = torch.arange(len(rows), device=keys.device)
    size = shape[-1]
    while size > shape[-1] // cells:
        channel = rows.view(-1, size, dim).var(1, unbiased=False).argmax(-1)  # (cells,)
        values = rows.view(-1, size, dim).gather(2, channel[:, None, None].expand(-1, size, 1))[..., 0]
        turn = values.argsort(dim=-1, stable=True)
        turn = (turn + torch.arange(0, len(rows), size, device=keys.device)[:, None]).flatten()
        rows, order = rows.index_select(0, turn), order.index_select(0, turn)
        size //= 2
    return order.view(shape) % shape[-1]


class Spread(NamedTuple):
    """A stream of S slots with regrouped spans: S' slots, the first block of a document before the spans'
    copies, and then all others.

    source (S',) the slot of the S that lies here, -1 in copies; place (S,) where each of the S lies; spans
    (N,) the first slot of each copied span, and copies (N * span tokens,) where the copies lie.
    """

    stream: Stream
    source: Tensor
    place: Tensor
    spans: Tensor
    copies: Tensor


def spread(stream: Stream, span: int) -> Spread | None:
    """The stream with copies of the past spans of `span` blocks; None if no document has one."""
    if all(bucket.blocks < span + 2 for bucket in stream.buckets):
        return None
    return stream.cached(("spread", span), lambda: _spread(stream, span))


def _spread(stream: Stream, span: int) -> Spread:
    block, device = stream.block, stream.device
    buckets, copied, sources, spans = [], [], [], []
    begin = 0
    for first, documents, blocks in stream.buckets:
        extra = past_spans(blocks, span) * span
        buckets.append(Bucket(begin, documents, blocks + extra))
        copied.append(extra)
        base = first + blocks * torch.arange(documents, device=device)[:, None]
        own = base + torch.arange(blocks, device=device)  # (documents, blocks)
        sources.append(torch.cat([own[:, :1], own.new_full((documents, extra), -1), own[:, 1:]], 1).flatten())
        spans.append((base + 1 + torch.arange(0, extra, span, device=device)).flatten())
        begin += documents * (blocks + extra)
    source_block = torch.cat(sources)
    offset = torch.arange(block, device=device)
    source = torch.where(source_block[:, None] < 0, -1, source_block[:, None] * block + offset).flatten()
    copies = (source < 0).nonzero()[:, 0]
    there = (source >= 0).nonzero()[:, 0]
    place = torch.empty(stream.num_slots, dtype=torch.long, device=device)
    place[source[there]] = there
    valid = None
    if stream.slot_valid is not None:  # copies are of whole blocks
        valid = stream.slot_valid[source.clamp_min(0)] | (source < 0)
    wider = Stream(block, tuple(buckets), valid, device, stream.grid, tuple(copied), span)
    return Spread(wider, source, place, torch.cat(spans) * block, copies)


def past_spans(blocks: int, span: int) -> int:
    """Spans of `span` blocks behind the first block that lie wholly before the last of `blocks` blocks."""
    return max(0, (blocks - 2) // span)


def gather_rows(rows: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """(H, X, d) -> (H, X', d): row source[i] at i, 0 where it is -1. `target` (X,) is where each row goes."""
    return _Gathered.apply(rows, source, target)


def gather_keys(rows: Tensor, spread: Spread, order: Tensor) -> Tensor:
    """Keys or values (H_kv, S, d) at their places (H_kv, S', d) and in the copies, `order` (H_kv, N, n) of
    each span."""
    return _Copied.apply(rows, spread, order)


def span_keys(rows: Tensor, spread: Spread, span: int) -> Tensor:
    """(H_kv, N, n, d) the rows of the spans of n = `span` tokens that are copied."""
    inside = torch.arange(span, device=rows.device)
    slots = (spread.spans[:, None] + inside).flatten()
    return rows.index_select(1, slots).unflatten(1, (-1, span))


class _Gathered(torch.autograd.Function):
    """`source` and `target` are each other's inverse where both are, so the gradient is a gather too."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, source: Tensor, target: Tensor) -> Tensor:
        ctx.save_for_backward(source, target)
        return _pick(rows, source)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        source, target = ctx.saved_tensors
        return _pick(grads[0], target), None, None


def _pick(rows: Tensor, source: Tensor) -> Tensor:
    picked = rows.index_select(1, source.clamp_min(0))
    return picked.masked_fill_((source < 0)[:, None], 0)


class _Copied(torch.autograd.Function):
    """Rows at their places, and in the copies once more: the gradient is the sum of both."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, spread: Spread, order: Tensor) -> Tensor:
        ctx.spread = spread
        ctx.save_for_backward(order)
        out = _pick(rows, spread.source)
        copies = rows.flatten(0, 1).index_select(0, _from(rows, spread, order)).view(len(rows), -1, rows.shape[2])
        return out.index_copy_(1, spread.copies, copies)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        spread, grad = ctx.spread, grads[0]
        rows = grad.index_select(1, spread.place)
        copies = grad.index_select(1, spread.copies).flatten(0, 1)
        rows.view(-1, rows.shape[2]).index_add_(0, _from(rows, spread, order), copies)  # each row at most once
        return rows, None, None


def _from(rows: Tensor, spread: Spread, order: Tensor) -> Tensor:
    """(H_kv * N * n,) the row of (H_kv * S, d) that each copy is of."""
    heads = torch.arange(len(rows), device=rows.device)[:, None, None] * rows.shape[1]
    return (heads + spread.spans[:, None] + order).flatten()
