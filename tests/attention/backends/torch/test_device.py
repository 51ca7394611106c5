"""Plain torch in the branches that a GPU takes: the same numbers, in few launches and in one order."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dualroute.attention import Routing, reference
from dualroute.attention.backends.torch import TorchBackend, device, full, selected, tile_attention
from dualroute.attention.core import precision
from tests.attention.helpers import assert_same_with_gradients, batches, expected, heads, run

PLAIN = TorchBackend()


@pytest.fixture
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (device, full, selected):
        monkeypatch.setattr(module, "is_cpu", lambda where: False)
    monkeypatch.setattr(tile_attention, "_HAS_FLASH", False)


def _routed(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, stream: Any) -> torch.Tensor:
    chosen = PLAIN.select_blocks(query.detach(), key.detach(), stream, top_k=2, sub_block=4)
    return PLAIN.routed_attention(query, key, value, stream, Routing(2, sub_block=4), selected=chosen)


@pytest.mark.usefixtures("as_on_cuda")
@pytest.mark.parametrize("name", ["packed", "any length"])
def test_routed_equals_the_reference_without_sums_in_any_order(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for sums in ("index_add_", "scatter_add_", "index_put_"):
        monkeypatch.setattr(torch.Tensor, sums, None)
    layout, inputs = batches()[name], heads(2, 75)
    options = {"block": 8, "top_k": 2, "sub_block": 4, "router": "minmax", "far_summary": "second_order"}
    wanted = expected(partial(reference.routed, **options), layout, inputs)
    assert_same_with_gradients(run(_routed, layout, inputs), wanted, inputs)


@pytest.mark.usefixtures("as_on_cuda")
@pytest.mark.parametrize("causal", [True, False])
def test_grouped_heads_behind_a_mask_are_no_square_matrix(
    causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, masked = F.scaled_dot_product_attention, []

    def spy(*args: torch.Tensor, attn_mask: torch.Tensor | None, enable_gqa: bool, **kwargs: Any) -> Any:
        masked.append(attn_mask is not None)
        assert attn_mask is None or not enable_gqa
        return original(*args, attn_mask=attn_mask, enable_gqa=enable_gqa, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    layout, inputs = batches()["packed and padded"], heads(2, 75)
    actual = run(partial(PLAIN.local_attention, window=24, causal=causal), layout, inputs)
    wanted = expected(partial(reference.local, window=24, causal=causal), layout, inputs)
    assert_same_with_gradients(actual, wanted, inputs)
    assert any(masked)


def test_a_gpu_is_given_more_at_once() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert (device.at_once(8, cpu), device.at_once(8, cuda)) == (8, 8 * device.LARGER)
    assert device.least_ranges(cuda) < device.least_ranges(cpu)


def test_products_of_half_precision_are_summed_in_float32() -> None:
    rows = torch.randn(2, 3, 5, 64).bfloat16()
    product = precision.wide_product(rows, rows.mT)
    assert product.dtype == torch.float32
    torch.testing.assert_close(product.double(), rows.double() @ rows.double().mT, rtol=1e-5, atol=1e-4)
