"""Weights that stay as they are, named by patterns.

In: a model and ``finetune.freeze``.  Here: parameters are told not to be trained.  Next: the optimizer has
only the others, and a training's state too (:func:`without_frozen`): what is frozen is read again from where
it came from, so a resume puts it back (:func:`with_frozen`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from dualroute.errors import UserError
from dualroute.training.finetuning.patterns import matches

_SHOWN = 12  # names in a message


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Stop training the parameters that ``patterns`` match; a pattern may name a whole module.

    Raises:
        UserError: A pattern matches nothing, or nothing is left to train.
    """
    names = dict(model.named_parameters())
    for pattern in patterns:
        found = [name for name in names if matches(name, pattern)]
        if not found:
            raise UserError(
                f"finetune.freeze: {pattern!r} matches no parameter; there are {_shown(list(names))}"
            )
        for name in found:
            names[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in names.values()):
        raise UserError(f"finetune.freeze {list(patterns)} leaves nothing to train: freeze less")


def _shown(names: list[str]) -> str:
    """The kinds of names there are: those of one layer stand for all."""
    kinds = list(
        dict.fromkeys(".".join("*" if p.isdigit() else p for p in name.split(".")) for name in names)
    )
    return ", ".join(kinds[:_SHOWN]) + (f" and {len(kinds) - _SHOWN} more" if len(kinds) > _SHOWN else "")


def frozen_names(module: nn.Module) -> set[str]:
    """Names of all parameters that are not trained; of a shared one all of its names."""
    return {
        name
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if not parameter.requires_grad
    }


def without_frozen(module: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """``state`` of ``module`` without what is not trained."""
    frozen = frozen_names(module)
    return {name: value for name, value in state.items() if name not in frozen}


def with_frozen(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state`` with what :func:`without_frozen` has left out, as ``module`` has it now."""
    own = module.state_dict()
    return {name: own[name] for name in frozen_names(module) & own.keys()} | dict(state)
