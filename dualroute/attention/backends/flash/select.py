"""The choice of blocks: scores of all blocks at once, and the best of them.

In: queries (H, S, d) and keys (H_kv, S, d) of a stream, detached. Out: `select_blocks` gives (H_kv, S, 1 +
top_k) int32 as `core.router` defines it. Causal only.

A score is a product of numbers of the queries' type, summed in float32: the bounds of the minmax router are
keys themselves, so nothing is rounded before. Of equal scores the first block wins, as everywhere:
`first_best` proves that of torch's `topk` on the device when it is first used, and sorts where it fails.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from dualroute.attention.backends.flash.slabs import Slab, fill_closed, slabs
from dualroute.attention.core.layout import Stream
from dualroute.attention.core.router import block_features, query_features

GROUP = 32  # blocks whose best score stands for them in a first round
TWO_ROUNDS = 1024  # from so many blocks on there are two rounds


@torch.no_grad()
def select_blocks(
    query: Tensor,
    key: Tensor,
    stream: Stream,
    *,
    top_k: int,
    router: str = "minmax",
    sub_block: int = 16,
    causal: bool = True,
) -> Tensor:
    """(H_kv, S, 1 + top_k) int32 blocks of the stream: the sink, then the chosen ones; -1 = none."""
    kv_heads = len(key)
    sink = stream.cached("sink column", lambda: _sink_column(stream)).expand(kv_heads, -1, 1)
    if top_k == 0:
        return sink.contiguous()
    rows = _query_rows(query.unflatten(0, (kv_heads, -1)), router)  # (H_kv, S, f)
    features = block_features(key.unflatten(1, (-1, stream.block)), router, sub_block)
    repeats = rows.shape[-1] // features.shape[-1]
    columns = features.transpose(1, 2).repeat(1, 1, 1, repeats).to(rows.dtype)  # (H_kv, parts, nb, f)
    chosen = [
        _select_in_slab(rows, columns, stream, slab, top_k)
        for slab in slabs(stream, kv_heads * columns.shape[1])
    ]
    whole = chosen[0] if len(chosen) == 1 else torch.cat(chosen, dim=2)
    selected = torch.cat([sink, whole.flatten(1, 2)], dim=-1)
    if stream.slot_valid is not None:
        selected.masked_fill_(stream.cached("no token", lambda: ~stream.slot_valid[:, None]), -1)
    return selected


def _sink_column(stream: Stream) -> Tensor:
    """(1, S, 1) int32: the first block of the document of each slot behind it, -1 in it."""
    first = stream.first_blocks()
    behind = stream.block_in_document() > 0
    return torch.where(behind, first, -1).repeat_interleave(stream.block, output_size=stream.num_slots)[
        None, :, None
    ]


def _query_rows(query: Tensor, router: str) -> Tensor:
    """Queries (H_kv, group, S, d) -> (H_kv, S, f): features, of the heads of a group side by side if they can
    stay in the queries' type that way, else summed."""
    if router == "moment":
        return query_features(query.to(torch.promote_types(query.dtype, torch.float32)), router)
    if router == "minmax":
        query = torch.cat([query.clamp_min(0), query.clamp_max(0)], dim=-1)
    return query[:, 0] if query.shape[1] == 1 else query.transpose(1, 2).flatten(2)


def _select_in_slab(rows: Tensor, columns: Tensor, stream: Stream, slab: Slab, top_k: int) -> Tensor:
    """(H_kv, documents, slots, top_k) int32 blocks of the stream."""
    kv_heads, parts = columns.shape[:2]
    rows = slab.of_rows(rows).flatten(0, 1)  # (H_kv * documents, slots, f)
    of_slab = columns.unflatten(2, (slab.documents, slab.blocks))[:, :, :, slice(*slab.columns)]
    of_slab = of_slab.transpose(1, 2).reshape(len(rows), parts * slab.width, -1)
    scores = wide_product(rows, of_slab.transpose(1, 2))  # (H_kv * documents, slots, parts * columns)
    if parts > 1:
        scores = scores.unflatten(2, (parts, slab.width)).amax(2)
    fill_closed(scores, stream, slab, -math.inf)
    best, number = first_best(scores, min(top_k, slab.width))
    none = best == -math.inf
    first = slab.columns[0]
    if slab.documents > 1:
        number = number.unflatten(0, (kv_heads, -1)).add_(_first_of_documents(stream, slab))
    elif first:
        number = number.add_(first)
    chosen = number.to(torch.int32).view(none.shape).masked_fill_(none, -1)
    if slab.width < top_k:
        chosen = torch.nn.functional.pad(chosen, (0, top_k - slab.width), value=-1)
    return chosen.unflatten(0, (kv_heads, slab.documents))


def _first_of_documents(stream: Stream, slab: Slab) -> Tensor:
    """(documents, 1, 1) the block with which each document begins."""

    def compute() -> Tensor:
        return slab.blocks * torch.arange(slab.documents, device=stream.device).view(-1, 1, 1)

    return stream.cached(("first of documents", slab.documents, slab.blocks), compute)


def wide_product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in float32: half-precision factors are multiplied as they are and summed in float32."""
    if left.is_cuda and left.dtype in (torch.float16, torch.bfloat16):
        return torch.bmm(left, right, out_dtype=torch.float32)
    wide = torch.promote_types(left.dtype, torch.float32)
    return torch.bmm(left.to(wide), right.to(wide)).to(torch.float32)


def first_best(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` best of the last dimension and their places, in no order; of equal ones the first.

    Many columns go in two rounds: of every group the best score, then all of the `count` best groups. No
    other group can hold one of the best, nor an earlier one of equals.
    """
    columns = scores.shape[-1]
    if columns < TWO_ROUNDS or columns < 2 * count * GROUP:
        return _first_best(scores, count)
    missing = -columns % GROUP
    if missing:
        scores = torch.nn.functional.pad(scores, (0, missing), value=-math.inf)
    groups = scores.unflatten(-1, (-1, GROUP))
    _, group = _first_best(groups.amax(-1), count)
    group = group.sort(-1).values  # places among the candidates are in the order of the columns
    best, place = _first_best(
        groups.gather(-2, group[..., None].expand(*group.shape, GROUP)).flatten(-2), count
    )
    return best, group.gather(-1, place // GROUP) * GROUP + place % GROUP


def _first_best(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    if takes_first_of_equals(scores.device):
        return scores.topk(count, dim=-1)
    best, place = scores.sort(dim=-1, descending=True, stable=True)
    return best[..., :count], place[..., :count]


@functools.cache
def takes_first_of_equals(device: torch.device) -> bool:
    """Whether `topk` of this device keeps the first of equal numbers: asked once, of rows full of them."""
    generator = torch.Generator().manual_seed(0)
    for columns in (24, 200, 1500, 5000):
        rows = torch.randint(0, 6, (64, columns), generator=generator).float().to(device)
        for count in (1, 4, 16):
            wanted = rows.sort(dim=-1, descending=True, stable=True).indices[:, :count].sort(-1).values
            if not torch.equal(rows.topk(count, dim=-1).indices.sort(-1).values, wanted):
                return False
    return True
