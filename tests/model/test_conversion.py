"""Dense to dual: exact where the routes read everything, and heads divided by how far they look."""

import math

import pytest
import torch

from dualroute.errors import UserError
from dualroute.model import DualRoutingTransformer, ModelConfig
from dualroute.model.conversion import (
    attention_layers,
    divide_heads,
    double_heads,
    dual_config,
    mass_beyond,
    nearest_groups,
    random_groups,
)

SMALL = {
    "vocab_size": 50, "dim": 32, "num_layers": 3, "num_heads": 8, "num_kv_heads": 4, "head_dim": 6,
    "attention": "dense", "block": 8, "sub_block": 4, "top_k": 1, "max_context": 64,
}  # fmt: skip
EVERYTHING = {"window": 64, "global_mode": "full"}


@torch.no_grad()
def dense(**changes):
    """A model whose every parameter is far from its initial value."""
    torch.manual_seed(0)
    model = DualRoutingTransformer(ModelConfig(**{**SMALL, **changes})).double().eval()
    for parameter in model.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def ids(length, rows=2, seed=1):
    return torch.randint(50, (rows, length), generator=torch.Generator().manual_seed(seed))


def groups_of(model, count=None, seed=0):
    groups = model.config.num_kv_heads
    return random_groups(model.config.num_layers, groups, count or groups // 2, seed)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qkv_bias": True},
        {"qk_norm": True, "gate": True},
        {"tie_embeddings": False, "num_kv_heads": 8},
        {"rope_theta": 500.0, "rope_scaling": {"factor": 2.0}},
        {"global_rotary_factor": 0.0},
        {"global_rotary_factor": 1 / 3, "local_rotary_factor": 0.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("heads", ["divide", "both"])
@torch.no_grad()
def test_routes_that_read_everything_are_the_dense_model(changes, heads):
    model = dense(**changes)
    config = dual_config(model.config, both=heads == "both", local_heads=None, **EVERYTHING)
    dual = double_heads(model, config) if heads == "both" else divide_heads(model, config, groups_of(model))
    tokens = ids(60)
    torch.testing.assert_close(dual(tokens), model(tokens), rtol=1e-9, atol=1e-9)
    assert (dual.head.weight is dual.embedding.weight) == model.config.tie_embeddings
    if heads == "divide":
        assert dual.num_parameters() == model.num_parameters()
    narrow = dual_config(model.config, both=heads == "both", local_heads=None, window=4, global_mode="full")
    dual = double_heads(model, narrow) if heads == "both" else divide_heads(model, narrow, groups_of(model))
    difference = (dual(tokens) - model(tokens)).abs().amax((0, 2))
    assert float(difference[:4].max()) < 1e-9  # the first tokens lose nothing
    assert float(difference[4:].min()) > 1e-3


@pytest.mark.parametrize("heads", ["divide", "both"])
@torch.no_grad()
def test_layers_without_a_global_route_get_all_heads_as_local_ones(heads):
    model = dense(gate=True)
    both = heads == "both"
    config = dual_config(model.config, both=both, local_heads=None, **EVERYTHING, global_layers=[1])
    dual = double_heads(model, config) if both else divide_heads(model, config, groups_of(model))
    assert [layer.attention.local_heads for layer in dual.layers] == [8, 8 if both else 4, 8]
    tokens = ids(60)
    torch.testing.assert_close(dual(tokens), model(tokens), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_an_unequal_division_and_its_cache():
    model = dense()
    config = dual_config(model.config, both=False, local_heads=6, **EVERYTHING)
    assert (config.global_heads, config.local_heads) == (2, 6)
    dual = divide_heads(model, config, groups_of(model, count=3))
    tokens = ids(40)
    caches = dual.new_caches(2, 40)
    pieces = [dual.hidden_states(tokens[:, a:b], caches=caches) for a, b in [(0, 30), (30, 31), (31, 40)]]
    torch.testing.assert_close(torch.cat(pieces, 1), model.hidden_states(tokens), rtol=1e-9, atol=1e-9)


def literal_mass(model, tokens, window):
    """(layers, heads), one text at a time, with the softmax written out."""
    config = model.config
    sums, count = torch.zeros(config.num_layers, config.num_heads, dtype=torch.float64), 0
    for text in tokens:
        hidden = model.embedding(text[None])
        n, half = len(text), config.head_dim // 2
        angles = torch.arange(n)[:, None] * config.rope_theta ** (-torch.arange(half) / half).double()
        turn = torch.polar(torch.ones_like(angles), angles)
        for layer, block in enumerate(model.layers):
            x = block.attention_norm(hidden)[0]
            rows = (x @ block.attention.global_qkv.weight.T).view(n, -1, config.head_dim)
            turned = torch.complex(rows[..., :half], rows[..., half:]) * turn[:, None]
            for head in range(config.num_heads):
                q, k = turned[:, head], turned[:, config.num_heads + head // 2]
                logits = (q[:, None] * k[None].conj()).real.sum(-1) / math.sqrt(config.head_dim)
                weights = logits.masked_fill(~torch.ones(n, n).tril().bool(), -math.inf).softmax(1)
                sums[layer, head] += weights.tril(-window).sum()
            hidden = block(hidden)
        count += max(0, n - window)
    return sums / count


@torch.no_grad()
def test_mass_beyond_the_window():
    model = dense()
    tokens = ids(37)
    expected = literal_mass(model, tokens, 5)
    assert 0.02 < float(expected.min()) < float(expected.max()) < 1
    measured = mass_beyond(model, [{"input_ids": tokens[:1]}, {"input_ids": tokens[1:]}], 5)
    torch.testing.assert_close(measured, expected, rtol=1e-5, atol=1e-6)
    # the same texts as documents of one row, of different lengths, with padding behind
    packed = torch.cat([tokens[0], tokens[1, :20], tokens[0, :3]])[None]
    segments = torch.tensor([[1] * 37 + [2] * 20 + [0] * 3])
    both = literal_mass(model, [tokens[0], tokens[1, :20]], 5)
    measured = mass_beyond(model, [{"input_ids": packed, "segment_ids": segments}], 5)
    torch.testing.assert_close(measured, both, rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match="longer than window 37"):
        mass_beyond(model, [{"input_ids": tokens}], 37)


@torch.no_grad()
def test_the_heads_that_look_near_become_local():
    model = dense()
    near = [[0, 3], [1, 2], [0, 1]]
    for attention, groups in zip(attention_layers(model), near, strict=True):
        rows = attention.global_qkv.weight.unflatten(0, (-1, 6))
        rows[:8] *= 0.02  # flat attention: mass beyond the window …
        for group in groups:  # … but in these, which hardly turn away from the token itself
            rows[8 + group] = rows[2 * group : 2 * group + 2].mean(0) * 50
            rows[2 * group : 2 * group + 2] = rows[8 + group] * 50
    mass = mass_beyond(model, [{"input_ids": ids(50)}], 8)
    assert nearest_groups(mass, 2, 2) == near
    assert nearest_groups(mass, 2, 4) == [[0, 1, 2, 3]] * 3


def test_random_groups_are_seeded_and_differ_by_layer():
    drawn = random_groups(20, 4, 2, seed=3)
    assert drawn == random_groups(20, 4, 2, seed=3) != random_groups(20, 4, 2, seed=4)
    assert len({tuple(groups) for groups in drawn}) > 2
    assert all(len(set(groups)) == 2 and max(groups) < 4 for groups in drawn)


@pytest.mark.parametrize(
    ("changes", "options", "named"),
    [
        ({}, {"local_heads": 3}, "multiple of the 2 query heads"),
        ({}, {"local_heads": 8}, "below 8"),
        ({"num_kv_heads": 1}, {"local_heads": None}, "use --heads both"),
        ({}, {"local_heads": None, "block": 6}, "model.block=6 is not a multiple of sub_block=4"),
    ],
)
def test_divisions_that_cannot_be(changes, options, named):
    with pytest.raises(UserError, match=named):
        dual_config(ModelConfig(**{**SMALL, **changes}), both=False, **options)


def test_only_a_dense_model_is_divided():
    model = dense(attention="dual")
    for convert in (lambda: divide_heads(model, model.config, []), lambda: double_heads(model, model.config)):
        with pytest.raises(UserError, match="attention 'dual'"):
            convert()
