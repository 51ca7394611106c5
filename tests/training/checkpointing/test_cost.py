"""Costs are counted as the code works; test_shares.py has the same on ranks."""

import runpy

import pytest

from dualroute.training.checkpointing.cost import Machine, checkpoint_cost
from tests.conftest import ROOT


def test_bytes_are_divided_over_the_ranks():
    one, many = checkpoint_cost(7e9, 1), checkpoint_cost(7e9, 1024)
    assert one.total == many.total == pytest.approx(14 * 7e9)
    assert many.written == pytest.approx(one.written / 1024)
    assert many.read == pytest.approx(one.read / 1024) == pytest.approx((14 + 12) * 7e9 / 1024)
    assert checkpoint_cost(7e9, 64, weight_bytes=4).total == pytest.approx(16 * 7e9)


def test_a_whole_state_is_written_by_one_and_loaded_by_all():
    cost = checkpoint_cost(1e9, 8, zero_stage=0)
    assert cost.loaded == 12e9
    assert cost.written == pytest.approx(12e9 + 2e9 / 8)


def test_seconds_follow_from_the_rates():
    slow, fast = (checkpoint_cost(70e9, 64, machine=Machine(rank_io=rate)) for rate in (1e8, 1e9))
    assert slow.save_seconds > 5 * fast.save_seconds
    assert slow.stall_seconds == fast.stall_seconds < fast.save_seconds
    # the file system is shared
    shared = checkpoint_cost(70e9, 1024, machine=Machine(total_io=1e9))
    assert shared.save_seconds > shared.total / 1e9


def test_the_table_of_the_documentation_is_the_one_that_is_printed():
    script = runpy.run_path(str(ROOT / "benchmarks" / "training" / "checkpoint_scale.py"))
    printed = script["table"]([7e9, 70e9], [64, 1024], 3, Machine())
    assert printed in (ROOT / "docs" / "running" / "checkpoints.md").read_text(encoding="utf-8")
