"""What of a model is trained, as ``finetune`` says: counted by names and shapes, without a model.

In: the configuration of a run.  Next: :mod:`dualroute.training.memory.parts` makes bytes of the counts.  No
torch is imported here.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from dualroute.errors import UserError
from dualroute.model.config import ModelConfig
from dualroute.model.cost.shapes import numel, parameter_shapes
from dualroute.training.config import PretrainConfig
from dualroute.training.finetuning.patterns import HEAD, OF_TASK, chosen_layers, matches, unties_head

_ENDS = (
    ".global_qkv.weight",
    ".local_qkv.weight",
    ".out_proj.weight",
    ".gate.weight",
    ".up.weight",
    ".down.weight",
)


@dataclass(frozen=True)
class Count:
    """Of parameters.

    Attributes:
        held: All, with adapters.
        trained: Those that have gradients and an optimizer.
        largest: Numbers of the largest one that is trained.
        matrices: Those of products in layers, without adapters.
        trained_matrices: Of these, those that have gradients.
        frozen_matrices: Those of products whose weights have no gradient, the head's included.
        layers_without_gradients: Layers from the bottom on that keep nothing for a backward pass, because
            nothing is trained in them, nor beneath.
        adapter_width: Numbers a token that the adapters of one layer keep besides.
        model: Resolved.
        layers: Configurations of its layers.
    """

    held: int
    trained: int
    largest: int
    matrices: int
    trained_matrices: int
    frozen_matrices: int
    layers_without_gradients: int
    adapter_width: int
    model: ModelConfig
    layers: tuple[ModelConfig, ...]


def counted(config: PretrainConfig) -> Count:
    """The parameters of a run's model.

    Raises:
        UserError: ``finetune.targets`` or ``finetune.freeze`` names nothing.
    """
    strategy, model = config.finetune, config.model.resolved()
    if strategy.adapter != "none" and unties_head(strategy.targets, model):
        model = dataclasses.replace(model, tie_embeddings=False)
    shapes = parameter_shapes(model)
    products = [name for name in shapes if name.endswith(_ENDS) or name == "head.weight"]
    of_head = "head.weight" if "head.weight" in shapes else "embedding.weight"
    sizes = {name: numel(shape) for name, shape in shapes.items()}
    trained = dict.fromkeys(sizes, True)
    width = 0
    if strategy.adapter != "none":
        layers = [name.removesuffix(".weight") for name in products if model.frontend is None or name != HEAD]
        chosen = chosen_layers(layers, strategy.targets)
        trained = {name: name.startswith(OF_TASK) for name in sizes}
        for layer in chosen:
            rows, columns = shapes[f"{layer}.weight"]
            added = strategy.rank * (rows + columns) + (rows if strategy.adapter == "dora" else 0)
            sizes[f"{layer}.lora_"], trained[f"{layer}.lora_"] = added, True
        by_layer = [[n for n in chosen if n.startswith(f"layers.{i}.")] for i in range(model.num_layers)]
        most: list[str] = max(by_layer, key=len)
        # the narrow product of each, and with dora the wide one, whose rows are scaled
        wide = sum(shapes[f"{layer}.weight"][0] for layer in most) if strategy.adapter == "dora" else 0
        width = len(most) * strategy.rank + wide
    for pattern in strategy.freeze:
        found = [name for name in sizes if matches(name, pattern)]
        if not found:
            raise UserError(f"finetune.freeze: {pattern!r} matches no parameter of the model")
        trained |= dict.fromkeys(found, False)
    counted_products = {*products, *([] if config.model.task_head or model.frontend else [of_head])}
    of_trained = [name for name in sizes if trained[name]]
    if not of_trained:
        raise UserError(f"finetune.freeze {list(strategy.freeze)} leaves nothing to train: freeze less")
    lowest = min(_depth(name, model.num_layers) for name in of_trained)
    return Count(
        held=sum(sizes.values()),
        trained=sum(sizes[name] for name in of_trained),
        largest=max(sizes[name] for name in of_trained),
        matrices=sum(sizes[name] for name in products if name != "head.weight"),
        trained_matrices=sum(sizes[name] for name in products if name != "head.weight" and trained[name]),
        frozen_matrices=sum(sizes[name] for name in counted_products if not trained[name]),
        layers_without_gradients=max(lowest, 0),
        adapter_width=width,
        model=model,
        layers=tuple(model.of_layer(i) for i in range(model.num_layers)),
    )


def _depth(name: str, num_layers: int) -> int:
    """The layer that a parameter belongs to; -1 for what enters the first one."""
    parts = name.split(".")
    if parts[0] == "layers":
        return int(parts[1])
    return -1 if parts[0] == "embedding" else num_layers
