"""The backward kernels of routed attention.

In: the gradient of the output, what went into `routed_forward` and what came out. Out: the operator
`routed_backward` gives the gradients of queries, keys, values and summaries, by the formulas of `gradients`.

For each piece of the stream (see `pair_lists`, sorted again rather than kept):
    pairs_kernel     key-block-major: dK and dV of a block from the tokens that read it, summed over the
                     pairs of a program; and each pair's share of dQ
    blocks_kernel    sums dK and dV over the programs of a block
    tokens_kernel    query-major: dQ from the own block, the far blocks and the shares of the token's pairs
    far.far_kernel   gradients of the pseudo-keys, from all tokens behind them
and once for the whole stream:
    windowed.key_gradient_kernel   dK and dV of own blocks, and the sum with those of the pairs

There is no atomic addition, so two runs give the same bits. Every sum is taken by one
thread block, or in two steps through partial sums that have places of their own.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dualroute.attention.backends.triton import pair_lists, windowed
from dualroute.attention.backends.triton.far import (
    far_gradients,
    far_words,
    half_square,
    log_shares,
    open_bits,
)
from dualroute.attention.backends.triton.gradients import (
    load_softmax,
    logit_gradients,
    poison,
    softmax_delta,
)
from dualroute.attention.backends.triton.pair_lists import PairList, Piece, pair_list, pieces
from dualroute.attention.backends.triton.tiles import (
    LOG2_E,
    LOG_2_E,
    Tile,
    dot,
    dot_add,
    load_rows,
    on_device,
    pad_dim,
    pairs_key_tile,
    store_rows,
    tile_for,
)


@triton.jit
def pairs_kernel(
    grad_rows, query_rows, key_rows, value_rows,  # (H, S, DIM) twice, (H_kv, S, DIM) twice
    lse_rows, delta_rows,  # (H, S)
    pairs, pair_start, program_bucket, program_start,  # see PairList
    tokens_in_block,  # (nb,)
    pair_query, part_key, part_value,  # (parts, GROUP, P, DIM), (programs, BLOCK, DIM) float32 twice, written
    slots, num_blocks, buckets, num_pairs, first_head, first_slot, piece_slots, scale,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Grid (programs, parts of KEYS tokens of a block). dK and dV of the part over the program's pairs, and
    the part's share of each pair's dQ."""
    program, part = tl.program_id(0), tl.program_id(1)
    bucket = tl.load(program_bucket + program)
    if bucket >= buckets:
        return
    kv_head = (first_head + bucket // num_blocks).to(tl.int64)
    begin = tl.load(pair_start + bucket) + (program - tl.load(program_start + bucket)) * CHUNK
    end = tl.minimum(begin + CHUNK, tl.load(pair_start + bucket + 1))

    lane = part * KEYS + tl.arange(0, KEYS)
    key_mask = lane < BLOCK
    if not CAUSAL:
        key_mask = lane < tl.load(tokens_in_block + bucket % num_blocks)
    key_slot = (bucket % num_blocks) * BLOCK + lane
    keys = load_rows(key_rows + kv_head * slots * DIM, key_slot, key_mask, DIM, DIM_PAD, DIM)
    values = load_rows(value_rows + kv_head * slots * DIM, key_slot, key_mask, DIM, DIM_PAD, DIM)
    to_key = tl.zeros((KEYS, DIM_PAD), tl.float32)
    to_value = tl.zeros((KEYS, DIM_PAD), tl.float32)
    pair_query += part.to(tl.int64) * GROUP * num_pairs * DIM
    for member in range(GROUP):
        head = kv_head * GROUP + member
        shares = pair_query + (head - kv_head * GROUP) * num_pairs * DIM
        for first in range(begin, end, ROWS):
            entry = first + tl.arange(0, ROWS)
            entry_mask = entry < end
            pair = tl.load(pairs + entry, mask=entry_mask, other=0)
            slot = first_slot + (pair // COLUMNS) % piece_slots
            query = load_rows(query_rows + head * slots * DIM, slot, entry_mask, DIM, DIM_PAD, DIM)
            grad = load_rows(grad_rows + head * slots * DIM, slot, entry_mask, DIM, DIM_PAD, DIM)
            lse, delta = load_softmax(lse_rows + head * slots, delta_rows + head * slots, slot, entry_mask)
            seen = entry_mask[:, None] & key_mask[None, :]
            weights, grad_logits = logit_gradients(
                query, keys, values, grad, lse, delta, seen, scale * LOG_2_E
            )
            grad_logits = grad_logits.to(query.dtype)
            to_value += dot(tl.trans(weights.to(grad.dtype)), grad)
            to_key += dot(tl.trans(grad_logits), query)
            share = dot(grad_logits, keys) * scale
            store_rows(shares, pair, entry_mask, share, DIM, DIM_PAD, DIM)
    place = program.to(tl.int64) * BLOCK * DIM
    store_rows(part_key + place, lane, lane < BLOCK, to_key * scale, DIM, DIM_PAD, DIM)
    store_rows(part_value + place, lane, lane < BLOCK, to_value, DIM, DIM_PAD, DIM)


@triton.jit
def blocks_kernel(
    part_key, part_value,  # (programs, BLOCK, DIM) float32
    program_start,  # (buckets + 1,)
    grad_key, grad_value,  # (heads of the piece, nb, BLOCK, DIM) float32, added to
    SIZE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Grid (buckets, parts of STEP numbers of a block's SIZE = BLOCK * DIM): sums over programs."""
    bucket = tl.program_id(0)
    first, last = tl.load(program_start + bucket), tl.load(program_start + bucket + 1)
    if first == last:
        return
    place = tl.program_id(1) * STEP + tl.arange(0, STEP)
    mask = place < SIZE
    target = bucket.to(tl.int64) * SIZE + place
    to_key = tl.load(grad_key + target, mask=mask, other=0.0)
    to_value = tl.load(grad_value + target, mask=mask, other=0.0)
    source = first.to(tl.int64) * SIZE + place
    for number in range(last - first):
        to_key += tl.load(part_key + source + number * SIZE, mask=mask, other=0.0)
        to_value += tl.load(part_value + source + number * SIZE, mask=mask, other=0.0)
    tl.store(grad_key + target, to_key, mask=mask)
    tl.store(grad_value + target, to_value, mask=mask)


@triton.jit
def far_part(
    query, square, grad, lse, delta, far_keys, far_values, far_poison, log_share, open_bits, column_begin,
    num_blocks, piece_slots, local, row_mask, scale, log_block,
    CAUSAL: tl.constexpr, ORDER: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Gradients of the logits (rows, KEYS) of a tile of pseudo-keys, and their means and variances."""
    column = column_begin + tl.arange(0, KEYS)
    inside = column < num_blocks
    sound = tl.load(far_poison + column, mask=inside, other=float("nan")) == 0.0
    mean = load_rows(far_keys, column, sound, DIM, DIM_PAD, ORDER * DIM)
    values = load_rows(far_values, column, inside, DIM, DIM_PAD, DIM)
    low, high = far_words(open_bits, column_begin // 32, piece_slots, local, row_mask, KEYS)
    second = (tl.arange(0, KEYS) >= 32)[None, :]
    seen = ((tl.where(second, high[:, None], low[:, None]) >> (column % 32)[None, :]) & 1) != 0
    logits = dot(query, tl.trans(mean))
    spread = mean
    if ORDER == 2:
        spread = load_rows(far_keys + DIM, column, sound, DIM, DIM_PAD, ORDER * DIM)
        logits = dot_add(square, tl.trans(spread), logits)
    logits = logits * (scale * LOG_2_E) + (log_block - lse)[:, None]
    if not CAUSAL:
        logits += tl.load(log_share + column, mask=inside, other=0.0)[None, :]
    weights = tl.exp2(logits)
    grad_logits = weights * (dot(grad, tl.trans(values)) - delta[:, None])
    return tl.where(seen, grad_logits, 0.0).to(mean.dtype), mean, spread


@triton.jit
def tokens_kernel(
    grad_rows, query_rows, key_rows, value_rows,  # (H, S, DIM) twice, (H_kv, S, DIM) twice
    lse_rows, delta_rows,  # (H, S)
    far_keys, far_values, open_bits,  # (H_kv, nb, ORDER * DIM), (H_kv, nb, DIM), see `far.open_bits`
    key_poison, far_poison,  # (H_kv, S), (H_kv, nb), see `gradients.poison`
    selected,  # (H_kv, S, COLUMNS)
    first_block, end_block, tokens_in_block, log_share,  # (nb,) each, see `block_places`, `far.log_shares`
    pair_query,  # (PARTS, GROUP, P, DIM)
    grad_query,  # (H, S, DIM), written
    slots, num_blocks, words, num_pairs, first_head, first_slot, piece_slots, scale, log_block,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
    ORDER: tl.constexpr, PARTS: tl.constexpr,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, TWICE: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of ROWS tokens of the piece, GROUP * heads of the piece): dQ.

    With S = dS of the far blocks, their share is (S mu + (S sigma^2) * q / sqrt(d)) / sqrt(d). The registers
    hold only one of these two sums of wide heads: TWICE walks over the far blocks for each of them.
    """
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
    grad = load_rows(grad_rows + head * slots * DIM, rows, row_mask, DIM, DIM_PAD, DIM)
    lse, delta = load_softmax(lse_rows + head * slots, delta_rows + head * slots, rows, row_mask)
    total = tl.zeros((ROWS, DIM_PAD), tl.float32)

    if ORDER > 0:
        first = tl.load(first_block + own)
        square = half_square(query, scale)
        far_keys += kv_head * num_blocks * ORDER * DIM
        far_values += kv_head * num_blocks * DIM
        far_poison += kv_head * num_blocks
        open_bits += piece_head.to(tl.int64) * words * piece_slots
        if ORDER == 2 and TWICE:
            for column_begin in range(tl.min(first) // KEYS * KEYS, tl.max(high), KEYS):
                grad_logits, mean, spread = far_part(
                    query, square, grad, lse, delta, far_keys, far_values, far_poison, log_share, open_bits,
                    column_begin, num_blocks, piece_slots, local, row_mask, scale, log_block,
                    CAUSAL, ORDER, DIM, DIM_PAD, KEYS,
                )  # fmt: skip
                total += dot(grad_logits, spread)
            total *= query.to(tl.float32) * scale

    key_rows += kv_head * slots * DIM
    value_rows += kv_head * slots * DIM
    key_poison += kv_head * slots
    for key_begin in range(tl.min(own) * BLOCK, last, KEYS):
        slot = key_begin + tl.arange(0, KEYS)
        poison = tl.load(key_poison + slot, mask=slot < last, other=float("nan"))
        keys = load_rows(key_rows, slot, poison == 0.0, DIM, DIM_PAD, DIM)
        values = load_rows(value_rows, slot, slot < last, DIM, DIM_PAD, DIM)
        seen = (slot[None, :] <= last_key[:, None]) & (slot[None, :] >= (own * BLOCK)[:, None])
        _, grad_logits = logit_gradients(query, keys, values, grad, lse, delta, seen, scale * LOG_2_E)
        total += dot(grad_logits.to(keys.dtype), keys)

    if ORDER > 0:
        to_square = tl.zeros((ROWS, DIM_PAD), tl.float32)
        for column_begin in range(tl.min(first) // KEYS * KEYS, tl.max(high), KEYS):
            grad_logits, mean, spread = far_part(
                query, square, grad, lse, delta, far_keys, far_values, far_poison, log_share, open_bits,
                column_begin, num_blocks, piece_slots, local, row_mask, scale, log_block,
                CAUSAL, ORDER, DIM, DIM_PAD, KEYS,
            )  # fmt: skip
            total += dot(grad_logits, mean)
            if ORDER == 2 and not TWICE:
                to_square += dot(grad_logits, spread)
        if ORDER == 2 and not TWICE:
            again = load_rows(query_rows + head * slots * DIM, rows, row_mask, DIM, DIM_PAD, DIM)
            total += to_square * again.to(tl.float32) * scale  # loaded again: no registers for it in between
    total *= scale

    selected_row = selected + (kv_head * slots + rows) * COLUMNS
    pair = (piece_head * piece_slots + local) * COLUMNS
    pair_query += member * num_pairs * DIM
    for place in range(COLUMNS):
        reads = row_mask & (tl.load(selected_row + place, mask=row_mask, other=-1) >= 0)
        for part in tl.static_range(PARTS):
            share = pair_query + tl.cast(num_pairs, tl.int64) * (part * GROUP * DIM)
            total += load_rows(share, pair + place, reads, DIM, DIM_PAD, DIM).to(tl.float32)
    store_rows(grad_query + head * slots * DIM, rows, row_mask, total, DIM, DIM_PAD, DIM)


@torch.library.custom_op("dualroute::routed_backward", mutates_args=())
def routed_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    far_keys: Tensor | None,
    far_values: Tensor | None,
    selected: Tensor,
    places: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, far_keys and far_values; the last two are empty without a summary.

    Contiguous, shapes as in the kernels.
    """
    heads, slots, _ = query.shape
    kv_heads, _, columns = selected.shape
    num_blocks = places.shape[1]
    block = slots // num_blocks
    tile = pairs_key_tile(query.shape[2], block, query.dtype)
    parts = triton.cdiv(block, tile.columns)
    delta = softmax_delta(grad, out)
    grad_query = torch.empty_like(query)
    read_key, read_value = (torch.zeros_like(rows, dtype=torch.float32) for rows in (key, value))
    to_far = [
        key.new_empty(0) if rows is None else torch.zeros_like(rows, dtype=torch.float32)
        for rows in (far_keys, far_values)
    ]
    with on_device(query):
        poisons = poison(key), None if far_keys is None else poison(far_keys)
        for piece in pieces(kv_heads, heads // kv_heads * parts, slots, columns, num_blocks):
            listed = pair_list(selected, piece, num_blocks)
            pair_query = _backward_pairs(
                grad, query, key, value, lse, delta, places, piece, listed, tile, columns, causal,
                read_key, read_value,
            )  # fmt: skip
            bits = None if far_keys is None else open_bits(selected, places, piece, causal)
            _backward_tokens(
                grad, query, key, value, lse, delta, far_keys, far_values, bits, poisons, selected,
                places, pair_query, piece, grad_query, causal,
            )  # fmt: skip
            if far_keys is not None and far_values is not None and bits is not None:
                found = far_gradients(
                    grad, query, lse, delta, far_keys, far_values, bits, places, piece, causal
                )
                for total, part in zip(to_far, found, strict=True):
                    total[piece.first_head : piece.last_head] += part
        begin = torch.arange(slots, device=query.device, dtype=torch.int32) // block * block
        end = begin + (block if causal else places[2].repeat_interleave(block, output_size=slots))
        to_key, to_value = windowed.key_gradients(
            grad, query, key, value, lse, delta, begin, end, block, causal, (read_key, read_value)
        )
    return grad_query, to_key, to_value, to_far[0].to(key.dtype), to_far[1].to(key.dtype)


@routed_backward.register_fake
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor,
    far_keys: Tensor | None, far_values: Tensor | None, *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    rows = [key.new_empty(0) if part is None else torch.empty_like(part) for part in (far_keys, far_values)]
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), rows[0], rows[1]


def _backward_pairs(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, lse: Tensor, delta: Tensor,
    places: Tensor, piece: Piece, listed: PairList, tile: Tile, columns: int, causal: bool,
    grad_key: Tensor, grad_value: Tensor,
) -> Tensor:  # fmt: skip
    """Add to the float32 gradients of keys and values; shares (parts, group, P, d) of that of queries."""
    heads, slots, dim = query.shape
    group, num_pairs = heads // len(key), len(listed.pairs)
    num_blocks = listed.buckets // piece.heads
    block = slots // num_blocks
    parts = triton.cdiv(block, tile.columns)
    pair_query = torch.empty(parts, group, num_pairs, dim, dtype=query.dtype, device=query.device)
    part_key = torch.empty(listed.programs, block, dim, dtype=torch.float32, device=query.device)
    part_value = torch.empty_like(part_key)
    pairs_kernel[(listed.programs, parts)](
        grad, query, key, value, lse, delta, *listed, places[2], pair_query, part_key, part_value,
        slots, num_blocks, listed.buckets, num_pairs, piece.first_head, piece.first_slot, piece.slots,
        1 / math.sqrt(dim),
        GROUP=group, CAUSAL=causal, BLOCK=block, COLUMNS=columns,
        DIM=dim, DIM_PAD=pad_dim(dim), ROWS=tile.rows, KEYS=tile.columns, CHUNK=pair_lists.CHUNK,
        num_warps=tile.warps, num_stages=1,
    )  # fmt: skip
    step = 1024
    blocks_kernel[(listed.buckets, triton.cdiv(block * dim, step))](
        part_key, part_value, listed.program_start,
        grad_key[piece.first_head :], grad_value[piece.first_head :],
        SIZE=block * dim, STEP=step, num_warps=4,
    )  # fmt: skip
    return pair_query


def _backward_tokens(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, lse: Tensor, delta: Tensor,
    far_keys: Tensor | None, far_values: Tensor | None, bits: Tensor | None,
    poisons: tuple[Tensor, Tensor | None], selected: Tensor, places: Tensor,
    pair_query: Tensor, piece: Piece, grad_query: Tensor, causal: bool,
) -> None:  # fmt: skip
    heads, slots, dim = query.shape
    group, num_blocks = heads // len(key), places.shape[1]
    block = slots // num_blocks
    order = 0 if far_keys is None else far_keys.shape[2] // dim
    tile = tile_for("tokens_query", dim, query.dtype)
    tokens_kernel[(triton.cdiv(piece.slots, tile.rows), piece.heads * group)](
        grad, query, key, value, lse, delta, far_keys, far_values, bits, *poisons, selected, *places,
        log_shares(places, block),
        pair_query, grad_query,
        slots, num_blocks, 0 if bits is None else bits.shape[1], pair_query.shape[2],
        piece.first_head, piece.first_slot, piece.slots,
        1 / math.sqrt(dim), math.log(block) * LOG2_E,
        GROUP=group, CAUSAL=causal, BLOCK=block, COLUMNS=selected.shape[2], ORDER=order,
        PARTS=len(pair_query),
        DIM=dim, DIM_PAD=pad_dim(dim), ROWS=tile.rows, KEYS=tile.columns, TWICE=dim > 64,
        num_warps=tile.warps, num_stages=2,
    )  # fmt: skip
