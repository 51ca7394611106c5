"""A run that gets no better ends, says so, and is finished when it is started again."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dualroute.model.checkpoint.format import find_checkpoint, list_checkpoints
from dualroute.training.finetuning.early_stopping import EarlyStopping, has_stopped
from tests.training.checkpointing.runs import killed_in, pretrain
from tests.training.step.test_module import curve


def watch(values: list[float], patience: int = 2, higher: bool | None = None, least: float = 0.0) -> Any:
    """(callback, steps at which it asked for a checkpoint, step at which it stopped)."""
    publisher = SimpleNamespace(described={}, save_now=False)
    callback = EarlyStopping(patience, least, publisher)  # type: ignore[arg-type]
    best_by = None if higher is None else ("accuracy", higher)
    module = SimpleNamespace(best_by=best_by, validation_metrics={})
    trainer = SimpleNamespace(
        sanity_checking=False, state=SimpleNamespace(fn="fit"), global_step=0, max_steps=99,
        should_stop=False, is_global_zero=True,
    )  # fmt: skip
    saved = []
    for step, value in enumerate(values, 1):
        trainer.global_step, module.validation_metrics = step, {best_by[0] if best_by else "loss": value}
        callback.on_validation_end(trainer, module)  # type: ignore[arg-type]
        if publisher.save_now:
            saved.append(step)
        publisher.save_now = False
        if trainer.should_stop:
            return callback, saved, step
    return callback, saved, None


def test_it_counts_validations_without_a_better_one() -> None:
    assert watch([3, 2, 2.5, 1, 1.5, 1.2, 0.5])[1:] == ([1, 2, 4, 6], 6)
    assert watch([0.3, 0.5, 0.4, 0.5], higher=True)[1:] == ([1, 2, 4], 4)
    assert watch([3, 2.95, 2.92, 2.8], least=0.1)[1:] == ([1, 3], 3)
    assert watch([float("nan"), 3, float("inf"), 2.9])[1:] == ([2, 4], None)


def test_its_count_goes_on_after_a_resume() -> None:
    first, *_ = watch([3, 2, 2.5])
    other = EarlyStopping(2, 0.0, first.publisher)
    other.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert (other.best, other.best_step, other.waited) == (2, 2, 1)


def test_more_patience_goes_on() -> None:
    said = {"stopped_early": {"waited": 3}}
    assert has_stopped(said, 3)
    assert has_stopped(said, 2)
    assert not has_stopped(said, 4)
    assert not has_stopped(said, None)
    assert not has_stopped({}, 1)


OPTIONS = (
    *("--finetune.early_stopping", "2", "--finetune.min_improvement", "100"),
    *("--train.val_every_steps", "3", "--checkpoint.keep_last", "9"),
)


def test_a_run_ends_keeps_the_best_and_is_finished(tiny_dataset: Path, tmp_path: Path, capsys: Any) -> None:
    """No loss falls by 100, so the first validation stays the best one."""
    run = tmp_path / "run"
    assert pretrain(tiny_dataset, run, 20, *OPTIONS) == 0
    checkpoint = find_checkpoint(run)
    assert checkpoint.step == 9
    assert [one.step for one in list_checkpoints(run / "checkpoints")] == [3, 4, 8, 9]
    said = checkpoint.metadata["stopped_early"]
    assert (said["metric"], said["best_step"], said["waited"]) == ("loss", 3, 2)
    assert said["best"] == pytest.approx(curve(run, "validation")[3])
    assert "stopped early at step 9: 2 validations without a better loss" in (run / "log.txt").read_text()
    capsys.readouterr()
    assert pretrain(tiny_dataset, run, 20, *OPTIONS) == 0
    assert "was stopped early: nothing to do" in capsys.readouterr().out
    assert pretrain(tiny_dataset, run, 20, *OPTIONS, "--finetune.early_stopping", "4") == 0
    assert find_checkpoint(run).step == 15


def test_killed_it_stops_where_it_would_have(tiny_dataset: Path, tmp_path: Path) -> None:
    with killed_in(8):
        pretrain(tiny_dataset, tmp_path / "run", 20, *OPTIONS)
    assert find_checkpoint(tmp_path / "run").step == 4
    assert pretrain(tiny_dataset, tmp_path / "run", 20, *OPTIONS) == 0
    assert find_checkpoint(tmp_path / "run").step == 9
