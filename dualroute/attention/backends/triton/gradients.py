"""The gradient of a softmax, one tile at a time: what all backward kernels share.

In: a tile of queries and keys, and of the *whole* softmax its log-sum-exp and delta = sum(dO * O). Out: the
weights of these keys and the gradients of their logits; `poison` marks rows that hold a NaN.

A tile needs nothing of the other tiles. With P = exp(q k^T / sqrt(d) - lse),
    dV = P^T dO     dS = P * (dO V^T - delta)     dQ = dS K / sqrt(d)     dK = dS^T Q / sqrt(d)
(Dao et al., arXiv 2205.14135, algorithm 4), whichever other keys, blocks or pseudo-keys share the softmax.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dualroute.attention.backends.triton.tiles import LOG_2_E, dot, load_rows, pad_dim


@triton.jit
def logit_gradients(query, keys, values, grad, lse, delta, seen, scale):
    """Weights P and gradients dS of the logits, (rows, keys) in float32, 0 where not seen.

    `lse` and `scale` are in units of log 2, see `softmax_step`.
    """
    weights = tl.where(seen, tl.exp2(dot(query, tl.trans(keys)) * scale - lse[:, None]), 0.0)
    return weights, tl.where(seen, weights * (dot(grad, tl.trans(values)) - delta[:, None]), 0.0)


@triton.jit
def key_logit_gradients(query, keys, values, grad, lse, delta, seen, scale):
    """The same the other way round, (keys, rows): a product with the rows takes them from registers."""
    weights = tl.where(seen, tl.exp2(dot(keys, tl.trans(query)) * scale - lse[None, :]), 0.0)
    return weights, tl.where(seen, weights * (dot(values, tl.trans(grad)) - delta[None, :]), 0.0)


@triton.jit
def load_softmax(lse_rows, delta_rows, rows, row_mask):
    """log-sum-exp in units of log 2, and delta of rows; masked ones get inf, and so weights of 0."""
    lse = tl.load(lse_rows + rows, mask=row_mask, other=float("inf"))
    return lse * LOG_2_E, tl.load(delta_rows + rows, mask=row_mask, other=0.0)


@triton.jit
def poison_kernel(rows, poison, num_rows, DIM: tl.constexpr, DIM_PAD: tl.constexpr, ROWS: tl.constexpr):
    """Grid (tiles of ROWS rows)."""
    offset = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    row_mask = offset + row < num_rows
    numbers = load_rows(rows + offset * DIM, row, row_mask, DIM, DIM_PAD, DIM).to(tl.float32)
    tl.store(poison + offset + row, tl.sum(numbers * 0.0, 1), mask=row_mask)


def poison(rows: Tensor) -> Tensor:
    """(H, n) float32 of contiguous rows (H, n, d): NaN where a row holds a number that is not finite, else 0.

    A tile may hold rows of several documents, and 0 * NaN is NaN: a weight of 0 does not keep them apart.
    So such rows count as 0 in products, and their NaN goes to the logits of those who see them.
    """
    found = torch.empty(rows.shape[:2], dtype=torch.float32, device=rows.device)
    tile, dim = 64, rows.shape[2]
    poison_kernel[(triton.cdiv(found.numel(), tile),)](
        rows, found, found.numel(), DIM=dim, DIM_PAD=pad_dim(dim), ROWS=tile, num_warps=4
    )
    return found


@triton.jit
def delta_kernel(
    grad_rows, out_rows, delta_rows, num_rows,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of ROWS rows). delta = sum(dO * O)."""
    offset = tl.program_id(0).to(tl.int64) * ROWS
    row_mask = offset + tl.arange(0, ROWS) < num_rows
    rows = tl.arange(0, ROWS)
    grad = load_rows(grad_rows + offset * DIM, rows, row_mask, DIM, DIM_PAD, DIM).to(tl.float32)
    out = load_rows(out_rows + offset * DIM, rows, row_mask, DIM, DIM_PAD, DIM).to(tl.float32)
    tl.store(delta_rows + offset + rows, tl.sum(grad * out, 1), mask=row_mask)


def softmax_delta(grad: Tensor, out: Tensor) -> Tensor:
    """(H, S) float32 sums of grad * out (H, S, d), both contiguous."""
    heads, slots, dim = out.shape
    delta = torch.empty(heads, slots, dtype=torch.float32, device=out.device)
    rows = 64
    delta_kernel[(triton.cdiv(heads * slots, rows),)](
        grad, out, delta, heads * slots, DIM=dim, DIM_PAD=pad_dim(dim), ROWS=rows, num_warps=4
    )
    return delta
