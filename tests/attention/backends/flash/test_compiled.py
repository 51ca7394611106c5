"""A layer on flash attention's operators as one graph, packed or not; on a CPU by their stand-ins."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters

from dualroute.attention import Layout
from dualroute.attention import routes as attention_routes
from dualroute.attention.backends.flash.backend import FlashBackend
from tests.attention.test_compiled import LENGTH, assert_equal, layer, packed, results


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    deterministic = torch.are_deterministic_algorithms_enabled()
    yield
    assert torch.are_deterministic_algorithms_enabled() == deterministic


@pytest.mark.slow
def test_a_compiled_layer_is_one_graph_and_equal(
    flash: FlashBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = []

    def choose(*rows: object, **options: object) -> FlashBackend:
        chosen.append(rows)
        return flash

    monkeypatch.setattr(attention_routes, "choose", choose)
    plain = layer("dual")
    program = torch.compile(plain, backend="aot_eager", fullgraph=True)
    hidden = torch.randn(2, LENGTH, 32)
    for segments in (None, packed(LENGTH, 20)):
        layout = Layout.build(2, LENGTH, 8, segment_ids=segments)
        plain.prepare(layout, torch.float32)
        found = results(program, plain, hidden, layout=layout)
        of_program = len(chosen)
        assert of_program >= 2, "both routes ask for their kernels"
        assert_equal(found, results(plain, plain, hidden, layout=layout))
        assert len(chosen) > of_program
        chosen.clear()
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 2
