"""One part of a model switched off at a time, for as long as a context lasts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dualroute.attention.core.layout import Layout
from dualroute.attention.layer import DualRouting
from dualroute.evaluate.inspect.weights import global_weights
from dualroute.model import DualRoutingTransformer
from dualroute.model.steering import attentions


@dataclass(frozen=True)
class Ablation:
    """What is switched off.

    Attributes:
        kind: ``route``, ``head``, ``layer`` or ``block``.
        name: As ``--scale`` has it for routes and heads (``global.*``, ``global.3``, ``global.3.2``); else
            ``layer 3``, which then hands on what it is given, or ``block 3``, which no later token reads on
            the global route of any layer.
    """

    kind: str
    name: str


def ablations_of(model: DualRoutingTransformer, length: int, kinds: Iterable[str]) -> list[Ablation]:
    """All that can be switched off, of the kinds ``routes``, ``heads``, ``layers`` and ``blocks``."""
    layers, wanted, found = attentions(model), set(kinds), []
    counts = {
        "global": [layer.global_heads for layer in layers],
        "local": [layer.local_heads for layer in layers],
    }
    if "routes" in wanted:
        found += [Ablation("route", f"{route}.*") for route, heads in counts.items() if any(heads)]
        for number in range(len(layers)):
            found += [
                Ablation("route", f"{route}.{number}") for route, heads in counts.items() if heads[number]
            ]
    if "heads" in wanted:
        for number in range(len(layers)):
            for route, heads in counts.items():
                found += [Ablation("head", f"{route}.{number}.{head}") for head in range(heads[number])]
    if "layers" in wanted:
        found += [Ablation("layer", f"layer {number}") for number in range(len(layers))]
    if "blocks" in wanted and any(counts["global"]):
        # the last one has nobody behind it
        found += [Ablation("block", f"block {number}") for number in range((length - 1) // layers[0].block)]
    return found


@contextmanager
def switched_off(model: DualRoutingTransformer, what: Ablation) -> Iterator[None]:
    """The model without a part, as :class:`Ablation` names it."""
    if what.kind == "layer":
        with _layer_off(model.layers[int(what.name.split()[1])]):
            yield
        return
    if what.kind == "block":
        with _block_off(attentions(model), int(what.name.split()[1])):
            yield
        return
    route, layer, *head = what.name.split(".")
    layers = attentions(model)
    chosen = layers if layer == "*" else [layers[int(layer)]]
    before = [one.head_scale for one in chosen]
    for one in chosen:
        first = 0 if route == "global" else one.global_heads
        count = one.global_heads if route == "global" else one.local_heads
        heads = one.global_heads + one.local_heads
        kept = torch.ones(heads, dtype=torch.float64, device=model.norm.weight.device)
        if one.head_scale is not None:
            kept *= one.head_scale
        kept[first + int(head[0]) if head else slice(first, first + count)] = 0
        one.head_scale = kept
    try:
        yield
    finally:
        for one, scale in zip(chosen, before, strict=True):
            one.head_scale = scale


@contextmanager
def _layer_off(layer: nn.Module) -> Iterator[None]:
    handle = layer.register_forward_hook(lambda module, given, result: given[0])
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _block_off(layers: list[DualRouting], block: int) -> Iterator[None]:
    def of(layer: DualRouting) -> Any:
        def attend(
            hidden_states: Tensor, layout: Layout, positions: Tensor | None, cache: Any, choice: Any
        ) -> Tensor:
            assert layer.global_qkv is not None
            rows = layer.stream_heads(
                layer.global_qkv, layer.global_rope, hidden_states, layout, positions, False
            )
            length = hidden_states.shape[1]
            outputs = global_weights(layer, *rows, length, off=block, choice=choice).outputs
            missing = rows[0].shape[1] - length
            return torch.nn.functional.pad(outputs, (0, 0, 0, missing)).to(hidden_states.dtype)

        return attend

    for layer in layers:
        layer.__dict__["_global"] = of(layer)  # before the class's own
    try:
        yield
    finally:
        for layer in layers:
            del layer.__dict__["_global"]
