"""Choosing blocks on a GPU: the scores of a tile of tokens and their running best, in one kernel.

In: queries (H, S, d) and keys (H_kv, S, d) of a stream. Out: `select_blocks` gives (H_kv, S, 1 + top_k)
int32 blocks like the function of the same name in `router`, whose docstring holds the formulas of the scores;
here too the chosen ones come in no order.

No (n, n / B) matrix exists: a program keeps the top_k of its tokens while it walks over the blocks.

Branch and bound: of every tile of blocks the coordinate-wise maximum and minimum of their features give an
upper bound of their scores. A tile whose bound enters no row's best is passed over. The bound is widened by
what rounding can do to both, so the same blocks are chosen, bit for bit, as if every tile had been scored.

Score and block number are packed into one 64-bit integer, the score above and the
number, inverted, below. Comparing these integers compares scores as float32 and prefers the earlier of two
equal blocks, so no two candidates are ever equal and a maximum also says where it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from dualroute.attention.backends.triton.tiles import (
    block_places,
    dot,
    load_part,
    on_device,
    pad_dim,
    tile_for,
)
from dualroute.attention.core.layout import Stream
from dualroute.attention.core.options import ROUTERS
from dualroute.attention.core.precision import HALF
from dualroute.attention.core.router import block_features

NONE = tl.constexpr(-(1 << 63))  # no candidate
NO_SCORE = tl.constexpr(-(1 << 63) + (1 << 32))  # every packed score lies above
TAKEN = tl.constexpr((1 << 63) - 1)
LAST = tl.constexpr((1 << 31) - 1)  # number ^ LAST = LAST - number

FEATURE_NUMBERS = 8192  # of the features that are multiplied at once
BOUNDED = 8  # tiles whose bounds are compared at once, with the best of the rows so far
BOUND_LANES = tl.constexpr(16)  # the narrowest product


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
    query, feature_rows, feature, feature_mask, begin, scale,
    ROUTER: tl.constexpr, DIM: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """(rows, parts) float32 scores of one query head; see `router` for the formulas.

    Of the numbers begin..begin + PART - 1 of a head, which are those of `query` (rows, PART).
    """
    if ROUTER == "mean":
        mean = load_part(feature_rows, feature, feature_mask, begin, DIM, PART, DIM).to(query.dtype)
        return dot(query, tl.trans(mean))
    wide = query.to(tl.float32)
    first = load_part(feature_rows, feature, feature_mask, begin, DIM, PART, 2 * DIM).to(query.dtype)
    second = load_part(feature_rows + DIM, feature, feature_mask, begin, DIM, PART, 2 * DIM).to(query.dtype)
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
def tile_bounds(
    query, bound_rows, tile, tile_mask, begin, scale,
    ROUTER: tl.constexpr, DIM: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """(rows, tiles) float32: no score of a block of the tiles is above, but for rounding; of a part of a
    head, like `part_scores`."""
    width: tl.constexpr = 3 * DIM if ROUTER == "moment" else 2 * DIM
    highest = load_part(bound_rows, tile, tile_mask, begin, DIM, PART, width).to(query.dtype)
    lowest = load_part(bound_rows + DIM, tile, tile_mask, begin, DIM, PART, width).to(query.dtype)
    wide = query.to(tl.float32)
    positive, negative = tl.maximum(wide, 0.0).to(query.dtype), tl.minimum(wide, 0.0).to(query.dtype)
    bound = dot(positive, tl.trans(highest)) + dot(negative, tl.trans(lowest))
    if ROUTER == "moment":
        second = load_part(bound_rows + 2 * DIM, tile, tile_mask, begin, DIM, PART, width).to(query.dtype)
        scaled = wide * scale
        bound = bound * scale + dot(scaled * scaled * 0.5, tl.trans(second.to(tl.float32))) * 1.001
    return bound


@triton.jit
def hopeful_tiles(
    query, query_rows, bound_rows, bound_norms, norm, begin, end, rows, row_mask, low, high, floor, slots,
    num_tiles, scale,
    GROUP: tl.constexpr, ROUTER: tl.constexpr, SLACK: tl.constexpr, COLUMNS: tl.constexpr,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A bit for each of the tiles begin..end-1: may a block of it beat the `floor` of a row that can read it?

    The rows choose among the blocks low + 1..high - 1. Rounding moves a score, and its bound, by less than
    half of SLACK times the sizes of its terms, whose sum is no more than the product of the norms. A bound
    that is no number is no reason to pass.
    """
    lane = tl.arange(0, BOUND_LANES)
    tile = begin + lane
    tile_mask = tile < num_tiles
    bound = norm[:, None] * (tl.load(bound_norms + tile, mask=tile_mask, other=0.0) * SLACK)[None, :]
    if GROUP == 1 and DIM <= PART:
        bound += tile_bounds(query, bound_rows, tile, tile_mask, 0, scale, ROUTER, DIM, PART)
    else:
        for step in tl.range(0, GROUP * (DIM_PAD // PART), num_stages=1):
            member, first = step // (DIM_PAD // PART), step % (DIM_PAD // PART) * PART
            other = load_part(query_rows + member * slots * DIM, rows, row_mask, first, DIM, PART, DIM)
            bound += tile_bounds(other, bound_rows, tile, tile_mask, first, scale, ROUTER, DIM, PART)
    read = (tile[None, :] * COLUMNS < high[:, None]) & ((tile + 1)[None, :] * COLUMNS > low[:, None] + 1)
    hopeful = read & (tile < end)[None, :] & ~(bound <= floor[:, None])
    return tl.sum(tl.max(hopeful.to(tl.int32), 0) << lane, 0)


@triton.jit
def tile_scores(
    query, query_rows, feature_rows, begin, first_part, num_blocks, rows, row_mask, slots, scale,
    GROUP: tl.constexpr, ROUTER: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, PART: tl.constexpr,
    PARTS: tl.constexpr, AT_ONCE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """(ROWS, COLUMNS) scores of the blocks from `begin` on, by AT_ONCE of their parts from `first_part` on.

    `query` is that of a group of one head no wider than PART; others are read again, for want of registers.
    """
    # part * COLUMNS + column: one thread then holds all parts of a block, and takes their maximum alone
    lane = tl.arange(0, AT_ONCE * COLUMNS)
    part = first_part + lane // COLUMNS
    column = begin + lane % COLUMNS
    mask = (column < num_blocks) & (part < PARTS)
    feature = column * PARTS + part
    if GROUP == 1 and DIM <= PART:
        scores = part_scores(query, feature_rows, feature, mask, 0, scale, ROUTER, DIM, PART)
    else:
        scores = tl.zeros((ROWS, AT_ONCE * COLUMNS), tl.float32)
        for step in tl.range(0, GROUP * (DIM_PAD // PART), num_stages=1):
            member, first = step // (DIM_PAD // PART), step % (DIM_PAD // PART) * PART
            other = load_part(query_rows + member * slots * DIM, rows, row_mask, first, DIM, PART, DIM)
            scores += part_scores(other, feature_rows, feature, mask, first, scale, ROUTER, DIM, PART)
    if PARTS % AT_ONCE != 0:
        scores = tl.where((part < PARTS)[None, :], scores, float("-inf"))
    return tl.max(tl.reshape(scores, (ROWS, AT_ONCE, COLUMNS)), 1)


@triton.jit
def select_kernel(
    query_rows,  # (H, S, DIM)
    feature_rows,  # (H_kv, nb, PARTS, DIM or 2 DIM)
    bound_rows, bound_norms,  # (H_kv, tiles, 2 DIM or 3 DIM), (H_kv, tiles), see `feature_bounds`, or None
    first_block, end_block,  # (nb,) twice
    selected,  # (H_kv, S, 1 + TOP_K), written
    scored,  # (H_kv, programs) int32, written: how many tiles were scored; None: nobody asks
    slots, num_blocks, scale,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, BLOCK: tl.constexpr, TOP_K: tl.constexpr,
    ROUTER: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, PART: tl.constexpr,
    PARTS: tl.constexpr, AT_ONCE: tl.constexpr,
    TOP_PAD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    SLACK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of ROWS tokens, H_kv), the last first; walks over COLUMNS blocks at a time."""
    kv_head = tl.program_id(1).to(tl.int64)
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    rows = program * ROWS + tl.arange(0, ROWS)
    row_mask = rows < slots
    own = tl.minimum(rows, slots - 1) // BLOCK
    first = tl.load(first_block + own)
    high = own
    if not CAUSAL:
        high = tl.load(end_block + own)
    width: tl.constexpr = DIM if ROUTER == "mean" else 2 * DIM
    feature_rows += kv_head * num_blocks * PARTS * width
    query_rows += kv_head * GROUP * slots * DIM
    selected += kv_head * slots * (1 + TOP_K)
    num_tiles = tl.cdiv(num_blocks, COLUMNS)
    if bound_rows is not None:
        bound_width: tl.constexpr = 3 * DIM if ROUTER == "moment" else 2 * DIM
        bound_rows += kv_head * num_tiles * bound_width
        bound_norms += kv_head * num_tiles
        norm = tl.zeros((ROWS,), tl.float32)
        for member in tl.range(0, GROUP, num_stages=1):
            squares = tl.zeros((ROWS,), tl.float32)
            for begin in tl.range(0, DIM, PART, num_stages=1):
                part = load_part(query_rows + member * slots * DIM, rows, row_mask, begin, DIM, PART, DIM)
                squares += tl.sum(part.to(tl.float32) * part.to(tl.float32), 1)
            norm += tl.sqrt(squares)

    best = empty_best(ROWS, TOP_K, TOP_PAD)
    _, floor = lowest(best)
    query = load_part(query_rows, rows, row_mask, 0, DIM, PART, DIM)
    count = 0
    last_tile = tl.cdiv(tl.max(high), COLUMNS)
    for step in range((tl.min(first) + 1) // COLUMNS, last_tile, STEP):
        end = tl.minimum(step + STEP, last_tile)
        if bound_rows is not None:
            hopeful = hopeful_tiles(
                query, query_rows, bound_rows, bound_norms, norm, step, end, rows, row_mask, first, high,
                floor, slots, num_tiles, scale, GROUP, ROUTER, SLACK, COLUMNS, DIM, DIM_PAD, PART, ROWS,
            )  # fmt: skip
        for tile in range(step, end):
            wanted = True
            if bound_rows is not None:
                wanted = ((hopeful >> (tile - step)) & 1) != 0
            if wanted:
                begin = tile * COLUMNS
                scores = tl.full((ROWS, COLUMNS), float("-inf"), tl.float32)
                for part in tl.range(0, PARTS, AT_ONCE, num_stages=1):
                    some = tile_scores(
                        query, query_rows, feature_rows, begin, part, num_blocks, rows, row_mask, slots,
                        scale, GROUP, ROUTER, DIM, DIM_PAD, PART, PARTS, AT_ONCE, ROWS, COLUMNS,
                    )  # fmt: skip
                    scores = some if AT_ONCE >= PARTS else tl.maximum(scores, some)
                column = begin + tl.arange(0, COLUMNS)
                allowed = (column[None, :] > first[:, None]) & (column[None, :] < high[:, None])
                if not CAUSAL:
                    allowed = allowed & (column[None, :] != own[:, None])
                scores = tl.where(allowed, scores, float("-inf"))
                best, floor = vote_best(best, floor, scores, column)
                count += 1

    place = tl.arange(0, TOP_PAD)
    tl.store(
        selected + rows[:, None] * (1 + TOP_K) + 1 + place[None, :],
        unpack(best),
        mask=row_mask[:, None] & (place < TOP_K)[None, :],
    )
    tl.store(selected + rows * (1 + TOP_K), tl.where(own > first, first, -1), mask=row_mask)
    if scored is not None:
        tl.store(scored + kv_head * tl.num_programs(0) + program, count)


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
        ValueError: an unknown router.
    """
    if router not in ROUTERS:
        raise ValueError(f"router={router} is unknown: valid are {', '.join(ROUTERS)}")
    valid = None
    if not causal and stream.slot_valid is not None:  # else only complete blocks are candidates
        valid = stream.slot_valid.view(-1, stream.block)
    # (H_kv, nb, parts, f)
    features = block_features(key.unflatten(1, (-1, stream.block)), router, sub_block, valid)
    places = block_places(stream)
    selected = select(query.contiguous(), features.contiguous(), places, top_k, router, causal)
    if stream.slot_valid is not None:
        selected.masked_fill_(~stream.slot_valid[:, None], -1)
    return selected


def feature_bounds(features: Tensor, router: str, columns: int) -> tuple[Tensor, Tensor]:
    """Of features (H_kv, nb, parts, ...): (H_kv, tiles, f) bounds of each tile of `columns` blocks, and the
    norm (H_kv, tiles), in float32, of the largest sizes of the coordinates.

    The bounds are the largest and the smallest coordinates; of what minmax has, the largest of the maxima and
    the smallest of the minima; moment has the largest variances, too.
    """
    dim = features.shape[-1] // (1 if router == "mean" else 2)
    first, second = features[..., :dim], features[..., -dim:]
    whole = features.shape[1] // columns * columns

    def reduced(numbers: Tensor, reduce: Callable[..., Tensor]) -> Tensor:
        tiles = reduce(numbers[:, :whole].unflatten(1, (-1, columns)), (2, 3))
        if whole == numbers.shape[1]:
            return tiles
        return torch.cat([tiles, reduce(numbers[:, whole:], (1, 2))[:, None]], dim=1)

    highest = reduced(first, torch.amax)
    lowest = reduced(second if router == "minmax" else first, torch.amin)
    bounds = [highest, lowest]
    if router == "moment":
        bounds.append(reduced(second, torch.amax))
    norms = torch.maximum(highest.float().abs(), lowest.float().abs()).norm(dim=-1)
    return torch.cat(bounds, dim=-1), norms


@torch.library.custom_op("dualroute::select_blocks", mutates_args=())
def select(query: Tensor, features: Tensor, places: Tensor, top_k: int, router: str, causal: bool) -> Tensor:
    """The kernel as an operator: queries (H, S, d), features (H_kv, nb, parts, f), `block_places`."""
    return launch(query, features, places, top_k, router, causal)


@select.register_fake
def _(query: Tensor, features: Tensor, places: Tensor, top_k: int, router: str, causal: bool) -> Tensor:
    return places.new_empty((features.shape[0], query.shape[1], 1 + top_k))


def launch(
    query: Tensor, features: Tensor, places: Tensor, top_k: int, router: str, causal: bool,
    bounded: bool = True, scored: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See `select`. Not `bounded`, every tile is scored; `scored` (H_kv, >= programs) counts them."""
    heads, slots, dim = query.shape
    kv_heads, num_blocks, parts, _ = features.shape
    selected = torch.empty(kv_heads, slots, 1 + top_k, dtype=torch.int32, device=query.device)
    parts_pad = triton.next_power_of_2(parts)
    tile = tile_for("select", dim, query.dtype)
    columns = max(16, min(32, 64 // parts_pad))
    wide = router == "moment" or query.dtype not in HALF  # products of float32
    held = heads == kv_heads and dim <= 128 and not wide
    part = pad_dim(dim) if held else min(pad_dim(dim), 32 if wide else 64)  # numbers of a head at once
    at_once = min(parts_pad, max(1, FEATURE_NUMBERS // part // columns))
    if at_once < parts_pad:  # the sums of two rounds share the registers
        at_once = max(1, at_once // 2)
    group = heads // kv_heads
    warps = tile.warps if held and at_once == parts_pad else 8
    # fewer blocks are bounded when nothing is known of the rows yet: in vain
    bounded = bounded and num_blocks > BOUNDED * columns and top_k > 0
    bounds = feature_bounds(features, router, columns) if bounded else (None, None)
    with on_device(query):
        select_kernel[(triton.cdiv(slots, tile.rows), kv_heads)](
            query, features, *bounds, places[0], places[1], selected, scored,
            slots, num_blocks, 1 / math.sqrt(dim),
            GROUP=group, CAUSAL=causal, BLOCK=slots // num_blocks, TOP_K=top_k, ROUTER=router,
            DIM=dim, DIM_PAD=pad_dim(dim), PART=part, PARTS=parts, AT_ONCE=at_once,
            TOP_PAD=triton.next_power_of_2(max(1, top_k)), ROWS=tile.rows, COLUMNS=columns,
            # products round by 2^-24 of their size, tensor cores by 2^-21 at worst; tf32x3 by 2^-19
            SLACK=2.0**-17 + group * 2 * pad_dim(dim) * 2.0**-20, STEP=BOUNDED,
            num_warps=warps, num_stages=2,
        )  # fmt: skip
    return selected
