"""Three deaths of a run, one of them aimed at a checkpoint in the making; the script does more."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.kill_anywhere import MOMENTS, campaign, compare


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_anywhere_the_run_is_the_same(tiny_dataset: Path, tmp_path: Path) -> None:
    kills, problems = campaign(tiny_dataset, tmp_path, times=3, steps=40)
    assert [kill.moment for kill in kills] == list(MOMENTS)
    assert kills[MOMENTS.index("save")].half_written
    assert problems == []
    # the comparison sees a difference: a run whose losses and weights are others
    (tmp_path / "killed" / "metrics.jsonl").write_text(
        (tmp_path / "unbroken" / "metrics.jsonl").read_text().replace('"train/loss": ', '"train/loss": 1')
    )
    assert compare(tmp_path / "killed", tmp_path / "unbroken") != []
