"""Choosing blocks on a GPU: the scores of a tile of tokens and their running best, in one kernel.

In: queries (H, S, d) and keys (H_kv, S, d) of a stream. Out: `select_blocks` gives (H_kv, S, 1 + top_k)
int32 blocks like the function of the same name in `router`, whose docstring holds the formulas of the scores;
here too the chosen ones come in no order. Causal only.

No (n, n / B) matrix exists: a program keeps the top_k of its tokens while it walks over the blocks.

Score and block number are packed into one 64-bit integer, the score above and the
number, inverted, below. Comparing these integers compares scores as float32 and prefers the earlier of two
equal blocks, so no two candidates are ever equal and a maximum also says where it is.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from dualroute.attention.backends.triton.tiles import dot, load_rows, on_device, pad_dim, tile_for
from dualroute.attention.core.layout import Stream
from dualroute.attention.core.options import ROUTERS
from dualroute.attention.core.router import block_features

NONE = tl.constexpr(-(1 << 63))  # no candidate
NO_SCORE = tl.constexpr(-(1 << 63) + (1 << 32))  # every packed score lies above
TAKEN = tl.constexpr((1 << 63) - 1)
LAST = tl.constexpr((1 << 31) - 1)  # number ^ LAST = LAST - number


@triton.jit
def pack(score, number):
    """Scores float32 and block numbers, of shapes that broadcast, as sortable int64: higher score, then lower
    number."""
    score = tl.where(score == 0.0, 0.0, score)  # -0.0 and 0.0 are a tie
    bits = score.to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ LAST, bits)  # negative floats sort backwards as integers
    return (ordered.to(tl.int64) << 32) | (number ^ LAST).to(tl.int64)


@triton.jit
def unpack(packed):
    """Block numbers (rows, n) int32 of packed scores, -1 for none."""
    number = (packed & LAST).to(tl.int32) ^ LAST
    return tl.where(packed < NO_SCORE, -1, number)


@triton.jit
def empty_best(ROWS: tl.constexpr, TOP_K: tl.constexpr, TOP_PAD: tl.constexpr):
    """(ROWS, TOP_PAD) with room for TOP_K: free places all differ, those past TOP_K look taken for ever."""
    place = tl.arange(0, TOP_PAD)
    room = tl.where(place < TOP_K, NONE + 1 + place.to(tl.int64), TAKEN)
    return tl.zeros((ROWS, TOP_PAD), tl.int64) + room[None, :]


@triton.jit
def keep_best(best, packed):
    """Put the largest of packed (rows, n) in the place of the smallest of `best` until no row gains by it.

    All entries of a row of `best` differ. After a few tiles hardly any candidate is better than what is
    there, and the loop ends after a turn or two.
    """
    top, low = tl.max(packed, 1), tl.min(best, 1)
    while tl.max((top > low).to(tl.int32), 0) > 0:
        gain = (best == low[:, None]) & (top > low)[:, None]
        best = tl.where(gain, top[:, None], best)
        packed = tl.where(packed == top[:, None], NONE, packed)
        top, low = tl.max(packed, 1), tl.min(best, 1)
    return best


@triton.jit
def part_scores(
    query, feature_rows, feature, feature_mask, scale,
    ROUTER: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
):  # fmt: skip
    """(rows, parts) float32 scores of one query head (rows, DIM_PAD); see `router` for the formulas."""
    if ROUTER == "mean":
        mean = load_rows(feature_rows, feature, feature_mask, DIM, DIM_PAD, DIM).to(query.dtype)
        return dot(query, tl.trans(mean))
    wide = query.to(tl.float32)
    first = load_rows(feature_rows, feature, feature_mask, DIM, DIM_PAD, 2 * DIM).to(query.dtype)
    second = load_rows(feature_rows + DIM, feature, feature_mask, DIM, DIM_PAD, 2 * DIM).to(query.dtype)
    if ROUTER == "minmax":  # q^- min k + q^+ max k; the products of half-precision numbers are exact
        positive, negative = tl.maximum(wide, 0.0).to(query.dtype), tl.minimum(wide, 0.0).to(query.dtype)
        return dot(positive, tl.trans(first)) + dot(negative, tl.trans(second))
    scaled = wide * scale
    spread = dot(scaled * scaled * 0.5, tl.trans(second.to(tl.float32)))
    return dot(query, tl.trans(first)) * scale + spread


@triton.jit
def lowest(best):
    """(rows,) the smallest packed entry of each row, and the score that it holds, -inf for a free place."""
    low = tl.min(best, 1)
    ordered = (low >> 32).to(tl.int32)
    bits = tl.where(ordered < 0, ordered ^ LAST, ordered)
    return low, tl.where(low < NO_SCORE, float("-inf"), bits.to(tl.float32, bitcast=True))


@triton.jit
def vote_best(best, floor, scores, column):
    """Put scores (rows, n) of ascending columns that beat their row's `floor` into `best`, the highest first.

    The floor (rows,) is the lowest score in `best`. A tile that beats no floor costs a comparison: only when
    the vote of all rows says so, one candidate per row is looked for, packed and put in its place. An equal
    score does not count: the earlier block, which is there already, wins.
    """
    top = tl.max(scores, 1)
    while tl.max((top > floor).to(tl.int32), 0) > 0:
        number = tl.min(tl.where(scores == top[:, None], column[None, :], LAST), 1)
        low, _ = lowest(best)
        gain = (best == low[:, None]) & (top > floor)[:, None]
        best = tl.where(gain, pack(top, number)[:, None], best)
        _, floor = lowest(best)
        scores = tl.where(column[None, :] == number[:, None], float("-inf"), scores)
        top = tl.max(scores, 1)
    return best, floor


@triton.jit
def select_kernel(
    query_rows,  # (H, S, DIM)
    feature_rows,  # (H_kv, nb, PARTS, DIM or 2 DIM)
    first_block,  # (nb,)
    selected,  # (H_kv, S, 1 + TOP_K), written
    slots, num_blocks, scale,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, TOP_K: tl.constexpr, ROUTER: tl.constexpr,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, PARTS: tl.constexpr, PARTS_PAD: tl.constexpr,
    TOP_PAD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of ROWS tokens, H_kv), the last first; walks over COLUMNS blocks at a time."""
    kv_head = tl.program_id(1).to(tl.int64)
    rows = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS + tl.arange(0, ROWS)
    row_mask = rows < slots
    own = tl.minimum(rows, slots - 1) // BLOCK
    first = tl.load(first_block + own)
    width: tl.constexpr = DIM if ROUTER == "mean" else 2 * DIM
    feature_rows += kv_head * num_blocks * PARTS * width
    query_rows += kv_head * GROUP * slots * DIM
    selected += kv_head * slots * (1 + TOP_K)

    best = empty_best(ROWS, TOP_K, TOP_PAD)
    _, floor = lowest(best)
    # part * COLUMNS + column: one thread then holds all parts of a block, and takes their maximum alone
    lane = tl.arange(0, PARTS_PAD * COLUMNS)
    part = lane // COLUMNS
    query = load_rows(query_rows, rows, row_mask, DIM, DIM_PAD, DIM)
    for begin in range(tl.min(first) + 1, tl.max(own), COLUMNS):
        feature_column = begin + lane % COLUMNS
        feature_mask = (feature_column < num_blocks) & (part < PARTS)
        feature = feature_column * PARTS + part
        scores = part_scores(query, feature_rows, feature, feature_mask, scale, ROUTER, DIM, DIM_PAD)
        for member in range(1, GROUP):
            other = load_rows(query_rows + member * slots * DIM, rows, row_mask, DIM, DIM_PAD, DIM)
            scores += part_scores(other, feature_rows, feature, feature_mask, scale, ROUTER, DIM, DIM_PAD)
        if PARTS < PARTS_PAD:
            scores = tl.where((part < PARTS)[None, :], scores, float("-inf"))
        scores = tl.max(tl.reshape(scores, (ROWS, PARTS_PAD, COLUMNS)), 1)
        column = begin + tl.arange(0, COLUMNS)
        allowed = (column[None, :] > first[:, None]) & (column[None, :] < own[:, None])
        scores = tl.where(allowed, scores, float("-inf"))
        best, floor = vote_best(best, floor, scores, column)

    place = tl.arange(0, TOP_PAD)
    tl.store(
        selected + rows[:, None] * (1 + TOP_K) + 1 + place[None, :],
        unpack(best),
        mask=row_mask[:, None] & (place < TOP_K)[None, :],
    )
    tl.store(selected + rows * (1 + TOP_K), tl.where(own > first, first, -1), mask=row_mask)


@torch.no_grad()
def select_blocks(
    query: Tensor,
    key: Tensor,
    stream: Stream,
    *,
    top_k: int,
    router: str = "minmax",
    sub_block: int = 16,
    causal: bool = True,
) -> Tensor:
    """(H_kv, S, 1 + top_k) int32 blocks of the stream: the sink, then the chosen ones; -1 = none.

    Raises:
        ValueError: not causal, or an unknown router.
    """
    if not causal:
        raise ValueError("causal=False has no kernel: use dualroute.attention.select_blocks")
    if router not in ROUTERS:
        raise ValueError(f"router={router} is unknown: valid are {', '.join(ROUTERS)}")
    # A part of a block that is not full may have wild bounds, but only complete blocks are candidates.
    features = block_features(key.unflatten(1, (-1, stream.block)), router, sub_block)  # (H_kv, nb, parts, f)
    selected = select(query.contiguous(), features.contiguous(), stream.first_blocks(), top_k, router)
    if stream.slot_valid is not None:
        selected.masked_fill_(~stream.slot_valid[:, None], -1)
    return selected


@torch.library.custom_op("dualroute::select_blocks", mutates_args=())
def select(query: Tensor, features: Tensor, first_block: Tensor, top_k: int, router: str) -> Tensor:
    """The kernel as an operator: queries (H, S, d), features (H_kv, nb, parts, f), `first_blocks`."""
    heads, slots, dim = query.shape
    kv_heads, num_blocks, parts, _ = features.shape
    selected = torch.empty(kv_heads, slots, 1 + top_k, dtype=torch.int32, device=query.device)
    parts_pad = triton.next_power_of_2(parts)
    tile = tile_for("select", dim, query.dtype)
    rows = tile.rows if parts_pad * dim <= 512 else 32  # else the features leave no shared memory
    columns = max(16, min(32, 64 // parts_pad))
    with on_device(query):
        select_kernel[(triton.cdiv(slots, rows), kv_heads)](
            query, features, first_block, selected,
            slots, num_blocks, 1 / math.sqrt(dim),
            GROUP=heads // kv_heads, BLOCK=slots // num_blocks, TOP_K=top_k, ROUTER=router,
            DIM=dim, DIM_PAD=pad_dim(dim), PARTS=parts, PARTS_PAD=parts_pad,
            TOP_PAD=triton.next_power_of_2(max(1, top_k)), ROWS=rows, COLUMNS=columns,
            num_warps=tile.warps, num_stages=2,
        )  # fmt: skip
    return selected


@select.register_fake
def _(query: Tensor, features: Tensor, first_block: Tensor, top_k: int, router: str) -> Tensor:
    return first_block.new_empty((features.shape[0], query.shape[1], 1 + top_k))
