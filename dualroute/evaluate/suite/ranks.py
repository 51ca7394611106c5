"""Several processes that share the work of a cell.

Every rank has the whole model and is given the same items; each takes a part of them, and afterwards all have
all results, in the order of the items.  In one process there is nobody to share with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

from dualroute.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")


class Ranks:
    """The processes of one evaluation, as one of them sees them.

    Args:
        rank: This one.
        size: How many; more than one have met in torch.distributed.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @property
    def first(self) -> bool:
        """Whether this one prints and writes."""
        return self.rank == 0

    def share(
        self, items: Sequence[Item], work: Callable[[Sequence[Item]], Sequence[Result]]
    ) -> list[Result]:
        """``work`` on a consecutive part of the items here, on the other parts elsewhere; all results.

        Raises:
            UserError: What ``work`` raised on any rank, on all of them.
        """
        if self.size == 1:
            return list(work(items))
        first, last = (len(items) * number // self.size for number in (self.rank, self.rank + 1))
        found: tuple[list[Result], str | None]
        try:
            found = list(work(items[first:last])), None
        except UserError as error:  # the others would wait for this one
            found = [], str(error)
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, found)
        for _, problem in parts:
            if problem is not None:
                raise UserError(problem)
        return [result for results, _ in parts for result in results]

    def told(self, say: Callable[[], Any]) -> Any:
        """What ``say`` gives on the first rank, on every rank; what it raises there is raised everywhere.

        Raises:
            UserError: As ``say`` did on the first rank.
        """
        if self.size == 1:
            return say()
        found: list[Any] = [None, None]
        if self.first:
            try:
                found[0] = say()
            except UserError as error:
                found[1] = str(error)
        dist.broadcast_object_list(found, src=0)
        if found[1] is not None:
            raise UserError(found[1])
        return found[0]
