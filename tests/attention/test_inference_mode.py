"""torch.inference_mode gives the same numbers, and what is kept from there serves training afterwards."""

from __future__ import annotations

import pytest
import torch

from dualroute.attention import DualRouting, Layout

LENGTH = 43


def build(device: str = "cpu") -> DualRouting:
    torch.manual_seed(0)
    options = {"window": 6, "block": 8, "sub_block": 4, "top_k": 1, "global_mode": "routed", "qk_norm": True}
    return DualRouting(32, 4, num_kv_heads=2, **options).to(device)


@pytest.fixture
def module(each_kernels: str) -> DualRouting:
    """Overridden where the same tests run on other kernels."""
    return build()


def states(module: DualRouting) -> torch.Tensor:
    rows = torch.randn(2, LENGTH, 32, generator=torch.Generator().manual_seed(1))
    return rows.to(module.out_proj.weight.device)


def layout_of(module: DualRouting, packed: bool) -> Layout:
    segments = torch.arange(LENGTH).expand(2, LENGTH) // 17 if packed else None
    return Layout.build(2, LENGTH, module.block, segments, device=module.out_proj.weight.device)


def gradients(module: DualRouting, **arguments: object) -> list[torch.Tensor]:
    out = module(states(module), **arguments)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), list(module.parameters()))]


@pytest.mark.parametrize("packed", [False, True])
def test_a_layout_that_was_used_there_serves_training(module: DualRouting, packed: bool) -> None:
    wanted = gradients(module, layout=layout_of(module, packed))
    with torch.inference_mode():
        made_inside = layout_of(module, packed)
    for layout in (layout_of(module, packed), made_inside):
        with torch.inference_mode():
            seen = module(states(module), layout=layout)
        assert torch.equal(seen, wanted[0])
        for got, want in zip(gradients(module, layout=layout), wanted, strict=True):
            assert torch.equal(got, want)


@torch.no_grad()
@pytest.mark.parametrize("first_inside", [True, False])
def test_a_cache_may_be_filled_inside_and_outside_in_turns(module: DualRouting, first_inside: bool) -> None:
    want = module(states(module))
    with torch.inference_mode(first_inside):
        cache, outputs = module.new_cache(2, LENGTH, capacity=8), []
    for number, part in enumerate(states(module).split((12, 1, 1, 8, 14, 1, 6), dim=1)):
        with torch.inference_mode((number % 2 == 0) == first_inside):
            outputs.append(module(part, cache=cache))
            if number in (2, 3):
                cache.select(torch.tensor([0, 1]))
    torch.testing.assert_close(torch.cat(outputs, 1), want, rtol=0, atol=1e-5)


def test_positions_made_there_are_read_anew_each_time(module: DualRouting) -> None:
    """They count no versions, so a change to them in place could not be seen."""
    layout, stretched = layout_of(module, False), 3 * torch.arange(LENGTH).expand(2, LENGTH)
    with torch.inference_mode():
        positions = torch.arange(LENGTH).expand(2, LENGTH).clone()
        first = module(states(module), layout=layout, positions=positions)
        positions *= 3
        second = module(states(module), layout=layout, positions=positions)
    assert not torch.allclose(first, second)
    wanted = gradients(module, positions=stretched)
    assert torch.equal(second, wanted[0])
    for got, want in zip(gradients(module, layout=layout, positions=positions), wanted, strict=True):
        assert torch.equal(got, want)
