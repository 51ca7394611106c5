"""The forward kernels of routed attention: a partial result per (token, block) pair, then one per token.

In: queries (H, S, d), keys and values (H_kv, S, d) of a stream, the summaries of its blocks and the selected
blocks. Out: the operator `routed_forward` gives the output (H, S, d) and the log-sum-exp (H, S) of the joint
softmax of `routed`.

Two kernels for each piece of the stream (see `pair_lists`):
    pairs_kernel    key-block-major: the tokens that read a block, gathered into tiles, attend to that block;
                    one partial output and log-sum-exp per pair and query head
    tokens_kernel   query-major: own block, pseudo-keys of far blocks, and the partial results of the token's
                    own pairs go into one running softmax

Gathering is done once and nothing is scattered. A pair owns the row that its result is
written to, so no two threads write to one place, and sums are taken in an order that never changes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dualroute.attention.backends.triton import pair_lists
from dualroute.attention.backends.triton.far import far_words, half_square, log_shares, open_bits
from dualroute.attention.backends.triton.gradients import poison
from dualroute.attention.backends.triton.pair_lists import PairList, Piece, pair_list, pieces
from dualroute.attention.backends.triton.tiles import (
    LN_2,
    LOG2_E,
    LOG_2_E,
    dot,
    dot_add,
    load_rows,
    on_device,
    pad_dim,
    softmax_step,
    store_rows,
    tile_for,
)


@triton.jit
def pairs_kernel(
    query_rows, key_rows, value_rows,  # (H, S, DIM), (H_kv, S, DIM) twice
    pairs, pair_start, program_bucket, program_start,  # see PairList
    tokens_in_block,  # (nb,)
    pair_out, pair_lse,  # (GROUP, P, DIM), (GROUP, P) in units of log 2, written
    slots, num_blocks, buckets, num_pairs, first_head, first_slot, piece_slots, scale,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Grid (programs, GROUP). o = softmax(q k^T / sqrt(d)) v over the keys of one block.

    A block of more than KEYS tokens is read KEYS at a time, again for every tile of queries. Causal, nobody
    reads a block that is not full.
    """
    program, member = tl.program_id(0), tl.program_id(1).to(tl.int64)
    bucket = tl.load(program_bucket + program)
    if bucket >= buckets:
        return
    kv_head = (first_head + bucket // num_blocks).to(tl.int64)
    begin = tl.load(pair_start + bucket) + (program - tl.load(program_start + bucket)) * CHUNK
    end = tl.minimum(begin + CHUNK, tl.load(pair_start + bucket + 1))

    lane = tl.arange(0, KEYS)
    tokens = BLOCK
    if not CAUSAL:
        tokens = tl.load(tokens_in_block + bucket % num_blocks)
    block_place = (kv_head * slots + (bucket % num_blocks) * BLOCK) * DIM
    key_rows += block_place
    value_rows += block_place
    if BLOCK <= KEYS:
        keys = load_rows(key_rows, lane, lane < BLOCK, DIM, DIM_PAD, DIM)
        values = load_rows(value_rows, lane, lane < BLOCK, DIM, DIM_PAD, DIM)
    query_rows += (kv_head * GROUP + member) * slots * DIM
    pair_out += member * num_pairs * DIM
    pair_lse += member * num_pairs
    for first in range(begin, end, ROWS):
        entry = first + tl.arange(0, ROWS)
        entry_mask = entry < end
        pair = tl.load(pairs + entry, mask=entry_mask, other=0)
        slot = first_slot + (pair // COLUMNS) % piece_slots
        query = load_rows(query_rows, slot, entry_mask, DIM, DIM_PAD, DIM)
        if BLOCK <= KEYS:
            logits = dot(query, tl.trans(keys)) * (scale * LOG_2_E)
            if BLOCK < KEYS or not CAUSAL:
                logits = tl.where((lane < tokens)[None, :], logits, float("-inf"))
            peak = tl.max(logits, 1)
            weights = tl.exp2(logits - peak[:, None])
            norm = tl.sum(weights, 1)
            total = dot(weights.to(values.dtype), values)
        else:
            total = tl.zeros((ROWS, DIM_PAD), tl.float32)
            norm = tl.zeros((ROWS,), tl.float32)
            peak = tl.full((ROWS,), float("-inf"), tl.float32)
            for key_begin in range(0, tokens, KEYS):
                place = key_begin + lane
                keys = load_rows(key_rows, place, place < tokens, DIM, DIM_PAD, DIM)
                values = load_rows(value_rows, place, place < tokens, DIM, DIM_PAD, DIM)
                logits = dot(query, tl.trans(keys)) * (scale * LOG_2_E)
                logits = tl.where((place < tokens)[None, :], logits, float("-inf"))
                total, peak, norm = softmax_step(total, peak, norm, logits, values)
        store_rows(pair_out, pair, entry_mask, total / norm[:, None], DIM, DIM_PAD, DIM)
        tl.store(pair_lse + pair, peak + tl.log2(norm), mask=entry_mask)


@triton.jit
def tokens_kernel(
    query_rows, key_rows, value_rows,  # (H, S, DIM), (H_kv, S, DIM) twice
    far_keys, far_values, open_bits,  # (H_kv, nb, ORDER * DIM), (H_kv, nb, DIM), see `far.open_bits`
    value_poison, far_poison,  # (H_kv, S), (H_kv, nb), see `gradients.poison`
    selected,  # (H_kv, S, COLUMNS)
    first_block, end_block, tokens_in_block, log_share,  # (nb,) each, see `block_places`, `far.log_shares`
    pair_out, pair_lse,  # (GROUP, P, DIM), (GROUP, P)
    out_rows, lse_rows,  # (H, S, DIM), (H, S), written
    slots, num_blocks, words, num_pairs, first_head, first_slot, piece_slots, scale, log_block,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
    ORDER: tl.constexpr,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of ROWS tokens of the piece, GROUP * heads of the piece): the joint softmax."""
    piece_head = tl.program_id(1) // GROUP
    member = (tl.program_id(1) % GROUP).to(tl.int64)
    kv_head = (first_head + piece_head).to(tl.int64)
    head = kv_head * GROUP + member
    begin = tl.program_id(0) * ROWS
    local = begin + tl.arange(0, ROWS)  # slot inside the piece
    row_mask = local < piece_slots
    rows = first_slot + tl.minimum(local, piece_slots - 1)
    last = tl.minimum(first_slot + begin + ROWS, first_slot + piece_slots)
    own = rows // BLOCK
    high, last_key = own, rows  # the last + 1 block and the last slot that a row may see
    if not CAUSAL:
        last = (tl.max(own) + 1) * BLOCK
        high = tl.load(end_block + own)
        last_key = own * BLOCK + tl.load(tokens_in_block + own) - 1
    query = load_rows(query_rows + head * slots * DIM, rows, row_mask, DIM, DIM_PAD, DIM)
    total = tl.zeros((ROWS, DIM_PAD), tl.float32)
    norm = tl.zeros((ROWS,), tl.float32)
    peak = tl.full((ROWS,), float("-inf"), tl.float32)

    key_rows += kv_head * slots * DIM
    value_rows += kv_head * slots * DIM
    value_poison += kv_head * slots
    for key_begin in range(tl.min(own) * BLOCK, last, KEYS):
        slot = key_begin + tl.arange(0, KEYS)
        keys = load_rows(key_rows, slot, slot < last, DIM, DIM_PAD, DIM)
        poison = tl.load(value_poison + slot, mask=slot < last, other=float("nan"))
        values = load_rows(value_rows, slot, poison == 0.0, DIM, DIM_PAD, DIM)
        seen = (slot[None, :] <= last_key[:, None]) & (slot[None, :] >= (own * BLOCK)[:, None])
        logits = dot(query, tl.trans(keys)) * (scale * LOG_2_E) + poison[None, :]
        total, peak, norm = softmax_step(total, peak, norm, tl.where(seen, logits, float("-inf")), values)

    if ORDER > 0:
        first = tl.load(first_block + own)
        far_keys += kv_head * num_blocks * ORDER * DIM
        far_values += kv_head * num_blocks * DIM
        far_poison += kv_head * num_blocks
        open_bits += piece_head.to(tl.int64) * words * piece_slots
        bit = tl.arange(0, KEYS) % 32
        second = (tl.arange(0, KEYS) >= 32)[None, :]
        square = half_square(query, scale)
        for column_begin in range(tl.min(first) // KEYS * KEYS, tl.max(high), KEYS):
            column = column_begin + tl.arange(0, KEYS)
            if KEYS < 32:  # of wider tiles the first column is the first bit of a word
                bit = column % 32
            inside = column < num_blocks
            mean = load_rows(far_keys, column, inside, DIM, DIM_PAD, ORDER * DIM)
            poison = tl.load(far_poison + column, mask=inside, other=float("nan"))
            values = load_rows(far_values, column, poison == 0.0, DIM, DIM_PAD, DIM)
            if not CAUSAL:
                poison += tl.load(log_share + column, mask=inside, other=0.0)
            low, high = far_words(open_bits, column_begin // 32, piece_slots, local, row_mask, KEYS)
            seen = ((tl.where(second, high[:, None], low[:, None]) >> bit[None, :]) & 1) != 0
            logits = dot(query, tl.trans(mean))
            if ORDER == 2:
                spread = load_rows(far_keys + DIM, column, inside, DIM, DIM_PAD, ORDER * DIM)
                logits = dot_add(square, tl.trans(spread), logits)
            logits = logits * (scale * LOG_2_E) + (poison + log_block)[None, :]
            total, peak, norm = softmax_step(total, peak, norm, tl.where(seen, logits, float("-inf")), values)

    selected_row = selected + (kv_head * slots + rows) * COLUMNS
    pair = (piece_head * piece_slots + local) * COLUMNS
    pair_out += member * num_pairs * DIM
    pair_lse += member * num_pairs
    for place in range(COLUMNS):
        reads = row_mask & (tl.load(selected_row + place, mask=row_mask, other=-1) >= 0)
        part_lse = tl.load(pair_lse + pair + place, mask=reads, other=float("-inf"))
        part = load_rows(pair_out, pair + place, reads, DIM, DIM_PAD, DIM).to(tl.float32)
        new_peak = tl.maximum(peak, part_lse)
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        decay, weight = tl.exp2(peak - shift), tl.exp2(part_lse - shift)
        total = total * decay[:, None] + part * weight[:, None]
        norm = norm * decay + weight
        peak = new_peak

    norm = tl.where(row_mask, norm, 1.0)
    store_rows(out_rows + head * slots * DIM, rows, row_mask, total / norm[:, None], DIM, DIM_PAD, DIM)
    tl.store(lse_rows + head * slots + rows, (peak + tl.log2(norm)) * LN_2, mask=row_mask)


@torch.library.custom_op("dualroute::routed_forward", mutates_args=())
def routed_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    far_keys: Tensor | None,
    far_values: Tensor | None,
    selected: Tensor,
    places: Tensor,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """Output (H, S, d) and float32 log-sum-exp (H, S); contiguous inputs, shapes as in the kernels, `places`
    as `block_places` gives them."""
    heads, slots, _ = query.shape
    kv_heads, _, columns = selected.shape
    out = torch.empty_like(query)
    lse = torch.empty(heads, slots, dtype=torch.float32, device=query.device)
    with on_device(query):
        poisons = poison(value), None if far_values is None else poison(far_values)
        for piece in pieces(kv_heads, heads // kv_heads, slots, columns, places.shape[1]):
            listed = pair_list(selected, piece, places.shape[1])
            pair_out, pair_lse = _forward_pairs(query, key, value, places, piece, listed, columns, causal)
            _forward_tokens(
                query, key, value, far_keys, far_values, poisons, selected, places,
                pair_out, pair_lse, piece, out, lse, causal,
            )  # fmt: skip
    return out, lse


@routed_forward.register_fake
def _(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), query.new_empty(query.shape[:2], dtype=torch.float32)


def _forward_pairs(
    query: Tensor, key: Tensor, value: Tensor, places: Tensor, piece: Piece, listed: PairList,
    columns: int, causal: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Partial outputs (group, P, d) in the type of the queries, log-sum-exps (group, P) in float32."""
    heads, slots, dim = query.shape
    group, num_pairs = heads // len(key), len(listed.pairs)
    num_blocks = listed.buckets // piece.heads
    block = slots // num_blocks
    # Half precision, when that is what comes in: these rows are most of what the route reads and writes.
    pair_out = torch.empty(group, num_pairs, dim, dtype=query.dtype, device=query.device)
    pair_lse = torch.empty(group, num_pairs, dtype=torch.float32, device=query.device)
    tile = tile_for("pairs", dim, query.dtype)
    keys = min(pad_dim(block), tile.columns)
    pairs_kernel[(listed.programs, group)](
        query, key, value, *listed, places[2], pair_out, pair_lse,
        slots, num_blocks, listed.buckets, num_pairs, piece.first_head, piece.first_slot, piece.slots,
        1 / math.sqrt(dim),
        GROUP=group, CAUSAL=causal, BLOCK=block, COLUMNS=columns,
        DIM=dim, DIM_PAD=pad_dim(dim), ROWS=tile.rows, KEYS=keys, CHUNK=pair_lists.CHUNK,
        num_warps=tile.warps if keys <= 64 else 8, num_stages=2,
    )  # fmt: skip
    return pair_out, pair_lse


def _forward_tokens(
    query: Tensor, key: Tensor, value: Tensor, far_keys: Tensor | None, far_values: Tensor | None,
    poisons: tuple[Tensor, Tensor | None], selected: Tensor, places: Tensor,
    pair_out: Tensor, pair_lse: Tensor, piece: Piece, out: Tensor, lse: Tensor, causal: bool,
) -> None:  # fmt: skip
    """Write the output and the log-sum-exp of the tokens of a piece."""
    heads, slots, dim = query.shape
    group, num_blocks = heads // len(key), places.shape[1]
    block = slots // num_blocks
    order = 0 if far_keys is None else far_keys.shape[2] // dim
    bits = None if far_keys is None else open_bits(selected, places, piece, causal)
    words = 0 if bits is None else bits.shape[1]
    tile = tile_for("tokens", dim, query.dtype)
    tokens_kernel[(triton.cdiv(piece.slots, tile.rows), piece.heads * group)](
        query, key, value, far_keys, far_values, bits, *poisons, selected, *places, log_shares(places, block),
        pair_out, pair_lse, out, lse,
        slots, num_blocks, words, pair_lse.shape[1], piece.first_head, piece.first_slot, piece.slots,
        1 / math.sqrt(dim), math.log(block) * LOG2_E,
        GROUP=group, CAUSAL=causal, BLOCK=block, COLUMNS=selected.shape[2], ORDER=order,
        DIM=dim, DIM_PAD=pad_dim(dim), ROWS=tile.rows, KEYS=tile.columns,
        num_warps=tile.warps, num_stages=2,
    )  # fmt: skip
