"""The choice of blocks equals the specification's, ties and all."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from dualroute.attention import Layout, reference
from dualroute.attention.backends.torch import select
from dualroute.attention.backends.triton import select_blocks, selection
from dualroute.attention.backends.triton.selection import launch, pack
from tests.attention.backends.triton.helpers import DEVICE, both, slots_of
from tests.attention.helpers import ROUTERS, batches, to_stream

BLOCK, SUB_BLOCK = 8, 4


def _select(layout: Layout, inputs: tuple[Tensor, ...], **options: object) -> Tensor:
    moved = layout.to(DEVICE)
    query, key = (to_stream(moved, x.detach()) for x in inputs[:2])
    return select_blocks(query, key, moved.stream, **options).cpu()


def _assert_equal_to_reference(layout: Layout, inputs: tuple[Tensor, ...], **options: object) -> None:
    low, wide = inputs
    selected = _select(layout, low, **options)
    block, query, key = layout.block, wide[0].detach(), wide[1].detach()
    for number in layout.documents.unique().tolist():
        for row in range(layout.batch):
            tokens = (layout.documents[row] == number).nonzero()[:, 0]
            if number < 0 or not len(tokens):
                continue
            mask = reference.select(query[row][:, tokens], key[row][:, tokens], block=block, **options)
            slots = slots_of(layout, row, tokens)
            first = int(slots[0]) // block
            chosen = torch.where(selected[:, slots] < 0, mask.shape[-1], selected[:, slots].long() - first)
            found = torch.zeros(*mask.shape[:2], mask.shape[2] + 1, dtype=torch.bool)
            found.scatter_(-1, chosen[..., 1:], True)
            assert torch.equal(found[..., :-1], mask)
            past = torch.arange(len(tokens)) // block > 0
            assert torch.equal(selected[:, slots, 0] == first, past.expand(len(selected), -1))


@pytest.mark.parametrize("chooser", ROUTERS)
@pytest.mark.parametrize("name", ["any length", "packed and padded"])
def test_equals_the_reference(name: str, chooser: str) -> None:
    layout = batches(block=BLOCK)[name]
    _assert_equal_to_reference(
        layout, both(2, layout.length, 2, 1), top_k=3, router=chooser, sub_block=SUB_BLOCK
    )


@pytest.mark.parametrize("name", ["any length", "packed and padded"])
def test_both_sides_of_a_token(name: str) -> None:
    layout = batches(block=BLOCK)[name]
    options = {"router": "minmax", "sub_block": SUB_BLOCK, "causal": False}
    _assert_equal_to_reference(layout, both(2, layout.length, 2, 1), top_k=3, **options)


@pytest.mark.parametrize(
    ("chooser", "causal"), [("minmax", True), ("minmax", False), ("moment", True), ("mean", True)]
)
def test_tiles_that_enter_no_best_are_passed_over(
    chooser: str, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what is chosen is the same, bit for bit: ties, several texts, numbers that are none among them."""
    monkeypatch.setattr(selection, "BOUNDED", 2)
    generator = torch.Generator().manual_seed(0)
    blocks = torch.arange(160)
    first = torch.where(blocks < 50, 0, 50)
    end = torch.where(blocks < 50, 50, 160)
    places = torch.stack([first, end, torch.ones_like(end)]).int().to(DEVICE)
    query = torch.randn(2, 160, 8, generator=generator).abs()
    width = 8 if chooser == "mean" else 16
    features = torch.randn(1, 160, 1, width, generator=generator).sort(-1, descending=True).values.abs()
    features[:, 50:] *= torch.linspace(4, 0.01, 110)[:, None, None]  # the best come first
    features[:, 5] = features[:, 7]
    features[:, 40, 0, 3] = torch.nan
    inputs = (query.to(DEVICE), features.to(DEVICE), places, 3, chooser, causal)
    counts = [torch.zeros(1, 64, dtype=torch.int32, device=DEVICE) for _ in range(2)]
    every, some = (launch(*inputs, bounded=bool(i), scored=counts[i]) for i in range(2))
    assert torch.equal(every, some)
    scored, fewer = (int(count.sum()) for count in counts)
    assert 0 < fewer < 0.8 * scored


@pytest.mark.parametrize(
    ("chooser", "dtype"), [("minmax", torch.bfloat16), ("moment", torch.bfloat16), ("mean", torch.float32)]
)
def test_a_bound_is_never_below_a_score(
    chooser: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of blocks that are all alike: bound and scores are equal but for rounding, and those of a tie stay."""
    monkeypatch.setattr(selection, "BOUNDED", 1)
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(3, 96, 40, generator=generator).to(dtype)
    row = torch.randn(1, 1, 1, 40 if chooser == "mean" else 80, generator=generator).abs()
    features = row.expand(1, 96, 1, -1).contiguous().to(dtype if chooser == "minmax" else torch.float32)
    features[:, 64:] *= 1.0078125  # a little better
    places = torch.tensor([[0], [96], [1]]).expand(3, 96).int().to(DEVICE)
    inputs = (query.to(DEVICE), features.to(DEVICE), places.contiguous(), 2, chooser, True)
    every, some = (launch(*inputs, bounded=bounded) for bounded in (False, True))
    assert torch.equal(every, some)


@pytest.mark.parametrize("top_k", [0, 1, 20])
def test_any_number_of_blocks(top_k: int) -> None:
    layout = batches(block=BLOCK)["packed"]
    _assert_equal_to_reference(layout, both(2, layout.length), top_k=top_k, sub_block=SUB_BLOCK)


@pytest.mark.parametrize(("dim", "block", "kv_heads"), [(64, 16, 1), (96, 24, 3), (200, 24, 3)])
def test_any_size_of_heads_blocks_and_groups(dim: int, block: int, kv_heads: int) -> None:
    """24 / 8 = 3 parts of a block: no power of two."""
    layout = Layout.build(1, 120, block)
    _assert_equal_to_reference(layout, both(1, 120, 3, kv_heads, dim), top_k=2, sub_block=8)


def test_more_blocks_than_a_tile_holds() -> None:
    layout = Layout.build(1, 160, 2)  # 80 blocks
    _assert_equal_to_reference(layout, both(1, 160, 1, 1), top_k=5, sub_block=2)


def test_of_equal_blocks_the_earlier_wins() -> None:
    layout = Layout.build(1, 96, BLOCK)
    query = torch.ones(1, 96, 4, device=DEVICE)
    stream = layout.to(DEVICE).stream
    selected = select_blocks(query, torch.zeros_like(query), stream, top_k=3, sub_block=SUB_BLOCK).cpu()
    assert selected[0, -1].sort().values.tolist() == [0, 1, 2, 3]


@triton.jit
def _pack_kernel(scores, packed, SIZE: tl.constexpr):
    lane = tl.arange(0, SIZE)
    tl.store(packed + lane[None, :], pack(tl.load(scores + lane), lane * 0 + 5)[None, :])


def test_packed_scores_sort_like_scores() -> None:
    """And 0.0 and -0.0 are a tie."""
    scores = torch.tensor([-torch.inf, -2, -1e-30, -0.0, 0.0, 1e-30, 3, torch.inf], device=DEVICE)
    packed = torch.empty(8, dtype=torch.int64, device=DEVICE)
    _pack_kernel[(1,)](scores, packed, 8)
    assert packed.diff().sign().tolist() == [1, 1, 1, 0, 1, 1, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chooser", ROUTERS)
def test_half_precision_chooses_what_the_plain_path_does(chooser: str, dtype: torch.dtype) -> None:
    layout = batches(block=BLOCK)["padded"]
    low, _ = both(2, layout.length, 2, 1, dtype=dtype)
    query, key, _ = (to_stream(layout, x.detach().cpu()) for x in low)
    options = {"top_k": 3, "router": chooser, "sub_block": SUB_BLOCK}
    plain = select.select_blocks(query, key, layout.stream, **options)
    selected = select_blocks(query.to(DEVICE), key.to(DEVICE), layout.to(DEVICE).stream, **options).cpu()
    same = (selected.sort(-1).values == plain.sort(-1).values).all(-1)
    assert same.float().mean() > 0.99  # sums in another order may settle a near tie differently


def test_later_tokens_decide_nothing() -> None:
    layout = Layout.build(1, 72, BLOCK)
    (query, key, value), _ = both(1, 72)
    before = _select(layout, (query, key, value), top_k=2, sub_block=SUB_BLOCK)
    query, key = query.detach().clone(), key.detach().clone()
    query[:, :, 50:], key[:, :, 50:] = -query[:, :, 50:], 9.0
    after = _select(layout, (query, key, value), top_k=2, sub_block=SUB_BLOCK)
    slots = slots_of(layout, 0, torch.arange(50))
    assert torch.equal(before[:, slots], after[:, slots])


def test_operator() -> None:
    query, features = torch.randn(1, 8, 6, device=DEVICE), torch.randn(1, 2, 1, 12, device=DEVICE)
    places = torch.tensor([[0, 0], [2, 2], [4, 4]], dtype=torch.int32, device=DEVICE)
    torch.library.opcheck(
        torch.ops.dualroute.select_blocks.default, (query, features, places, 2, "minmax", True)
    )


def test_refuses_what_it_cannot_do() -> None:
    layout = Layout.build(1, 16, BLOCK).to(DEVICE)
    rows = torch.zeros(1, 16, 4, device=DEVICE)
    with pytest.raises(ValueError, match="router=nearest"):
        select_blocks(rows, rows, layout.stream, top_k=1, router="nearest")
