"""Who may be chosen, and who is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dualroute.attention import Layout, reference, select_blocks
from dualroute.attention.core.router import block_features, block_scores, top_blocks
from tests.attention.helpers import ROUTERS, batches, heads, to_stream

pytestmark = pytest.mark.usefixtures("each_kernels")


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("name", batches())
def test_only_other_blocks_of_the_same_document(name: str, router: str, causal: bool) -> None:
    layout = batches()[name]
    query, key = (to_stream(layout, rows.detach()) for rows in heads(2, layout.length)[:2])
    selected = select_blocks(
        query, key, layout.stream, top_k=3, router=router, sub_block=4, causal=causal
    ).long()
    own = torch.arange(layout.stream.num_slots) // layout.block
    in_document = layout.stream.block_in_document()
    document = (in_document == 0).cumsum(0)
    for blocks in selected:  # (S, 4)
        chosen = blocks >= 0
        slots = own[:, None].expand_as(blocks)
        assert (document[blocks[chosen]] == document[slots[chosen]]).all()
        assert (blocks[chosen] < slots[chosen]).all() if causal else (blocks[chosen] != slots[chosen]).all()
        assert (in_document[blocks[:, 0][chosen[:, 0]]] == 0).all()
        assert (in_document[blocks[:, 1:][chosen[:, 1:]]] > 0).all()
        for row in blocks:
            real = row[row >= 0]
            assert len(real.unique()) == len(real)
    if layout.stream.slot_valid is not None:
        assert (selected[:, ~layout.stream.slot_valid] == -1).all()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("router", ROUTERS)
def test_equals_the_reference(router: str, causal: bool) -> None:
    layout = Layout.build(1, 75, 8)
    query, key, _ = heads(1, 75)
    options = {"top_k": 3, "router": router, "sub_block": 4, "causal": causal}
    selected = select_blocks(to_stream(layout, query), to_stream(layout, key), layout.stream, **options)
    got = torch.zeros(2, layout.stream.num_slots, 11, dtype=torch.bool)
    got.scatter_(-1, torch.where(selected[..., 1:] < 0, 10, selected[..., 1:].long()), True)
    wanted = reference.select(query[0], key[0], block=8, **options)
    assert torch.equal(got[:, :75, :10], wanted)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.sampled_from([-3.5, -1.0, -0.0, 0.0, 1e-30, 2.0, float("inf")]), min_size=1, max_size=12),
    st.integers(0, 6),
    st.randoms(use_true_random=False),
)
def test_the_best_allowed_scores_win_and_ties_go_to_the_first(
    scores: list[float], top_k: int, random
) -> None:
    allowed = [random.random() < 0.7 for _ in scores]
    best = sorted((c for c, ok in enumerate(allowed) if ok), key=lambda c: (-scores[c], c))[:top_k]
    got = top_blocks(torch.tensor(scores, dtype=torch.float64), torch.tensor(allowed), top_k).tolist()
    assert sorted(got) == sorted(best + [-1] * (min(top_k, len(scores)) - len(best)))


def test_more_columns_do_not_change_the_choice() -> None:
    scores = torch.randint(0, 3, (50, 40), generator=torch.Generator().manual_seed(0)).float()
    allowed = torch.arange(40) < 10
    wide = top_blocks(scores, allowed.expand(50, 40), 4)
    narrow = top_blocks(scores[:, :10], torch.ones(50, 10, dtype=torch.bool), 4)
    assert torch.equal(wide.sort().values, narrow.sort().values)


def test_the_minmax_score_bounds_every_product() -> None:
    query, key, _ = (rows[0].detach() for rows in heads(1, 16, 2, 2))
    bound = reference.block_score(query, key, "minmax", 4)
    assert (bound >= (query @ key.mT).amax(-1) - 1e-12).all()


def test_bounds_of_a_half_filled_part_are_those_of_its_own_tokens() -> None:
    """Both ways a document's last block is a candidate, however few tokens are in its last sub-block."""
    layout, generator = Layout.build(1, 53, 8), torch.Generator().manual_seed(0)
    stream, valid = layout.stream, torch.arange(56).view(-1, 8) < 53
    key = torch.randn(2, 56, 4, generator=generator, dtype=torch.float64)
    key[:, 53:] = 0
    query = torch.randn(2, 1, 53, 4, generator=generator, dtype=torch.float64)
    features = block_features(key.unflatten(1, (-1, 8)), "minmax", 4, valid)
    for block in range(stream.num_blocks):
        tokens = key[:, 8 * block : min(8 * block + 8, 53)]
        wanted = reference.block_score(query[:, 0], tokens, "minmax", 4)
        actual = block_scores(query, features[:, block : block + 1], "minmax")[..., 0]
        torch.testing.assert_close(actual, wanted)
