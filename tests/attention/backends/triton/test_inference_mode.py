"""What `tests.attention.test_inference_mode` asks of the other kernels, of these."""

from __future__ import annotations

import pytest

from dualroute.attention import DualRouting, backend
from tests.attention.backends.triton.helpers import DEVICE
from tests.attention.test_inference_mode import (
    build,
    test_a_cache_may_be_filled_inside_and_outside_in_turns,
    test_a_layout_that_was_used_there_serves_training,
    test_positions_made_there_are_read_anew_each_time,
)

__all__ = [
    "test_a_cache_may_be_filled_inside_and_outside_in_turns",
    "test_a_layout_that_was_used_there_serves_training",
    "test_positions_made_there_are_read_anew_each_time",
]


pytestmark = pytest.mark.slow  # the interpreter takes seconds for each


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> DualRouting:
    monkeypatch.setenv(backend.VARIABLE, "triton")
    return build(DEVICE)
