"""The rotary embedding against complex numbers, and what it must not change."""

from __future__ import annotations

import math

import pytest
import torch

from dualroute.attention import reference
from dualroute.attention.core.rope import Rope, RopeScaling, rotate, token_tables

POSITIONS = torch.tensor([0, 1, 5, 130, 99_999])


def _rows(heads: int = 3, dim: int = 8, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(len(POSITIONS), heads, dim, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.mark.parametrize("channels", [8, 6, 2])
def test_equals_multiplication_by_complex_numbers(channels: int) -> None:
    rows = _rows()
    got = rotate(rows, Rope(8, channels, 500.0).table(POSITIONS, rows.dtype))
    torch.testing.assert_close(got, reference.rotate(rows.transpose(0, 1), POSITIONS, 500.0, channels))


def test_of_some_channels_the_others_stay() -> None:
    """The turned ones are a head of their own, as with the partial_rotary_factor of transformers."""
    rows = _rows()
    first, second = rotate(rows, Rope(8, 4, 500.0).table(POSITIONS, rows.dtype)).transpose(0, 1).chunk(2, -1)
    x, y = rows.chunk(2, -1)
    assert torch.equal(first[..., 2:], x[..., 2:])
    assert torch.equal(second[..., 2:], y[..., 2:])
    small = rotate(torch.cat([x[..., :2], y[..., :2]], -1), Rope(4, 4, 500.0).table(POSITIONS, rows.dtype))
    assert torch.equal(torch.cat([first[..., :2], second[..., :2]], -1).transpose(0, 1), small)
    assert torch.equal(rotate(rows, None), rows.transpose(0, 1))


def test_the_tables_of_a_token_are_those_of_its_position() -> None:
    ropes = (Rope(8, 0), Rope(8, 4, 500.0, RopeScaling(4.0)), Rope(8, 8))
    cos, sin = token_tables(ropes, torch.tensor(130), torch.float64)
    for number, rope in enumerate(ropes):
        wanted = rope.table(torch.tensor([130]), torch.float64)
        assert torch.equal(cos[number], wanted[0].flatten())
        assert torch.equal(sin[number], wanted[1].flatten())


def test_float32_angles_stay_exact_far_out() -> None:
    cos, _ = Rope(8, 8, 10000.0).table(POSITIONS, torch.float32)
    exact, _ = Rope(8, 8, 10000.0).table(POSITIONS, torch.float64)
    torch.testing.assert_close(cos.double(), exact, rtol=0, atol=1e-7)


def test_products_depend_on_the_distance_only() -> None:
    query, key = _rows(), _rows().flip(0)
    products = []
    for shift in (0, 1000):
        table = Rope(8, 8, 10000.0).table(POSITIONS + shift, torch.float64)
        products.append(rotate(query, table) @ rotate(key, table).mT)
    torch.testing.assert_close(products[0], products[1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("channels", [8, 4, 0])
def test_gradient(channels: int) -> None:
    table = Rope(8, channels).table(POSITIONS, torch.float64) if channels else None
    assert torch.autograd.gradcheck(lambda rows: rotate(rows, table), (_rows().requires_grad_(),))


def test_half_precision_rounds_once() -> None:
    rows = _rows(dtype=torch.bfloat16)
    got = rotate(rows, Rope(8, 8, 10000.0).table(POSITIONS, rows.dtype))
    exact = rotate(rows.float(), Rope(8, 8, 10000.0).table(POSITIONS, torch.float32))
    assert torch.equal(got, exact.bfloat16())


def test_scaled_frequencies():
    """Linear scaling divides positions; that of Llama 3.1 leaves fast channels and divides slow ones."""
    plain = Rope(8, 8, 100.0).table(POSITIONS, torch.float64)
    linear = Rope(8, 8, 100.0, RopeScaling(4.0)).table(4 * POSITIONS, torch.float64)
    torch.testing.assert_close(linear, plain)
    partial = Rope(8, 4, 100.0, RopeScaling(4.0)).table(4 * POSITIONS, torch.float64)
    torch.testing.assert_close(partial, Rope(8, 4, 100.0).table(POSITIONS, torch.float64))
    frequencies = torch.tensor([1.0, 0.5, 1e-4], dtype=torch.float64)  # 15.9, 8.0, 0.002 turns in 100 tokens
    scaled = RopeScaling(8.0, 4.0, 12.0, 100.0).apply(frequencies)
    torch.testing.assert_close(scaled[[0, 2]], torch.tensor([1.0, 1e-4 / 8], dtype=torch.float64))
    stays = (0.5 * 100 / (2 * math.pi) - 4) / 8
    assert float(scaled[1]) == pytest.approx(0.5 * (stays + (1 - stays) / 8))
