"""One step from a cache equals the last token of the specification."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from dualroute.attention import reference
from dualroute.attention.backends.torch.decode import decode_step as plain_step
from dualroute.attention.backends.triton import decode_step
from dualroute.attention.core.cache import GlobalCache, LayerCache
from dualroute.attention.decoding import share_choices
from tests.attention.backends.triton.helpers import DEVICE, both
from tests.attention.helpers import ORDERS, ROUTERS

BLOCK, SUB_BLOCK = 8, 4


def _step(
    length: int, top_k: int, chooser: str = "minmax", order: str = "second_order",
    dtype: torch.dtype = torch.float32, cache_dtype: torch.dtype | None = None,
    group: int = 2, dim: int = 6, block: int = BLOCK,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output (R, group, d) of the newest of `length` tokens: by the kernels, and by the reference."""
    rows = 2
    (query, key, value), wide = both(1, length, rows * group, rows, dim, dtype)
    cache_dtype = cache_dtype or dtype
    cache = GlobalCache(rows, 90, dim, block, chooser, SUB_BLOCK, order, DEVICE, cache_dtype)
    with torch.no_grad():
        cache.append(key[0].to(cache_dtype), value[0].to(cache_dtype))
        newest = query[0, :, -1:].unflatten(0, (rows, group))  # (R, group, 1, d)
        actual = decode_step(newest, cache, top_k)
        assert actual.dtype == dtype
        wanted = reference.routed(
            *(x[0] for x in wide),
            block=block, top_k=top_k, router=chooser, far_summary=order, sub_block=SUB_BLOCK,
        )  # fmt: skip
    return actual[:, :, 0].double().cpu(), wanted[:, -1].unflatten(0, (rows, group))


@pytest.mark.parametrize(("chooser", "order"), itertools.product(ROUTERS, ORDERS))
def test_equals_the_reference(chooser: str, order: str) -> None:
    actual, wanted = _step(75, 2, chooser, order)
    torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("top_k", [0, 3, 20])
@pytest.mark.parametrize("length", [1, 8, 9, 17, 64])
def test_any_length_and_number_of_blocks(length: int, top_k: int) -> None:
    actual, wanted = _step(length, top_k)
    torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("dim", "group", "block"), [(64, 1, 16), (96, 3, 8), (10, 17, 24), (256, 2, 40)])
def test_any_size_of_heads_groups_and_blocks(dim: int, group: int, block: int) -> None:
    actual, wanted = _step(85, 1, group=group, dim=dim, block=block)
    torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("chooser", ["minmax", "moment"])
def test_half_precision(chooser: str, cache_dtype: torch.dtype) -> None:
    actual, wanted = _step(75, 3, chooser, dtype=torch.bfloat16, cache_dtype=cache_dtype)
    torch.testing.assert_close(actual, wanted, rtol=0, atol=4e-2)


def test_a_second_layer_reads_what_the_first_has_chosen() -> None:
    generator = torch.Generator().manual_seed(0)
    caches: list[GlobalCache] = []
    outputs, queries = [], torch.randn(2, 2, 2, 1, 16, generator=generator).to(DEVICE)
    for layer in range(2):
        cache = GlobalCache(2, 90, 16, BLOCK, "minmax", SUB_BLOCK, "second_order", DEVICE, torch.float32)
        cache.append(*(torch.randn(2, 75, 16, generator=generator).to(DEVICE) for _ in range(2)))
        caches.append(cache)
        outputs.append(decode_step(queries[layer], cache, 2))
    share_choices([LayerCache(2, 90, False, cache, None) for cache in caches], 2)
    for kernels in (decode_step, plain_step):
        first, second = (kernels(query, cache, 2) for query, cache in zip(queries, caches, strict=True))
        torch.testing.assert_close(first, outputs[0], rtol=0, atol=1e-5)
        assert not torch.allclose(second, outputs[1], atol=1e-3)
        outputs.append(second)
    torch.testing.assert_close(outputs[2], outputs[3], rtol=0, atol=1e-5)


def test_operator() -> None:
    query, rows = torch.randn(1, 1, 1, 4, device=DEVICE), torch.randn(1, 3, 4, device=DEVICE)
    features = torch.randn(1, 3, 1, 4, device=DEVICE)
    torch.library.opcheck(
        torch.ops.dualroute.decode_global_step.default,
        (query, rows, rows.clone(), features, rows.clone(), rows.clone(), 3, 1, "mean"),
        test_utils=("test_schema", "test_faketensor"),
    )
