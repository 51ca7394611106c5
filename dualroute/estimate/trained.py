"""What of a model is trained: with adapters, or with weights that stay, a part of it.

In: a configuration.  Here: its model on the meta device, as ``training/initial_model.py`` would give it to a
trainer, and its parameters counted.  Next: :mod:`dualroute.estimate.command` makes bytes of the counts.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import nn

from dualroute.estimate.config import EstimateConfig
from dualroute.model import DualRoutingTransformer
from dualroute.model.lm_head import NextTokenHead
from dualroute.training.finetuning.adapted import is_adapter
from dualroute.training.finetuning.adapters import add_adapters, unties_head
from dualroute.training.finetuning.freezing import freeze


@dataclass(frozen=True)
class Count:
    """Of parameters.

    Attributes:
        held: All.
        trained: Those that have gradients and an optimizer.
        frozen_matrices: Those of products whose weights have no gradient.
        layers_without_gradients: Layers from the bottom on that keep nothing for a backward pass, because
            nothing is trained in them, nor beneath.
    """

    held: int
    trained: int
    frozen_matrices: int
    layers_without_gradients: int


def trained_model(config: EstimateConfig) -> DualRoutingTransformer:
    """The model of a run, on the meta device, with its adapters, and frozen where it will be.

    Raises:
        UserError: ``finetune.targets`` or ``finetune.freeze`` names nothing.
    """
    strategy, model = config.finetune, config.model.resolved()
    if strategy.adapter != "none" and unties_head(strategy.targets, model):
        model = dataclasses.replace(model, tie_embeddings=False)
    with torch.device("meta"):
        whole = DualRoutingTransformer(model)
        if strategy.adapter != "none":
            add_adapters(whole, strategy, config.seed)
    freeze(whole, strategy.freeze)
    return whole


def counted(model: DualRoutingTransformer) -> Count:
    """The parameters of :func:`trained_model`."""
    named = dict(model.named_parameters())
    products = {
        id(module.weight): module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | NextTokenHead) and not is_adapter(f"{name}.")
    }
    trained = [name for name, parameter in named.items() if parameter.requires_grad]
    lowest = min((_depth(name, model.config.num_layers) for name in trained), default=0)
    return Count(
        sum(parameter.numel() for parameter in named.values()),
        sum(named[name].numel() for name in trained),
        sum(weight.numel() for weight in products.values() if not weight.requires_grad),
        max(lowest, 0),
    )


def _depth(name: str, num_layers: int) -> int:
    """The layer that a parameter belongs to; -1 for what enters the first one."""
    parts = name.split(".")
    if parts[0] == "layers":
        return int(parts[1])
    return -1 if parts[0] == "embedding" else num_layers
