"""Batches for the tests of attention, and the comparison of a route with the reference per document."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dualroute.attention import Layout, reference

ROUTERS = ("minmax", "moment", "mean")
ORDERS = ("second_order", "first_order", "none")


def heads(
    batch: int,
    length: int,
    num_heads: int = 4,
    kv_heads: int = 2,
    dim: int = 4,
    seed: int = 0,
    scale: float = 1.5,
) -> tuple[Tensor, Tensor, Tensor]:
    """Random float64 queries (B, H, n, d), keys and values (B, H_kv, n, d) that require gradients."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(  # type: ignore[return-value]
        (
            scale * torch.randn(batch, count, length, dim, generator=generator, dtype=torch.float64)
        ).requires_grad_()
        for count in (num_heads, kv_heads, kv_heads)
    )


def to_stream(layout: Layout, rows: Tensor) -> Tensor:
    """(B, H, n, d) -> (H, S, d)."""
    count, dim = rows.shape[1], rows.shape[3]
    return layout.to_stream(rows.transpose(1, 2).flatten(2)).unflatten(1, (count, dim)).transpose(0, 1)


def from_stream(layout: Layout, rows: Tensor) -> Tensor:
    """(H, S, d) -> (B, H, n, d)."""
    return (
        layout.from_stream(rows.transpose(0, 1).flatten(1)).unflatten(2, (-1, rows.shape[2])).transpose(1, 2)
    )


def run(route: Callable[..., Tensor], layout: Layout, inputs: tuple[Tensor, ...]) -> Tensor:
    """A route of the package on a batch: (B, H, n, d)."""
    return from_stream(layout, route(*(to_stream(layout, rows) for rows in inputs), layout.stream))


def assert_same_with_gradients(
    actual: Tensor, expected: Tensor, inputs: tuple[Tensor, ...], tolerance: float = 1e-11
) -> None:
    """Values and gradients agree, for a random cotangent."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)
    cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(7), dtype=expected.dtype)
    for name, got, wanted in zip(
        ("query", "key", "value"),
        torch.autograd.grad(actual, inputs, cotangent, retain_graph=True),
        torch.autograd.grad(expected, inputs, cotangent, retain_graph=True),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def expected(route: Callable[..., Tensor], layout: Layout, inputs: tuple[Tensor, ...]) -> Tensor:
    """A route of the reference on the same batch."""
    return reference.per_document(route, *inputs, layout.documents)


def batches(length: int = 75, block: int = 8) -> dict[str, Layout]:
    """Layouts of two rows: whole, packed into documents, with padding on the left, right and inside."""
    segments = torch.zeros(2, length, dtype=torch.long)
    segments[:, 40:] = 1
    segments[0, 43:] = 2
    segments[1, 70:] = 5
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[0, -9:] = False
    mask[1, :5] = False
    mask[1, 20:23] = False
    build = Layout.build
    whole = length // block * block
    return {
        "whole blocks": build(2, whole, block),
        "any length": build(2, length, block),
        "shorter than a block": build(2, block - 3, block),
        "packed": build(2, length, block, segments),
        "padded": build(2, length, block, attention_mask=mask),
        "packed and padded": build(2, length, block, segments, mask),
    }
