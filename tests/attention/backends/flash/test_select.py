"""The choice of blocks of the flash back end, ties included."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dualroute.attention import Layout
from dualroute.attention.backends import torch as plain
from dualroute.attention.backends.flash import select, slabs
from dualroute.attention.backends.flash.backend import FlashBackend
from tests.attention.helpers import ROUTERS, batches, heads, to_stream


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("name", sorted(batches()))
def test_chooses_what_plain_torch_chooses(flash: FlashBackend, name: str, router: str, causal: bool) -> None:
    layout = batches()[name]
    query, key = (to_stream(layout, rows.detach()) for rows in heads(2, layout.length)[:2])
    options = {"top_k": 3, "router": router, "sub_block": 4, "causal": causal}
    _same_choice(flash, query, key, layout, options)


@pytest.mark.parametrize("entries", [1 << 26, 30_000])
@pytest.mark.parametrize("causal", [True, False])
def test_chooses_the_same_in_two_rounds_and_many_slabs(
    flash: FlashBackend, causal: bool, entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups of columns reach over the ends of slabs and of documents."""
    monkeypatch.setattr(slabs, "max_entries", lambda device: entries)
    monkeypatch.setattr(select, "TWO_ROUNDS", 100)
    segments = torch.zeros(1, 1100, dtype=torch.long)
    segments[0, 330:] = 1
    segments[0, 420:] = 2
    for layout in (Layout.build(1, 1100, 4, segments), Layout.build(2, 550, 4)):
        assert select.in_two_rounds(layout.stream.num_blocks // layout.batch, 2)
        assert (len(slabs.slabs(layout.stream, 2, causal)) > 5) == (entries < 1 << 26)
        query, key = (to_stream(layout, rows.detach()) for rows in heads(layout.batch, layout.length)[:2])
        _same_choice(flash, query, key, layout, {"top_k": 2, "sub_block": 4, "causal": causal})


def _same_choice(
    flash: FlashBackend, query: torch.Tensor, key: torch.Tensor, layout: Layout, options: dict[str, Any]
) -> None:
    ours = flash.select_blocks(query, key, layout.stream, **options)
    theirs = plain.select_blocks(query, key, layout.stream, **options)
    assert ours.dtype == theirs.dtype
    assert torch.equal(ours[..., 0], theirs[..., 0])
    assert torch.equal(ours[..., 1:].sort(-1).values, theirs[..., 1:].sort(-1).values)


@pytest.mark.parametrize("topk_is_good", [True, False])
@pytest.mark.parametrize("columns", [5, 704, 1504])
def test_of_equal_scores_the_first_wins(
    columns: int, topk_is_good: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one round and in two; by `topk` where it does so, by a stable sort where it does not."""

    def first_ones(rows: torch.Tensor, count: int, dim: int) -> tuple[torch.Tensor, ...]:
        assert topk_is_good
        best, place = torch.sort(rows, dim=dim, descending=True, stable=True)
        return best[..., :count].flip(-1), place[..., :count].flip(-1)  # in no order

    monkeypatch.setattr(select, "takes_first_of_equals", lambda device: topk_is_good)
    monkeypatch.setattr(torch.Tensor, "topk", first_ones)
    two_rounds = select.in_two_rounds(columns, 4)
    assert two_rounds == (columns > 5)
    generator = torch.Generator().manual_seed(columns)
    scores = torch.randint(0, 4, (50, columns), generator=generator).float()
    scores[:10, 3:] = -torch.inf
    if two_rounds:
        groups = select.best_groups(scores, 4)
        best, place = select.best_of_groups(*groups, 4, torch.arange(select.GROUP))
    else:
        best, place = select._first_best(scores, 4)
    wanted = torch.sort(scores, dim=-1, descending=True, stable=True)
    assert torch.equal(place.sort(-1).values, wanted.indices[:, :4].sort(-1).values)
    assert torch.equal(best.sort(-1).values, wanted.values[:, :4].sort(-1).values)
    assert torch.equal(scores.gather(-1, place), best)
