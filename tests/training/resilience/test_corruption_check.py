"""The check leaves the training's numbers alone, and finds the one rank whose results differ."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dualroute.training.resilience.corruption_check import SilentCorruption, bits
from tests.training.resilience.ranks import finish, start
from tests.training.step.test_module import curve

EVERY_SECOND_STEP = ("--watchdog.sdc_check_every_steps", "2")
DDP = ("--parallel.strategy", "ddp")


def test_any_flipped_bit_changes_the_sum() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        tensor = torch.randn(7, 5).to(dtype).t()
        before = bits(tensor)
        assert torch.equal(bits(tensor.clone()), before)
        flipped = tensor.clone().contiguous()
        words = flipped.view(torch.int16)
        words[2, 1] ^= 1
        assert not torch.equal(bits(flipped), before)


@pytest.mark.slow
def test_losses_are_the_same_with_and_without_the_check(tiny_dataset: Path, tmp_path: Path) -> None:
    runs = [tmp_path / "with", tmp_path / "without"]
    with_check = start(tiny_dataset, runs[0], 9, *EVERY_SECOND_STEP, ranks=1)
    without = start(tiny_dataset, runs[1], 9, ranks=1)
    assert [status for status, _ in finish([*with_check, *without])] == [0, 0]
    assert curve(runs[0]) == curve(runs[1])
    assert curve(runs[0], "validation") == curve(runs[1], "validation")


@pytest.mark.slow
def test_losses_are_the_same_under_zero_3(tiny_dataset: Path, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    runs = [tmp_path / "with", tmp_path / "without"]
    zero3 = ("--parallel.strategy", "deepspeed", "--parallel.zero_stage", "3")
    with_check = start(tiny_dataset, runs[0], 7, *zero3, *EVERY_SECOND_STEP)
    without = start(tiny_dataset, runs[1], 7, *zero3)
    assert [status for status, _ in finish([*with_check, *without])] == [0] * 4
    assert curve(runs[0]) == curve(runs[1])
    assert curve(runs[0], "validation") == curve(runs[1], "validation")


@pytest.mark.slow
def test_the_rank_that_computes_two_results_is_named(tiny_dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    results = finish(start(tiny_dataset, run, 9, *DDP, *EVERY_SECOND_STEP, fault=("flip", 1, 6)))
    assert [status for status, _ in results] == [SilentCorruption.exit_status] * 2
    for rank, (_, error) in enumerate(results):
        assert f"error (rank {rank}): silent data corruption before step 6 on rank(s) 1: one" in error
    assert "on host" in results[1][1]
    assert max(curve(run)) == 5
