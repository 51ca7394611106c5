"""Whole documents and windows through flash attention, against the reference."""

from __future__ import annotations

from functools import partial

import pytest

from dualroute.attention import reference
from dualroute.attention.backends.flash.backend import FlashBackend
from tests.attention.helpers import assert_same_with_gradients, batches, expected, heads, run

BATCHES = batches()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 9, 64, 200])
@pytest.mark.parametrize("batch", sorted(BATCHES))
def test_values_and_gradients(flash: FlashBackend, batch: str, window: int | None, causal: bool) -> None:
    layout = BATCHES[batch]
    inputs = heads(layout.batch, layout.length)
    if window is None:
        ours, theirs = flash.full_attention, reference.full
        how = {"causal": causal}
    else:
        ours, theirs = flash.local_attention, reference.local
        how = {"causal": causal, "window": window}
    assert_same_with_gradients(
        run(partial(ours, **how), layout, inputs), expected(partial(theirs, **how), layout, inputs), inputs
    )
