"""How long a document may be that is read in full."""

from __future__ import annotations

from dualroute.attention.core.routing import exact_blocks


def test_modes_set_the_limit() -> None:
    assert exact_blocks("full", 64, 8) is None
    assert exact_blocks("routed", 64, 8) == 10
    assert exact_blocks("auto", 64, 8) == 2048 // 64
    assert exact_blocks("auto", 64, 8, break_even=4096) == 64
    assert exact_blocks("auto", 1024, 8, break_even=4096) == 10
