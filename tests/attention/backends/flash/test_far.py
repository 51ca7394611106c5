"""The matrices of rows by far blocks: one in the forward pass, two in the backward one, whatever the slabs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dualroute.attention import Layout
from dualroute.attention.backends.flash import far, slabs


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
    lse = torch.full((1, blocks * block, 1), 9.0)
    with Made(most) as made:
        far.forward(query, summary, exact, stream, True)
    assert len(made.kept) == 1
    with Made(most) as made:
        far.backward(grad, query, out, lse, summary, exact, stream, True, to_query)
    assert len(made.kept) == 2
