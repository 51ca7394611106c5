"""Statistics of blocks of half-precision keys are those of float32 arithmetic on the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dualroute.attention import DualRouting, Layout, Routing, routed_attention, select_blocks
from dualroute.attention.backend import plain_torch
from tests.attention.helpers import ORDERS, ROUTERS

pytestmark = pytest.mark.usefixtures("each_kernels")


def _rows(dtype: torch.dtype, tokens: int = 1200, heads: tuple[int, ...] = (4, 2, 2)) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(count, tokens, 16, generator=generator).to(dtype) for count in heads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("router", ROUTERS)
def test_the_same_blocks_are_chosen_as_in_float32(router: str, dtype: torch.dtype) -> None:
    query, key, _ = _rows(dtype)
    stream = Layout.build(1, 1200, 8).stream
    options = {"top_k": 4, "router": router, "sub_block": 4}
    got = select_blocks(query, key, stream, **options).sort(-1).values
    assert torch.equal(got, select_blocks(query.float(), key.float(), stream, **options).sort(-1).values)
    with plain_torch():
        assert torch.equal(got, select_blocks(query, key, stream, **options).sort(-1).values)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("router", ROUTERS)
def test_float16_keys_of_200(router: str, order: str) -> None:
    """Their squares are infinite in float16. The result is that of float32, rounded; so are the gradients."""
    query, key, value = _rows(torch.float16, 400)
    signs = torch.where(key > 0, 1, -1)
    half = [part.requires_grad_() for part in (query / 200, (200 * signs).half(), value)]
    wide = [part.detach().float().requires_grad_() for part in half]
    stream, routing = Layout.build(1, 400, 8).stream, Routing(3, router, order, 4)
    results = []
    for inputs in (half, wide):
        out = routed_attention(*inputs, stream, routing)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), inputs)])
    for got, wanted in zip(*results, strict=True):
        assert got.isfinite().all()
        assert (got.float() - wanted).abs().max() <= 0.01 * wanted.abs().max()


@pytest.mark.parametrize("router", ROUTERS)
def test_a_cache_of_float16_keys_of_200(router: str) -> None:
    """Token by token as in the forward pass."""
    torch.manual_seed(0)
    layer = DualRouting(32, 2, global_heads=2, local_heads=0, block=8, sub_block=4, top_k=2,
                        global_mode="routed", router=router).half()  # fmt: skip
    with torch.no_grad():
        layer.global_qkv.weight[:32].div_(100)
        layer.global_qkv.weight[32:64].mul_(300)
        hidden = torch.randn(1, 80, 32).half()
        whole = layer(hidden)
        cache = layer.new_cache(1, 80)
        parts = [layer(hidden[:, :20], cache=cache)]
        parts += [layer(hidden[:, at : at + 1], cache=cache) for at in range(20, 80)]
    assert cache.global_cache.keys.abs().max() > 200
    assert whole.isfinite().all()
    assert (torch.cat(parts, 1) - whole).abs().max() <= 0.03 * whole.abs().max()
