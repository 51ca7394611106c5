"""Token by token, or chunk by chunk, the cache gives what one forward pass over the whole text gives."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.attention.helpers import ORDERS, ROUTERS
from tests.attention.test_layer import layer, states

OPTIONS = [
    {"global_mode": "full"},
    {"num_kv_heads": 2},
    {"qk_norm": True, "gate": True},
    {"local_heads": 0},
    {"global_heads": 0},
    {"top_k": 0},
    {"global_rotary_factor": 0.0},
    {"global_rotary_factor": 0.5, "local_rotary_factor": 0.0},
    *({"router": router, "far_summary": order} for router, order in itertools.product(ROUTERS, ORDERS)),
]


@torch.no_grad()
def _cached(module: torch.nn.Module, hidden: torch.Tensor, chunks: list[int]) -> torch.Tensor:
    cache = module.new_cache(len(hidden), hidden.shape[1])
    parts = [module(part, cache=cache) for part in hidden.split(chunks, dim=1)]
    assert cache.length == hidden.shape[1]
    return torch.cat(parts, 1)


@pytest.mark.parametrize("options", OPTIONS)
def test_single_tokens_equal_the_whole(options: dict) -> None:
    module, hidden = layer(**options), states(2, 67)
    torch.testing.assert_close(_cached(module, hidden, [1] * 67), module(hidden).detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("chunks", [[67], [50] + [1] * 17, [3, 20, 1, 1, 40, 2], [8, 8, 51]])
def test_chunked_prefill_equals_the_whole(chunks: list[int], options: dict) -> None:
    module, hidden = layer(**options), states(2, 67)
    torch.testing.assert_close(_cached(module, hidden, chunks), module(hidden).detach(), rtol=0, atol=1e-12)


def test_long_chunks_are_cut() -> None:
    module, hidden = layer(num_kv_heads=2), states(1, 320)
    torch.testing.assert_close(
        _cached(module, hidden, [40, 280]), module(hidden).detach(), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("limit", [64, 72])
def test_auto_decides_by_the_room_in_the_cache(limit: int) -> None:
    auto, hidden = layer(global_mode="auto", auto_break_even=limit), states(1, 67)
    same = layer(global_mode="full" if limit == 72 else "routed")
    for chunks in ([1] * 67, [30, 37]):
        torch.testing.assert_close(_cached(auto, hidden, chunks), same(hidden).detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(auto(hidden), same(hidden))


def test_given_positions_are_used() -> None:
    module, hidden = layer(), states(1, 40)
    positions = torch.arange(40)[None] * 2
    cache = module.new_cache(1, 40)
    parts = [
        module(hidden[:, t : t + 5], positions=positions[:, t : t + 5], cache=cache) for t in range(0, 40, 5)
    ]
    torch.testing.assert_close(torch.cat(parts, 1), module(hidden, positions=positions), rtol=0, atol=1e-12)


def test_a_half_precision_cache_stays_near() -> None:
    module, hidden = layer().float(), states(1, 60).float()
    module.routing = type(module.routing)(20, "minmax", "second_order", 4)
    cache = module.new_cache(1, 60, dtype=torch.bfloat16)
    with torch.no_grad():
        got = torch.cat([module(part, cache=cache) for part in hidden.split([20, 1, 39], 1)], 1)
        wanted = module(hidden)
    assert cache.global_cache.keys.dtype == torch.bfloat16
    assert float((got - wanted).norm() / wanted.norm()) < 0.02


def test_the_local_cache_keeps_the_window_only() -> None:
    cache = layer(window=10).new_cache(2, 1000)
    assert cache.local_cache.keys.shape == (4, 10, 4)


def test_a_cache_that_does_not_fit_is_refused() -> None:
    module = layer()
    cache = module.new_cache(2, 10)
    with pytest.raises(ValueError, match="batch_size=2"):
        module(states(1, 5), cache=cache)
    module(states(2, 8), cache=cache)
    with pytest.raises(ValueError, match="holds 8 of max_length=10"):
        module(states(2, 3), cache=cache)
    with pytest.raises(ValueError, match="cannot be combined"):
        module(states(2, 1), cache=cache, attention_mask=torch.ones(2, 1))
    with pytest.raises(ValueError, match="causal=False"):
        layer(causal=False).new_cache(1, 5)
    with pytest.raises(ValueError, match="max_length=0"):
        module.new_cache(1, 0)


@pytest.mark.parametrize("options", OPTIONS)
@torch.no_grad()
def test_a_cache_grows_and_its_texts_can_be_chosen_anew(options: dict) -> None:
    """As a beam search does: after each step some texts go on twice, others not at all."""
    module, hidden = layer(**options), states(3, 67)
    cache = module.new_cache(3, 67, capacity=8)
    module(hidden[:, :30], cache=cache)
    cache.select(torch.tensor([2, 0, 2, 1]))
    module(hidden[[2, 0, 2, 1], 30:55], cache=cache)
    cache.select(torch.tensor([3, 2]))
    last = [module(hidden[[1, 2], place : place + 1], cache=cache) for place in range(55, 67)]
    torch.testing.assert_close(torch.cat(last, 1), module(hidden)[[1, 2], 55:], rtol=0, atol=1e-12)
