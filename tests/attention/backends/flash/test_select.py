"""The choice of blocks of the flash back end, ties included."""

from __future__ import annotations

import pytest
import torch

from dualroute.attention.backends import torch as plain
from dualroute.attention.backends.flash import select
from dualroute.attention.backends.flash.backend import FlashBackend
from tests.attention.helpers import ROUTERS, batches, heads, to_stream


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("name", sorted(batches()))
def test_chooses_what_plain_torch_chooses(flash: FlashBackend, name: str, router: str) -> None:
    layout = batches()[name]
    query, key = (to_stream(layout, rows.detach()) for rows in heads(2, layout.length)[:2])
    options = {"top_k": 3, "router": router, "sub_block": 4}
    ours = flash.select_blocks(query, key, layout.stream, **options)
    theirs = plain.select_blocks(query, key, layout.stream, **options)
    assert ours.dtype == theirs.dtype
    assert torch.equal(ours[..., 0], theirs[..., 0])
    assert torch.equal(ours[..., 1:].sort(-1).values, theirs[..., 1:].sort(-1).values)


@pytest.mark.parametrize("topk_is_good", [True, False])
@pytest.mark.parametrize("columns", [5, 700, 1500])
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
    generator = torch.Generator().manual_seed(columns)
    scores = torch.randint(0, 4, (50, columns), generator=generator).float()
    scores[:10, 3:] = -torch.inf
    best, place = select.first_best(scores, 4, torch.arange(select.GROUP))
    wanted = torch.sort(scores, dim=-1, descending=True, stable=True)
    assert torch.equal(place.sort(-1).values, wanted.indices[:, :4].sort(-1).values)
    assert torch.equal(best.sort(-1).values, wanted.values[:, :4].sort(-1).values)
    assert torch.equal(scores.gather(-1, place), best)
