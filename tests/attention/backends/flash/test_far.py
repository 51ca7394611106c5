"""Of matrices of rows by far blocks, each pass holds two, in however many slabs; and what they hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dualroute.attention import Layout
from dualroute.attention.backends.flash import far, slabs
from dualroute.attention.core import far_summary


class Made(TorchDispatchMode):
    """Distinct memories of at least `least` numbers that were made inside."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.kept = least, {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.untyped_storage().nbytes() >= 4 * self.least:
            self.kept[out.untyped_storage().data_ptr()] = out  # kept: no address is used twice
        return out


@pytest.mark.parametrize("entries", [1 << 26, 1 << 13])
def test_matrices_are_as_few_as_can_be(entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slabs, "max_entries", lambda device: entries)
    blocks, block, dim = 64, 4, 2
    stream = Layout.build(1, blocks * block, block).stream
    parts = slabs.slabs(stream, 1)
    assert (len(parts) > 1) == (entries < 1 << 14)
    most = max((part.rows[1] - part.rows[0]) * block * part.width for part in parts)
    query, grad, out, to_query = (torch.randn(1, blocks * block, 1, dim) for _ in range(4))
    key, value = (torch.randn(1, blocks * block, dim) for _ in range(2))
    summary = far.summarise(key, value, stream, "second_order", causal=True)
    assert summary is not None
    exact = torch.zeros(1, blocks * block, 1, dtype=torch.long)
    lses = [torch.randn(1, blocks * block, 1, 1), torch.randn(1, blocks * block, 1, 1)]
    with Made(most) as made:
        lse = far.forward(query, lses, summary, exact, stream, True).lse
    assert len(made.kept) == 2
    with Made(most) as made:
        far.backward(grad, query, out, lse, summary, exact, stream, True, to_query)
    assert len(made.kept) == 2


@pytest.mark.parametrize("order", ["first_order", "second_order"])
def test_summaries_and_features_of_half_precision_are_rounded_once(order: str) -> None:
    stream = Layout.build(1, 64, 8).stream
    key, value = (torch.randn(2, 64, 16).mul(3).bfloat16() for _ in range(2))
    ours = far.summarise(key, value, stream, order, causal=True)
    theirs = far_summary.summarise(key.double(), value.double(), stream, order)
    assert ours is not None
    assert theirs is not None
    for one, exact in zip(ours, theirs, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one.double(), exact, rtol=1e-5, atol=1e-5)
    width = ours.keys.shape[-1]
    features = far.query_features(key, width, stream)
    exact = far_summary.far_query_features(key.double(), width)
    torch.testing.assert_close(features.double(), exact, rtol=1e-6, atol=1e-6)
