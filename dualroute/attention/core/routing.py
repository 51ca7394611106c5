"""What the global route reads: the settings of the routing, and which documents are not routed at all."""

from __future__ import annotations

from dataclasses import dataclass

from dualroute.attention.core.arguments import check_whole
from dualroute.attention.core.options import AUTO_BREAK_EVEN, FAR_SUMMARIES, ROUTERS, check_name


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
