"""What a layer asks of its back end: shapes of the rows, what the routes read, how documents lie.

In: a model, the type of its rows, and what it is going to read. Out: `Problem`, one for each kind of layer,
and from `draw` a `Batch` of rows for it, on a device.

Lengths are capped: kernels that are right on a few thousand tokens, with documents that are read in full and
documents that are routed, full blocks and half-filled ones, walk the same code on more of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dualroute.attention.core.layout import Layout, Stream
from dualroute.attention.core.routing import Routing
from dualroute.attention.layer import DualRouting

CHECKED_TOKENS = 4096  # of values and gradients, if documents of that length are routed
CHECKED_FULL = 2048  # tokens of the longest document that is read in full: float64 keeps a number a pair
TIMED_TOKENS = 32768  # at most


@dataclass(frozen=True)
class Problem:
    """One kind of layer in one run; see `DualRouting` for the names.

    `dtype` is that of queries, keys and values, by its name in torch. `context` is the longest document,
    `packed` whether several documents share a text. `layers` of the model are of this kind.
    """

    head_dim: int
    group: int
    global_heads: int
    local_heads: int
    window: int
    block: int
    top_k: int
    router: str
    sub_block: int
    far_summary: str
    max_exact_blocks: int | None
    causal: bool
    dtype: str
    context: int
    packed: bool
    layers: int = 1

    @property
    def routing(self) -> Routing:
        return Routing(self.top_k, self.router, self.far_summary, self.sub_block)

    def __str__(self) -> str:
        exact = "any number of" if self.max_exact_blocks is None else self.max_exact_blocks
        return (
            f"{self.global_heads}+{self.local_heads} heads of {self.head_dim} ({self.group} a key head), "
            f"window {self.window}, block {self.block}, top_k {self.top_k}, exact up to {exact} blocks, "
            f"{self.dtype}, {'packed ' if self.packed else ''}texts of {self.context}"
            f"{'' if self.causal else ', both sides of a token'}"
        )

    def checked_documents(self) -> list[int]:
        """Lengths of the documents on which values and gradients are compared: shortest last."""
        if self.max_exact_blocks is None:
            longest = min(self.context, CHECKED_FULL)
        else:
            routed = (self.max_exact_blocks + 6) * self.block  # far blocks besides those that are read
            longest = min(self.context, max(CHECKED_TOKENS, 2 * routed))
        if not self.packed or longest < 4:
            return [longest]
        quarter = min(longest // 4, CHECKED_FULL)
        parts = (quarter, quarter // 2 + 1, min(self.block // 2 + 1, longest // 8), 1)
        return [longest - sum(parts), *parts] if longest > sum(parts) else [longest]

    def timed_documents(self) -> list[int]:
        """Lengths of the documents on which back ends are timed."""
        longest = min(self.context, TIMED_TOKENS)
        if not self.packed or longest < 16:
            return [longest]
        parts = [longest // 2, longest // 4, longest // 8]
        return [*parts, longest - sum(parts)]


def problems_of(
    model: nn.Module, dtype: torch.dtype, context: int, *, packed: bool, sequence_ranks: int = 1
) -> list[Problem]:
    """The kinds of attention layers in a model, each once.

    Args:
        dtype: of queries, keys and values: that of the projections' results, which under autocast is not that
            of the weights.
        context: tokens of the longest text.
        packed: texts hold several documents.
        sequence_ranks: ranks that share every text, and with it the heads.
    """
    counted: Counter[Problem] = Counter()
    for layer in model.modules():
        if not isinstance(layer, DualRouting):
            continue
        counted[
            Problem(
                head_dim=layer.head_dim,
                group=layer.group,
                global_heads=layer.global_heads // sequence_ranks,
                local_heads=layer.local_heads // sequence_ranks,
                window=layer.window,
                block=layer.block,
                top_k=layer.routing.top_k,
                router=layer.routing.router,
                sub_block=layer.routing.sub_block,
                far_summary=layer.routing.far_summary,
                max_exact_blocks=layer.max_exact_blocks,
                causal=layer.causal,
                dtype=str(dtype).removeprefix("torch."),
                context=context,
                packed=packed,
            )
        ] += 1
    return [replace(problem, layers=count) for problem, count in counted.items()]


class Rows(NamedTuple):
    """Queries (H, S, d), keys and values (H_kv, S, d) of a route, and its result's gradient (H, S, d)."""

    query: Tensor
    key: Tensor
    value: Tensor
    cotangent: Tensor

    def each(self, change: Callable[[Tensor], Tensor]) -> Rows:
        """`change` of each of them."""
        return Rows(change(self.query), change(self.key), change(self.value), change(self.cotangent))

    def leaves(self) -> Rows:
        """Copies of queries, keys and values that collect gradients."""
        copies = self.each(lambda rows: rows.detach().clone().requires_grad_())
        return copies._replace(cotangent=self.cotangent)


class Batch(NamedTuple):
    """Documents as a stream, and the rows of both routes; None where a layer has no such route."""

    stream: Stream
    global_rows: Rows | None
    local_rows: Rows | None


def draw(problem: Problem, documents: list[int], device: torch.device, seed: int = 0) -> Batch:
    """Rows of independent normal numbers, as normalised queries and keys are; 0 in slots without a token."""
    numbers = torch.arange(len(documents), device=device)
    segments = numbers.repeat_interleave(torch.tensor(documents, device=device))[None]
    stream = Layout.build(1, sum(documents), problem.block, segments, device=device).stream
    generator = torch.Generator(device).manual_seed(seed)
    dtype: torch.dtype = getattr(torch, problem.dtype)

    def rows(heads: int) -> Tensor:
        size = (heads, stream.num_slots, problem.head_dim)
        drawn = torch.randn(size, device=device, generator=generator)
        if stream.slot_valid is not None:
            drawn.masked_fill_(~stream.slot_valid[:, None], 0)
        return drawn.to(dtype)

    def route(heads: int) -> Rows | None:
        kv_heads = heads // problem.group
        return Rows(rows(heads), rows(kv_heads), rows(kv_heads), rows(heads)) if heads else None

    return Batch(stream, route(problem.global_heads), route(problem.local_heads))
