"""Deaths of a run, some of them aimed at a checkpoint in the making; the script does more."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.resilience.kill_anywhere import MOMENTS, campaign, compare


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_anywhere_the_run_is_the_same(tiny_dataset: Path, tmp_path: Path) -> None:
    kills, problems = campaign(tiny_dataset, tmp_path, times=3, steps=60)
    assert [kill.moment for kill in kills] == list(MOMENTS)
    assert kills[MOMENTS.index("save")].half_written
    assert problems == []
    # the comparison sees a difference: a run whose losses and weights are others
    (tmp_path / "killed" / "metrics.jsonl").write_text(
        (tmp_path / "unbroken" / "metrics.jsonl").read_text().replace('"train/loss": ', '"train/loss": 1')
    )
    assert compare(tmp_path / "killed", tmp_path / "unbroken") != []


ZERO = ("deepspeed", "--parallel.zero_stage", "3")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("strategy", [("ddp",), ZERO], ids=["ddp", "zero3"])
def test_a_rank_killed_while_threads_write_a_checkpoint(
    tiny_dataset: Path, tmp_path: Path, strategy: tuple[str, ...]
) -> None:
    """Two ranks: it is passed over for the one before, and the run is the same to the last bit."""
    if strategy == ZERO:
        pytest.importorskip("deepspeed")
    kills, problems = campaign(
        tiny_dataset,
        tmp_path,
        times=1,
        steps=12,
        ranks=2,
        strategy=strategy[0],
        more=(*strategy[1:], "--checkpoint.asynchronous", "true"),
        moments=("next save",),
    )
    assert [kill.half_written for kill in kills] == [True]
    assert kills[0].newest > 0
    assert problems == []
