"""Sequence parallelism in training: which ranks share a text, and which data each rank is given.

- In: ``parallel.sequence_parallel`` = P and the world.
- Here: ranks 0..P-1, P..2P-1, ... form the groups; :class:`SharedSequences` makes the strategy hand all ranks
  of a group the same samples; :func:`check_sequence_parallel` refuses what does not divide.
- Next: ``DualRoutingTransformer.set_sequence_group`` divides each text inside the group.

The strategy needs nothing else.  Each rank's loss is the sum over its own tokens
divided by the targets of the whole batch, so the mean over *all* ranks, which ZeRO and DDP take, is the right
gradient.
DeepSpeed's own settings for this (``sequence_parallel_size``) are not used: they train to another loss.
"""

from __future__ import annotations

from typing import Any

import torch.distributed

from dualroute.model import ModelConfig
from dualroute.training.parallel.divide import check_divides
from dualroute.training.parallel.environment import World

__all__ = ["SharedSequences", "check_sequence_parallel", "new_sequence_group"]


class SharedSequences:
    """Mixed into a strategy of Lightning: data go to groups of ``sequence_ranks`` ranks, not to ranks."""

    sequence_ranks = 1

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        of_ranks = super().distributed_sampler_kwargs  # type: ignore[misc]
        return {name: number // self.sequence_ranks for name, number in of_ranks.items()}


def new_sequence_group(ranks: int) -> torch.distributed.ProcessGroup | None:
    """This rank's group of ``ranks`` neighbours; None for one.  Collective: all ranks of the run call it."""
    if ranks == 1:
        return None
    own = None
    for first in range(0, torch.distributed.get_world_size(), ranks):
        members = list(range(first, first + ranks))
        group = torch.distributed.new_group(members)
        if torch.distributed.get_rank() in members:
            own = group
    assert own is not None
    return own


def check_sequence_parallel(ranks: int, world: World, model: ModelConfig) -> int:
    """The number of groups, that is, of ranks with data of their own.

    Raises:
        UserError: ranks or heads cannot be divided so.
    """
    return check_divides(ranks, world.world_size, model)
