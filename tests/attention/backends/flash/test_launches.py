"""How many kernels a layer launches, and that nothing is read back from the device.

Fake tensors have shapes and no numbers: 64k tokens cost nothing, and whatever asks for a number raises. An
operator that is no view counts as one launch. `pytest -s` prints the numbers.
"""

from __future__ import annotations

import weakref
from collections import Counter
from functools import cache
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dualroute.attention import Layout, Routing, global_attention, local_attention
from dualroute.attention import routes as attention_routes
from dualroute.attention.backends.flash import select, slabs
from dualroute.attention.backends.flash.backend import FLASH
from dualroute.attention.core import precision
from dualroute.attention.core.stream import Stream

FORWARD, BACKWARD = 60, 90
SLAB_FORWARD, SLAB_BACKWARD = 17, 9  # for each slab after the first
VIEWS = {
    "view", "_unsafe_view", "transpose", "t", "expand", "slice", "select", "unsqueeze", "squeeze", "permute",
    "as_strided", "detach", "alias", "split", "split_with_sizes", "unbind", "unfold", "reshape",
    "_reshape_alias", "empty", "new_empty", "empty_like", "empty_strided", "lift_fresh", "view_as",
}  # fmt: skip


class Launches(TorchDispatchMode):
    """Counts what a device would be given to do."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.tensors: Counter[int] = Counter()  # that live, by their memory
        self.bytes = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        library, name = func.name().split("::")
        name = name.split(".")[0]
        if library != "prim" and name not in VIEWS:
            self.names[name] += 1
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(made, torch.Tensor):
                self._keep(made)
        self.peak = max(self.peak, self.bytes)
        return out

    def _keep(self, made: torch.Tensor) -> None:
        memory = made.untyped_storage()
        key, size = memory._cdata, memory.nbytes()
        self.bytes += 0 if self.tensors[key] else size
        self.tensors[key] += 1
        weakref.finalize(made, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self.tensors[key] -= 1
        self.bytes -= 0 if self.tensors[key] else size


@pytest.fixture(autouse=True)
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """The branches that a GPU of 80 GiB takes."""
    monkeypatch.setattr(attention_routes, "choose", lambda *args, **kwargs: FLASH)
    monkeypatch.setattr(precision, "has_wide_product", lambda rows: rows.dtype == torch.bfloat16)
    monkeypatch.setattr(select, "takes_first_of_equals", lambda device: True)
    monkeypatch.setattr(slabs, "max_entries", lambda device: int((80 << 30) * slabs.MEMORY_SHARE) // 4)


def _packed(batch: int, length: int) -> torch.Tensor:
    """Documents of many sizes, one of them long."""
    generator = torch.Generator().manual_seed(0)
    starts = torch.rand(batch, length, generator=generator) < 1 / 700
    starts[0, : length // 2] = False
    return starts.cumsum(1) + 1


CASES = {
    "8k": (1, 8192, 4, 4, 64, 4, False),
    "64k": (1, 65536, 4, 4, 64, 4, False),
    "160m recipe, packed": (8, 4096, 6, 6, 64, 8, True),
    "1b recipe, packed": (1, 16384, 8, 8, 128, 16, True),
    "7b recipe": (1, 16384, 16, 4, 128, 16, False),
    "64k, packed, grouped": (1, 65536, 8, 2, 64, 4, True),
}
KINDS = {
    "both sides": ({"causal": False}, 2, 2),
    "both sides, filled up": ({"causal": False, "packed": True}, 8, 4),
    "moment": ({"router": "moment"}, 8, 0),
    "mean": ({"router": "mean"}, 4, 0),
    "first order": ({"far_summary": "first_order"}, 0, 0),
    "nothing far": ({"far_summary": "none"}, 0, 0),
}  # and the launches they may take more, forward and backward, than the layer of a recipe


def _count(
    stream: Stream,
    heads: int,
    kv_heads: int,
    dim: int,
    routing: Routing,
    limit: int,
    *,
    causal: bool = True,
) -> tuple[Launches, Launches]:
    """What both routes of a layer launch, forward and backward."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        inputs = [
            torch.randn(count, stream.num_slots, dim, dtype=torch.bfloat16, requires_grad=True)
            for count in (heads, kv_heads, kv_heads)
        ]

        def layer() -> tuple[Launches, Launches]:
            with Launches() as forward:
                outs = [
                    global_attention(*inputs, stream, routing=routing, max_exact_blocks=limit, causal=causal),
                    local_attention(*inputs, stream, window=256, causal=causal),
                ]
            grads = [torch.ones_like(out) for out in outs]
            with Launches() as backward:
                torch.autograd.grad(outs, inputs, grads)
            return forward, backward

        layer()  # what all layers of a batch share is made by the first
        return layer()


@pytest.mark.parametrize("mode", ["routed", "auto"])
@pytest.mark.parametrize("case", CASES)
def test_a_layer_launches_little_and_reads_nothing_back(case: str, mode: str) -> None:
    batch, length, heads, kv_heads, dim, top_k, packed = CASES[case]
    stream = Layout.build(batch, length, 64, _packed(batch, length) if packed else None).stream
    limit = top_k + 2 if mode == "routed" else 2048 // 64
    stream.prepare([limit])  # as the processes that load data do
    forward, backward = _count(stream, heads, kv_heads, dim, Routing(top_k), limit)
    print(f"{case}, {mode}: {forward.names.total()} / {backward.names.total()}")
    assert forward.names["_flash_attention_forward"] >= 3
    assert forward.names.total() <= FORWARD, forward.names
    assert backward.names.total() <= BACKWARD, backward.names


@cache
def _count_of(packed: bool, routing: Routing, causal: bool) -> tuple[Launches, Launches]:
    stream = Layout.build(1, 16384, 64, _packed(1, 16384) if packed else None).stream
    stream.prepare([6])
    return _count(stream, 8, 2, 64, routing, 6, causal=causal)


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_of_layers_take_hardly_more(kind: str) -> None:
    given, forward_more, backward_more = KINDS[kind]
    options: dict[str, Any] = {"causal": True, "packed": False, **given}
    causal, packed = options.pop("causal"), options.pop("packed")
    usual = _count_of(packed, Routing(4), True)
    counted = _count_of(packed, Routing(4, **options), causal)
    print(f"{kind}: {[part.names.total() for part in counted]}, {[part.names.total() for part in usual]}")
    for part, other, more in zip(counted, usual, (forward_more, backward_more), strict=True):
        assert part.names.total() <= other.names.total() + more, part.names - other.names


@pytest.mark.parametrize(
    ("length", "heads"),
    [
        (1 << 13, 16),
        (1 << 16, 16),
        (1 << 17, 16),
        pytest.param(1 << 19, 8, marks=pytest.mark.slow),
        pytest.param(1 << 20, 8, marks=pytest.mark.slow),
    ],
)
def test_longer_texts_cost_a_fixed_number_of_launches_a_slab(length: int, heads: int) -> None:
    """Every slab keeps within the memory, and there are hardly more than the triangle needs."""
    stream = Layout.build(1, length, 64).stream
    parts = slabs.slabs(stream, heads)
    limit = slabs.max_entries(stream.device)
    sizes = [(part.rows[1] - part.rows[0]) * 64 * part.width * heads for part in parts]
    assert max(sizes) <= limit
    assert [part.rows[0] for part in parts[1:]] == [part.rows[1] for part in parts[:-1]]
    assert parts[-1].rows[1] == stream.num_blocks
    triangle = length * stream.num_blocks * heads / 2
    assert len(parts) <= 1.1 * triangle / limit + 2
    counted = _count(stream, heads, heads // 4, 64, Routing(4), 6)
    forward, backward = (part.names.total() for part in counted)
    size = length * 64 * 2 * (heads + heads // 2)  # bytes of queries, keys and values
    peaks = [part.peak / size for part in counted]
    print(f"{length}, {heads} heads: {forward} / {backward}, {len(parts)} slabs, memory x {peaks}")
    assert max(peaks) <= 20 + 2.1 * 4 * limit / size  # two matrices of the largest slab
    assert forward <= FORWARD + SLAB_FORWARD * (len(parts) - 1)
    assert backward <= BACKWARD + SLAB_BACKWARD * (len(parts) - 1)
