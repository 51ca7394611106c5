"""The far blocks' gradients hold two matrices of rows by blocks, and make no third one."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dualroute.attention import Layout
from dualroute.attention.backends.flash import far
from dualroute.attention.backends.flash.slabs import slabs


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


def test_the_backward_pass_makes_two_matrices() -> None:
    blocks, block, dim = 64, 4, 2
    stream = Layout.build(1, blocks * block, block).stream
    (slab,) = slabs(stream, 1)
    rows = blocks * block
    parts = far.Columns(
        torch.randn(1, rows, 2 * dim),
        torch.randn(1, blocks, 2 * dim),
        torch.randn(1, blocks, dim),
        torch.zeros(1, rows, 1, dtype=torch.long),
    )
    with Made(rows * blocks) as made:
        far.backward(
            torch.randn(1, rows, dim),
            torch.randn(1, rows, 1),
            torch.full((1, rows, 1), 9.0),
            parts,
            stream,
            slab,
        )
    assert len(made.kept) == 2
