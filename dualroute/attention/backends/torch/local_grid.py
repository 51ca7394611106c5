"""The local route of images: exact attention to a square around each patch, in O(S * window^2).

In: queries (H, S, d), keys and values (H_kv, S, d) of a stream with a grid (see `core.grid`). Out: (H, S, d),
o_t = sum_s softmax_s(q_t . k_s / sqrt(d)) v_s over the patches s of the same image that are nearer to t than
`window` in rows and in columns: a square of 2 * window - 1 patches a side, cut off at the edges.

An image is cut into tiles of TILE x TILE patches. The queries of a tile see the keys of the tile and of a
halo of window - 1 patches around it, with an exact mask on top. Keys are gathered by a table of slots; so are
their gradients, by the table turned round: each patch knows in which halos it lies, so that nothing is
scattered and the sums have a fixed order on every device.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dualroute.attention.backends.torch.device import at_once
from dualroute.attention.backends.torch.full import full_attention
from dualroute.attention.backends.torch.tile_attention import attend, attend_backward
from dualroute.attention.core.grid import Grid
from dualroute.attention.core.layout import Stream
from dualroute.attention.core.precision import NEG_INF, accumulation_dtype, without_autocast

TILE = 8  # patches a side: 64 queries share a view of the keys
MAX_CHUNK = 1 << 20  # elements of the keys that are gathered at once: they stay in the caches


def grid_attention(query: Tensor, key: Tensor, value: Tensor, stream: Stream, *, window: int) -> Tensor:
    """Attention (H, S, d) to the patches nearer than `window` in both axes, inside each image.

    A window that reaches over the whole image is full attention.
    """
    grid = stream.grid
    assert grid is not None
    if window >= max(grid.height, grid.width):
        return full_attention(query, key, value, stream, causal=False)
    return _Squares.apply(query.contiguous(), key.contiguous(), value.contiguous(), stream, window)


class _Tables(NamedTuple):
    """What lies where in a tiled image of L slots; -1 = nothing. The same for every image of a stream."""

    queries: Tensor  # (tiles, rows) slot of each query
    keys: Tensor  # (tiles, span) slot of each key in view
    mask: Tensor  # (tiles, 1, rows, span) 0 and -inf
    query_of_slot: Tensor  # (L,) its number among the queries
    keys_of_slot: Tensor  # (L, views) its numbers among the keys


def _tables(stream: Stream, window: int, dtype: torch.dtype) -> _Tables:
    key = ("squares", window, dtype)
    tables = stream.cached(key, lambda: tuple(_compute_tables(stream.grid, window, dtype, stream.device)))
    return _Tables(*tables)


def _compute_tables(grid: Grid | None, window: int, dtype: torch.dtype, device: torch.device) -> _Tables:
    assert grid is not None
    row, seen_row = _axis(grid.height, window)  # (tiles down, tile), (tiles down, span)
    column, seen_column = _axis(grid.width, window)
    query_place = _pairs(row, column)  # (tiles, rows, 2)
    key_place = _pairs(seen_row, seen_column)  # (tiles, span, 2)
    queries, keys = _slots(grid, query_place), _slots(grid, key_place)
    apart = (query_place[:, :, None] - key_place[:, None]).abs()  # (tiles, rows, span, 2)
    allowed = (apart < window).all(-1) & (keys >= 0)[:, None]
    allowed |= (apart == 0).all(-1)  # a query that is no patch sees itself: no row is ever empty
    mask = torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~allowed, NEG_INF)[:, None]
    tables = _Tables(queries, keys, mask, _readers(queries, grid)[:, 0], _readers(keys, grid))
    return _Tables(*(table.to(device) for table in tables))


def _axis(size: int, window: int) -> tuple[Tensor, Tensor]:
    """Places along one axis, (tiles, tile) of queries and (tiles, span) of the keys in view, -1 and `size` or
    more being outside. One tile that holds the whole axis needs no halo."""
    tile = min(TILE, size)
    tiles = -(-size // tile)
    halo = 0 if tiles == 1 else min(window - 1, size)
    first = torch.arange(tiles)[:, None] * tile
    return first + torch.arange(tile), first + torch.arange(-halo, tile + halo)


def _pairs(rows: Tensor, columns: Tensor) -> Tensor:
    """(a, m) and (b, n) places on the axes -> (a * b, m * n, 2) places on the grid."""
    a, m = rows.shape
    b, n = columns.shape
    shape = (a, b, m, n)
    both = rows[:, None, :, None].expand(shape), columns[None, :, None, :].expand(shape)
    return torch.stack(both, -1).reshape(a * b, m * n, 2)


def _slots(grid: Grid, place: Tensor) -> Tensor:
    """Slots of places (..., 2) inside a document, -1 outside of the grid."""
    row, column = place.unbind(-1)
    inside = (row >= 0) & (row < grid.height) & (column >= 0) & (column < grid.width)
    number = torch.where(inside, row * grid.width + column, 0)
    return torch.where(inside, grid.slot_of_patch()[number], -1)


def _readers(slots: Tensor, grid: Grid) -> Tensor:
    """Table (tiles, m) of slots -> (L, most) the places in it, flattened, that hold each slot; -1 = none."""
    flat = slots.flatten()
    place = (flat >= 0).nonzero()[:, 0]
    order = place[torch.argsort(flat[place], stable=True)]
    slot = flat[order]
    counts = torch.bincount(slot, minlength=grid.slots)
    nth = torch.arange(len(slot)) - (counts.cumsum(0) - counts)[slot]
    table = torch.full((grid.slots, int(counts.max())), -1)
    table[slot, nth] = order
    return table


def _images(rows: Tensor, length: int, first: int, last: int) -> Tensor:
    """(heads, S, ...) -> (heads, images, length, ...) view of the images first..last-1."""
    return rows[:, first * length : last * length].unflatten(1, (last - first, length))


def _gather(rows: Tensor, table: Tensor) -> Tensor:
    """(heads, images, L, ...) by a table (tiles, m) of slots -> (images * tiles, heads, m, ...), 0 at -1."""
    tiles = rows.index_select(2, table.clamp_min(0).flatten()).unflatten(2, table.shape)
    missing = (table < 0).view(table.shape + (1,) * (tiles.ndim - 4))
    return tiles.masked_fill_(missing, 0).movedim(0, 2).flatten(0, 1)


def _back(tiles: Tensor, images: int, readers: Tensor) -> Tensor:
    """(images * tiles, heads, m, ...) -> (heads, images, L, ...): the sum over the places (L, views) of each
    slot, 0 where there is none."""
    flat = tiles.unflatten(0, (images, -1)).movedim(2, 0).flatten(2, 3)  # (heads, images, tiles * m, ...)
    total: Tensor | None = None
    for view in readers.unbind(1):
        missing = (view < 0).view(-1, *(1,) * (flat.ndim - 3))
        part = flat.index_select(2, view.clamp_min(0)).masked_fill_(missing, 0)
        total = part if total is None else total.add_(part)
    assert total is not None
    return total


def _chunks(query: Tensor, stream: Stream, tables: _Tables) -> Iterator[tuple[int, int]]:
    """Ranges (first, end) of images that are worked on at once, at least one each."""
    assert stream.grid is not None
    images = stream.num_slots // stream.grid.slots
    cost = query.shape[0] * query.shape[2] * tables.keys.numel()
    step = max(1, at_once(MAX_CHUNK, query.device) // cost)
    for first in range(0, images, step):
        yield first, min(first + step, images)


def _mask(tables: _Tables, images: int) -> Tensor:
    """(images * tiles or 1, 1, rows, span)."""
    return tables.mask if len(tables.mask) == 1 else tables.mask.repeat(images, 1, 1, 1)


class _Squares(torch.autograd.Function):
    """The route on a whole stream. Saves its inputs, its output and one log-sum-exp per row: O(S)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, stream: Stream, window: int) -> Tensor:
        accumulate = accumulation_dtype(query.dtype)
        tables = _tables(stream, window, accumulate)
        length = len(tables.query_of_slot)
        out = torch.empty_like(query)
        lse = torch.empty(query.shape[:2], dtype=accumulate, device=query.device)
        for first, last in _chunks(query, stream, tables):
            q, k, v = (_images(rows, length, first, last) for rows in (query, key, value))
            part, part_lse = attend(
                _gather(q, tables.queries),
                _gather(k, tables.keys),
                _gather(v, tables.keys),
                mask=_mask(tables, last - first),
            )
            for whole, tiles in ((out, part), (lse, part_lse)):
                rows = _back(tiles, last - first, tables.query_of_slot[:, None])
                _images(whole, length, first, last).copy_(rows)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.stream, ctx.window = stream, window
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    @without_autocast
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        stream: Stream = ctx.stream
        tables = _tables(stream, ctx.window, accumulation_dtype(query.dtype))
        length = len(tables.query_of_slot)
        to_rows = [torch.empty_like(rows) for rows in (query, key, value)]
        for first, last in _chunks(query, stream, tables):
            grad, q, k, v, o, of_lse = (
                _images(rows, length, first, last) for rows in (grads[0], query, key, value, out, lse)
            )
            parts = attend_backward(
                _gather(grad, tables.queries),
                _gather(q, tables.queries),
                _gather(k, tables.keys),
                _gather(v, tables.keys),
                _gather(o, tables.queries),
                _gather(of_lse, tables.queries),
                mask=_mask(tables, last - first),
            )
            readers = (tables.query_of_slot[:, None], tables.keys_of_slot, tables.keys_of_slot)
            for whole, tiles, places in zip(to_rows, parts, readers, strict=True):
                _images(whole, length, first, last).copy_(_back(tiles, last - first, places))
        return (*to_rows, None, None)
