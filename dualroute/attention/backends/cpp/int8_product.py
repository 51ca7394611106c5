"""One token's row times an int8 weight: a step of decoding reads every weight once, and this is how fast.

In: a row of float32 or bfloat16, and the weight as `int8_panels` lays it out. Out: the row of the product, in
the type of the row; sums are float32.

It takes a single row and no more. For one row torch's compiled int8 product keeps two
vectors of sums and waits for its additions, here there are eight; several rows have enough of them anyway.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dualroute.attention.backends.cpp.build import load

COLUMNS = 64  # of a panel


def fast_int8_product() -> bool:
    """Whether `int8_product` is worth having: vectors narrower than AVX2's widen bytes one by one, slowly."""
    return load().vector_bytes() >= 32


def int8_panels(weight: Tensor, scale: Tensor) -> Tensor:
    """(ceil(N / 64), K + 4, 64) int8: weight (N, K) transposed, in panels of 64 columns.

    The last four rows of a panel are the bytes of its 64 scales, float32; `scale` is (N, 1).
    """
    missing = -len(weight) % COLUMNS
    numbers = F.pad(weight, (0, 0, 0, missing)).unflatten(0, (-1, COLUMNS)).transpose(1, 2)
    scales = F.pad(scale.to(torch.float32).flatten(), (0, missing)).view(torch.int8)
    return torch.cat([numbers, scales.view(len(numbers), -1, COLUMNS)], dim=1)


def int8_product(row: Tensor, panels: Tensor, columns: int) -> Tensor:
    """(1, K) times the weight (N, K), transposed, times its scales -> (1, N).

    Args:
        row: (1, K) float32 or bfloat16, on the CPU.
        panels: `int8_panels` of the weight.
        columns: N.
    """
    return torch.ops.dualroute.int8_product(row.contiguous(), panels, columns)


torch.library.define(
    "dualroute::int8_product", "(Tensor row, Tensor panels, int columns) -> Tensor"
)  # implemented in torch_ops.h


@torch.library.register_fake("dualroute::int8_product")
def _(row: Tensor, panels: Tensor, columns: int) -> Tensor:
    return row.new_empty(1, columns)
