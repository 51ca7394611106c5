"""The far summary's pseudo-keys inside the kernels: their logits, and their gradients.

In: queries (H, S, d) of a stream, the summaries of its blocks as `far_summary.summarise` gives them, and the
selected blocks. Out: `far_logits`, which the kernels of both directions call; `far_gradients`, those of the
summaries.

Causal, an incomplete block is never anybody's past: n in log n is the same for all pseudo-keys, the block.

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
from dualroute.attention.backends.triton.tiles import dot, load_rows, pad_dim, store_rows, tile_sizes

MAX_SPLITS = 32  # parts that the tokens behind a pseudo-key are divided into
PROGRAMS = 512  # thread blocks that keep a large GPU busy


@triton.jit
def far_logits(
    query, mean, spread, selected_row, row_mask, column, first, own, scale, log_block,
    COLUMNS: tl.constexpr, ORDER: tl.constexpr,
):  # fmt: skip
    """(rows, columns) of log n + q . mu / sqrt(d) [+ 1/2 (q^2) . sigma^2 / d], -inf where not far.

    Far is what lies after the document's first block, before the own one, and is not selected.
    """
    logits = dot(query, tl.trans(mean)) * scale + log_block
    if ORDER == 2:
        scaled = query.to(tl.float32) * scale
        logits += dot((scaled * scaled * 0.5).to(spread.dtype), tl.trans(spread))
    open_column = (column[None, :] > first[:, None]) & (column[None, :] < own[:, None]) & row_mask[:, None]
    for place in range(1, COLUMNS):
        chosen = tl.load(selected_row + place, mask=row_mask, other=-1)
        open_column = open_column & (column[None, :] != chosen[:, None])
    return tl.where(open_column, logits, float("-inf"))


@triton.jit
def far_kernel(
    grad_rows, query_rows,  # (H, S, DIM)
    lse_rows, delta_rows,  # (H, S)
    far_keys, far_values,  # (H_kv, nb, ORDER * DIM), (H_kv, nb, DIM)
    selected, first_block, end_block,  # (H_kv, S, COLUMNS), (nb,) first and last + 1 block of the document
    part_keys, part_values,  # (splits, H_kv, nb, ORDER * DIM), (splits, H_kv, nb, DIM) float32, written
    slots, num_blocks, kv_heads, scale, log_block,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, ORDER: tl.constexpr,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of KEYS pseudo-keys, H_kv, splits); split i looks at every splits-th tile of tokens.

    d mu = dS^T q / sqrt(d), d sigma^2 = dS^T q^2 / 2 d, d v_bar = P^T dO.
    """
    kv_head, split = tl.program_id(1).to(tl.int64), tl.program_id(2)
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

    first_slot = (first_column + 1) * BLOCK + split * ROWS
    for member in range(GROUP):
        head = kv_head * GROUP + member
        for row_begin in range(first_slot, last_block * BLOCK, tl.num_programs(2) * ROWS):
            rows = row_begin + tl.arange(0, ROWS)
            row_mask = rows < slots
            rows = tl.minimum(rows, slots - 1)
            own = rows // BLOCK
            first = tl.load(first_block + own)
            query = load_rows(query_rows + head * slots * DIM, rows, row_mask, DIM, DIM_PAD, DIM)
            grad = load_rows(grad_rows + head * slots * DIM, rows, row_mask, DIM, DIM_PAD, DIM)
            lse, delta = load_softmax(lse_rows + head * slots, delta_rows + head * slots, rows, row_mask)
            logits = far_logits(
                query, mean, spread, selected + (kv_head * slots + rows) * COLUMNS, row_mask, column, first,
                own, scale, log_block, COLUMNS, ORDER,
            )  # fmt: skip
            weights = tl.exp(logits - lse[:, None])
            grad_logits = weights * (dot(grad, tl.trans(values)) - delta[:, None])
            grad_columns = tl.trans(grad_logits.to(query.dtype))
            to_value += dot(tl.trans(weights.to(grad.dtype)), grad)
            to_mean += dot(grad_columns, query)
            if ORDER == 2:
                scaled = query.to(tl.float32) * scale
                to_spread += dot(grad_columns, (scaled * scaled * 0.5).to(query.dtype))

    part = (split * kv_heads + kv_head) * num_blocks * DIM
    store_rows(part_keys + part * ORDER, column, inside, to_mean * scale, DIM, DIM_PAD, ORDER * DIM)
    if ORDER == 2:
        store_rows(part_keys + part * ORDER + DIM, column, inside, to_spread, DIM, DIM_PAD, ORDER * DIM)
    store_rows(part_values + part, column, inside, to_value, DIM, DIM_PAD, DIM)


def far_gradients(
    grad: Tensor, query: Tensor, lse: Tensor, delta: Tensor,
    far_keys: Tensor, far_values: Tensor, selected: Tensor, first_block: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of the summaries: (H_kv, nb, f) and (H_kv, nb, d)."""
    heads, slots, dim = query.shape
    kv_heads, num_blocks, width = far_keys.shape
    block, keys = slots // num_blocks, 16 if dim > 64 else 32
    tiles = triton.cdiv(num_blocks, keys)
    splits = max(1, min(MAX_SPLITS, PROGRAMS // (tiles * kv_heads), num_blocks // 8))
    part_keys = torch.empty(splits, *far_keys.shape, dtype=torch.float32, device=query.device)
    part_values = torch.empty(splits, *far_values.shape, dtype=torch.float32, device=query.device)
    # (nb,) last + 1 block of each block's document: where its first block is the same for the last time
    end_block = torch.searchsorted(first_block, first_block, right=True).to(torch.int32)
    tile = tile_sizes(dim, query.dtype, backward=True)
    far_kernel[(tiles, kv_heads, splits)](
        grad, query, lse, delta, far_keys, far_values, selected, first_block, end_block,
        part_keys, part_values, slots, num_blocks, kv_heads, 1 / math.sqrt(dim), math.log(block),
        GROUP=heads // kv_heads, BLOCK=block, COLUMNS=selected.shape[2], ORDER=width // dim,
        DIM=dim, DIM_PAD=pad_dim(dim), ROWS=tile.columns, KEYS=keys,
        num_warps=4, num_stages=2,
    )  # fmt: skip
    return part_keys.sum(0).to(far_keys.dtype), part_values.sum(0).to(far_values.dtype)
