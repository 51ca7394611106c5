"""The model of a run, with the weights that it begins with.

- In: the configuration of the run; with ``init_from`` also that of the weights.
- Here: :func:`with_given` is the configuration of a run that begins with the weights of another: that one's,
  but for what was *given* (a given value may equal the default).  What has no weights may be another; what
  decides their shapes may not, and is refused by name before anything is loaded.  :func:`build_model` and
  :func:`build_sharded_model` make the model, at once or without its weights.
- Next: the LightningModule trains it; one without weights gets them in its ``configure_model``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dualroute.errors import UserError
from dualroute.model import DualRoutingTransformer, ModelConfig
from dualroute.model.checkpoint.format import (
    CONFIG,
    WEIGHTS,
    Checkpoint,
    check_weights,
    find_checkpoint,
    is_head,
    keeps_head,
    load_body,
    new_head,
    open_weights,
    verify_checkpoint,
)
from dualroute.model.deferred_init import Draws, build_deferred
from dualroute.training.config import PretrainConfig
from dualroute.training.finetuning.adapters import add_adapters
from dualroute.training.finetuning.deferred import add_deferred_adapters
from dualroute.training.finetuning.freezing import freeze
from dualroute.training.parallel.sharded_weights import InitialWeights
from dualroute.training.step.activations import keep_fewer_activations
from dualroute.training.step.compilation import compile_layers
from dualroute.training.step.fp8 import multiply_in_fp8
from dualroute.training.step.quantization_aware import round_weights_in_forward

#: Fields that decide which weights there are, and their shapes; null stands for what the weights have.
OF_WEIGHTS = (
    "vocab_size", "dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "ffn_dim", "layer_ffn_dims",
    "attention", "dense_every", "global_heads", "local_heads", "global_layers", "qkv_bias", "qk_norm", "gate",
    "tie_embeddings",
)  # fmt: skip
_PER_LAYER = {"window": "layer_windows", "top_k": "layer_top_k"}


def with_given(initial: ModelConfig, asked: ModelConfig, source: str) -> ModelConfig:
    """``initial`` with what ``asked`` was given.

    Args:
        initial: The model of the weights.
        asked: Its ``given`` fields count, the others do not.
        source: What the weights are called in messages: ``init_from`` and its value.

    Raises:
        UserError: A given value contradicts the weights, or would have no effect.
    """
    given: dict[str, Any] = {name: getattr(asked, name) for name in sorted(asked.given)}
    theirs = initial.resolved()
    for name in OF_WEIGHTS:
        value, has = given.pop(name, None), getattr(theirs, name)
        if value is None or value == has or (name == "dense_every" and theirs.attention != "interleaved"):
            continue
        other = (
            "dualroute convert makes a model of another attention"
            if name == "attention"
            else "give the weights of such a model"
        )
        raise UserError(
            f"model.{name} is {value} and the weights of {source} have {has}: leave model.{name} out, or "
            f"{other}"
        )
    for name, per_layer in _PER_LAYER.items():
        values = getattr(initial, per_layer)
        if name in given and per_layer not in given and values is not None:
            raise UserError(
                f"model.{name} {given[name]} would have no effect, because {source} has one of its own for "
                f"each layer (model.{per_layer} {values}): give --model.{per_layer} null too, or leave "
                f"model.{name} out"
            )
    return dataclasses.replace(initial, **given)


def build_model(config: PretrainConfig, *, resumed: Checkpoint | None = None) -> DualRoutingTransformer:
    """The model of a run, with its seeded initial weights, or those of ``init_from``.

    Where a checkpoint is ``resumed`` its state replaces either, but for what is frozen: that comes from its
    weights, or beneath adapters from ``init_from``, which has to be there still.
    """
    torch.manual_seed(config.seed)
    source = _source(config, resumed)
    if source is None:
        model = DualRoutingTransformer(config.model)
    else:
        model = load_body(source, config.model, config.seed).float().train()
    if config.finetune.adapter != "none":
        add_adapters(model, config.finetune, config.seed)
    return _as_trained(model, config)


def _source(config: PretrainConfig, resumed: Checkpoint | None) -> Checkpoint | None:
    """Whose weights the model has before a state is loaded; null: seeded ones."""
    strategy = config.finetune
    if resumed is None or strategy.adapter != "none":
        return None if config.init_from is None else find_checkpoint(config.init_from)
    return resumed if strategy.freeze else None


def weights_beneath_adapters(config: PretrainConfig) -> str | None:
    """sha256 of the weights that a run adds adapters to; null without adapters."""
    if config.finetune.adapter == "none" or config.init_from is None:
        return None
    digest: str = find_checkpoint(config.init_from).metadata["files"][WEIGHTS]["sha256"]
    return digest


def build_sharded_model(
    config: PretrainConfig, *, resumed: Checkpoint | None = None
) -> tuple[DualRoutingTransformer, InitialWeights]:
    """:func:`build_model` without its weights, and these one by one, for ranks that keep a part of each."""
    model, draws = build_deferred(config.model)
    source = _source(config, resumed)
    if source is not None:
        weights = _weights_of(source, model, config.seed)
    elif resumed is not None:
        weights = InitialWeights(draws.order)
    else:
        weights = _seeded_weights(draws, config.seed)
    if config.finetune.adapter != "none":
        weights = add_deferred_adapters(model, config.finetune, config.seed, weights)
    return _as_trained(model, config), weights


def _as_trained(model: DualRoutingTransformer, config: PretrainConfig) -> DualRoutingTransformer:
    """``model`` with what training adds to its modules."""
    train = config.train
    freeze(model, config.finetune.freeze)
    if train.quantization_aware is not None:
        round_weights_in_forward(model, train.quantization_aware, train.quantization_group_size)
    if train.precision == "fp8":
        multiply_in_fp8(model)
    if train.compile:
        compile_layers(model)
    keep_fewer_activations(  # around what is compiled, so that a layer is computed again by the same program
        model,
        train.activation_checkpointing,
        every=train.recompute_every_layers,
        offload=train.offload_activations,
    )
    return model


def _seeded_weights(draws: Draws, seed: int) -> InitialWeights:
    """The weights that a model has which is built at once with this seed."""

    def tensors() -> Iterator[tuple[str, Tensor]]:
        torch.manual_seed(seed)
        yield from draws.tensors()

    return InitialWeights(draws.order, tensors)


def _weights_of(checkpoint: Checkpoint, model: DualRoutingTransformer, seed: int) -> InitialWeights:
    """Those of a checkpoint, for ``model``, which has its parameters on the meta device.

    As :func:`~dualroute.model.checkpoint.format.load_body` takes them: another head is drawn with ``seed``.
    """
    new = new_head(checkpoint, model.config, seed)

    def check() -> None:
        verify_checkpoint(checkpoint, only=CONFIG)
        file = open_weights(checkpoint)
        keeps = keeps_head(checkpoint, model.config)
        taken = {name: shape for name, shape in file.shapes.items() if keeps or not is_head(name)}
        taken |= {name: tuple(value.shape) for name, value in new.items()}
        check_weights(own, taken, str(file.path))

    def tensors() -> Iterator[tuple[str, Tensor]]:
        file = open_weights(checkpoint, verified=False)  # compared by check
        for name in own:
            yield name, new[name] if name in new else file.read(name)

    own = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return InitialWeights(list(own), tensors, check)
