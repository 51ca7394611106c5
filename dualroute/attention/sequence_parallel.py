"""Sequence parallelism (DeepSpeed Ulysses, Jacobs et al., arXiv 2309.14509): ranks share one long text.

In: on each of P ranks, rows of its n/P consecutive tokens for all heads. `scatter_heads` gives each rank all
n tokens of H/P heads of a route, on which attention runs as ever; `gather_heads` is the way back. Everything
outside the attention works on n/P tokens.

Both are one all-to-all, forward and backward, of n/P rows per rank: what is sent does not grow with P.

The ranks of a group see the same text, yet to ZeRO and to DDP they are ranks like any
other. The gradient of a rank holds what its tokens and its heads contributed; the mean over all ranks is what
plain data parallelism takes anyway.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
from torch import Tensor

Group = torch.distributed.ProcessGroup


def check_group(group: Group, shared: int, **heads: int) -> None:
    """Whether the heads of each route, of which `shared` share a key head, can be divided among a group.

    Raises:
        ValueError: they cannot.
    """
    for name, count in heads.items():
        if count // shared % group.size():
            raise ValueError(
                f"{name}={count} with {shared} query heads per key head cannot be divided among the "
                f"{group.size()} ranks of sequence_group: the key heads of each route must be a multiple"
            )


def scatter_heads(rows: Tensor, group: Group, heads: list[int]) -> Tensor:
    """(B, n/P, sum(heads), d) -> (B, n, sum(heads) / P, d).

    Args:
        rows: this rank's tokens; the heads lie in sections, say queries, keys and values.
        group: the P ranks that share a text, in the order of its parts.
        heads: heads of each section, each a multiple of P; a rank gets its share of every section.
    """
    size = group.size()
    sections = [part.unflatten(2, (size, -1)) for part in rows.split(heads, dim=2)]
    parts = torch.cat(sections, dim=3).movedim(2, 0)  # (P, B, n/P, H/P, d), one for each receiver
    return _Exchange.apply(parts, group).movedim(0, 1).flatten(1, 2)


def gather_heads(rows: Tensor, group: Group, heads: list[int]) -> Tensor:
    """(B, n, sum(heads) / P, d) -> (B, n/P, sum(heads), d): the inverse of `scatter_heads`."""
    size = group.size()
    parts = rows.unflatten(1, (size, -1)).movedim(1, 0)  # (P, B, n/P, H/P, d)
    received = _Exchange.apply(parts, group).movedim(0, 2)  # (B, n/P, P, H/P, d)
    sections = received.split([count // size for count in heads], dim=3)
    return torch.cat([part.flatten(2, 3) for part in sections], dim=2)


class _Exchange(torch.autograd.Function):
    """Part p of the result is what rank p had for this rank; its own inverse, so its own gradient."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _all_to_all(parts, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _all_to_all(grads[0], ctx.group), None


def _all_to_all(parts: Tensor, group: Group) -> Tensor:
    parts = parts.contiguous()
    received = torch.empty_like(parts)
    torch.distributed.all_to_all_single(received, parts, group=group)
    return received
