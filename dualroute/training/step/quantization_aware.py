"""Quantisation-aware training: the forward pass sees rounded weights, the optimizer steps the float ones.

In: a model that is about to be trained.  Here: Linear, embedding and head round their weight each time they
use it, exactly as ``dualroute quantize`` will; the gradient passes the rounding as if it were not there (the
straight-through estimator: Bengio et al. 2013, arXiv 1308.3432; for whole networks Jacob et al. 2018, arXiv
1712.05877).  Out: ordinary float weights under their ordinary names, in ordinary checkpoints.

Nothing has to be converted afterwards.  Rounding is a function of the weight alone, so
the loss of the last validation *is* the loss of the quantised model.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualroute.errors import UserError
from dualroute.model import DualRoutingTransformer
from dualroute.model.lm_head import NextTokenHead
from dualroute.training.finetuning.adapted import (
    HEAD,
    adapted_layers,
    is_adapter,
    is_base_layer,
    round_adapted,
)

Result = TypeVar("Result")


def round_rows(weight: Tensor) -> Tensor:
    """(N, K) → the same, rounded to int8 with one float32 scale a row."""
    scale = (weight.abs().amax(1, keepdim=True) / 127.5).clamp_min(torch.finfo(torch.float32).eps)
    return (weight * (1.0 / scale)).round().clamp(-128, 127) * scale


def round_groups(weight: Tensor, group_size: int) -> Tensor:
    """(N, K) → the same, rounded to int4 with one bfloat16 scale for each ``group_size`` columns."""
    groups = weight.unflatten(1, (-1, group_size))
    scale = (groups.abs().amax(2, keepdim=True) / 7.5).clamp_min(torch.finfo(weight.dtype).smallest_normal)
    scale = scale.to(torch.bfloat16)
    rounded = (
        (groups * (1.0 / scale)).round().clamp(-8, 7)
    )  # the inverse, too, has the precision of the scale
    return (rounded * scale.to(weight.dtype)).flatten(1)


class _StraightThrough(torch.autograd.Function):
    """The rounded value forward, the gradient untouched backward."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, group_size: int | None) -> Tensor:
        return round_rows(weight) if group_size is None else round_groups(weight, group_size)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def _rounded(weight: Tensor, group_size: int | None) -> Tensor:
    value: Tensor = _StraightThrough.apply(weight, group_size)
    return value


class RoundedLinear(nn.Linear):
    """A linear layer that rounds its weight in each forward pass."""

    group_size: int | None = None

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(…, K) → (…, N)."""
        return F.linear(hidden_states, _StraightThrough.apply(self.weight, self.group_size))


class RoundedEmbedding(nn.Embedding):
    """A look-up in rounded rows."""

    def forward(self, input_ids: Tensor) -> Tensor:
        """(…) ids → (…, dim)."""
        return F.embedding(input_ids, _StraightThrough.apply(self.weight, None))


class RoundedHead(NextTokenHead):
    """A head that lends its rounded weight."""

    def forward(
        self,
        hidden_states: Tensor,
        project: Callable[[Tensor, Tensor], Result] = F.linear,  # type: ignore[assignment]
    ) -> Result:
        """As :class:`NextTokenHead`."""
        return project(hidden_states, _StraightThrough.apply(self.weight, None))


def round_weights_in_forward(model: DualRoutingTransformer, scheme: str, group_size: int) -> None:
    """Have every linear layer, the embedding and the head of ``model`` round their weights from now on.

    The modules stay the same objects, with the same parameters under the same names.  A layer with an adapter
    rounds what both make together, since that is what will be quantised.

    Args:
        model: Changed in place.
        scheme: ``int8_weight_only`` or ``int4_weight_only``.
        group_size: Columns that share a scale, for int4.

    Raises:
        UserError: The group size does not divide the width of a layer.
    """
    adapted = adapted_layers(model)
    of_rows = group_size if scheme == "int4_weight_only" else None
    for name, module in model.named_modules():
        if is_adapter(name) or is_base_layer(name):
            continue
        if type(module) is nn.Linear or (name in adapted and name != HEAD):
            width = int(module.in_features)
            if of_rows is not None and width % of_rows:
                raise UserError(
                    f"train.quantization_group_size {group_size} does not divide the {width} "
                    f"columns of {name}: give another, or train for int8_weight_only"
                )
        if name in adapted:
            is_head = name == HEAD
            group = None if is_head else of_rows
            round_adapted(module, partial(_rounded, group_size=group), is_head=is_head)
        elif type(module) is nn.Linear:
            module.__class__ = RoundedLinear
            module.group_size = of_rows  # type: ignore[assignment]
        elif type(module) is nn.Embedding:
            module.__class__ = RoundedEmbedding
        elif type(module) is NextTokenHead:
            module.__class__ = RoundedHead
