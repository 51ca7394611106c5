"""Whether ranks can share texts as a configuration asks for.  No torch is imported here."""

from __future__ import annotations

from dualroute.errors import UserError
from dualroute.model.config import ModelConfig


def check_divides(ranks: int, world_size: int, model: ModelConfig) -> int:
    """The number of groups of ``ranks`` ranks, that is, of ranks with data of their own.

    Raises:
        UserError: ranks or heads cannot be divided so.
    """
    if ranks < 1:
        raise UserError(f"parallel.sequence_parallel is {ranks}: it must be at least 1")
    if world_size % ranks:
        raise UserError(
            f"parallel.sequence_parallel is {ranks}, which does not divide the {world_size} rank(s) of "
            f"this run: start a multiple of {ranks}"
        )
    resolved = model.resolved()
    assert resolved.num_kv_heads is not None
    group = resolved.num_heads // resolved.num_kv_heads
    for layer in (resolved.of_layer(i) for i in range(resolved.num_layers)):
        for name in ("global_heads", "local_heads"):
            heads = getattr(layer, name)
            if heads // group % ranks:
                raise UserError(
                    f"parallel.sequence_parallel is {ranks}, but model.{name} is {heads} with {group} query "
                    f"head(s) per key head: the key heads of each route must be a multiple of {ranks}"
                )
    return world_size // ranks
