"""Layers that read the blocks which the first of them has chosen, in training and with caches."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from dualroute.attention import routes
from dualroute.attention.decoding import share_again
from dualroute.errors import UserError
from dualroute.evaluate.inspect.ablation import Ablation, switched_off
from dualroute.evaluate.inspect.numbers import inspect_ids
from dualroute.model import DualRoutingTransformer, ModelConfig
from dualroute.model.cost.flops import training_flops
from dualroute.model.decoding.batched import copied, new_text, next_logits
from dualroute.training.step.activations import keep_fewer_activations

SMALL: dict[str, Any] = {
    "vocab_size": 50, "dim": 32, "num_layers": 4, "num_heads": 4, "window": 8, "block": 8, "sub_block": 4,
    "top_k": 2, "global_mode": "routed", "max_context": 256, "share_choice": 2,
}  # fmt: skip
IDS = torch.randint(50, (3, 120), generator=torch.Generator().manual_seed(1))


def build(**changes: Any) -> DualRoutingTransformer:
    torch.manual_seed(0)
    model = DualRoutingTransformer(ModelConfig(**{**SMALL, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    return model


@pytest.fixture
def choices(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What is chosen, as long as the test runs."""
    made, choose = [], routes.select_blocks

    def select_blocks(*args: Any, **options: Any) -> Tensor:
        made.append(choose(*args, **options))
        return made[-1]

    monkeypatch.setattr(routes, "select_blocks", select_blocks)
    return made


@pytest.mark.parametrize(
    ("changes", "groups"),
    [
        ({}, [[0, 1], [2, 3]]),
        ({"share_choice": 1}, []),
        ({"share_choice": 3}, [[0, 1, 2]]),  # the last layer chooses for itself
        ({"share_choice": 9}, [[0, 1, 2, 3]]),
        ({"num_layers": 6, "global_layers": [0, 2, 3, 5]}, [[0, 2], [3, 5]]),
        ({"layer_top_k": [1, 1, 3, 3]}, [[0, 1], [2, 3]]),
    ],
)
def test_the_first_layer_of_each_group_chooses(
    changes: dict[str, Any], groups: list[list[int]], choices: list[Tensor]
) -> None:
    model = build(**changes)
    assert model.config.choice_groups == groups
    with torch.no_grad():
        model(IDS)
    layers = len(model.config.global_layers or model.layers)
    assert len(choices) == layers - sum(len(group) - 1 for group in groups)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"attention": "dense"}, "model.attention is dense: use share_choice 1"),
        ({"cluster_span": 16}, "model.cluster_span is 16: use share_choice 1"),
        ({"layer_top_k": [1, 2, 3, 3]}, r"model.layer_top_k is \[1, 2\] in the layers \[0, 1\]"),
        ({"share_choice": 0}, "model.share_choice"),
    ],
)
def test_what_cannot_be_shared_is_refused_by_name(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        build(**changes)


def test_a_file_without_the_key_is_one_in_which_each_layer_chooses() -> None:
    assert "share_choice" not in build(share_choice=1).config.to_dict()
    assert build().config.to_dict()["share_choice"] == 2


def test_a_layer_that_is_computed_again_reads_what_was_chosen(choices: list[Tensor]) -> None:
    segments = torch.ones_like(IDS)
    segments[0, 20:70], segments[0, 70:], segments[1, 100:] = 2, 3, 0

    def gradients(model: DualRoutingTransformer) -> list[Tensor]:
        model(IDS, segment_ids=segments)[segments > 0].square().mean().backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    model, again = build(), build()
    keep_fewer_activations(again, "full")
    for one, other in zip(gradients(model), gradients(again), strict=True):
        assert torch.equal(one, other)
    assert len(choices) == 4  # two of each model: nothing is chosen again


@pytest.mark.slow
def test_compiled_layers_share_as_others_do() -> None:
    model, compiled = build(), build()
    for layer in compiled.layers:
        layer.compile(dynamic=True)  # type: ignore[operator]
    for length in (120, 75):
        for one in (model, compiled):
            one.zero_grad()
            one(IDS[:, :length]).square().mean().backward()
        for mine, theirs in zip(model.parameters(), compiled.parameters(), strict=True):
            assert mine.grad is not None
            most = float(mine.grad.abs().max())
            torch.testing.assert_close(theirs.grad, mine.grad, rtol=0, atol=1e-4 * most)


@torch.no_grad()
@pytest.mark.usefixtures("each_kernels")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("share", [2, 4])
def test_decoding_gives_what_one_pass_gives(share: int, dtype: torch.dtype) -> None:
    model = build(share_choice=share).to(dtype)
    wanted, other = model(IDS), build(share_choice=1).to(dtype)(IDS)
    assert not torch.allclose(wanted[:, 60:], other[:, 60:], atol=1e-2)
    caches = model.new_caches(3, 128)
    ends = [50, 51, 80, 97, *range(98, 121)]
    parts = [IDS[:, a:b] for a, b in zip([0, *ends], ends, strict=False)]
    found = torch.cat([model.head(model.hidden_states(part, caches=caches)) for part in parts], 1)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3 if dtype == torch.float32 else 1e-9)


@torch.no_grad()
@pytest.mark.parametrize("cache_dtype", ["int8", "int4"])
def test_integers_in_the_cache_give_steps_what_they_give_a_chunk(cache_dtype: str) -> None:
    """Token by token on integers as in one piece: of both the choice is that of the first layer."""
    model = build()
    one_by_one, chunk = (model.new_caches(3, 128, cache_dtype=cache_dtype) for _ in range(2))
    for caches in (one_by_one, chunk):
        model.hidden_states(IDS[:, :70], caches=caches)
    steps = [model.hidden_states(IDS[:, i : i + 1], caches=one_by_one) for i in range(70, 100)]
    wanted = model.hidden_states(IDS[:, 70:100], caches=chunk)
    difference = (torch.cat(steps, 1) - wanted).abs().mean() / wanted.abs().mean()
    assert difference < 1e-3


@torch.no_grad()
@pytest.mark.usefixtures("each_kernels")
def test_texts_of_a_batch_and_copies_go_on_for_themselves() -> None:
    model = build()
    texts = [new_text(model, 120) for _ in range(2)]
    for text, length in zip(texts, (60, 90), strict=True):
        model.hidden_states(IDS[:1, :length], caches=text)
    texts.append(copied(model, texts[0], 120))
    for step in range(6):
        tokens = [int(IDS[0, 60 + step]), int(IDS[0, 90 + step]), int(IDS[1, step])]
        logits = next_logits(model, tokens, texts)
    both = [IDS[:1, :66], IDS[:1, :96], torch.cat([IDS[:1, :60], IDS[1:2, :6]], 1)]
    for row, ids in zip(logits, both, strict=True):
        torch.testing.assert_close(row, model(ids)[0, -1], rtol=0, atol=1e-3)


@torch.no_grad()
@pytest.mark.usefixtures("each_kernels")
def test_beams_are_put_in_another_order() -> None:
    model = build()
    caches = model.new_caches(3, 128)
    model.hidden_states(IDS[:, :60], caches=caches)
    model.hidden_states(IDS[:, 60:61], caches=caches)
    order = torch.tensor([2, 0, 0, 1])
    for cache in caches:
        cache.select(order)
    last = model.head(model.hidden_states(IDS[:1, 61:62].expand(4, 1), caches=caches))[:, 0]
    texts = torch.cat([IDS[order, :61], IDS[:1, 61:62].expand(4, 1)], 1)
    torch.testing.assert_close(last, model(texts)[:, -1], rtol=0, atol=1e-3)


def test_copies_of_caches_share_among_themselves() -> None:
    caches = build().new_caches(1, 64)
    parts = [copy.copy(cache) for cache in caches]
    for part in parts:
        part.global_cache = copy.copy(part.global_cache)
    share_again(parts)
    of = [part.global_cache.choice for part in (*caches, *parts) if part.global_cache is not None]
    assert [of.index(choice) for choice in of] == [0, 0, 2, 2, 4, 4, 6, 6]
    assert [part.global_cache.follows for part in parts if part.global_cache is not None] == [
        False, True, False, True,
    ]  # fmt: skip


@torch.no_grad()
def test_a_deep_copy_goes_on_when_the_original_is_gone() -> None:
    model = build()
    caches = model.new_caches(3, 128)
    model.hidden_states(IDS[:, :60], caches=caches)
    copies = copy.deepcopy(caches)
    del caches
    last = [
        model.head(model.hidden_states(IDS[:, a:b], caches=copies))[:, -1] for a, b in [(60, 80), (80, 81)]
    ]
    wanted = model(IDS)
    torch.testing.assert_close(last[0], wanted[:, 79], rtol=0, atol=1e-3)
    torch.testing.assert_close(last[1], wanted[:, 80], rtol=0, atol=1e-3)


def test_weights_and_statistics_are_those_of_the_blocks_that_are_read() -> None:
    model = build().double()
    found = inspect_ids(model, IDS[0].tolist(), list(map(str, range(120))), ablations=[])
    assert all(layer.difference < 1e-9 for layer in found.layers)
    ids = torch.cat([IDS[:1], IDS[1:2, :40], IDS[2:, :40]], 1)
    segments = torch.tensor([[1] * 120 + [2] * 30 + [3] * 50])
    for share in (1, 2):
        model = build(share_choice=share).double()
        for layer in model.layers:
            layer.attention.collect_statistics = True  # type: ignore[union-attr]
        with torch.no_grad():
            model(ids, segment_ids=segments)
        mass = [float(layer.attention.statistics["mass_selected"]) for layer in model.layers]  # type: ignore
        if share == 1:
            alone = mass
    assert mass[0] == alone[0]
    assert mass[1] < alone[1]  # blocks of its own choice would hold more


@torch.no_grad()
def test_a_block_that_is_off_is_off_for_those_that_follow() -> None:
    """Its tokens are as if they were others, for whom no window brings them: window 1."""
    model = build(window=1).double()
    changed = IDS[:1].clone()
    changed[:, 32:40] = (changed[:, 32:40] + 7) % 50
    with switched_off(model, Ablation("block", "block 4")):
        hidden, others = model.hidden_states(IDS[:1]), model.hidden_states(changed)
    assert torch.equal(hidden[:, 40:], others[:, 40:])
    assert not torch.allclose(model.hidden_states(IDS[:1])[:, 40:], model.hidden_states(changed)[:, 40:])


def test_a_choice_is_counted_once() -> None:
    alone, shared = (training_flops(ModelConfig(**{**SMALL, "share_choice": n}), 4096) for n in (1, 4))
    assert shared.router == alone.router / 4
    assert (shared.summary, shared.of_model) == (alone.summary, alone.of_model)
    flops = [build(share_choice=n).attention_flops_per_token(4096) for n in (1, 4)]
    assert flops[0] - flops[1] == pytest.approx(0.75 * alone.router)
