"""Inputs and layouts for the kernels, on their device, and the same numbers in float64 for `reference`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dualroute.attention import Layout
from tests.attention.helpers import heads, run

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = 2e-5


def both(
    batch: int,
    length: int,
    num_heads: int = 4,
    kv_heads: int = 2,
    dim: int = 6,
    dtype: torch.dtype = torch.float32,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The same random queries, keys and values: in `dtype` for the kernels, in float64 for the reference."""
    low = [x.detach().to(dtype) for x in heads(batch, length, num_heads, kv_heads, dim)]
    return (
        tuple(x.to(DEVICE).requires_grad_() for x in low),
        tuple(x.double().requires_grad_() for x in low),
    )


def run_on_device(route: Callable[..., Tensor], layout: Layout, inputs: tuple[Tensor, ...]) -> Tensor:
    """A route on a batch, (B, H, n, d)."""
    return run(route, layout.to(DEVICE), inputs)


def assert_close_with_gradients(
    actual: Tensor,
    inputs: tuple[Tensor, ...],
    expected: Tensor,
    wide_inputs: tuple[Tensor, ...],
    tolerance: float = TOLERANCE,
) -> None:
    """Values and gradients agree with those of the float64 `wide_inputs`, relative to the largest number."""

    def close(name: str, got: Tensor, wanted: Tensor) -> None:
        bound = tolerance * max(1.0, wanted.abs().max().item())
        error = (got.double().cpu() - wanted).abs().max().item()
        assert error <= bound, f"{name}: off by {error:.2e}, allowed is {bound:.2e}"

    close("output", actual, expected)
    cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(7)).to(actual.dtype)
    got = torch.autograd.grad(actual, inputs, cotangent.to(DEVICE))
    wanted = torch.autograd.grad(expected, wide_inputs, cotangent.double())
    for name, part, wide in zip(("query", "key", "value"), got, wanted, strict=True):
        close(f"gradient of {name}", part, wide)


def slots_of(layout: Layout, row: int, tokens: Tensor) -> Tensor:
    """Stream slots of tokens of a row."""
    flat = row * layout.length + tokens
    return flat if layout.token_slot is None else layout.token_slot.cpu()[flat]
