"""Whole layers under `torch.compile`: norms, rotation, gate, feed-forward and residual sums as few loops.

- In: a model that is about to be trained.
- Here: :func:`compile_layers` has all blocks run through one compiled program.  The routes of the attention
  are operators in it (:mod:`dualroute.attention.compiled`), which run as they do without.
- Next: ``training/initial_model.py`` builds the model so; parameters and their names stay.

All layers of one shape share a program: one for training and one for validation, each for packed texts and
for whole ones.  Packings differ in their slots, and a program takes any number of them from the start, so
that a run that is resumed computes with the same program as one that was not.  Embedding, loss and optimizer
stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dualroute import compat
from dualroute.model.layers import TransformerBlock

__all__ = ["compile_layers"]


def compile_layers(model: nn.Module, backend: str = "inductor") -> None:
    """Change ``model.layers`` in place; the layers compile when they are first used.

    Decoding with a cache, and a pass that collects the router's statistics, go the way they go without: they
    ask the host for numbers.  Where ranks share texts the attention does so too, since they meet in it.

    Args:
        model: With ``layers``, each a :class:`TransformerBlock`.
        backend: Of ``torch.compile``.
    """
    compat.compile_regions()
    whole = torch.compile(TransformerBlock.forward, backend=backend, fullgraph=True)
    half = torch.compile(_feed_forward, backend=backend, fullgraph=True)
    for layer in model.layers:  # type: ignore[union-attr]
        layer.forward = _compiled(layer, whole, half)


def _feed_forward(layer: TransformerBlock, hidden_states: Tensor) -> Tensor:
    return hidden_states + layer.ffn(layer.ffn_norm(hidden_states))


def _compiled(
    layer: TransformerBlock, whole: Callable[..., Tensor], half: Callable[..., Tensor]
) -> Callable[..., Tensor]:
    def run(hidden_states: Tensor, **attention: Any) -> Tensor:
        if attention.get("cache") is not None or layer.attention.collect_statistics:
            return TransformerBlock.forward(layer, hidden_states, **attention)
        if layer.attention.sequence_group is not None:
            attended = layer.attention(layer.attention_norm(hidden_states), **attention)
            return half(layer, hidden_states + attended)
        layout = attention.get("layout")
        if layout is not None:
            for kept in layout.sized_by_packing():
                compat.size_varies(kept)
        return whole(layer, hidden_states, **attention)

    return run
