"""What leaves the model: hidden states become logits over the vocabulary, or directly a loss.

The head *lends* its weight to a function instead of always making logits.  At a
vocabulary of 32k the matrix [tokens, vocab] is larger than the rest of the step; a trainer therefore
passes a loss that walks over it in chunks.  It has to happen inside this module's forward because ZeRO-3
gathers a parameter only while the module that owns it runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

Result = TypeVar("Result")


class NextTokenHead(nn.Module):
    """Projection onto the vocabulary; its weight may be the input embedding's (tied)."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight  # (V, dim), an nn.Parameter

    def forward(
        self,
        hidden_states: Tensor,
        project: Callable[[Tensor, Tensor], Result] = F.linear,  # type: ignore[assignment]
    ) -> Result:
        """``project(hidden_states, weight)``: logits (…, V) by default, or whatever the caller makes."""
        return project(hidden_states, self.weight)
