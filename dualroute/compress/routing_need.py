"""The window and the top_k that each layer needs: two more things to prune.

In: a model and calibration windows of text.  Here: layer after layer, its window and then its top_k are
halved as long as the loss on these windows allows it.  Out: the same weights with ``layer_windows`` and
``layer_top_k``.

No attention weights are looked at.  A head may look far and find nothing that matters;
the loss says what is missed.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from dualroute.compress.calibration import Batch, Loss, loss_on
from dualroute.model import DualRoutingTransformer

SMALLEST_WINDOW = 16


@dataclass(frozen=True)
class Need:
    """What each layer keeps, and the loss with it (nats)."""

    windows: list[int]
    top_k: list[int]
    loss: float


def fit_routing(
    model: DualRoutingTransformer,
    batches: list[Batch],
    device: torch.device,
    tolerance: float,
    loss_of: Loss | None = None,
) -> tuple[DualRoutingTransformer, Need]:
    """Halve windows and top_k while the loss stays within ``tolerance`` nats of what it was, in all.

    Each layer may use up its equal part of the tolerance, and what the layers before it left over.

    Args:
        model, batches, device: What is measured, on what and where.
        tolerance: In nats.
        loss_of: The loss; null is that of the batches' labels.

    Returns:
        A model of the same weights, and what was found.  Routes that a layer does not have stay as they are.
    """
    loss_of = loss_of or (lambda model, batches: loss_on(model, batches, device))
    start = loss_of(model, batches)
    loss, used = start, 0
    steps = 2 * len(model.layers)
    attentions: list[Any] = [layer.attention for layer in model.layers]
    of_one_layer = model.config.share_choice == 1  # layers that read the same blocks read equally many
    for attention in attentions:
        for name, has_route, least in (
            ("window", attention.local_heads, SMALLEST_WINDOW),
            ("top_k", attention.global_heads and attention.max_exact_blocks is not None and of_one_layer, 1),
        ):
            used += 1
            while has_route and _get(attention, name) // 2 >= least:
                before = _get(attention, name)
                _set(attention, name, before // 2)
                tried = loss_of(model, batches)
                if tried - start > tolerance * used / steps:
                    _set(attention, name, before)
                    break
                loss = tried
    need = Need([_get(a, "window") for a in attentions], [_get(a, "top_k") for a in attentions], loss)
    config = dataclasses.replace(model.config, layer_windows=need.windows, layer_top_k=need.top_k)
    fitted = DualRoutingTransformer(config)
    fitted.load_state_dict(model.state_dict())
    return fitted.to(device).eval(), need


def _get(attention: Any, name: str) -> int:
    return int(attention.window if name == "window" else attention.routing.top_k)


def _set(attention: Any, name: str, value: int) -> None:
    if name == "window":
        attention.window = value
    else:
        attention.routing = dataclasses.replace(attention.routing, top_k=value)
