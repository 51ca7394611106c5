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

from dualroute.attention.backends.flash.slabs import (
    Slab,
    fill_closed,
    first_of_documents,
    first_of_slots,
    slabs,
)
from dualroute.attention.core.layout import Stream
from dualroute.attention.core.precision import accumulation_dtype, wide_product
from dualroute.attention.core.router import block_features, query_features

GROUP = 32  # blocks whose best score stands for them in a first round
TWO_ROUNDS = 512  # from so many blocks on there are two rounds


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
    """(H_kv, S, 1 + top_k) int32 blocks of the stream: the sink, then the chosen ones; -1 = none.

    Raises:
        ValueError: not causal.
    """
    if not causal:
        raise ValueError("causal=False has no flash attention: use dualroute.attention.select_blocks")
    kv_heads = len(key)
    columns = _columns(key.unflatten(1, (-1, stream.block)), router, sub_block, len(query) // kv_heads)
    rows = _query_rows(query.unflatten(0, (kv_heads, -1)), router, stream)  # (H_kv, S, f)
    selected = key.new_empty(kv_heads, stream.num_slots, 1 + top_k, dtype=torch.int32)
    for slab in slabs(stream, kv_heads * columns.shape[1]):
        _select_in_slab(selected, rows, columns, stream, slab)
    none = stream.cached(("nothing to choose", top_k), lambda: _nothing_to_choose(stream, top_k))
    return selected.masked_fill_(none, -1)


def _nothing_to_choose(stream: Stream, top_k: int) -> Tensor:
    """(S, 1 + top_k) True where a token has no more to read: past blocks come first, closed ones last."""
    past = stream.block_in_document().repeat_interleave(stream.block, output_size=stream.num_slots)[:, None]
    none = torch.arange(1 + top_k, device=stream.device) >= past
    return none if stream.slot_valid is None else none | ~stream.slot_valid[:, None]


def _columns(blocks: Tensor, router: str, sub_block: int, group: int) -> Tensor:
    """Keys (H_kv, nb, block, d) -> features (H_kv, parts, nb, f) for the rows of `_query_rows`."""
    if router == "minmax":
        parts = blocks.unflatten(2, (-1, sub_block))
        low, high = (bound.transpose(1, 2) for bound in parts.aminmax(dim=3))  # (H_kv, parts, nb, d)
        return torch.cat([high, low] * group, dim=-1)
    features = block_features(blocks, router, sub_block).transpose(1, 2)
    return features.repeat(1, 1, 1, group) if router == "mean" else features


def _query_rows(query: Tensor, router: str, stream: Stream) -> Tensor:
    """Queries (H_kv, group, S, d) -> (H_kv, S, f): features, of the heads of a group side by side if they can
    stay in the queries' type that way, else summed."""
    if router == "moment":
        return query_features(query.to(accumulation_dtype(query.dtype)), router)
    by_slot = query.transpose(1, 2)  # (H_kv, S, group, d)
    if router == "mean":
        return by_slot.flatten(2)
    # q+ beside q-: a bound of the sum takes the maximum of a key where the query is positive
    bounds = stream.cached(("signs", query.shape[-1], query.dtype), lambda: _signs(query))
    return torch.cat([by_slot, by_slot], dim=-1).clamp_(*bounds).flatten(2)


def _signs(query: Tensor) -> tuple[Tensor, Tensor]:
    """(2d,) each: the least and the largest value of q+ and q-."""
    zero = query.new_zeros(query.shape[-1])
    return torch.cat([zero, zero - math.inf]), torch.cat([zero + math.inf, zero])


def _select_in_slab(selected: Tensor, rows: Tensor, columns: Tensor, stream: Stream, slab: Slab) -> None:
    """Write the sink and the best blocks into selected (H_kv, S, 1 + top_k); any, where there are fewer."""
    kv_heads, parts = columns.shape[:2]
    rows = slab.of_rows(rows).flatten(0, 1)  # (H_kv * documents, slots, f)
    of_slab = columns.unflatten(2, (slab.documents, slab.blocks))[:, :, :, slice(*slab.columns)]
    of_slab = of_slab.transpose(1, 2).reshape(len(rows), parts * slab.width, -1)
    scores = wide_product(rows, of_slab.transpose(1, 2))  # (H_kv * documents, slots, parts * columns)
    scores = scores.to(torch.float32)
    if parts > 1:
        scores = scores.unflatten(2, (parts, slab.width)).amax(2)
    fill_closed(scores, stream, slab, -math.inf)
    top_k = min(selected.shape[2] - 1, slab.width)
    places = stream.cached("places in a group", lambda: torch.arange(GROUP, device=stream.device))
    _, number = first_best(scores, top_k, places)
    number = number.unflatten(0, (kv_heads, -1))  # (H_kv, documents, slots, top_k)
    if slab.documents > 1:
        number = number.add_(first_of_documents(stream))
    elif slab.columns[0]:
        number = number.add_(slab.columns[0])
    sink = first_of_slots(stream).expand(kv_heads, -1, 1)
    torch.cat([slab.of_rows(sink), number], dim=-1, out=slab.of_rows(selected)[..., : 1 + top_k])


def first_best(scores: Tensor, count: int, places: Tensor) -> tuple[Tensor, Tensor]:
    """The `count` best of the last dimension and their places, the best first; of equal ones the first.

    Many columns go in two rounds: of every GROUP (their `places` are 0, 1, ...) the best score, then all of
    the `count` best groups. No other group can hold one of the best, nor an earlier one of equals.
    """
    columns = scores.shape[-1]
    if columns < TWO_ROUNDS or columns < 2 * count * GROUP:
        return _first_best(scores, count)
    missing = -columns % GROUP
    if missing:
        scores = torch.nn.functional.pad(scores, (0, missing), value=-math.inf)
    groups = scores.unflatten(-1, (-1, GROUP))
    group = _first_best(groups.amax(-1), count)[1].sort(-1).values[..., None]  # in the order of the columns
    candidates = groups.gather(-2, group.expand(*group.shape[:-1], GROUP)).flatten(-2)
    best, place = _first_best(candidates, count)
    column = torch.add(places, group, alpha=GROUP)
    return best, column.flatten(-2).gather(-1, place)


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
