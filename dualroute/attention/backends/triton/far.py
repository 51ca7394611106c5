"""The far summary's pseudo-keys inside the kernels: which are open to a row, and their gradients.

In: queries (H, S, d) of a stream, the summaries of its blocks as `far_summary.summarise` gives them, and the
selected blocks. Out: `open_bits`, a bit per row and pseudo-key; `half_square` and `far_words`, which the
kernels of both directions call; `far_gradients`, those of the summaries.

Causal, an incomplete block is never anybody's past: n in log n is the same for all pseudo-keys, the block.
With both sides of a token the last block of a document may be another's, and its n is smaller.

Which blocks are far is the same for all query heads of a group and for both directions. It is worked out once
for a piece of the stream, 32 blocks to a word, and a tile tests a bit instead of comparing every pseudo-key
with every chosen block.

A few pseudo-keys stand for a whole text, so one thread block per tile of them would
leave most of a GPU idle. The tokens behind them are split between many, whose partial sums torch adds up.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from dualroute.attention.backends.triton.gradients import load_softmax
from dualroute.attention.backends.triton.pair_lists import Piece
from dualroute.attention.backends.triton.tiles import (
    LOG2_E,
    LOG_2_E,
    dot,
    dot_add,
    load_rows,
    pad_dim,
    store_rows,
    tile_for,
)

MAX_SPLITS = 32  # parts that the tokens behind a pseudo-key are divided into
PROGRAMS = 512  # thread blocks that keep a large GPU busy
FAR_TILE = 64  # pseudo-keys per pair of words; every tile of pseudo-keys begins at a multiple of its size


@triton.jit
def low_bits(count):
    """int32 with the lowest `count` bits set: none below 0, all from 32 on."""
    some = (1 << (count & 31)) - 1
    return tl.where(count <= 0, 0, tl.where(count >= 32, -1, some))


@triton.jit
def bits_kernel(
    selected, first_block, end_block,  # (H_kv, S, 1 + TOP_K), (nb,) twice
    open_bits,  # (heads of the piece, words, slots of the piece), written
    slots, words, first_head, first_slot, piece_slots,
    CAUSAL: tl.constexpr, BLOCK: tl.constexpr, TOP_K: tl.constexpr, TOP_PAD: tl.constexpr,
    ROWS: tl.constexpr, GROUP_WORDS: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of ROWS tokens of the piece, heads of the piece). A word has a bit per block.

    Words outside of the tiles between the first and the own block of the rows, or the last one, are not
    written.
    """
    piece_head = tl.program_id(1).to(tl.int64)
    local = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = local < piece_slots
    rows = first_slot + tl.minimum(local, piece_slots - 1)
    own = rows // BLOCK
    first = tl.load(first_block + own)
    high = own
    if not CAUSAL:
        high = tl.load(end_block + own)
    place = tl.arange(0, TOP_PAD)
    chosen = tl.load(
        selected + (((first_head + piece_head) * slots + rows) * (1 + TOP_K))[:, None] + 1 + place[None, :],
        mask=(place < TOP_K)[None, :],
        other=-1,
    )
    open_bits += piece_head * words * piece_slots
    begin = tl.min(first) // (32 * GROUP_WORDS) * GROUP_WORDS
    for word in range(begin, tl.cdiv(tl.max(high), 32 * GROUP_WORDS) * GROUP_WORDS):
        taken = tl.sum(tl.where(chosen >> 5 == word, 1 << (chosen & 31), 0), 1)
        past = low_bits(high - 32 * word) & ~low_bits(first + 1 - 32 * word)
        if not CAUSAL:
            past &= ~tl.where(own >> 5 == word, 1 << (own & 31), 0)
        tl.store(open_bits + word * piece_slots + local, past & ~taken, mask=row_mask)


def open_bits(selected: Tensor, places: Tensor, piece: Piece, causal: bool) -> Tensor:
    """(heads, words, slots) int32 of a piece: bit i of word w is block 32 w + i, 1 where it is far.

    Far is what lies after the document's first block, before the own one (not causal: anywhere but there),
    and is not selected. The blocks of a row of `selected` (H_kv, S, C) differ; `places` see `block_places`.
    """
    _, slots, columns = selected.shape
    num_blocks = places.shape[1]
    words = triton.cdiv(num_blocks, FAR_TILE) * (FAR_TILE // 32)
    bits = torch.empty(piece.heads, words, piece.slots, dtype=torch.int32, device=selected.device)
    top_pad = triton.next_power_of_2(max(1, columns - 1))
    rows = max(16, min(128, 4096 // top_pad))
    bits_kernel[(triton.cdiv(piece.slots, rows), piece.heads)](
        selected, places[0], places[1], bits, slots, words, piece.first_head, piece.first_slot, piece.slots,
        CAUSAL=causal, BLOCK=slots // num_blocks, TOP_K=columns - 1, TOP_PAD=top_pad,
        ROWS=rows, GROUP_WORDS=FAR_TILE // 32, num_warps=4,
    )  # fmt: skip
    return bits


def log_shares(places: Tensor, block: int) -> Tensor:
    """(nb,) float32, in units of log 2: n_b / B of each block, 0 where it is full.

    What log n_b is below log B; causal, nobody reads a block that is not full.
    """
    return (places[2].float() / block).log2()


@triton.jit
def half_square(query, scale):
    """What a query multiplies variances with, but for a factor `scale`: 1/2 q^2 / sqrt(d)."""
    wide = query.to(tl.float32)
    return (wide * wide * (0.5 * scale)).to(query.dtype)


@triton.jit
def far_words(bits, word, word_stride, rows, row_mask, KEYS: tl.constexpr):
    """The words (rows,) twice that hold the bits of KEYS pseudo-keys; the second counts when KEYS is 64."""
    low = tl.load(bits + word * word_stride + rows, mask=row_mask, other=0)
    high = low
    if KEYS == 64:
        high = tl.load(bits + (word + 1) * word_stride + rows, mask=row_mask, other=0)
    return low, high


@triton.jit
def far_kernel(
    grad_rows, query_rows,  # (H, S, DIM)
    lse_rows, delta_rows,  # (H, S)
    far_keys, far_values,  # (H_kv, nb, ORDER * DIM), (H_kv, nb, DIM)
    open_bits, first_block, end_block,  # see open_bits, (nb,) twice: of the document
    log_share,  # (nb,), see `log_shares`
    part_keys, part_values,  # (splits, heads of the piece, nb, ORDER * DIM) and DIM, float32, written
    slots, num_blocks, words, kv_heads, first_head, first_slot, piece_slots, scale, log_block,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, BLOCK: tl.constexpr, ORDER: tl.constexpr,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    TO_MEAN: tl.constexpr, TO_SPREAD: tl.constexpr, TO_VALUES: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of KEYS pseudo-keys, heads of the piece, splits); of rows every splits-th tile.

    TO_MEAN, TO_SPREAD and TO_VALUES say which gradients are wanted: of wide heads, three sums do not fit.
    d mu = dS^T q / sqrt(d), d sigma^2 = dS^T q^2 / 2 d, d v_bar = P^T dO.
    """
    piece_head, split = tl.program_id(1).to(tl.int64), tl.program_id(2)
    kv_head = first_head + piece_head
    first_column = tl.program_id(0) * KEYS
    column = first_column + tl.arange(0, KEYS)
    inside = column < num_blocks
    last_block = tl.max(tl.load(end_block + column, mask=inside, other=0))
    far_keys += kv_head * num_blocks * ORDER * DIM
    mean = load_rows(far_keys, column, inside, DIM, DIM_PAD, ORDER * DIM)
    spread = mean
    if ORDER == 2:
        spread = load_rows(far_keys + DIM, column, inside, DIM, DIM_PAD, ORDER * DIM)
    values = load_rows(far_values + kv_head * num_blocks * DIM, column, inside, DIM, DIM_PAD, DIM)
    to_mean = tl.zeros((KEYS, DIM_PAD), tl.float32)
    to_spread = tl.zeros((KEYS, DIM_PAD), tl.float32)
    to_value = tl.zeros((KEYS, DIM_PAD), tl.float32)

    open_bits += piece_head * words * piece_slots
    bit = column % 32
    second = (tl.arange(0, KEYS) >= 32)[:, None]
    first_reader = first_column + 1
    if not CAUSAL:
        first_reader = tl.min(tl.load(first_block + column, mask=inside, other=num_blocks))
    begin = tl.maximum(first_reader * BLOCK - first_slot, 0) + split * ROWS
    end = tl.minimum(last_block * BLOCK - first_slot, piece_slots)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        for row_begin in range(begin, end, tl.num_programs(2) * ROWS):
            local = row_begin + tl.arange(0, ROWS)
            row_mask = local < end
            rows = first_slot + local
            lse, delta = load_softmax(lse_rows + head * slots, delta_rows + head * slots, rows, row_mask)
            sound = row_mask & (tl.abs(delta) < float("inf"))  # else lse or delta hands on a NaN
            query = load_rows(query_rows + head * slots * DIM, rows, sound, DIM, DIM_PAD, DIM)
            grad = load_rows(grad_rows + head * slots * DIM, rows, sound, DIM, DIM_PAD, DIM)
            low, high = far_words(open_bits, first_column // 32, piece_slots, local, row_mask, KEYS)
            seen = ((tl.where(second, high[None, :], low[None, :]) >> bit[:, None]) & 1) != 0
            logits = dot(mean, tl.trans(query))
            if ORDER == 2:
                square = half_square(query, scale)
                logits = dot_add(spread, tl.trans(square), logits)
            logits = logits * (scale * LOG_2_E) + (log_block - lse)[None, :]
            if not CAUSAL:
                logits += tl.load(log_share + column, mask=inside, other=0.0)[:, None]
            weights = tl.exp2(logits)
            weights = tl.where(seen, weights, 0.0)
            if TO_VALUES:
                to_value += dot(weights.to(grad.dtype), grad)
            if TO_MEAN or TO_SPREAD:
                grad_logits = weights * (dot(values, tl.trans(grad)) - delta[None, :])
                grad_logits = tl.where(seen, grad_logits, 0.0).to(query.dtype)
                if TO_MEAN:
                    to_mean += dot(grad_logits, query)
                if TO_SPREAD:
                    to_spread += dot(grad_logits, square)

    part = (split * kv_heads + piece_head) * num_blocks * DIM
    part_keys += part * ORDER
    if TO_MEAN:
        store_rows(part_keys, column, inside, to_mean * scale, DIM, DIM_PAD, ORDER * DIM)
    if TO_SPREAD:
        store_rows(part_keys + DIM, column, inside, to_spread * scale, DIM, DIM_PAD, ORDER * DIM)
    if TO_VALUES:
        store_rows(part_values + part, column, inside, to_value, DIM, DIM_PAD, DIM)


def far_gradients(
    grad: Tensor, query: Tensor, lse: Tensor, delta: Tensor,
    far_keys: Tensor, far_values: Tensor, bits: Tensor, places: Tensor, piece: Piece, causal: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Float32 gradients of the summaries from the tokens of a piece: (heads, nb, f) and (heads, nb, d)."""
    heads, slots, dim = query.shape
    kv_heads, num_blocks, width = far_keys.shape
    tile = tile_for("far", dim, query.dtype)
    tiles = triton.cdiv(num_blocks, tile.columns)
    splits = max(1, min(MAX_SPLITS, PROGRAMS // (tiles * piece.heads), num_blocks // 8))
    parts = [
        torch.empty(splits, piece.heads, *rows.shape[1:], dtype=torch.float32, device=query.device)
        for rows in (far_keys, far_values)
    ]
    shares = log_shares(places, slots // num_blocks)
    second = width > dim
    wanted = [(True, second, True)]
    if dim > 64:
        wanted = [(True, second, False), (False, False, True)]
    if dim > 128 and second:
        wanted = [(True, False, False), (False, True, False), (False, False, True)]
    for to_mean, to_spread, to_values in wanted:
        far_kernel[(tiles, piece.heads, splits)](
            grad, query, lse, delta, far_keys, far_values, bits, places[0], places[1], shares, *parts,
            slots, num_blocks, bits.shape[1], piece.heads, piece.first_head, piece.first_slot, piece.slots,
            1 / math.sqrt(dim), math.log(slots // num_blocks) * LOG2_E,
            GROUP=heads // kv_heads, CAUSAL=causal, BLOCK=slots // num_blocks, ORDER=width // dim,
            DIM=dim, DIM_PAD=pad_dim(dim), ROWS=tile.rows if to_mean or to_spread else 32, KEYS=tile.columns,
            TO_MEAN=to_mean, TO_SPREAD=to_spread, TO_VALUES=to_values, num_warps=tile.warps, num_stages=2,
        )  # fmt: skip
    return parts[0].sum(0), parts[1].sum(0)
