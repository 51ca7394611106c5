"""One token at a time through the C++ kernels: what plain torch gives, and the same caches afterwards."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from dualroute.attention import DualRouting, LayerCache
from dualroute.attention.backend import plain_torch
from dualroute.attention.backends import cpp as cpu_kernels
from dualroute.attention.backends.cpp import decode
from dualroute.attention.decoding import token_heads
from tests.attention.helpers import ORDERS, ROUTERS

LENGTH = 75


def _layer(dtype: torch.dtype = torch.float64, **changes: object) -> DualRouting:
    torch.manual_seed(0)
    options = {"head_dim": 12, "window": 10, "block": 8, "sub_block": 4, "top_k": 2, "global_mode": "routed"}
    layer = DualRouting(32, 4, **(options | changes)).to(dtype)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(3)
    return layer.requires_grad_(False)


def _decode(layer: DualRouting, hidden: Tensor, cache: LayerCache, prompt: int) -> Tensor:
    """Outputs of a prompt and then of one token at a time."""
    with torch.no_grad():
        parts = [layer(hidden[:, :prompt], cache=cache)]
        parts += [layer(hidden[:, at : at + 1], cache=cache) for at in range(prompt, hidden.shape[1])]
    return torch.cat(parts, dim=1)


def _tensors(cache: LayerCache) -> dict[str, Tensor]:
    parts = {"global": cache.global_cache, "local": cache.local_cache}
    return {
        f"{name}.{key}": value
        for name, part in parts.items()
        if part is not None
        for key, value in vars(part).items()
        if isinstance(value, Tensor)
    }


def _both(layer: DualRouting, hidden: Tensor, prompt: int = 3, **options: bool) -> None:
    """Compares outputs and caches with those of plain torch."""
    caches = [layer.new_cache(len(hidden), LENGTH, capacity=16, **options) for _ in range(2)]
    actual = _decode(layer, hidden, caches[0], prompt)
    with plain_torch():
        expected = _decode(layer, hidden, caches[1], prompt)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    for name, tensor in _tensors(caches[1]).items():
        torch.testing.assert_close(
            _tensors(caches[0])[name], tensor, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(("router", "order"), itertools.product(ROUTERS, ORDERS))
def test_every_router_and_summary(router: str, order: str) -> None:
    layer = _layer(router=router, far_summary=order, num_kv_heads=2)
    _both(layer, torch.randn(2, LENGTH, 32, dtype=torch.float64))


@pytest.mark.parametrize(
    "changes",
    [
        {"global_mode": "full"},
        {"global_mode": "auto"},
        {"top_k": 0},
        {"local_heads": 0, "global_heads": 4},
        {"local_heads": 4, "global_heads": 0},
        {"local_heads": 1, "global_heads": 3},
        {"qk_norm": True},
        {"gate": True, "qkv_bias": True},
        {"head_dim": 16, "window": 1},
        {"head_dim": 70, "window": 200},
        {"block": 1, "sub_block": 1},
        {"global_rotary_factor": 0.0},
        {"global_rotary_factor": 0.5, "local_rotary_factor": 1 / 3},
    ],
    ids=lambda changes: ",".join(f"{name}={value}" for name, value in changes.items()),
)
@pytest.mark.parametrize("prompt", [1, 30])
def test_every_kind_of_layer(changes: dict[str, object], prompt: int) -> None:
    _both(_layer(**changes), torch.randn(2, LENGTH, 32, dtype=torch.float64), prompt)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_other_types(dtype: torch.dtype, tolerance: float, int8: bool) -> None:
    """The first-order summary and bounds do not depend on how a type rounds variances.

    The kernels do not round the queries, so in bfloat16 blocks that score alike may be chosen differently:
    there all are read.
    """
    layer = _layer(dtype, far_summary="first_order", top_k=2 if dtype == torch.float32 else 40)
    hidden = torch.randn(1, LENGTH, 32, dtype=dtype)
    caches = [layer.new_cache(1, LENGTH, int8=int8) for _ in range(2)]
    with torch.no_grad():
        assert decode.can_decode(hidden, caches[0])
        for at in range(LENGTH):
            with plain_torch():
                expected = layer(hidden[:, at : at + 1], cache=caches[1])
            actual = layer(hidden[:, at : at + 1], cache=caches[0])
            error = (actual - expected).float().abs().max() / expected.float().abs().max()
            assert error <= tolerance, (at, float(error))


def test_threads_share_the_rows_of_a_batch() -> None:
    layer = _layer(torch.float32, head_dim=64, window=500, top_k=40)
    hidden = torch.randn(8, 400, 32)
    before, outputs = torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        outputs.append(_decode(layer, hidden, layer.new_cache(8, 400), 390))
    torch.set_num_threads(before)
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-5)


def test_types_they_cannot_take_run_in_torch() -> None:
    layer = _layer(torch.float32)
    assert not decode.can_decode(torch.zeros(1, 1, dtype=torch.float16), layer.new_cache(1, 8))
    mixed = layer.new_cache(1, LENGTH, dtype=torch.bfloat16)
    assert not decode.can_decode(torch.zeros(1, 1), mixed)
    assert not decode.can_decode(torch.zeros(1, 1, dtype=torch.float64), layer.new_cache(1, 8, int8=True))


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("number", ["nan", "inf"])
def test_numbers_that_are_none_stay_so(number: str, int8: bool) -> None:
    """A NaN has no best blocks; nothing outside of the cache is read for it, and it is not rounded away."""
    layer = _layer(torch.float32)
    hidden = torch.randn(1, LENGTH, 32)
    hidden[0, 60, 7] = float(number)
    cache = layer.new_cache(1, LENGTH, int8=int8)
    out = _decode(layer, hidden, cache, 3)
    assert out[0, :60].isfinite().all()
    assert out[0, 60].isnan().all()
    assert cache.global_cache is not None
    keys, _ = cache.global_cache.read(lambda tokens: tokens[:, :LENGTH], torch.float32)
    assert not keys[:, 60].isfinite().all()
    assert keys[:, 61:].isfinite().all()


def test_the_operator_is_one_that_compilers_may_call() -> None:
    layer = _layer(torch.float32)
    cache = layer.new_cache(2, LENGTH)
    memory = decode.cache_memory([cache])
    rows = torch.randn(2, 6 * 12)
    arguments = (torch.tensor(7), torch.randn(2, 6), torch.randn(2, 6), rows, rows, memory, 0, 12, 1, 2)
    torch.library.opcheck(
        torch.ops.dualroute.decode_layer.default,
        arguments,
        test_utils=("test_schema", "test_faketensor"),
    )


def test_the_memory_of_layers_is_told_apart() -> None:
    """Layers with caches of different kinds in one table."""
    layers = [_layer(torch.float32), _layer(torch.float32, local_heads=0, global_heads=4, far_summary="none")]
    caches = [
        layer.new_cache(1, LENGTH, int8=int8) for layer, int8 in zip(layers, (True, False), strict=True)
    ]
    memory = decode.cache_memory(caches)
    tables = torch.ones(2, 6), torch.zeros(2, 6)
    for number, (layer, cache) in enumerate(zip(layers, caches, strict=True)):
        rows = torch.randn(1, 3 * layer.global_heads * 12)
        near = rows if layer.local_heads else None
        token_heads(layer, cpu_kernels, [rows, near], tables, memory, number, torch.tensor(0))
        assert cache.global_cache is not None
        keys, _ = cache.global_cache.read(lambda tokens: tokens[:, 0], torch.float32)
        expected = rows.view(3, layer.global_heads, 12)[1]
        torch.testing.assert_close(keys, expected, rtol=0, atol=2e-2)
