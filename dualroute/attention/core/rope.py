"""Rotary position embedding: turns each pair (x_i, x_{i+d/2}) of a head by position * theta^(-2i/d).

With `channels` r below d only the pairs of i < r/2 are turned, by position * theta^(-2i/r), and the others
stay as they are; with 0 there are no positions at all.

In: queries or keys as the projection gives them, (S, heads, head_dim), and the table of their positions.
Out: the rotated rows, heads first, (heads, S, head_dim), contiguous: what the routes read.
Source: Su et al., RoFormer (arXiv 2104.09864), in the "half-split" order of GPT-NeoX and Llama.

The angles are computed in float64. At position 100,000 a float32 angle is already off
by 0.004.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dualroute.attention.core.precision import outside_inference_mode

Table = tuple[Tensor, Tensor]  # cosine and sine of each pair of channels


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


class Rope(NamedTuple):
    """The rotary embedding of one route: all that its tables depend on besides positions.

    `channels` of the head_dim channels of a head are turned; a multiple of 2, on a grid of 4.
    """

    head_dim: int
    channels: int
    theta: float = 10000.0
    scaling: RopeScaling | None = None

    @property
    def numbers(self) -> tuple[float | None, ...]:
        """It as a plain tuple: a compiler tells named ones apart by what they are and not by what they hold,
        and would make a program for each layer."""
        return (*self[:3], *(self.scaling or ()))

    def frequencies(self, device: torch.device | str | None = None) -> Tensor:
        """(head_dim // 2,) float64 radians per token of each pair; 0 of those that stay."""
        turned = _frequencies(self.channels, self.theta, device)
        if self.scaling is not None:
            turned = self.scaling.apply(turned)
        return F.pad(turned, (0, self.head_dim // 2 - len(turned)))

    def table(self, positions: Tensor, dtype: torch.dtype) -> Table:
        """Cosine and sine, each (S, 1, head_dim // 2), of positions (S,), in float64 for float64, else in
        float32."""
        return _table(positions.to(torch.float64)[:, None, None] * self.frequencies(positions.device), dtype)

    def grid_table(self, row: Tensor, column: Tensor, dtype: torch.dtype) -> Table:
        """The same of places (S,) on a grid: the first half of the turned pairs is turned by the row, the
        other half by the column, each as a head of half the size would be."""
        turned = _frequencies(self.channels // 2, self.theta, row.device)
        angles = torch.cat([axis.to(torch.float64)[:, None, None] * turned for axis in (row, column)], dim=-1)
        return _table(F.pad(angles, (0, self.head_dim // 2 - angles.shape[-1])), dtype)


def token_tables(ropes: tuple[Rope, ...], position: Tensor, dtype: torch.dtype) -> Table:
    """Cosine and sine, each (len(ropes), head_dim // 2), of one position () or (1,)."""
    # asked for by every layer at every token; a compiler sees to that by itself
    frequencies = _stacked if torch.compiler.is_compiling() else _kept
    return _table(position.to(torch.float64) * frequencies(ropes, position.device), dtype)


def _stacked(ropes: tuple[Rope, ...], device: torch.device) -> Tensor:
    return torch.stack([rope.frequencies(device) for rope in ropes])


_kept = functools.lru_cache(maxsize=64)(outside_inference_mode(_stacked))


def _frequencies(channels: int, theta: float, device: torch.device | str | None) -> Tensor:
    exponent = torch.arange(0, channels, 2, dtype=torch.float64, device=device) / channels
    return theta ** (-exponent)


def _table(angles: Tensor, dtype: torch.dtype) -> Table:
    table_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return angles.cos().to(table_dtype), angles.sin().to(table_dtype)


def rotate(rows: Tensor, table: Table | None) -> Tensor:
    """Rotate (S, heads, head_dim) rows by their table; the result is (heads, S, head_dim), contiguous.
    Without a table they are not turned."""
    if table is None:
        return rows.transpose(0, 1).contiguous()
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
