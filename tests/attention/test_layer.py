"""The layer: the sum of the reference's routes, unmoved by packing, padding, position and batch."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dualroute.attention import DualRouting, Layout, reference
from dualroute.attention.backends.torch import tile_attention as kernels
from tests.attention.helpers import ORDERS, ROUTERS

pytestmark = pytest.mark.usefixtures("each_kernels")

DIM, HEADS, BLOCK = 16, 4, 8


def layer(**options: object) -> DualRouting:
    torch.manual_seed(0)
    settings: dict = {
        "window": 10,
        "block": BLOCK,
        "top_k": 2,
        "sub_block": 4,
        "global_mode": "routed",
        **options,
    }
    module = DualRouting(DIM, HEADS, **settings).double()
    for parameter in module.parameters():  # sharper logits than the default initialisation gives
        if parameter.ndim == 2:
            parameter.data.normal_(std=0.4 if parameter is not module.gate_weight else 0.0)
    return module


def states(batch: int, length: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, DIM, generator=generator, dtype=torch.float64)


#: positions of each route: some channels of each head of 4 (of 8), none, all
POSITIONS = [
    {"global_rotary_factor": 0.0},
    {"global_rotary_factor": 0.5, "local_rotary_factor": 0.0},
    {"global_rotary_factor": 0.0, "local_rotary_factor": 0.25, "head_dim": 8, "global_mode": "full"},
]


def by_reference(module: DualRouting, hidden: Tensor) -> Tensor:
    """The layer on one document (n, dim), from its weights."""
    positions = torch.arange(len(hidden))
    outputs = []
    for projection, heads in (
        (module.global_qkv, module.global_heads),
        (module.local_qkv, module.local_heads),
    ):
        kv_heads = heads // module.group
        rows = (hidden @ projection.weight.T).unflatten(1, (-1, module.head_dim)).transpose(0, 1)
        query, key, value = rows.split([heads, kv_heads, kv_heads])
        rope = module.global_rope if projection is module.global_qkv else module.local_rope
        query, key = (reference.rotate(part, positions, channels=rope.channels) for part in (query, key))
        if projection is module.local_qkv:
            outputs.append(reference.local(query, key, value, window=module.window, causal=module.causal))
        elif module.global_mode == "full":
            outputs.append(reference.full(query, key, value, causal=module.causal))
        else:
            options = dict(vars(module.routing))
            assert options.pop("cluster_span") == 0  # see core/test_clusters.py
            outputs.append(
                reference.routed(query, key, value, block=module.block, causal=module.causal, **options)
            )
    weights = module.out_proj.weight.split(
        [module.global_heads * module.head_dim, outputs[1].shape[0] * module.head_dim], 1
    )
    return reference.dual(*outputs, *weights)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"global_mode": "full"},
        {"num_kv_heads": 2},
        {"num_kv_heads": 2, "global_heads": 4, "local_heads": 2, "head_dim": 6},
        *POSITIONS,
        *({"router": router, "far_summary": order} for router, order in itertools.product(ROUTERS, ORDERS)),
    ],
)
def test_equals_the_sum_of_the_reference_routes(options: dict, causal: bool) -> None:
    module = layer(causal=causal, **options)
    hidden = states(2, 61).requires_grad_()
    actual = module(hidden)
    wanted = torch.stack([by_reference(module, row) for row in hidden])
    torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-11)
    cotangent = states(2, 61, seed=5)
    inputs = (hidden, *module.parameters())
    for got, want in zip(
        torch.autograd.grad(actual, inputs, cotangent),
        torch.autograd.grad(wanted, inputs, cotangent),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


MODES = [
    {"global_mode": "full"},
    {},
    {"global_mode": "auto", "auto_break_even": 40},  # routes the longest document only
    {"qk_norm": True, "gate": True, "num_kv_heads": 2},
    {"global_rotary_factor": 0.0, "local_rotary_factor": 0.5},
]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("options", MODES)
def test_packed_and_padded_equal_separate(options: dict, causal: bool) -> None:
    module = layer(causal=causal, **options)
    lengths = (61, 5, 33)
    documents = [states(1, length, seed=length) for length in lengths]
    separate = [module(document) for document in documents]
    packed = torch.cat(documents, 1)
    segments = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    torch.testing.assert_close(
        module(packed, segment_ids=segments), torch.cat(separate, 1), rtol=0, atol=1e-12
    )

    for side in ("left", "right"):
        rows, mask = torch.full((3, 64, DIM), 9.0, dtype=torch.float64), torch.zeros(3, 64)
        for row, document in enumerate(documents):
            place = slice(0, lengths[row]) if side == "right" else slice(64 - lengths[row], 64)
            rows[row, place], mask[row, place] = document[0], 1
        padded = module(rows, attention_mask=mask)
        torch.testing.assert_close(padded[mask.bool()], torch.cat(separate, 1)[0], rtol=0, atol=1e-12)
        assert not padded[~mask.bool()].any()


def test_a_shared_layout_equals_one_made_inside() -> None:
    module, hidden = layer(), states(2, 50)
    segments = torch.arange(50).expand(2, 50) // 20
    layout = Layout.build(2, 50, BLOCK, segments)
    assert torch.equal(module(hidden, layout=layout), module(hidden, segment_ids=segments))
    assert torch.equal(module(hidden, layout=layout), module(hidden, layout=layout))


def test_only_padding_gives_zeros_and_finite_gradients() -> None:
    for causal in (True, False):
        module, hidden = layer(causal=causal, qk_norm=True), states(2, 9).requires_grad_()
        out = module(hidden, attention_mask=torch.zeros(2, 9))
        assert not out.any()
        gradients = torch.autograd.grad(out.sum(), (hidden, *module.parameters()))
        assert all(not gradient.any() for gradient in gradients)


@pytest.mark.parametrize(
    "options", [{"global_mode": "full"}, {"router": "mean", "far_summary": "first_order"}]
)
def test_the_rotary_embedding_sees_distances_only(options: dict) -> None:
    """What reads single coordinates of keys (bounds, variances) is left out: rotation mixes coordinates."""
    module, hidden = layer(**options), states(1, 61)
    shifted = module(hidden, positions=torch.arange(61)[None] + 1000)
    torch.testing.assert_close(shifted, module(hidden), rtol=0, atol=1e-9)
    stretched = module(hidden, positions=torch.arange(61)[None] * 3)
    assert not torch.allclose(stretched, module(hidden))


@pytest.mark.parametrize("options", [{"global_mode": "full"}, {}])
def test_a_route_without_rotation_knows_no_positions(options: dict) -> None:
    """Wherever the tokens stand, the global route gives the same; the local one does not."""
    hidden, stretched = states(1, 61), torch.arange(61)[None] * 3
    without = {"global_rotary_factor": 0.0, **options}
    alone = layer(local_heads=0, global_heads=HEADS, **without)
    assert torch.equal(alone(hidden, positions=stretched), alone(hidden))
    both = layer(**without)
    assert not torch.allclose(both(hidden, positions=stretched), both(hidden))


def test_positions_of_each_document_are_the_default() -> None:
    module, hidden = layer(), states(2, 50)
    segments = torch.arange(50).expand(2, 50) // 20
    positions = (torch.arange(50) % 20).expand(2, 50)
    assert torch.equal(
        module(hidden, segment_ids=segments, positions=positions), module(hidden, segment_ids=segments)
    )


@pytest.mark.parametrize("num_kv_heads", [None, 2])
def test_the_default_has_a_dense_layers_parameters(num_kv_heads: int | None) -> None:
    def count(module: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    dense = layer(num_kv_heads=num_kv_heads, local_heads=0, global_mode="full")
    kv = num_kv_heads or HEADS
    assert count(layer(num_kv_heads=num_kv_heads)) == count(dense) == DIM * (2 * DIM + 2 * kv * DIM // HEADS)
    assert count(layer(num_kv_heads=num_kv_heads, global_heads=0)) == count(dense)
    normed = [layer(qk_norm=True), layer(qk_norm=True, local_heads=0)]
    assert count(normed[0]) == count(normed[1])
    twice = layer(global_heads=HEADS, local_heads=HEADS)
    assert count(twice) == 2 * count(layer())


def test_the_dense_baseline_is_multi_head_attention() -> None:
    module, hidden = layer(local_heads=0, global_mode="full"), states(2, 61)
    rows = (hidden @ module.global_qkv.weight.T).unflatten(2, (3 * HEADS, -1)).transpose(1, 2)
    query, key, value = rows.split(HEADS, dim=1)
    query, key = (
        torch.stack([reference.rotate(row, torch.arange(61)) for row in part]) for part in (query, key)
    )
    wanted = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    wanted = wanted.transpose(1, 2).flatten(2) @ module.out_proj.weight.T
    torch.testing.assert_close(module(hidden), wanted, rtol=0, atol=1e-12)


def test_the_gate_starts_at_one_and_learns() -> None:
    plain, gated, hidden = layer(), layer(gate=True), states(2, 30)
    gated.load_state_dict(plain.state_dict() | {"gate_weight": gated.gate_weight})
    torch.testing.assert_close(gated(hidden), plain(hidden), rtol=0, atol=1e-14)
    gated(hidden).square().sum().backward()
    assert bool(gated.gate_weight.grad.any())
    gated.gate_weight.data.normal_()
    assert not torch.allclose(gated(hidden), plain(hidden))


def test_qk_norm_bounds_the_logits() -> None:
    module, hidden = layer(qk_norm=True), states(1, 30)
    with torch.no_grad():
        for projection in (module.global_qkv, module.local_qkv):
            kv_heads = HEADS // 2
            projection.weight[: 2 * kv_heads * module.head_dim] *= 100  # queries and keys
    torch.testing.assert_close(module(hidden), layer(qk_norm=True)(hidden), rtol=0, atol=1e-5)


def test_bf16_autocast_stays_near_float32() -> None:
    module, hidden = layer(qk_norm=True, gate=True).float(), states(2, 61).float().requires_grad_()
    module.routing = type(module.routing)(20, "minmax", "second_order", 4)  # nothing to choose differently
    exact = module(hidden)
    wanted = torch.autograd.grad(exact.square().sum(), (hidden, *module.parameters()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = module(hidden)
    got = torch.autograd.grad(rounded.square().sum(), (hidden, *module.parameters()))
    for small, large in zip((rounded, *got), (exact, *wanted), strict=True):
        assert float((small.detach().float() - large.detach()).norm() / large.detach().norm()) < 0.03


@pytest.mark.parametrize("causal", [True, False])
def test_without_the_private_operator(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain path, which other devices take, through both routes, forward and backward."""
    module, hidden = layer(causal=causal, num_kv_heads=2), states(2, 61).requires_grad_()
    segments = torch.arange(61).expand(2, 61) // 40
    results = []
    for flash in (True, False):
        monkeypatch.setattr(kernels, "_HAS_FLASH", flash)
        out = module(hidden, segment_ids=segments)
        results.append((out, *torch.autograd.grad(out.square().sum(), (hidden, *module.parameters()))))
    for operator, plain in zip(*results, strict=True):
        torch.testing.assert_close(plain, operator, rtol=0, atol=1e-10)


def test_a_layer_survives_saving_and_loading() -> None:
    first, second = layer(gate=True, qk_norm=True), layer(gate=True, qk_norm=True)
    for parameter in first.parameters():
        parameter.data.normal_()
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(states(1, 20)), second(states(1, 20)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"router": "minmx"}, "router=minmx is unknown: did you mean minmax"),
        ({"far_summary": "second"}, "far_summary=second is unknown: did you mean second_order"),
        ({"global_mode": "route"}, "global_mode=route is unknown: did you mean routed"),
        ({"window": 0}, "window=0"),
        ({"top_k": -1}, "top_k=-1"),
        ({"auto_break_even": 0}, "auto_break_even=0"),
        ({"rope_theta": 0.0}, "rope_theta=0.0"),
        ({"global_rotary_factor": -0.1}, "global_rotary_factor=-0.1 is a share of the channels"),
        ({"local_rotary_factor": float("nan")}, "local_rotary_factor=nan is a share of the channels"),
        ({"local_rotary_factor": 0.3}, "local_rotary_factor=0.3 of head_dim=4 is 1.2 channels.* use 0.5"),
        ({"block": 12, "sub_block": 16}, "block=12 is not a multiple of sub_block=16.*use block=16"),
        ({"num_kv_heads": 3}, "num_kv_heads=3 does not divide num_heads=4"),
        ({"num_kv_heads": 2, "global_heads": 1}, "global_heads=1 is not a multiple of 2"),
        ({"global_heads": 5}, "global_heads=5 and local_heads=-1"),
        ({"global_heads": 0, "local_heads": 0}, "one must be at least 1"),
        ({"head_dim": 3}, "head_dim=3 must be even"),
    ],
)
def test_bad_options_name_the_key_and_the_remedy(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer(**options)


def test_heads_must_divide() -> None:
    with pytest.raises(ValueError, match="dim=10 is not a multiple of num_heads=4"):
        DualRouting(10, 4)
    with pytest.raises(ValueError, match="num_heads=3 with num_kv_heads=1 cannot be halved"):
        DualRouting(12, 3, num_kv_heads=1)


def test_an_odd_number_of_key_heads_leaves_the_larger_part_to_the_local_route() -> None:
    module = DualRouting(96, 6, num_kv_heads=3)
    assert (module.global_heads, module.local_heads) == (2, 4)


def test_forward_refuses_what_does_not_fit() -> None:
    module, hidden = layer(), states(2, 20)
    with pytest.raises(ValueError, match="length 21"):
        module(hidden, layout=Layout.build(2, 21, BLOCK))
    with pytest.raises(ValueError, match="block=8"):
        module(hidden, layout=Layout.build(2, 20, 4))
    with pytest.raises(ValueError, match="layout already holds"):
        module(hidden, layout=Layout.build(2, 20, BLOCK), segment_ids=torch.zeros(2, 20))
