"""The choice of blocks: scores of all blocks at once, and the best of them.

In: queries (H, S, d) and keys (H_kv, S, d) of a stream, detached. Out: `select_blocks` gives (H_kv, S, 1 +
top_k) int32 as `core.router` defines it.

A score is a product of numbers of the queries' type, summed in float32: the bounds of the minmax router are
keys themselves, so nothing is rounded before. Of equal scores the first block wins, as everywhere:
`takes_first_of_equals` proves that of torch's `topk` on the device when it is first used; where it fails,
scores are sorted.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from dualroute.attention.backends.flash.slabs import (
    Slab,
    fill_closed,
    first_columns,
    first_of_slots,
    rectangle,
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
    """(H_kv, S, 1 + top_k) int32 blocks of the stream: the sink, then the chosen ones; -1 = none."""
    kv_heads = len(key)
    selected = key.new_empty(kv_heads, stream.num_slots, 1 + top_k, dtype=torch.int32)
    sink = first_of_slots(stream).expand(kv_heads, -1, 1)
    if top_k == 0:
        selected.copy_(sink)
    else:
        number = _best_blocks(query, key, stream, top_k, router, sub_block, causal)
        torch.cat([sink, number], dim=-1, out=selected[..., : 1 + number.shape[-1]])
    none = stream.cached(
        ("nothing to choose", top_k, causal), lambda: _nothing_to_choose(stream, top_k, causal)
    )
    return selected.masked_fill_(none, -1)


def _nothing_to_choose(stream: Stream, top_k: int, causal: bool) -> Tensor:
    """(S, 1 + top_k) True where a token has no more to read: open blocks come first, closed ones last."""
    own = stream.block_in_document()
    there = own > 0  # a first block outside of the token's own
    others = (own if causal else stream.blocks_in_document()) - 1  # past blocks, or all but one, without it
    others = (others if causal else others - there.long())[:, None]
    none = torch.cat([~there[:, None], torch.arange(top_k, device=stream.device) >= others], dim=1)
    none = none.repeat_interleave(stream.block, dim=0, output_size=stream.num_slots)
    return none if stream.slot_valid is None else none | ~stream.slot_valid[:, None]


def _columns(
    key: Tensor, stream: Stream, router: str, sub_block: int, group: int, causal: bool, multiple: int
) -> Tensor:
    """Keys (H_kv, S, d) -> features (H_kv, parts, documents, blocks, f) for the rows of `_query_rows`, with
    any numbers at the end up to a `multiple` of blocks."""
    documents = rectangle(stream)[0]
    holes = stream.slot_valid is not None and not causal
    if router == "minmax":
        if holes:  # copies of real keys where there is none, so that no bound changes
            key = key.index_select(
                1, stream.cached(("stand in", sub_block), lambda: _stand_in(stream, sub_block))
            )
        parts = key.unflatten(1, (documents, -1, stream.block // sub_block, sub_block))
        low, high = (bound.movedim(3, 1) for bound in parts.aminmax(dim=4))
        size = low.shape[3]  # (H_kv, parts, documents, blocks, d)
        columns = low.new_empty(*low.shape[:3], size + -size % multiple, 2 * group * low.shape[4])
        torch.cat([high, low] * group, dim=-1, out=columns[:, :, :, :size])
        return columns
    valid = stream.slot_valid.view(-1, stream.block) if stream.slot_valid is not None and holes else None
    features = block_features(key.unflatten(1, (-1, stream.block)), router, sub_block, valid)
    columns = features.transpose(1, 2).unflatten(2, (documents, -1))
    missing = -columns.shape[3] % multiple
    return torch.nn.functional.pad(columns, (0, 0, 0, missing)) if missing else columns


def _stand_in(stream: Stream, sub_block: int) -> Tensor:
    """(S,) each slot; for one without a token the first of its part of a block, or where that has none
    either, of its block: its point lies within the bounds of the first part."""
    assert stream.slot_valid is not None
    slot = torch.arange(stream.num_slots, device=stream.device)
    first = slot - slot % sub_block
    first = torch.where(stream.slot_valid[first], first, slot - slot % stream.block)
    return torch.where(stream.slot_valid, slot, first)


def _query_rows(query: Tensor, router: str, stream: Stream) -> Tensor:
    """Queries (H_kv, group, S, d) -> (H_kv, S, f): features, of the heads of a group side by side if they can
    stay in the queries' type that way, else summed."""
    if router != "minmax":  # means and variances are not of the queries' type
        return query_features(query.to(accumulation_dtype(query.dtype)), router)
    by_slot = query.transpose(1, 2)  # (H_kv, S, group, d)
    # q+ beside q-: a bound of the sum takes the maximum of a key where the query is positive
    bounds = stream.cached(("signs", query.shape[-1], query.dtype), lambda: _signs(query))
    return by_slot[..., None, :].clamp(*bounds).flatten(2)


def _signs(query: Tensor) -> tuple[Tensor, Tensor]:
    """(2, d) each: the least and the largest value of q+ and q-."""
    zero = query.new_zeros(query.shape[-1])
    return torch.stack([zero, zero - math.inf]), torch.stack([zero + math.inf, zero])


def _best_blocks(
    query: Tensor, key: Tensor, stream: Stream, top_k: int, router: str, sub_block: int, causal: bool
) -> Tensor:
    """(H_kv, S, min(top_k, blocks)) the best blocks, the best first; any, where there are fewer.

    Many blocks go in two rounds (`best_groups`, `best_of_groups`). What the first leaves of a slab is small:
    the second one is for all slabs together.
    """
    kv_heads = len(key)
    rows = _query_rows(query.unflatten(0, (kv_heads, -1)), router, stream)  # (H_kv, S, f)
    parts = slabs(stream, kv_heads * (stream.block // sub_block if router == "minmax" else 1), causal)
    count = min(top_k, parts[0].blocks)
    two_rounds = in_two_rounds(parts[0].blocks, count)
    parts = [_widened(slab, count, two_rounds) for slab in parts]
    group, multiple = len(query) // kv_heads, GROUP if two_rounds else 1
    columns = _columns(key, stream, router, sub_block, group, causal, multiple)
    best: list[tuple[Tensor, ...]] = []
    for slab in parts:
        scores = _scores(rows, columns, stream, slab, causal)
        best.append(best_groups(scores, count) if two_rounds else (_first_best(scores, count)[1],))
        del scores  # before the next one is made
    found = (
        best[0]
        if len(best) == 1
        else tuple(torch.cat(of_slabs, dim=1) for of_slabs in zip(*best, strict=True))
    )
    number = found[0]
    if two_rounds:
        number = best_of_groups(found[0], found[1], count, group_places(stream))[1]
    number = number.unflatten(0, (kv_heads, -1)).flatten(1, 2)
    first = first_columns(stream, parts)
    return number if first is None else number.add_(first)


def group_places(stream: Stream) -> Tensor:
    """(GROUP,) 0, 1, ..."""
    return stream.cached("places in a group", lambda: torch.arange(GROUP, device=stream.device))


def _widened(slab: Slab, count: int, two_rounds: bool) -> Slab:
    """The slab with whole groups of columns, and no fewer than are chosen; what lies beyond it is closed."""
    if two_rounds:
        width, blocks = max(-(-slab.width // GROUP), count) * GROUP, -(-slab.blocks // GROUP) * GROUP
    else:
        width, blocks = max(slab.width, count), slab.blocks
    end = min(slab.columns[0] + width, blocks)
    return slab._replace(columns=(end - width, end))


def _scores(rows: Tensor, columns: Tensor, stream: Stream, slab: Slab, causal: bool) -> Tensor:
    """float32 scores (H_kv * documents, slots, columns) of a slab, -inf where a block may not be read."""
    parts = columns.shape[1]
    of_slab = columns[:, :, :, slice(*slab.columns)].transpose(1, 2)
    of_slab = of_slab.reshape(-1, parts * slab.width, columns.shape[-1])
    scores = wide_product(slab.of_rows(rows), of_slab.transpose(1, 2)).to(torch.float32)
    if parts > 1:
        scores = scores.unflatten(2, (parts, slab.width)).amax(2)
    fill_closed(scores, stream, slab, causal, -math.inf)
    return scores


def in_two_rounds(columns: int, count: int) -> bool:
    """Whether the `count` best of so many are found in two rounds."""
    return columns >= max(TWO_ROUNDS, 2 * count * GROUP)


def best_groups(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first round: of every GROUP of the last dimension the best score, then the `count` best groups.

    No other group can hold one of the `count` best, nor an earlier one of equals. Out: the groups (...,
    count) in the order of the columns, and their scores (..., count * GROUP).
    """
    groups = scores.unflatten(-1, (-1, GROUP))
    group = _first_best(groups.amax(-1), count)[1].sort(-1).values
    candidates = groups.gather(-2, group[..., None].expand(*group.shape, GROUP))
    return group, candidates.flatten(-2)


def best_of_groups(group: Tensor, candidates: Tensor, count: int, places: Tensor) -> tuple[Tensor, Tensor]:
    """The second round: the `count` best scores and their columns, the best first; `places` are 0, 1, ..."""
    best, place = _first_best(candidates, count)
    column = torch.add(places, group[..., None], alpha=GROUP)
    return best, column.flatten(-2).gather(-1, place)


def _first_best(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` best of the last dimension and their places, the best first; of equal ones the first."""
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
