"""Sorted dispatch: (token, block) pairs grouped by block into tiles, as experts group their tokens.

In: the blocks each token selected. Out: `plan` lists, for a piece of the stream, tiles of TILE rows that all
read one block, the token behind each row, and the row behind each pair. `routed` runs attention
over the tiles.

A filled-up tile repeats its first token in its unused rows. Nobody looks at what they give, and
their log-sum-exp is set to +inf before the backward pass, which makes their gradients exactly 0. That token
is of the document of the block it reads: should it be NaN, no other document meets it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dualroute.attention.backends.torch.device import at_once

TILE = 64  # tokens per tile
MAX_PAIRS = 1 << 17  # (token, block) pairs dispatched at once: bounds the memory of a pair's row
JOIN_PAIRS = 1 << 15  # short heads are dispatched together up to this many
DUMMY_LSE = 1e30  # exp(logit - DUMMY_LSE) is 0


class Piece(NamedTuple):
    """Key heads `heads` and slots `slots` of the stream: what is dispatched at once."""

    heads: tuple[int, int]
    slots: tuple[int, int]


class Plan(NamedTuple):
    """Tiles of a piece; rows and blocks are numbered over all heads: head * S + slot, head * nb + block."""

    tile_block: Tensor  # (tiles,) block each tile reads
    row: Tensor  # (tiles * TILE,) int32 row of (H_kv * S) behind each tile row, -1 = unused
    pair: Tensor  # (rows of the piece, pairs per row) int32 tile row of each pair, -1 = no such pair


def pieces(kv_heads: int, slots: int, pairs_per_slot: int, device: torch.device) -> Iterator[Piece]:
    """Cover all heads and slots with pieces of MAX_PAIRS pairs on a CPU: several short heads, or part of one.

    A part of a head has fewer tokens for each block, which fill their tiles less well.
    """
    if pairs_per_slot == 0:
        return
    join, most = at_once(JOIN_PAIRS, device), at_once(MAX_PAIRS, device)
    heads = max(1, min(join, most) // (slots * pairs_per_slot))
    step = slots if heads > 1 else max(1, most // pairs_per_slot)
    for head in range(0, kv_heads, heads):
        for begin in range(0, slots, step):
            yield Piece((head, min(head + heads, kv_heads)), (begin, min(begin + step, slots)))


def plan(selected: Tensor, piece: Piece, num_blocks: int) -> Plan | None:
    """The tiles of a piece of selected (H_kv, S, pairs), -1 = none; None when there is no pair at all."""
    (head, last_head), (begin, end) = piece
    slots, pairs = selected.shape[1:]
    device = selected.device
    heads, rows = last_head - head, end - begin
    chosen = selected[head:last_head, begin:end]  # (heads, rows, pairs)
    buckets = heads * num_blocks  # block numbers over the heads of this piece; one more stands for "none"
    offset = num_blocks * torch.arange(heads, device=device, dtype=chosen.dtype)[:, None, None]
    key = torch.where(chosen < 0, buckets, chosen + offset).flatten()
    if buckets < torch.iinfo(torch.int16).max:
        key = key.to(torch.int16)  # narrower keys sort faster
    order = torch.sort(key, stable=True).indices
    count = torch.bincount(key, minlength=buckets + 1)
    valid = len(key) - int(count[-1])
    if valid == 0:
        return None
    count = count[:-1]
    tiles = (count + TILE - 1) // TILE  # tiles of each block
    total = int(tiles.sum())
    shift = (tiles.cumsum(0) - tiles) * TILE - (count.cumsum(0) - count)  # from sorted place to tile row
    order = order[:valid]
    place = torch.arange(valid, device=device) + shift.repeat_interleave(count, output_size=valid)
    token = order // pairs + (
        head * slots + begin
    )  # a piece has all slots, or one head: its tokens are a range
    row = torch.full((total * TILE,), -1, dtype=torch.int32, device=device)
    row[place] = token.to(torch.int32)
    pair = torch.full((len(key),), -1, dtype=torch.int32, device=device)
    pair[order] = place.to(torch.int32)
    block = torch.arange(head * num_blocks, last_head * num_blocks, device=device)
    return Plan(block.repeat_interleave(tiles, output_size=total), row, pair.view(heads * rows, pairs))


def gather_rows(rows: Tensor, plan: Plan) -> Tensor:
    """rows (H_kv, S, group, d) -> tiles (tiles, TILE, group, d)."""
    flat = rows.flatten(2).flatten(0, 1)  # (H_kv * S, group * d)
    row = plan.row.view(-1, TILE)
    gathered = flat.index_select(0, torch.where(row < 0, row[:, :1], row).flatten())
    return gathered.view(-1, TILE, *rows.shape[2:])


def gather_lse(lse: Tensor, plan: Plan) -> Tensor:
    """lse (H_kv, S, group) -> (tiles, TILE, group), DUMMY_LSE in unused rows."""
    gathered = lse.flatten(0, 1).index_select(0, plan.row.clamp_min(0))
    return gathered.masked_fill_((plan.row < 0)[:, None], DUMMY_LSE).view(-1, TILE, lse.shape[2])


def new_part(like: Tensor, plan: Plan) -> Tensor:
    """(tiles * TILE + 1, group, d) for a plan's results, typed like (..., group, d); the last row is 0."""
    part = like.new_empty(len(plan.row) + 1, *like.shape[-2:])
    part[-1] = 0
    return part


def sum_pairs(part: Tensor, pair: Tensor, weights: Tensor | None = None) -> Tensor:
    """Back to tokens: (tiles * TILE + 1, group, d) -> (rows, group, d), the weighted sum over a row's pairs.

    weights is (rows, pairs, group), 1 when None; pairs of -1 read the last row of `part`, which `new_part`
    has made 0: a row of another document may be NaN, and NaN times 0 is NaN.
    """
    group, dim = part.shape[1:]
    rows = part.reshape(-1, dim)  # ((tiles * TILE + 1) * group, d)
    exists = pair >= 0
    place = torch.where(exists, pair, len(part) - 1)
    sums = []
    for member in range(group):
        scale = exists.to(rows.dtype) if weights is None else weights[..., member]
        index = place if group == 1 else place * group + member
        sums.append(F.embedding_bag(index, rows, mode="sum", per_sample_weights=scale))
    return torch.stack(sums, dim=1)
