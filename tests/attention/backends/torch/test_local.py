"""The sliding window on the stream equals the window of the formula."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dualroute.attention import Layout, local_attention, reference
from dualroute.attention.backends.torch import local as local_route
from tests.attention.helpers import assert_same_with_gradients, batches, expected, heads, run

pytestmark = pytest.mark.usefixtures("each_kernels")


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [1, 5, 8, 17])
@pytest.mark.parametrize("name", batches())
def test_equals_the_reference(name: str, window: int, causal: bool) -> None:
    layout = batches()[name]
    inputs = heads(2, layout.length)
    actual = run(lambda q, k, v, s: local_attention(q, k, v, s, window=window, causal=causal), layout, inputs)
    wanted = expected(lambda q, k, v: reference.local(q, k, v, window=window, causal=causal), layout, inputs)
    assert_same_with_gradients(actual, wanted, inputs)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 50), st.integers(1, 60), st.integers(1, 12), st.booleans())
def test_any_length_window_and_block(length: int, window: int, block: int, causal: bool) -> None:
    layout = Layout.build(1, length, block)
    inputs = heads(1, length, 2, 1, 2, seed=length)
    actual = run(lambda q, k, v, s: local_attention(q, k, v, s, window=window, causal=causal), layout, inputs)
    wanted = expected(lambda q, k, v: reference.local(q, k, v, window=window, causal=causal), layout, inputs)
    torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-11)


@pytest.mark.parametrize("causal", [True, False])
def test_a_window_over_everything_is_full_attention(causal: bool) -> None:
    layout = Layout.build(2, 75, 8)
    inputs = heads(2, 75)
    actual = run(lambda q, k, v, s: local_attention(q, k, v, s, window=75, causal=causal), layout, inputs)
    wanted = expected(lambda q, k, v: reference.full(q, k, v, causal=causal), layout, inputs)
    assert_same_with_gradients(actual, wanted, inputs)


@pytest.mark.parametrize("causal", [True, False])
def test_documents_of_one_block_give_block_local_attention(causal: bool) -> None:
    block, inputs = 8, heads(1, 64)
    layout = Layout.build(1, 64, 16, torch.arange(64)[None] // block)
    actual = run(lambda q, k, v, s: local_attention(q, k, v, s, window=block, causal=causal), layout, inputs)
    query, key, value = (rows[0] for rows in inputs)
    wanted = reference.block_local(query, key, value, block=block, causal=causal)[None]
    assert_same_with_gradients(actual, wanted, inputs)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = batches()["packed and padded"]
    inputs = heads(2, layout.length)
    whole = run(lambda q, k, v, s: local_attention(q, k, v, s, window=11), layout, inputs)
    monkeypatch.setattr(local_route, "MAX_CHUNK", 3 * 4 * 24 * 4)  # three query blocks at a time
    chunked = run(lambda q, k, v, s: local_attention(q, k, v, s, window=11), layout, inputs)
    assert_same_with_gradients(chunked, whole, inputs)


def test_causal_to_the_last_bit() -> None:
    layout = Layout.build(1, 75, 8)
    inputs = heads(1, 75)
    before = run(lambda q, k, v, s: local_attention(q, k, v, s, window=20), layout, inputs)
    for token in (1, 24, 37, 74):
        changed = tuple(rows.detach().clone() for rows in inputs)
        for rows in changed:
            rows[:, :, token:] += torch.randn_like(rows[:, :, token:])
        after = run(lambda q, k, v, s: local_attention(q, k, v, s, window=20), layout, changed)
        assert torch.equal(after[:, :, :token], before[:, :, :token])
        assert not torch.equal(after[:, :, token], before[:, :, token])


def test_gradcheck() -> None:
    layout = Layout.build(1, 14, 4, torch.tensor([[0] * 5 + [1] * 9]))
    inputs = heads(1, 14, 2, 1, 2)
    route = lambda *rows: run(lambda q, k, v, s: local_attention(q, k, v, s, window=6), layout, rows)  # noqa: E731
    assert torch.autograd.gradcheck(route, inputs)


def test_memory_is_linear_in_the_length() -> None:
    sizes = []
    for length in (128, 256):
        layout = Layout.build(1, length, 16)
        inputs = heads(1, length)
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, s=saved: s.append(t.numel()) or t, lambda t: t
        ):
            run(lambda q, k, v, s: local_attention(q, k, v, s, window=20), layout, inputs)
        sizes.append(sum(saved))
    assert sizes[1] == 2 * sizes[0]
