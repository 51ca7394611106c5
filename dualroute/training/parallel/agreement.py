"""Ranks that decide alike.

Two ranks that look into the same folder may see different things: on a network file system one of them sees
what it saw a minute ago.  So rank 0 looks, and tells the others what it found; and where every rank has to do
something of its own, all of them fail if one does.

In one process there is nobody to tell.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from lightning.pytorch.strategies import Strategy

from dualroute.errors import RUN_AGAIN
from dualroute.training.parallel.environment import World

log = logging.getLogger(__name__)

T = TypeVar("T")


def meet(strategy: Strategy, world: World, limit_minutes: float) -> None:
    """Let the ranks find each other, before anything is decided; every rank calls it.

    Args:
        strategy: Of a Trainer; what it sets up here, ``fit`` finds done.
        world: This process's place.
        limit_minutes: After so long without the others this process ends, with the status that means "run it
            again": no heartbeat is there yet that could tell who is missing.
    """
    if world.world_size == 1:
        return
    alarm = threading.Timer(60 * limit_minutes, _give_up, [world, limit_minutes])
    alarm.daemon = True
    alarm.start()
    try:
        strategy.setup_environment()  # returns when all are there
    finally:
        alarm.cancel()


def _give_up(world: World, limit_minutes: float) -> None:
    log.error(
        "%s",
        f"dualroute: rank {world.rank} of {world.world_size} has waited {limit_minutes:g} minutes for the "
        f"others to start (watchdog.start_minutes), at {world.main_address}:{world.main_port}; exit status "
        f"{RUN_AGAIN}, run the same command again",
    )
    os._exit(RUN_AGAIN)


def decided_by_rank_zero(decide: Callable[[], T]) -> T:
    """What ``decide`` returns on rank 0, on every rank; what it raises there is raised everywhere."""
    if not _several():
        return decide()
    said: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            said[0] = decide()
        except Exception as error:
            said[1] = error
    try:
        dist.broadcast_object_list(said, src=0)
    except Exception as error:
        if said[1] is not None:  # what cannot be sent is at least shown here
            raise said[1] from error
        raise
    if said[1] is not None:
        raise said[1]
    found: T = said[0]
    return found


def all_succeed(act: Callable[[], None]) -> None:
    """Call ``act`` on every rank; where one raises, all raise what the first of them did."""
    told_by_all(act)


def told_by_all(act: Callable[[], T]) -> list[T]:
    """What ``act`` returns on each rank, in their order.

    Where one raises, all raise what the first of them did, and those that raise themselves their own.
    """
    if not _several():
        return [act()]
    said: tuple[Any, Exception | None] = (None, None)
    try:
        said = (act(), None)
    except Exception as error:
        said = (None, error)
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, said)
    for _, problem in (said, *found):
        if problem is not None:
            raise problem
    return [value for value, _ in found]


def place() -> tuple[int, int]:
    """(rank, number of ranks) of this process among those that decide together."""
    return (dist.get_rank(), dist.get_world_size()) if _several() else (0, 1)


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
