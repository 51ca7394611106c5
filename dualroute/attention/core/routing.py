"""What the global route reads: the settings of the routing, which documents are not routed at all, and a
choice of blocks that several layers share."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from dualroute.attention.core.arguments import check_whole
from dualroute.attention.core.held import held, hold
from dualroute.attention.core.options import AUTO_BREAK_EVEN, FAR_SUMMARIES, ROUTERS, check_name

STREAM = "stream"  # in a `SharedChoice`: the tokens of a forward pass


@dataclass(frozen=True)
class Routing:
    """How a token chooses what it reads: see `router` and `far_summary` for the names.

    Raises:
        TypeError, ValueError: a number is none or too small, or a name is unknown.
    """

    top_k: int = 8
    router: str = "minmax"
    far_summary: str = "second_order"
    sub_block: int = 16
    cluster_span: int = 0

    def __post_init__(self) -> None:
        check_whole(0, top_k=self.top_k)
        check_whole(1, sub_block=self.sub_block)
        check_whole(0, cluster_span=self.cluster_span)
        check_name("router", self.router, ROUTERS)
        check_name("far_summary", self.far_summary, FAR_SUMMARIES)


def exact_blocks(mode: str, block: int, top_k: int, break_even: int = AUTO_BREAK_EVEN) -> int | None:
    """Documents of at most this many blocks are attended to in full; None means all documents.

    A document of top_k + 2 blocks is read completely by every token (own block, sink, top_k): there routed
    attention *is* full attention, and the full kernel is faster. "auto" raises the limit to `break_even`
    tokens.
    """
    everything_read = top_k + 2
    if mode == "full":
        return None
    if mode == "routed":
        return everything_read
    return max(everything_read, break_even // block)


class SharedChoice:
    """The blocks that one layer has chosen, for the layers after it that read the same ones.

    Whichever layer asks first chooses, so a layer that is computed again for its gradients finds its own
    choice. One object serves one forward pass, or the caches of one text.

    Args:
        top_k: blocks of a choice, where decoding kernels are to leave it in memory.
        handle: of an object that lives in a compiled graph; a new one by default.

    Attributes:
        handle: stands for what is kept, for operators that take tensors alone (see `held`).
    """

    def __init__(self, top_k: int = 0, handle: Tensor | None = None) -> None:
        kept: dict[Hashable, Tensor] = {}
        self.top_k = top_k
        self.handle = hold(kept) if handle is None else handle
        self._memory: Tensor | None = None

    def __reduce__(self) -> tuple[type[SharedChoice], tuple[int]]:
        """A copy begins anew; copied together, those that shared it share the copy."""
        return SharedChoice, (self.top_k,)

    def get(self, what: Hashable) -> Tensor | None:
        """What was chosen for the tokens `what`; None where nobody has chosen."""
        kept: dict[Hashable, Tensor] = held(self.handle)
        return kept.get(what)

    def put(self, what: Hashable, blocks: Tensor) -> None:
        """Leave what was chosen for the tokens `what`."""
        kept: dict[Hashable, Tensor] = held(self.handle)
        kept[what] = blocks

    def forget(self) -> None:
        """Go on with other tokens."""
        held(self.handle).clear()

    def memory(self, rows: int) -> Tensor:
        """(rows, top_k) int32 where kernels of a step write and read the choice, -1 = none; it stays where it
        is as long as the number of rows does."""
        if self._memory is None or len(self._memory) != rows:
            self._memory = torch.full((rows, self.top_k), -1, dtype=torch.int32)
        return self._memory
