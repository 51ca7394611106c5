"""The selected blocks: each token reads the few blocks that the router chose for it, exactly.

In: queries (H_kv, S, group, d), keys and values in blocks (H_kv * nb, 1, block, d) and the chosen blocks
(H_kv, S, top_k). Out: `merge_selected` adds these keys to a running (output, log-sum-exp) and returns its
plans; `selected_backward` gives the gradients from the same plans.

The (token, block) pairs are sorted by block into tiles (`dispatch`), whose rows are gathered, attended to and
summed back to their tokens.

What is gathered exists for a few tiles at a time. Besides inputs and output there is one
row per pair, for one piece of the stream, however long the document is.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dualroute.attention.backends.torch.device import at_once, is_cpu
from dualroute.attention.backends.torch.dispatch import (
    TILE,
    Piece,
    Plan,
    gather_lse,
    gather_rows,
    new_part,
    pieces,
    plan,
    sum_pairs,
)
from dualroute.attention.backends.torch.tile_attention import attend, attend_backward
from dualroute.attention.core.precision import NEG_INF

CHUNK_ROWS = 1 << 11  # gathered query rows at once: a chunk stays in the caches of a core

Planned = list[tuple[Piece, Plan]]


def merge_selected(
    query: Tensor,
    key_blocks: Tensor,
    value_blocks: Tensor,
    chosen: Tensor,
    num_blocks: int,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> Planned:
    """Add the chosen blocks, in place, to out (H_kv, S, group, d) and lse (H_kv, S, group) of other keys.

    `mask` (H_kv * nb, 1, 1, block), 0 or -inf, closes slots of a block; None = all are open.
    """
    kv_heads, slots, group, dim = query.shape
    planned: Planned = []
    for piece in pieces(kv_heads, slots, chosen.shape[2], query.device):
        tiles = plan(chosen, piece, num_blocks)
        if tiles is None:
            continue
        planned.append((piece, tiles))
        part = new_part(out, tiles)
        part_lse = lse.new_empty(len(tiles.row), group)
        for rows, chunk in _chunks(tiles, group):
            result, result_lse = attend(
                _tile_queries(query, chunk),
                key_blocks.index_select(0, chunk.tile_block),
                value_blocks.index_select(0, chunk.tile_block),
                mask=None if mask is None else mask.index_select(0, chunk.tile_block),
            )
            part[rows] = result.view(-1, group, dim)
            part_lse[rows] = result_lse.view(-1, group)
        (head, last_head), (begin, end) = piece
        pair_lse = part_lse.index_select(0, tiles.pair.clamp_min(0).flatten()).view(*tiles.pair.shape, group)
        pair_lse.masked_fill_((tiles.pair < 0)[..., None], NEG_INF)
        old = lse[head:last_head, begin:end].reshape(-1, 1, group)
        merged = torch.logsumexp(torch.cat([old, pair_lse], dim=1), dim=1, keepdim=True)  # (rows, 1, group)
        summed = sum_pairs(part, tiles.pair, (pair_lse - merged).exp_())
        rows_out = out[head:last_head, begin:end]
        rows_out.mul_((old - merged).exp_().view(*rows_out.shape[:3], 1)).add_(summed.view(rows_out.shape))
        lse[head:last_head, begin:end] = merged.view(rows_out.shape[:3])
        del part, summed  # before the next piece makes its own
    return planned


def selected_backward(
    planned: Planned,
    grad: Tensor,
    query: Tensor,
    key_blocks: Tensor,
    value_blocks: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
) -> None:
    """Add the chosen blocks' part of the gradients in place; `out` and `lse` are those of the whole softmax.

    grad_query is (H_kv, S, group, d); grad_key and grad_value are (H_kv * nb, 1, block, d).
    """
    group, dim = query.shape[2:]
    for ((head, last_head), (begin, end)), tiles in planned:
        part = new_part(grad_query, tiles)
        for rows, chunk in _chunks(tiles, group):
            to_query, to_key, to_value = attend_backward(
                _tile_queries(grad, chunk),
                _tile_queries(query, chunk),
                key_blocks.index_select(0, chunk.tile_block),
                value_blocks.index_select(0, chunk.tile_block),
                _tile_queries(out, chunk),
                gather_lse(lse, chunk).flatten(1, 2)[:, None],
                mask=None if mask is None else mask.index_select(0, chunk.tile_block),
            )
            part[rows] = to_query.view(-1, group, dim)
            _add_tiles(grad_key, chunk.tile_block, to_key)
            _add_tiles(grad_value, chunk.tile_block, to_value)
        rows_grad = grad_query[head:last_head, begin:end]
        rows_grad.add_(sum_pairs(part, tiles.pair).view(rows_grad.shape))
        del part  # before the next piece makes its own


def _add_tiles(total: Tensor, block: Tensor, tiles: Tensor) -> None:
    """Add tiles (n, 1, block, d) to the blocks, ascending, of total (blocks, 1, block, d), in a fixed order.

    On a GPU `index_add_` adds up in whatever order its threads arrive.
    """
    if is_cpu(total.device):
        total.index_add_(0, block, tiles)
        return
    number = torch.arange(max(len(total) + 1, len(tiles)), device=block.device)
    first = torch.searchsorted(block, number[: len(total) + 1])  # the first tile of each block
    sums = torch.embedding_bag(tiles.flatten(1), number[: len(tiles)], first, include_last_offset=True)[0]
    total.add_(sums.view(total.shape))


def _chunks(tiles: Plan, group: int) -> Iterator[tuple[slice, Plan]]:
    """A plan in portions of at most CHUNK_ROWS query rows: tile rows of each, and its part of the plan."""
    step = max(1, at_once(CHUNK_ROWS, tiles.row.device) // (TILE * group))
    for first in range(0, len(tiles.tile_block), step):
        rows = slice(first * TILE, min(first + step, len(tiles.tile_block)) * TILE)
        yield rows, Plan(tiles.tile_block[first : first + step], tiles.row[rows], tiles.pair)


def _tile_queries(rows: Tensor, tiles: Plan) -> Tensor:
    """rows (H_kv, S, group, d) -> (tiles, 1, TILE * group, d), as `attend` takes queries."""
    return gather_rows(rows, tiles).flatten(1, 2)[:, None]
