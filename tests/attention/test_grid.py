"""Images: blocks are regions, the local route reads a square; values and gradients as the reference."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from dualroute.attention import (
    DualRouting,
    Layout,
    Routing,
    full_attention,
    local_attention,
    reference,
    routed_attention,
)
from dualroute.attention.backends.torch import local_grid
from dualroute.attention.core.grid import Grid
from dualroute.attention.core.layout import LayoutPlan
from dualroute.attention.core.rope import Rope, rotate
from tests.attention.helpers import ORDERS, ROUTERS, assert_same_with_gradients, expected, heads, run

GRIDS = [
    Grid(4, 4, 2, 2),
    Grid(7, 7, 4, 4),  # regions stick out at both edges
    Grid(5, 9, 2, 4),
    Grid(3, 17, 2, 2),
    Grid(11, 10, 4, 2),
    Grid(1, 12, 1, 4),
    Grid(6, 6, 6, 6),  # one region
]
pytestmark = pytest.mark.usefixtures("each_kernels")


def packed(grid: Grid, images: int = 3) -> Layout:
    """Two rows: images side by side, and padding before, between and behind them."""
    n = grid.patches
    segments = torch.zeros(2, images * n + 5, dtype=torch.long)
    for number in range(images):
        segments[0, number * n : (number + 1) * n] = 1 + number % 2
    segments[1, 2 : 2 + n] = 7
    segments[1, 4 + n : 4 + 2 * n] = 8
    return Layout.build(*segments.shape, grid.block, segments, segments != 0, grid=grid)


def ids(grid: Grid) -> str:
    return f"{grid.height}x{grid.width}-{grid.region_height}x{grid.region_width}"


@pytest.mark.parametrize("window", [1, 2, 3, 5, 40])
@pytest.mark.parametrize("grid", GRIDS, ids=ids)
def test_the_local_route_reads_a_square(grid: Grid, window: int) -> None:
    layout = packed(grid)
    inputs = heads(*layout.documents.shape)
    actual = run(partial(local_attention, window=window, causal=False), layout, inputs)
    route = partial(reference.grid_local, height=grid.height, width=grid.width, window=window)
    assert_same_with_gradients(actual, expected(route, layout, inputs), inputs)


def test_a_large_image_is_cut_into_tiles_and_images_into_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than one tile a side, halos over more than one neighbour, and one image at a time."""
    grid = Grid(19, 21, 4, 4)
    layout = packed(grid, 2)
    inputs = heads(*layout.documents.shape, num_heads=2, kv_heads=1)
    route = partial(local_attention, window=10, causal=False)
    want = expected(partial(reference.grid_local, height=19, width=21, window=10), layout, inputs)
    assert_same_with_gradients(run(route, layout, inputs), want, inputs)
    monkeypatch.setattr(local_grid, "MAX_CHUNK", 1)
    assert_same_with_gradients(run(route, layout, inputs), want, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_local_route_in_lower_precision(dtype: torch.dtype) -> None:
    grid = Grid(9, 10, 4, 4)
    layout = packed(grid)
    inputs = heads(*layout.documents.shape, dim=8)
    route = partial(local_attention, window=3, causal=False)
    rounded = tuple(part.detach().to(dtype).requires_grad_() for part in inputs)
    exact = tuple(part.detach().double().requires_grad_() for part in rounded)
    got, want = run(route, layout, rounded), run(route, layout, exact)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(got.double(), want, rtol=0, atol=tolerance)
    grads = (
        torch.autograd.grad(out.double().square().sum(), rows)
        for out, rows in ((got, rounded), (want, exact))
    )
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=20 * tolerance)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("grid", [Grid(6, 8, 2, 2), *GRIDS[1:5]], ids=ids)
def test_the_global_route_chooses_regions(grid: Grid, order: str, router: str) -> None:
    layout = packed(grid)
    inputs = heads(*layout.documents.shape)
    routing = Routing(2, router, order, sub_block=2)
    actual = run(
        lambda q, k, v, stream: routed_attention(q, k, v, stream, routing, causal=False), layout, inputs
    )
    owner = reference.regions(grid.height, grid.width, grid.region_height, grid.region_width)
    route = partial(
        reference.routed,
        block=grid.block,
        top_k=2,
        router=router,
        far_summary=order,
        sub_block=2,
        causal=False,
        owner=owner,
    )
    assert_same_with_gradients(actual, expected(route, layout, inputs), inputs)


@pytest.mark.parametrize("grid", [*GRIDS[:3], Grid(8, 8, 2, 2)], ids=ids)
def test_full_attention_of_images(grid: Grid) -> None:
    layout = packed(grid)
    inputs = heads(*layout.documents.shape)
    actual = run(partial(full_attention, causal=False), layout, inputs)
    route = partial(reference.full, causal=False)
    assert_same_with_gradients(actual, expected(route, layout, inputs), inputs)


def layer(grid: Grid, **options: object) -> DualRouting:
    torch.manual_seed(0)
    settings: dict = {
        "window": 2,
        "block": grid.block,
        "top_k": 1,
        "sub_block": 2,
        "global_mode": "routed",
        "causal": False,
        "grid": grid,
        **options,
    }
    module = DualRouting(16, 4, **settings).double()
    for parameter in module.parameters():
        parameter.data.normal_(std=0.4)
    return module


def test_the_layer_is_the_sum_of_the_references_routes() -> None:
    grid = Grid(5, 7, 2, 2)
    module = layer(grid)
    hidden = torch.randn(1, grid.patches, 16, dtype=torch.float64)
    owner = reference.regions(5, 7, 2, 2)
    parts = []
    for projection in (module.global_qkv, module.local_qkv):
        rows = (hidden[0] @ projection.weight.T).unflatten(1, (-1, 4)).transpose(0, 1)
        query, key, value = rows.chunk(3)
        query, key = (reference.grid_rotate(part, 5, 7) for part in (query, key))
        if projection is module.local_qkv:
            parts.append(reference.grid_local(query, key, value, height=5, width=7, window=2))
        else:
            parts.append(
                reference.routed(query, key, value, block=4, top_k=1, sub_block=2, causal=False, owner=owner)
            )
    want = torch.cat(parts).transpose(0, 1).flatten(1) @ module.out_proj.weight.T
    torch.testing.assert_close(module(hidden)[0], want, rtol=0, atol=1e-11)


def test_packed_images_do_not_see_each_other() -> None:
    """Each gives what it gives alone, and another image, NaN even, changes nothing."""
    grid = Grid(7, 5, 4, 2)
    module = layer(grid)
    n = grid.patches
    images = torch.randn(3, n, 16, dtype=torch.float64)
    segments = torch.tensor([1, 2, 1]).repeat_interleave(n)[None]
    row = images.flatten(0, 1)[None].clone()
    together = module(row, segment_ids=segments, attention_mask=segments != 0)
    torch.testing.assert_close(together[0].unflatten(0, (3, n)), module(images), rtol=0, atol=1e-12)
    row[0, n : 2 * n] = torch.nan
    poisoned = module(row, segment_ids=segments, attention_mask=segments != 0)
    for begin in (0, 2 * n):
        assert torch.equal(poisoned[0, begin : begin + n], together[0, begin : begin + n])


@pytest.mark.parametrize("channels", [8, 4])
def test_patches_are_turned_by_row_and_by_column(channels: int) -> None:
    """Only the difference of places counts: an image looks alike wherever the grid begins."""
    grid = Grid(4, 6, 2, 2)
    layout = Layout.build(1, grid.patches, 4, grid=grid)
    table = layout.rotary_table(None, Rope(8, channels, 100.0), torch.float64)
    rows = torch.randn(grid.patches, 1, 8, dtype=torch.float64)
    on_stream = layout.to_stream(rows.transpose(0, 1)).unflatten(1, (1, 8))
    turned = layout.from_stream(rotate(on_stream, table)[0])
    wanted = reference.grid_rotate(rows.transpose(0, 1), 4, 6, 100.0, channels)
    torch.testing.assert_close(turned, wanted, rtol=0, atol=1e-12)


def test_both_axes_turn_whole_pairs() -> None:
    """The layer of images knows its own rotary share as well."""
    options = {"block": 4, "sub_block": 4, "causal": False, "grid": Grid(4, 4, 2, 2)}
    with pytest.raises(ValueError, match=r"is 6 channels, no multiple of 4, as the two axes .* use 0\.5"):
        DualRouting(32, 4, **options, global_rotary_factor=0.75)
    assert DualRouting(32, 4, **options, global_rotary_factor=0.5).global_rope.channels == 4


def test_every_patch_has_a_slot_of_its_region() -> None:
    for grid in GRIDS:
        slots = grid.slot_of_patch()
        assert len(set(slots.tolist())) == grid.patches
        owner = reference.regions(grid.height, grid.width, grid.region_height, grid.region_width)
        assert torch.equal(slots // grid.block, owner)
        for region in owner.unique():  # what is left over lies at the end of a block
            assert slots[owner == region].tolist() == list(
                range(int(region) * grid.block, int(region) * grid.block + int((owner == region).sum()))
            )


def test_a_layout_made_ahead_is_the_same() -> None:
    grid = Grid(5, 5, 2, 2)
    module = layer(grid)
    segments = torch.tensor([1, 2]).repeat_interleave(grid.patches)[None]
    layout = LayoutPlan(4, (3,), grid).build(segments)
    hidden = torch.randn(1, 50, 16, dtype=torch.float64)
    want = module(hidden, segment_ids=segments)
    assert torch.equal(module(hidden, layout=layout), want)
    assert torch.equal(module(hidden, layout=layout.to("cpu")), want)


def test_nothing_but_padding_gives_zeros_and_gradients() -> None:
    grid = Grid(3, 5, 2, 2)
    hidden = torch.randn(1, 15, 16, dtype=torch.float64, requires_grad=True)
    out = layer(grid)(hidden, attention_mask=torch.zeros(1, 15))
    assert not out.any()
    assert torch.isfinite(torch.autograd.grad(out.sum(), hidden)[0]).all()


def test_statistics_of_images() -> None:
    grid = Grid(7, 7, 4, 4)
    module = layer(grid)
    module.collect_statistics = True
    module(torch.randn(2, 49, 16, dtype=torch.float64))
    masses = sum(module.statistics[f"mass_{part}"] for part in ("own", "sink", "selected", "far"))
    assert float(masses) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"causal": True}, "causal=False"),
        ({"block": 8}, "use block=4"),
        ({"head_dim": 6}, "use head_dim=8"),
    ],
)
def test_options_that_do_not_fit_a_grid_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer(Grid(4, 4, 2, 2), **options)


def test_documents_of_another_size_are_refused() -> None:
    grid = Grid(4, 4, 2, 2)
    with pytest.raises(ValueError, match="a document has 15 tokens: an image of 4 x 4 patches has 16"):
        layer(grid)(torch.randn(1, 15, 16, dtype=torch.float64))
    with pytest.raises(ValueError, match="layout is for None, the layer has grid"):
        layer(grid)(torch.randn(1, 16, 16, dtype=torch.float64), layout=Layout.build(1, 16, 4))
    with pytest.raises(ValueError, match="region_height=5 is above the grid's height=4"):
        Grid(4, 4, 5, 2)
