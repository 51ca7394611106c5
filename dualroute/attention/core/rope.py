"""Rotary position embedding: turns each pair (x_i, x_{i+d/2}) of a head by position * theta^(-2i/d).

In: queries or keys as the projection gives them, (S, heads, head_dim), and the table of their positions.
Out: the rotated rows, heads first, (heads, S, head_dim), contiguous: what the routes read.
Source: Su et al., RoFormer (arXiv 2104.09864), in the "half-split" order of GPT-NeoX and Llama.

The angles are computed in float64. At position 100,000 a float32 angle is already off
by 0.004.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor


class RopeScaling(NamedTuple):
    """How frequencies are lowered so that a model reads further than it was pretrained to.

    With `factor` alone, all of them are divided by it: linear position interpolation (Chen et al., arXiv
    2306.15595). With the other three it is that of Llama 3.1 (arXiv 2407.21783): a frequency that turns at
    most low_freq_factor times in original_max_position_embeddings tokens is divided, one that turns at least
    high_freq_factor times stays, and between them the share that stays grows linearly.
    """

    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: float | None = None

    def apply(self, frequencies: Tensor) -> Tensor:
        """Frequencies (radians per token) after scaling."""
        low, high = self.low_freq_factor, self.high_freq_factor
        if low is None or high is None or self.original_max_position_embeddings is None:
            return frequencies / self.factor
        turns = frequencies * self.original_max_position_embeddings / (2 * math.pi)
        stays = ((turns - low) / (high - low)).clamp(0, 1)
        return frequencies * (stays + (1 - stays) / self.factor)


def rotary_table(
    positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype, scaling: RopeScaling | None = None
) -> tuple[Tensor, Tensor]:
    """Cosine and sine, each (S, 1, head_dim // 2), of positions (S,); float64 for float64, else float32."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device) / head_dim
    frequencies = theta ** (-exponent)
    if scaling is not None:
        frequencies = scaling.apply(frequencies)
    angles = positions.to(torch.float64)[:, None, None] * frequencies
    table_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return angles.cos().to(table_dtype), angles.sin().to(table_dtype)


def grid_rotary_table(
    row: Tensor, column: Tensor, head_dim: int, theta: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosine and sine, each (S, 1, head_dim // 2), of places (S,) on a grid: the first half of the pairs is
    turned by the row, the other half by the column, each as a head of half the size would be.
    head_dim is a multiple of 4."""
    tables = [rotary_table(axis, head_dim // 2, theta, dtype) for axis in (row, column)]
    cosine, sine = (torch.cat(parts, dim=-1) for parts in zip(*tables, strict=True))
    return cosine, sine


def rotate(rows: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate (S, heads, head_dim) rows by their table; the result is (heads, S, head_dim), contiguous."""
    if torch.compiler.is_compiling():  # a compiler makes one loop of it, and its gradient too
        return _rotated(rows, *table)
    return _Rotate.apply(rows, *table)


def _rotated(rows: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x, y = rows.transpose(0, 1).to(cos.dtype).chunk(2, dim=-1)
    cos, sin = cos.transpose(0, 1), sin.transpose(0, 1)
    turned = torch.cat([x * cos - y * sin, y * cos + x * sin], dim=-1)
    return turned.to(rows.dtype).contiguous()


def _turn(source: Tensor, out: Tensor, cos: Tensor, sin: Tensor, sign: int) -> None:
    """Write `source`, turned by sign * angle, into `out`; both (S, heads, head_dim) with any strides."""
    half = source.shape[-1] // 2
    x, y = source[..., :half], source[..., half:]
    if source.dtype != cos.dtype:  # half precision: turn in float32, round once
        x, y = x.to(cos.dtype), y.to(cos.dtype)
        out[..., :half] = torch.addcmul(x * cos, y, sin, value=-sign)
        out[..., half:] = torch.addcmul(y * cos, x, sin, value=sign)
        return
    torch.mul(x, cos, out=out[..., :half]).addcmul_(y, sin, value=-sign)
    torch.mul(y, cos, out=out[..., half:]).addcmul_(x, sin, value=sign)


class _Rotate(torch.autograd.Function):
    """A rotation; its gradient is the rotation back, so only the table is saved."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        slots, heads, head_dim = rows.shape
        out = rows.new_empty(heads, slots, head_dim)
        _turn(rows, out.transpose(0, 1), cos, sin, 1)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        heads, slots, head_dim = grads[0].shape
        out = grads[0].new_empty(slots, heads, head_dim)
        _turn(grads[0].transpose(0, 1), out, cos, sin, -1)
        return out, None, None
