"""A number that is none stays in its document, though a tile of the kernels holds rows of several."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dualroute.attention import Layout, Routing
from dualroute.attention.backends.triton import local_attention, routed_attention, select_blocks
from tests.attention.backends.triton.helpers import DEVICE

LENGTHS = (1, 13, 28, 3)  # of the documents
DIM = 8


def _layout() -> Layout:
    segments = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))[None]
    return Layout.build(1, sum(LENGTHS), 8, segments).to(DEVICE)


def _results(layout: Layout, inputs: list[Tensor], route: str) -> list[Tensor]:
    """Output and gradients, and the chosen blocks of the routed route."""
    *rows, cotangent = [part.clone() for part in inputs]
    rows = [part.requires_grad_() for part in rows]
    causal = "both ways" not in route
    if "routed" in route:
        out = routed_attention(*rows, layout.stream, Routing(1, sub_block=4), causal=causal)
        keys = [x.detach() for x in rows[:2]]
        chosen = [select_blocks(*keys, layout.stream, top_k=1, sub_block=4, causal=causal)]
    else:
        out = local_attention(*rows, layout.stream, window=11, causal=causal)
        chosen = []
    return [out, *torch.autograd.grad(out, rows, cotangent), *chosen]


@pytest.mark.parametrize(
    "route",
    [
        pytest.param("routed", marks=pytest.mark.slow),
        pytest.param("routed, both ways", marks=pytest.mark.slow),
        "local",
        "local, both ways",
    ],
)
def test_of_every_kind(route: str) -> None:
    """Wherever it stands: queries, keys, values, gradient; as NaN and as an infinity."""
    layout = _layout()
    owner = layout.to_stream(layout.documents[..., None] + 1)[:, 0] - 1  # (S,), -1 without a token
    generator = torch.Generator().manual_seed(0)
    clean = [
        torch.randn(heads, layout.stream.num_slots, DIM, generator=generator).to(DEVICE)
        for heads in (2, 1, 1, 2)
    ]
    for part in clean:
        part[:, owner < 0] = 0
    wanted = _results(layout, clean, route)
    poisons = [(0, "nan"), (1, "inf"), (1, "nan"), (2, "nan"), (2, "-inf"), (3, "nan")]
    if route == "routed, both ways":  # the slowest; one of each place
        poisons = [poisons[number] for number in (0, 1, 3, 5)]
    for number, (place, poison) in enumerate(poisons):
        document = (2, 1)[number % 2]
        token = (owner == document).nonzero()[5, 0]
        dirty = [part.clone() for part in clean]
        dirty[place][:, token, 3] = float(poison)
        got = _results(layout, dirty, route)
        others = (owner >= 0) & (owner != document)
        for name, kept, part in zip(("output", "q", "k", "v", "chosen"), wanted, got, strict=False):
            assert torch.equal(part[:, others], kept[:, others]), (name, "qkvg"[place], poison)
        if place < 3:  # nor is it hidden from whoever reads it
            assert not got[0][:, token].isfinite().all()
        else:
            assert not all(part[:, owner == document].isfinite().all() for part in got[1:4])
