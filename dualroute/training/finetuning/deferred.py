"""Adapters of a model that has no weights yet, because they are to be divided among the ranks (ZeRO-3).

In: a model on the meta device, and its :class:`InitialWeights`, which come one at a time.  Here:
:func:`add_deferred_adapters` puts the adapters in, which every rank draws alike and whole, since they are
small.  Next: :func:`~dualroute.training.parallel.sharded_weights.shard` divides both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from dualroute.training.finetuning.adapted import NAME, adapted_layers
from dualroute.training.finetuning.adapters import add_adapters, targets
from dualroute.training.finetuning.config import StrategyConfig
from dualroute.training.parallel.sharded_weights import InitialWeights

_LENGTH = f"lora_magnitude_vector.{NAME}.weight"


def add_deferred_adapters(
    model: nn.Module, config: StrategyConfig, seed: int, weights: InitialWeights
) -> InitialWeights:
    """:func:`add_adapters` to a model on the meta device, with the same numbers.

    Args:
        model: Changed in place; what is trained of its adapters is on the CPU afterwards, but for the lengths
            of dora, which follow from the weights.
        config, seed: As there.
        weights: Those of ``model``.

    Returns:
        The weights under the names that they have now, the lengths of dora's rows among them.
    """
    chosen = targets(model, config.targets)
    beneath = {name: model.get_submodule(name).weight for name in chosen}
    for name, weight in beneath.items():
        # on the CPU, so that peft draws there; one number, whatever the shape
        lent = torch.zeros((), dtype=weight.dtype).expand(weight.shape)  # type: ignore[arg-type]
        model.get_submodule(name).weight = nn.Parameter(lent, requires_grad=False)
    add_adapters(model, config, seed)
    for name, layer in adapted_layers(model).items():
        weight = beneath[name]
        assert isinstance(weight, nn.Parameter)
        layer.get_base_layer().weight = weight.requires_grad_(False)  # type: ignore[operator]
        if config.adapter == "dora":
            length = layer.get_submodule(_LENGTH.rpartition(".")[0])
            length.weight = nn.Parameter(torch.empty(weight.shape[0], device="meta"))
    return _renamed(weights, set(chosen), with_lengths=config.adapter == "dora")


def _renamed(weights: InitialWeights, chosen: set[str], *, with_lengths: bool) -> InitialWeights:
    def new_names(name: str) -> list[str]:
        layer, _, leaf = name.rpartition(".")
        if layer not in chosen:
            return [name]
        lengths = [f"{layer}.{_LENGTH}"] if with_lengths and leaf == "weight" else []
        return [f"{layer}.base_layer.{leaf}", *lengths]

    def tensors() -> Iterator[tuple[str, Tensor]]:
        assert weights.tensors is not None
        for name, value in weights.tensors():
            new, *lengths = new_names(name)
            yield new, value
            for length in lengths:
                yield length, torch.linalg.norm(value.float(), dim=1)

    order = [new for name in weights.order for new in new_names(name)]
    return dataclasses.replace(weights, order=order, tensors=None if weights.tensors is None else tensors)
