"""A window of data on which the loss is not a number: back to a checkpoint, and on without that window."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dualroute.data.module import ShardDataModule
from dualroute.data.plan import merge_spans, sample_numbers
from dualroute.errors import UserError
from dualroute.model.checkpoint.format import find_checkpoint
from dualroute.training.resilience.rollback import FILE, Divergence, read_rollbacks, roll_back
from dualroute.training.step.spike_guard import TrainingDiverged
from tests.training.checkpointing.runs import snapshot
from tests.training.resilience.ranks import finish, start
from tests.training.step.test_module import curve

GUARD = ("--spike_guard.patience", "3", "--checkpoint.keep_last", "9")
DDP = ("--parallel.strategy", "ddp")
SAMPLES = 8  # of a step


def test_samples_that_are_left_out_are_passed_over() -> None:
    skipped_samples = merge_spans([(10, 12), (4, 6), (5, 7)])
    assert skipped_samples == [(4, 7), (10, 12)]
    numbers, position = sample_numbers(2, 6, skipped_samples)
    assert (numbers.tolist(), position) == ([2, 3, 7, 8, 9, 12], 13)
    # cut anywhere, it is the same sequence
    for cut in range(7):
        first, middle = sample_numbers(2, cut, skipped_samples)
        rest, end = sample_numbers(middle, 6 - cut, skipped_samples)
        assert ([*first.tolist(), *rest.tolist()], end) == ([2, 3, 7, 8, 9, 12], 13)
    assert sample_numbers(5, 2)[0].tolist() == [5, 6]


def test_a_file_that_is_not_ours_is_named(tmp_path: Path) -> None:
    assert read_rollbacks(tmp_path) == []
    (tmp_path / FILE).write_text('[{"left_out_samples": 3}]')
    with pytest.raises(UserError, match=r"rollbacks\.json cannot be read"):
        read_rollbacks(tmp_path)


def whole(folder: Path, step: int) -> Path:
    made = folder / f"step-{step:08d}"
    made.mkdir(parents=True)
    names = ("state.ckpt", "model.json", "model.safetensors", "tokenizer.model")
    for name in names:
        (made / name).write_bytes(b"state")
    said = {"step": step, "files": {name: {"size": 5, "sha256": ""} for name in names}}
    (made / "checkpoint.json").write_text(json.dumps(said))
    return made


def test_it_goes_to_a_whole_checkpoint_and_writes_nothing_before_that_has_loaded(
    tiny_dataset: Path, tmp_path: Path
) -> None:
    data = ShardDataModule(tiny_dataset, context=64, micro_batch=2, tokens_per_batch=512)
    for step in (4, 8, 12, 16):
        whole(tmp_path / "checkpoints", step)
    (tmp_path / "checkpoints" / "step-00000008" / "state.ckpt").write_bytes(b"cut")
    (tmp_path / "checkpoints" / "step-00000012" / "checkpoint.json").write_text("{")
    before = snapshot(tmp_path)
    decided = roll_back(Divergence(14, 17, (104, 136), "the loss is nan"), tmp_path, data, 3)
    assert decided.start.checkpoint is not None
    assert decided.start.checkpoint.step == 4
    assert data.skipped_samples == [(104, 136)]
    assert snapshot(tmp_path) == before
    decided.write(tmp_path, 3)
    assert [entry["resumed_from_step"] for entry in read_rollbacks(tmp_path)] == [4]
    with pytest.raises(TrainingDiverged, match="after 1 roll-backs"):
        roll_back(Divergence(14, 17, (104, 136), "the loss is nan"), tmp_path, data, 1)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_bad_window_is_left_out_and_nothing_else_changes(tiny_dataset: Path, tmp_path: Path) -> None:
    run, again = tmp_path / "run", tmp_path / "again"
    # the loss is not a number in steps 7 to 10
    fault = ("spoil", 1, 6 * SAMPLES)
    assert [status for status, _ in finish(start(tiny_dataset, run, 16, *DDP, *GUARD, fault=fault))] == [0, 0]
    (entry,) = read_rollbacks(run)
    assert (entry["first_skipped_step"], entry["failed_in_step"], entry["resumed_from_step"]) == (7, 9, 4)
    assert entry["left_out_samples"] == [6 * SAMPLES, 9 * SAMPLES]
    assert "the loss is nan" in entry["reason"]
    assert sorted(curve(run)) == list(range(1, 17))
    assert [step for step, loss in curve(run).items() if loss is None] == [7]  # the window's last step
    state = find_checkpoint(run)
    assert state.step == 16
    # a run that knew of it from the beginning trains the same, without going back
    again.mkdir()
    (again / FILE).write_text((run / FILE).read_text())
    assert [s for s, _ in finish(start(tiny_dataset, again, 16, *DDP, *GUARD, fault=fault))] == [0, 0]
    assert curve(again) == curve(run)
    assert curve(again, "validation") == curve(run, "validation")
    assert len(read_rollbacks(again)) == 1


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_under_zero_the_engine_is_made_anew_and_goes_on(tiny_dataset: Path, tmp_path: Path) -> None:
    """The losses are those of a run that left the window out from the beginning, which never went back."""
    pytest.importorskip("deepspeed")
    run, again = tmp_path / "run", tmp_path / "again"
    zero2 = ("--parallel.strategy", "deepspeed", "--parallel.zero_stage", "2")
    fault = ("spoil", 1, 4 * SAMPLES)
    assert [s for s, _ in finish(start(tiny_dataset, run, 9, *zero2, *GUARD, fault=fault))] == [0, 0]
    (entry,) = read_rollbacks(run)
    assert (entry["failed_in_step"], entry["resumed_from_step"]) == (7, 4)
    again.mkdir()
    (again / FILE).write_text((run / FILE).read_text())
    assert [s for s, _ in finish(start(tiny_dataset, again, 9, *zero2, *GUARD, fault=fault))] == [0, 0]
    assert sorted(curve(run)) == list(range(1, 10))
    assert curve(run) == curve(again)
    assert curve(run, "validation") == curve(again, "validation")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_it_does_not_go_back_for_ever(tiny_dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    more = (*GUARD, "--spike_guard.max_rollbacks", "2")
    fault = ("spoil_all", 0, 6 * SAMPLES)
    ((status, error),) = finish(start(tiny_dataset, run, 40, *more, fault=fault, ranks=1))
    assert status == 2
    assert "after 2 roll-backs (spike_guard.max_rollbacks" in error
    assert [e["left_out_samples"] for e in json.loads((run / FILE).read_text())] == [[48, 72], [72, 96]]
    assert [e["resumed_from_step"] for e in json.loads((run / FILE).read_text())] == [4, 4]
