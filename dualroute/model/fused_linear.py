"""Linear layers that read the same rows, joined into one product.

In: the query-key-value projections of both routes, or the gate and the widening of a feed-forward.  Here: one
layer with their outputs side by side.  Next: :mod:`dualroute.model.decoding.compiled_decode`, where a step of
a small model is as much calls as arithmetic.

Nothing is stored twice.  The layers' own weights become views of the joined ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dualroute.model.quantized import QuantizedLinear


class Joined(nn.Module):
    """Linear layers over the same rows as one; those that cannot be joined are called one by one.

    Args:
        layers: Each (…, K) → (…, N_i), of any kind.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        super().__init__()
        self.widths = [int(layer.out_features) for layer in layers]
        whole = join(layers)
        self.layers = nn.ModuleList(layers if whole is None else [whole])

    def forward(self, rows: Tensor) -> list[Tensor]:
        """(…, K) → (…, N_i) of each layer."""
        if len(self.layers) == len(self.widths):
            return [layer(rows) for layer in self.layers]
        return list(self.layers[0](rows).split(self.widths, dim=-1))


def join(layers: Sequence[Any]) -> nn.Linear | QuantizedLinear | None:
    """A layer (…, K) → (…, ΣN_i) that gives the outputs of all; its weights take the place of theirs.

    None where there is nothing to join: a single layer, layers of several kinds, or weights of another
    library, which know themselves how they are stored.
    """
    kinds = {_kind(layer) for layer in layers}
    if len(layers) < 2 or len(kinds) > 1 or None in kinds:
        return None
    first, width = layers[0], sum(layer.out_features for layer in layers)
    whole: nn.Linear | QuantizedLinear
    if isinstance(first, nn.Linear):
        whole = nn.Linear(first.in_features, width, bias=first.bias is not None, device="meta")
    else:
        whole = QuantizedLinear(
            first.in_features,
            width,
            group_size=first.group_size,
            dynamic=first.dynamic,
            bias=first.bias is not None,
        )
    is_float = isinstance(first, nn.Linear)
    for name in ("weight", "bias") if is_float else ("qdata", "scale", "bias"):
        parts: list[Any] = [getattr(layer, name) for layer in layers]
        if parts[0] is None:
            continue
        rows = torch.cat([part.detach() for part in parts])
        setattr(whole, name, nn.Parameter(rows, requires_grad=False) if is_float else rows)
        for part, view in zip(parts, rows.split([len(part) for part in parts]), strict=True):
            part.data = view
    return whole.eval()


def _kind(layer: nn.Module) -> tuple[Any, ...] | None:
    """What layers must have in common; None = cannot be joined."""
    if type(layer) is QuantizedLinear:
        return QuantizedLinear, layer.group_size, layer.dynamic, layer.bias is None
    if type(layer) is nn.Linear and type(layer.weight.data) is Tensor:
        return nn.Linear, layer.weight.dtype, layer.bias is None
    return None
