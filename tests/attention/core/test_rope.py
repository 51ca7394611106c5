"""The rotary embedding against complex numbers, and what it must not change."""

from __future__ import annotations

import math

import pytest
import torch

from dualroute.attention import reference
from dualroute.attention.core.rope import RopeScaling, rotary_table, rotate

POSITIONS = torch.tensor([0, 1, 5, 130, 99_999])


def _rows(heads: int = 3, dim: int = 8, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(len(POSITIONS), heads, dim, generator=torch.Generator().manual_seed(0), dtype=dtype)


def test_equals_multiplication_by_complex_numbers() -> None:
    rows = _rows()
    got = rotate(rows, rotary_table(POSITIONS, 8, 500.0, rows.dtype))
    torch.testing.assert_close(got, reference.rotate(rows.transpose(0, 1), POSITIONS, 500.0))


def test_float32_angles_stay_exact_far_out() -> None:
    cos, _ = rotary_table(POSITIONS, 8, 10000.0, torch.float32)
    exact, _ = rotary_table(POSITIONS, 8, 10000.0, torch.float64)
    torch.testing.assert_close(cos.double(), exact, rtol=0, atol=1e-7)


def test_products_depend_on_the_distance_only() -> None:
    query, key = _rows(), _rows().flip(0)
    products = []
    for shift in (0, 1000):
        table = rotary_table(POSITIONS + shift, 8, 10000.0, torch.float64)
        products.append(rotate(query, table) @ rotate(key, table).mT)
    torch.testing.assert_close(products[0], products[1], rtol=0, atol=1e-9)


def test_gradient() -> None:
    table = rotary_table(POSITIONS, 8, 10000.0, torch.float64)
    assert torch.autograd.gradcheck(lambda rows: rotate(rows, table), (_rows().requires_grad_(),))


def test_half_precision_rounds_once() -> None:
    rows = _rows(dtype=torch.bfloat16)
    got = rotate(rows, rotary_table(POSITIONS, 8, 10000.0, rows.dtype))
    exact = rotate(rows.float(), rotary_table(POSITIONS, 8, 10000.0, torch.float32))
    assert torch.equal(got, exact.bfloat16())


def test_scaled_frequencies():
    """Linear scaling divides positions; that of Llama 3.1 leaves fast channels and divides slow ones."""
    plain = rotary_table(POSITIONS, 8, 100.0, torch.float64)
    linear = rotary_table(4 * POSITIONS, 8, 100.0, torch.float64, RopeScaling(4.0))
    torch.testing.assert_close(linear, plain)
    frequencies = torch.tensor([1.0, 0.5, 1e-4], dtype=torch.float64)  # 15.9, 8.0, 0.002 turns in 100 tokens
    scaled = RopeScaling(8.0, 4.0, 12.0, 100.0).apply(frequencies)
    torch.testing.assert_close(scaled[[0, 2]], torch.tensor([1.0, 1e-4 / 8], dtype=torch.float64))
    stays = (0.5 * 100 / (2 * math.pi) - 4) / 8
    assert float(scaled[1]) == pytest.approx(0.5 * (stays + (1 - stays) / 8))
