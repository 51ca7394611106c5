"""Steering: switch off or scale heads of a trained model while it runs.

``global.3.2=0`` is the third head (they count from 0) of the global route in the fourth layer, switched off;
``global.3=0.5`` halves every head of that route there, ``local.*=0`` switches the local route off in all
layers, ``global.*.2=0`` one head in each.  Several stand with commas between, later ones win.

It is exact: the output of the head is multiplied before the output projection, wherever the model is run
(whole texts, token by token, compiled).  Weights do not change, and nothing of it is saved.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from dualroute.attention.layer import DualRouting
from dualroute.errors import UserError
from dualroute.model.layers import TransformerBlock
from dualroute.model.transformer import DualRoutingTransformer

ROUTES = ("global", "local")
_RULE = re.compile(r"(\w+)(?:\.(\*|\d{1,9}))?(?:\.(\*|\d{1,9}))?=(\S+)")


@dataclass(frozen=True)
class Scale:
    """One rule: heads of a route and their factor.

    Attributes:
        route: ``global`` or ``local``.
        layer, head: Numbers from 0; null for all.
        factor: What the heads' outputs are multiplied by.
    """

    route: str
    layer: int | None
    head: int | None
    factor: float

    def __str__(self) -> str:
        layer = "*" if self.layer is None else self.layer
        return f"{self.route}.{layer}{'' if self.head is None else f'.{self.head}'}={self.factor:g}"


def parse_scales(text: str) -> list[Scale]:
    """The rules of a text such as ``global.3.2=0,local.*=0.5``.

    Raises:
        UserError: Naming the rule that is none.
    """
    return [_parse(rule.strip()) for rule in text.split(",") if rule.strip()]


def _parse(rule: str) -> Scale:
    found = _RULE.fullmatch(rule)
    if found is None:
        raise UserError(
            f"scale {rule!r} is no rule: write ROUTE.LAYER.HEAD=FACTOR, such as global.3.2=0, global.3=0.5 "
            f"or local.*=0"
        )
    route, layer, head, factor = found.groups()
    if route not in ROUTES:
        raise UserError(f"scale {rule!r}: there is no route {route!r}; it is global or local")
    try:
        number = float(factor)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"scale {rule!r}: {factor!r} is no factor; give a finite number")
    return Scale(
        route,
        None if layer in (None, "*") else int(layer),
        None if head in (None, "*") else int(head),
        number,
    )


def attentions(model: DualRoutingTransformer) -> list[DualRouting]:
    """The attention of each layer."""
    found = []
    for layer in model.layers:
        assert isinstance(layer, TransformerBlock)
        found.append(layer.attention)
    return found


def steer(model: DualRoutingTransformer, scales: str | list[Scale]) -> None:
    """Scale heads of a model from now on, instead of any scaled before; no rules end it.

    A program that was compiled before keeps what it was compiled with: steer first.

    Args:
        model: In place.
        scales: Rules, or their text.

    Raises:
        UserError: There is no such layer or head.
    """
    rules = parse_scales(scales) if isinstance(scales, str) else scales
    layers = attentions(model)
    factors = [torch.ones(layer.global_heads + layer.local_heads, dtype=torch.float64) for layer in layers]
    for rule in rules:
        if rule.layer is not None and rule.layer >= len(layers):
            raise UserError(
                f"scale {rule}: there is no layer {rule.layer}; the model has layers 0 to {len(layers) - 1}"
            )
        chosen = range(len(layers)) if rule.layer is None else [rule.layer]
        hits = [_scale_layer(layers[number], factors[number], rule) for number in chosen]
        if not any(hits):
            heads = max(_heads(layers[number], rule.route) for number in chosen)
            there = f"heads 0 to {heads - 1}" if heads else "none"
            raise UserError(f"scale {rule}: no such head; of the {rule.route} route there are {there}")
    for layer, values in zip(layers, factors, strict=True):
        device = model.norm.weight.device  # floats in a quantised model too
        layer.head_scale = None if bool((values == 1).all()) else values.to(device)


def _heads(layer: DualRouting, route: str) -> int:
    return layer.global_heads if route == "global" else layer.local_heads


def _scale_layer(layer: DualRouting, factors: Tensor, rule: Scale) -> bool:
    """Whether the layer has what the rule names; its factors are set in place."""
    heads = _heads(layer, rule.route)
    first = 0 if rule.route == "global" else layer.global_heads
    if rule.head is None:
        factors[first : first + heads] = rule.factor
        return heads > 0
    if rule.head >= heads:
        return False
    factors[first + rule.head] = rule.factor
    return True
