"""The model of a run that begins with the weights of another: that one's, but for what was given.

In: the configuration of the weights, and the one that was asked for, which knows what of it was *given* (a
given value may equal the default).  Out: the configuration to train.  What has no weights may be another;
what decides their shapes may not, and is refused by name before anything is loaded.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from dualroute.errors import UserError
from dualroute.model import ModelConfig

#: Fields that decide which weights there are, and their shapes; null stands for what the weights have.
OF_WEIGHTS = (
    "vocab_size", "dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "ffn_dim", "attention",
    "dense_every", "global_heads", "local_heads", "qkv_bias", "qk_norm", "gate", "tie_embeddings",
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
