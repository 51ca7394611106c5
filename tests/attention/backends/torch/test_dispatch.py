"""Plans: every pair exactly once, every tile one block."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dualroute.attention.backends.torch import dispatch


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 60), st.integers(1, 4), st.integers(1, 5), st.integers(0, 9), st.data()
)
def test_every_pair_has_its_row(
    kv_heads: int, slots: int, pairs: int, num_blocks: int, seed: int, data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(seed)
    selected = torch.randint(-1, num_blocks, (kv_heads, slots, pairs), generator=generator, dtype=torch.int32)
    head = data.draw(st.integers(0, kv_heads - 1))
    begin = data.draw(st.integers(0, slots - 1))
    if data.draw(st.booleans()):  # a piece is several heads with all slots, or a part of one head
        last, begin = kv_heads, 0
    else:
        last = head + 1
    plan = dispatch.plan(selected, dispatch.Piece((head, last), (begin, slots)), num_blocks)
    part = selected[head:last, begin:]
    if plan is None:
        assert (part < 0).all()
        return
    pair = plan.pair.view(last - head, slots - begin, pairs)
    assert torch.equal(pair >= 0, part >= 0)
    used = pair[pair >= 0]
    assert len(used.unique()) == len(used) == int((plan.row >= 0).sum())
    for h, s, p in (part >= 0).nonzero().tolist():
        place = int(pair[h, s, p])
        assert int(plan.row[place]) == (h + head) * slots + s + begin
        assert int(plan.tile_block[place // dispatch.TILE]) == (h + head) * num_blocks + int(part[h, s, p])


@given(st.integers(1, 9), st.integers(1, 5000), st.integers(1, 20), st.integers(1, 3000))
@settings(max_examples=50, deadline=None)
def test_pieces_cover_everything_once(kv_heads: int, slots: int, pairs: int, budget: int) -> None:
    limit = dispatch.MAX_PAIRS
    dispatch.MAX_PAIRS = max(budget, slots * pairs // 50)
    try:
        seen = torch.zeros(kv_heads, slots)
        for (head, last), (begin, end) in dispatch.pieces(kv_heads, slots, pairs, torch.device("cpu")):
            seen[head:last, begin:end] += 1
            assert (last - head) * (end - begin) * pairs <= dispatch.MAX_PAIRS or end - begin == 1
    finally:
        dispatch.MAX_PAIRS = limit
    assert (seen == 1).all()
