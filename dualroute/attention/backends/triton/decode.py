"""One step of the global route on a GPU: what one new token reads from a `GlobalCache`.

In: queries (R, group, 1, d) of the newest token, R = batch * kv_heads, whose key is already in the cache.
Out: (R, group, 1, d), equal to `decode._decode_step`.

    score_kernel    scores of all past blocks, for the router
    choose_kernel   the top_k best; with the sink and the own block, the list of blocks that are read
    read_kernel     one part of the softmax per program: one block, gathered from its place in the cache, or a
                    tile of pseudo-keys
and torch merges the parts by their log-sum-exps.

One token has no rows to fill a tile with, so the query heads that share keys are its
rows, padded to 16. The work is in reading memory, and it is spread over as many programs as there are parts.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dualroute.attention.backends.triton.selection import (
    NONE,
    empty_best,
    keep_best,
    pack,
    part_scores,
    unpack,
)
from dualroute.attention.backends.triton.tiles import dot, load_rows, on_device, pad_dim, store_rows
from dualroute.attention.core.cache import GlobalCache
from dualroute.attention.core.precision import HALF

TILE_NUMBERS = 8192  # of keys that a program holds at once, and as many values


@triton.jit(do_not_specialize=["length"])
def score_kernel(
    query_rows, feature_rows,  # (R, GROUP, DIM), (R, capacity, PARTS, DIM or 2 DIM)
    scores,  # (R, own), written
    length, capacity, scale,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, BLOCK: tl.constexpr, ROUTER: tl.constexpr,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, PARTS: tl.constexpr, PARTS_PAD: tl.constexpr,
    COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Grid (R, tiles of COLUMNS past blocks). A block's score is its best part's, summed over the heads."""
    row = tl.program_id(0).to(tl.int64)
    own = (length - 1) // BLOCK
    member = tl.arange(0, GROUP_PAD)
    query = load_rows(query_rows + row * GROUP * DIM, member, member < GROUP, DIM, DIM_PAD, DIM)
    if WIDE:
        query = query.to(tl.float32)
    lane = tl.arange(0, COLUMNS * PARTS_PAD)  # column * PARTS_PAD + part
    column, part = tl.program_id(1) * COLUMNS + lane // PARTS_PAD, lane % PARTS_PAD
    width: tl.constexpr = DIM if ROUTER == "mean" else 2 * DIM
    found = part_scores(
        query, feature_rows + row * capacity * PARTS * width, column * PARTS + part,
        (column < own) & (part < PARTS), 0, scale, ROUTER, DIM, DIM_PAD,
    )  # fmt: skip
    found = tl.where(part < PARTS, tl.sum(found, 0), float("-inf"))  # (COLUMNS * PARTS_PAD,)
    found = tl.max(tl.reshape(found, (COLUMNS, PARTS_PAD)), 1)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    tl.store(scores + row * own + column, found, mask=column < own)


@triton.jit(do_not_specialize=["length"])
def choose_kernel(
    scores,  # (R, own)
    read,  # (R, TOP_K + 2), written
    length,
    BLOCK: tl.constexpr, TOP_K: tl.constexpr, TOP_PAD: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Grid (R,). The chosen blocks, -1 = none, the sink (-1 when it is the own block), and the own block."""
    row = tl.program_id(0).to(tl.int64)
    own = (length - 1) // BLOCK
    read += row * (TOP_K + 2)
    if TOP_K > 0:
        best = empty_best(1, TOP_K, TOP_PAD)
        for begin in range(1, own, COLUMNS):
            column = begin + tl.arange(0, COLUMNS)
            found = tl.load(scores + row * own + column, mask=column < own, other=0.0)[None, :]
            best = keep_best(best, tl.where((column < own)[None, :], pack(found, column[None, :]), NONE))
        place = tl.arange(0, TOP_PAD)
        tl.store(read + place[None, :], unpack(best), mask=(place < TOP_K)[None, :])
    tl.store(read + TOP_K, tl.where(own > 0, 0, -1))
    tl.store(read + TOP_K + 1, own)


@triton.jit
def write_part(
    logits, seen, values, part_out, part_lse, member,
    GROUP: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of a softmax over logits (heads, keys); 0 and -inf where no key is seen."""
    logits = tl.where(seen[None, :], logits, float("-inf"))
    peak = tl.max(logits, 1)
    weights = tl.exp(logits - tl.where(peak == float("-inf"), 0.0, peak)[:, None])
    norm = tl.sum(weights, 1)
    some = tl.where(norm > 0, norm, 1.0)
    out = dot(weights.to(values.dtype), values) / some[:, None]
    store_rows(part_out, member, member < GROUP, out, DIM, DIM_PAD, DIM)
    tl.store(part_lse + member, peak + tl.log(some), mask=member < GROUP)


@triton.jit(do_not_specialize=["length", "num_parts"])
def read_kernel(
    query_rows, key_rows, value_rows,  # (R, GROUP, DIM), (R, capacity * BLOCK, DIM) twice
    far_keys, far_values,  # (R, capacity, ORDER * DIM), (R, capacity, DIM)
    read,  # (R, TOP_K + 2)
    part_out, part_lse,  # (R, parts, GROUP, DIM), (R, parts, GROUP) float32, written
    length, capacity, num_parts, scale, log_block,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr,
    SPLIT: tl.constexpr, TOP_K: tl.constexpr, ORDER: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Grid (R, (TOP_K + 2) * SPLIT + tiles of LANES pseudo-keys): one part of the softmax of `routed` each.

    A block is read in SPLIT parts of LANES keys.
    """
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    own = (length - 1) // BLOCK
    member, lane = tl.arange(0, GROUP_PAD), tl.arange(0, LANES)
    query = load_rows(query_rows + row * GROUP * DIM, member, member < GROUP, DIM, DIM_PAD, DIM)
    if WIDE:
        query = query.to(tl.float32)
    read += row * (TOP_K + 2)
    part_out += (row * num_parts + part) * GROUP * DIM
    part_lse += (row * num_parts + part) * GROUP
    if part < (TOP_K + 2) * SPLIT:
        number = tl.load(read + part // SPLIT)
        offset = part % SPLIT * LANES + lane
        token = number * BLOCK + offset
        seen = (offset < BLOCK) & (token >= 0) & (token < length)  # number -1: none
        keys = load_rows(key_rows + row * capacity * BLOCK * DIM, token, seen, DIM, DIM_PAD, DIM)
        values = load_rows(value_rows + row * capacity * BLOCK * DIM, token, seen, DIM, DIM_PAD, DIM)
        if WIDE:
            keys, values = keys.to(tl.float32), values.to(tl.float32)
        logits = dot(query, tl.trans(keys)) * scale
        write_part(logits, seen, values, part_out, part_lse, member, GROUP, DIM, DIM_PAD)
    else:
        if ORDER > 0:
            column = 1 + (part - (TOP_K + 2) * SPLIT) * LANES + lane  # not the sink
            seen = column < own
            far_keys += row * capacity * ORDER * DIM
            mean = load_rows(far_keys, column, seen, DIM, DIM_PAD, ORDER * DIM)
            values = load_rows(far_values + row * capacity * DIM, column, seen, DIM, DIM_PAD, DIM)
            if WIDE:
                mean, values = mean.to(tl.float32), values.to(tl.float32)
            logits = dot(query, tl.trans(mean)) * scale + log_block
            if ORDER == 2:
                spread = load_rows(far_keys + DIM, column, seen, DIM, DIM_PAD, ORDER * DIM)
                scaled = query.to(tl.float32) * scale
                logits += dot((scaled * scaled * 0.5).to(query.dtype), tl.trans(spread.to(query.dtype)))
            for place in range(TOP_K):
                seen = seen & (column != tl.load(read + place))
            write_part(logits, seen, values, part_out, part_lse, member, GROUP, DIM, DIM_PAD)


def decode_step(query: Tensor, cache: GlobalCache, top_k: int) -> Tensor:
    """The global route of the newest token, (R, group, 1, d), of a cache that already holds its key."""
    choice, follows = cache.choice, cache.follows
    with on_device(query):
        out, read = decode_global_step(
            query.contiguous(),
            cache.keys,
            cache.values,
            cache.features,
            cache.far_keys,
            cache.far_values,
            cache.length,
            top_k,
            cache.router,
            choice.get("read") if choice is not None and follows else None,
        )
    if choice is not None and not follows:
        choice.put("read", read)
    return out


@torch.library.custom_op("dualroute::decode_global_step", mutates_args=())
def decode_global_step(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    features: Tensor,
    far_keys: Tensor | None,
    far_values: Tensor | None,
    length: int,
    top_k: int,
    router: str,
    chosen: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The step on the tensors of a cache of which `length` tokens are filled, the newest one's included, and
    the blocks (R, top_k + 2) int32 that it read, -1 = none; those `chosen` by another layer, where given."""
    rows, group, _, dim = query.shape
    capacity, parts = features.shape[1:3]
    block = keys.shape[1] // capacity
    own = (length - 1) // block  # the blocks 1 .. own - 1 are candidates
    shared = {
        "GROUP": group, "GROUP_PAD": pad_dim(group), "BLOCK": block, "DIM": dim, "DIM_PAD": pad_dim(dim),
        "WIDE": {query.dtype, features.dtype} != {keys.dtype} or query.dtype not in HALF, "num_warps": 4,
    }  # fmt: skip
    scores = torch.empty(rows, own, dtype=torch.float32, device=query.device)
    if own > 1 and top_k and chosen is None:
        parts_pad = triton.next_power_of_2(parts)
        columns = max(1, max(16, TILE_NUMBERS // 2 // pad_dim(dim)) // parts_pad)
        score_kernel[(rows, triton.cdiv(own, columns))](
            query, features, scores, length, capacity, 1 / math.sqrt(dim),
            ROUTER=router, PARTS=parts, PARTS_PAD=parts_pad, COLUMNS=columns,
            **shared,
        )  # fmt: skip
    read = torch.empty(rows, top_k + 2, dtype=torch.int32, device=query.device)
    if chosen is not None:
        read.copy_(chosen)
    else:
        choose_kernel[(rows,)](
            scores, read, length,
            BLOCK=block, TOP_K=top_k, TOP_PAD=triton.next_power_of_2(max(1, top_k)), COLUMNS=256, num_warps=1,
        )  # fmt: skip
    lanes = min(pad_dim(block), max(32, TILE_NUMBERS // pad_dim(dim)))
    split = triton.cdiv(block, lanes)
    far_tiles = 0 if far_keys is None else triton.cdiv(max(0, own - 1), lanes)
    num_parts = (top_k + 2) * split + far_tiles
    part_out = torch.empty(rows, num_parts, group, dim, dtype=torch.float32, device=query.device)
    part_lse = torch.empty(rows, num_parts, group, 1, dtype=torch.float32, device=query.device)
    read_kernel[(rows, num_parts)](
        query, keys, values, far_keys, far_values, read, part_out, part_lse,
        length, capacity, num_parts, 1 / math.sqrt(dim), math.log(block),
        LANES=lanes, SPLIT=split, TOP_K=top_k, ORDER=0 if far_keys is None else far_keys.shape[2] // dim,
        **{**shared, "num_warps": 8 if dim > 128 else 4},
    )  # fmt: skip
    return (part_out * part_lse.softmax(1)).sum(1)[:, :, None].to(query.dtype), read


@decode_global_step.register_fake
def _(query: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    top_k = others[6]
    return torch.empty_like(query), query.new_empty(len(query), top_k + 2, dtype=torch.int32)
