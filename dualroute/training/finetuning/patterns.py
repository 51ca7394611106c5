"""What the patterns of ``finetune`` mean, by names alone.  No torch is imported here."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from dualroute.errors import UserError
from dualroute.model.config import ModelConfig

HEAD = "head"  #: of a model
OF_TASK = "task_head."  #: what the names of a task's head begin with


def matches(name: str, pattern: str) -> bool:
    """Whether ``pattern`` means the parameter ``name``, or a module that it is in."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def unties_head(patterns: Sequence[str], config: ModelConfig) -> bool:
    """Whether ``patterns`` name the head of a model whose head is its embedding too.

    What is added to such a head must not be added to the embedding, so the run's model has a head of its own,
    which begins with the embedding's weight.
    """
    is_tied = config.tie_embeddings and config.task_head is None and config.frontend is None
    return is_tied and any(fnmatchcase(HEAD, pattern) for pattern in patterns if pattern != "all")


def chosen_layers(linear: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """Those of the linear layers that ``patterns`` choose.

    Raises:
        UserError: A pattern chooses nothing.
    """
    chosen: set[str] = set()
    for pattern in patterns:
        found = {
            name
            for name in linear
            if pattern == "all"
            or any(fnmatchcase(part, pattern) for part in (name, name.rpartition(".")[2]))
            or fnmatchcase(name, f"{pattern}.*")
        }
        if not found:
            there = sorted({name.rpartition(".")[2] for name in linear})
            raise UserError(
                f"finetune.targets: {pattern!r} names no linear layer; there are {', '.join(there)} (or all, "
                f"or full names such as layers.0.ffn.*)"
            )
        chosen |= found
    return [name for name in linear if name in chosen]
