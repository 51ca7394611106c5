"""The local route: exact sliding-window attention in O(S * window).

In: queries (H, S, d), keys and values (H_kv, S, d) of a stream (see `layout`). Out: (H, S, d).
o_t = sum_s softmax_s(q_t . k_s / sqrt(d)) v_s over 0 <= t - s < window (causal) or |t - s| < window, in one
document.

Each block of queries sees one strided view of the keys, the window before it rounded up to whole query
blocks, with an exact mask on top. The backward pass adds the overlapping views up again, one strided sum per
query block of span.

The window counts the token itself, so window = 1 returns the values. Libraries differ
by one.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dualroute.attention.backends.torch.device import at_once
from dualroute.attention.backends.torch.full import full_attention
from dualroute.attention.backends.torch.local_grid import grid_attention
from dualroute.attention.backends.torch.tile_attention import attend, attend_backward
from dualroute.attention.core.layout import Stream, attend_by_length
from dualroute.attention.core.precision import NEG_INF, accumulation_dtype, without_autocast

QUERY_BLOCK = 64  # queries that share one view of the keys, at most; smaller wastes fewer masked keys
LONG_RUN = 8  # query blocks inside their document that are worth a chunk of their own
MAX_CHUNK = 1 << 20  # elements of a chunk's keys: a chunk stays in the caches, and bounds the memory


def local_attention(
    query: Tensor, key: Tensor, value: Tensor, stream: Stream, *, window: int, causal: bool = True
) -> Tensor:
    """Sliding-window attention, (H, S, d), of a stream; `window` keys including the token's own.

    Documents that fit into the window are attended to in full: there the two are the same thing. Up to twice
    that length, causal attention in full behind a mask is still the faster one. In images the window is a
    square, see `local_grid`.
    """
    if stream.grid is not None:
        return grid_attention(query, key, value, stream, window=window)
    in_full = (2 * window if causal else window) // stream.block
    return attend_by_length(
        partial(full_attention, causal=causal, window=window if causal else None),
        partial(_banded, window=window, causal=causal),
        query,
        key,
        value,
        stream,
        in_full,
    )


def _banded(
    query: Tensor, key: Tensor, value: Tensor, stream: Stream, *, window: int, causal: bool
) -> Tensor:
    band = _band(stream.block, window, causal)
    return _Banded.apply(query.contiguous(), key.contiguous(), value.contiguous(), stream, band)


class _Band(NamedTuple):
    """A query block has `rows` slots and sees keys from `left` slots before to `right` slots after it."""

    window: int
    causal: bool
    rows: int
    left: int
    right: int

    @property
    def span(self) -> int:
        return self.left + self.rows + self.right


def _band(block: int, window: int, causal: bool) -> _Band:
    rows = max(size for size in range(1, min(block, QUERY_BLOCK) + 1) if block % size == 0)
    left = -(-(window - 1) // rows) * rows
    return _Band(window, causal, rows, left, 0 if causal else left)


def _band_mask(stream: Stream, band: _Band, first: int, last: int, dtype: torch.dtype) -> Tensor:
    """(blocks or 1, 1, rows, span) of 0 and -inf for the query blocks first..last-1."""
    inner = stream.cached(("inner blocks", band), lambda: _inner_blocks(stream, band))
    if all(inner[first:last]):  # all alike: one mask for the whole chunk, made once for all layers
        key, last = ("band", band, dtype), first + 1
        return stream.cached(key, lambda: _compute_band_mask(stream, band, first, last, dtype))
    return _compute_band_mask(stream, band, first, last, dtype)


def _inner_blocks(stream: Stream, band: _Band) -> list[bool]:
    """Of each query block: whether all that it has in view lies inside its document."""
    per_block = stream.block // band.rows
    number = torch.arange(stream.num_blocks * per_block, device=stream.device)
    owner = number // per_block
    begin = stream.block_in_document()[owner] * stream.block + number % per_block * band.rows
    end = begin + band.rows + band.right
    inner: list[bool] = ((begin >= band.left) & (end <= _document_tokens(stream)[owner])).tolist()
    return inner


def _compute_band_mask(stream: Stream, band: _Band, first: int, last: int, dtype: torch.dtype) -> Tensor:
    device = stream.device
    row = torch.arange(band.rows, device=device)[:, None]
    distance = row - _columns(band, device)
    near = distance < band.window
    near &= distance >= 0 if band.causal else distance > -band.window
    allowed = near & _inside(stream, band, first, last)[:, None]
    allowed |= distance == 0  # a slot without a token sees itself: no row is ever empty
    mask = torch.zeros(allowed.shape, dtype=dtype, device=device)
    return mask.masked_fill_(~allowed, NEG_INF)[:, None]


def _columns(band: _Band, device: torch.device) -> Tensor:
    """(span,) key slots in view, relative to the query block's first slot."""
    return torch.arange(band.span, device=device) - band.left


def _inside(stream: Stream, band: _Band, first: int, last: int) -> Tensor:
    """(blocks, span) which keys in view of the query blocks first..last-1 are tokens of the same document."""
    per_block = stream.block // band.rows
    number = torch.arange(first, last, device=stream.device)
    owner = number // per_block
    begin = (
        stream.block_in_document()[owner] * stream.block + number % per_block * band.rows
    )  # place in document
    place = begin[:, None] + _columns(band, stream.device)  # position in the document of each key in view
    return (place >= 0) & (place < _document_tokens(stream)[owner][:, None])


def _other_documents(stream: Stream, band: _Band, first: int, last: int) -> Tensor | None:
    """(blocks, 1, span, 1) keys in view of the query blocks first..last-1 that are not of their document.

    None where all are.
    """
    inner = stream.cached(("inner blocks", band), lambda: _inner_blocks(stream, band))
    if all(inner[first:last]):
        return None
    return ~_inside(stream, band, first, last)[:, None, :, None]


def _only_own(rows: Tensor, hidden: Tensor | None) -> Tensor:
    """Rows (blocks, heads, span, d) with 0 where they are hidden.

    The mask gives these the weight 0, but 0 times a NaN of another document is NaN.
    """
    return rows if hidden is None else rows.masked_fill(hidden, 0)


def _document_tokens(stream: Stream) -> Tensor:
    """(num_blocks,) tokens in the document of each block."""
    size = stream.blocks_in_document()
    if stream.slot_valid is None:
        return size * stream.block
    number = torch.arange(stream.num_blocks, device=stream.device)
    final = number - stream.block_in_document() + size - 1  # the last block of each block's document
    return (size - 1) * stream.block + stream.tokens_in_block()[final]


def _key_views(rows: Tensor, band: _Band, first: int, last: int) -> Tensor:
    """(blocks, heads, span, d) view of padded rows (heads, left + S + right, d): blocks first..last-1."""
    heads, _, dim = rows.shape
    return rows.as_strided(
        (last - first, heads, band.span, dim),
        (band.rows * dim, rows.stride(0), dim, 1),
        rows.storage_offset() + first * band.rows * dim,
    )


def _tiles(rows: Tensor, band: _Band, first: int, last: int) -> Tensor:
    """(blocks, heads, rows, ...) view of (heads, S, ...) for query blocks first..last-1."""
    return (
        rows[:, first * band.rows : last * band.rows].unflatten(1, (last - first, band.rows)).transpose(0, 1)
    )


def _chunks(query: Tensor, stream: Stream, band: _Band) -> list[tuple[int, int]]:
    """Ranges (first, end) of query blocks that are worked on at once."""
    heads, _, dim = query.shape
    step = max(1, at_once(MAX_CHUNK, query.device) // (heads * band.span * dim))
    return stream.cached(("chunks", band, step), lambda: _compute_chunks(stream, band, step))


def _compute_chunks(stream: Stream, band: _Band, step: int) -> list[tuple[int, int]]:
    """At most `step` blocks each; long runs of inner blocks by themselves: they need no mask of their own."""
    inner = stream.cached(("inner blocks", band), lambda: _inner_blocks(stream, band))
    cuts, first = {0, len(inner)}, 0
    for kind, run in itertools.groupby(inner):
        end = first + len(list(run))
        if kind and end - first >= LONG_RUN:
            cuts |= {first, end}
        first = end
    return [
        (begin, min(begin + step, last))
        for first, last in itertools.pairwise(sorted(cuts))
        for begin in range(first, last, step)
    ]


class _Banded(torch.autograd.Function):
    """The route on a whole stream. Saves its inputs, its output and one log-sum-exp per row: O(S)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, stream: Stream, band: _Band) -> Tensor:
        accumulate = accumulation_dtype(query.dtype)
        padded_key, padded_value = (F.pad(rows, (0, 0, band.left, band.right)) for rows in (key, value))
        out = torch.empty_like(query)
        lse = torch.empty(query.shape[:2], dtype=accumulate, device=query.device)
        for first, last in _chunks(query, stream, band):
            hidden = _other_documents(stream, band, first, last)
            part, part_lse = attend(
                _tiles(query, band, first, last),
                _only_own(_key_views(padded_key, band, first, last), hidden),
                _only_own(_key_views(padded_value, band, first, last), hidden),
                mask=_band_mask(stream, band, first, last, accumulate),
            )
            _tiles(out, band, first, last).copy_(part)
            _tiles(lse, band, first, last).copy_(part_lse)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.stream, ctx.band = stream, band
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    @without_autocast
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        stream, band = ctx.stream, ctx.band
        accumulate = accumulation_dtype(query.dtype)
        padded_key, padded_value = (F.pad(rows, (0, 0, band.left, band.right)) for rows in (key, value))
        grad_query = torch.empty_like(query)
        grad_key, grad_value = (
            torch.zeros_like(rows, dtype=accumulate) for rows in (padded_key, padded_value)
        )
        for first, last in _chunks(query, stream, band):
            hidden = _other_documents(stream, band, first, last)
            to_query, to_key, to_value = attend_backward(
                _tiles(grads[0], band, first, last),
                _tiles(query, band, first, last),
                _only_own(_key_views(padded_key, band, first, last), hidden),
                _only_own(_key_views(padded_value, band, first, last), hidden),
                _tiles(out, band, first, last),
                _tiles(lse, band, first, last),
                mask=_band_mask(stream, band, first, last, accumulate),
            )
            _tiles(grad_query, band, first, last).copy_(to_query)
            _overlap_add(grad_key, _only_own(to_key, hidden), band, first)
            _overlap_add(grad_value, _only_own(to_value, hidden), band, first)
        unpadded = slice(band.left, band.left + key.shape[1])
        grad_key, grad_value = grad_key[:, unpadded].to(key.dtype), grad_value[:, unpadded].to(value.dtype)
        return grad_query, grad_key, grad_value, None, None


def _overlap_add(total: Tensor, parts: Tensor, band: _Band, first: int) -> None:
    """Add parts (blocks, heads, span, d) of overlapping slots into total (heads, left + S + right, d)."""
    blocks = len(parts)
    for offset in range(0, band.span, band.rows):
        begin = first * band.rows + offset
        target = total[:, begin : begin + blocks * band.rows].unflatten(1, (blocks, band.rows))
        target.add_(parts[:, :, offset : offset + band.rows].transpose(0, 1))
