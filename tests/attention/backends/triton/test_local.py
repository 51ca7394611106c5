"""The local route of the kernels against the specification: any window, documents, directions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dualroute.attention import Layout, reference
from dualroute.attention.backends.triton import local_attention
from tests.attention.backends.triton.helpers import (
    DEVICE,
    TOLERANCE,
    assert_close_with_gradients,
    both,
    run_on_device,
)
from tests.attention.helpers import batches, expected


def _compare(
    layout: Layout,
    inputs: tuple[tuple[Tensor, ...], ...],
    window: int,
    causal: bool = True,
    tolerance: float = TOLERANCE,
) -> None:
    low, wide = inputs
    actual = run_on_device(
        lambda q, k, v, s: local_attention(q, k, v, s, window=window, causal=causal), layout, low
    )
    assert actual.dtype == low[0].dtype
    wanted = expected(lambda q, k, v: reference.local(q, k, v, window=window, causal=causal), layout, wide)
    assert_close_with_gradients(actual, low, wanted, wide, tolerance)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", batches())
def test_equals_the_formula(name: str, causal: bool) -> None:
    layout = batches(75, 8)[name]
    _compare(layout, both(2, layout.length, 2 if name == "any length" else 1, 1), 11, causal)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [1, 2, 70, 1000])
def test_any_window(window: int, causal: bool) -> None:
    _compare(Layout.build(1, 100, 16), both(1, 100, 1, 1), window, causal)


@pytest.mark.parametrize(("dim", "kv_heads"), [(64, 1), (96, 3), (128, 3), (256, 3), (10, 1)])
def test_any_size_of_heads_and_groups(dim: int, kv_heads: int) -> None:
    _compare(Layout.build(1, 45, 16), both(1, 45, 3, kv_heads, dim), 20)


@pytest.mark.parametrize("causal", [True, False])
def test_a_window_of_everything_is_full_attention(causal: bool) -> None:
    layout = batches(75, 8)["packed and padded"]
    low, wide = both(2, 75, 2, 1)
    actual = run_on_device(
        lambda q, k, v, s: local_attention(q, k, v, s, window=75, causal=causal), layout, low
    )
    wanted = expected(lambda q, k, v: reference.full(q, k, v, causal=causal), layout, wide)
    assert_close_with_gradients(actual, low, wanted, wide)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_half_precision(dtype: torch.dtype, tolerance: float) -> None:
    _compare(Layout.build(1, 75, 8), both(1, 75, 2, 1, 16, dtype), 20, tolerance=tolerance)


def test_what_lies_outside_of_the_window_changes_nothing() -> None:
    layout = Layout.build(1, 96, 8)
    low, _ = both(1, 96, 2, 1)

    def attend(inputs: tuple[Tensor, ...]) -> Tensor:
        return run_on_device(lambda q, k, v, s: local_attention(q, k, v, s, window=10), layout, inputs)

    changed = [x.detach().clone() for x in low]
    for rows in changed[1:]:
        rows[:, :, 40] += 5
    same = (attend(low) == attend(tuple(changed))).all(-1).all(1)[0].cpu()
    assert torch.equal(same, ~((torch.arange(96) >= 40) & (torch.arange(96) < 50)))


def test_operators() -> None:
    query, key, value = (torch.randn(1, 3, 4, device=DEVICE, requires_grad=True) for _ in range(3))
    begin, end = (torch.full((3,), slot, dtype=torch.int32, device=DEVICE) for slot in (0, 3))
    torch.library.opcheck(torch.ops.dualroute.local_forward.default, (query, key, value, begin, end, 2, True))
    rows = [x.detach() for x in (query, query, key, value, query)]
    torch.library.opcheck(
        torch.ops.dualroute.local_backward.default,
        (*rows, torch.zeros(1, 3, device=DEVICE), begin, end, 2, True),
        test_utils=("test_schema", "test_faketensor"),
    )
