"""What a checkpoint survives, and what it says when it cannot be used."""

import math
import shutil
import subprocess

import pytest

from data_prep.prepare import PrepareConfig, prepare
from dualroute.errors import UserError
from dualroute.model.checkpoint.format import find_checkpoint, list_checkpoints
from dualroute.training.checkpointing.resume import choose_start
from dualroute.training.config import CheckpointConfig
from dualroute.training.monitoring.metrics_log import read_metrics
from tests.conftest import write_corpus
from tests.training.step.test_module import attempt, curve, train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tiny_dataset, tmp_path_factory):
    output = tmp_path_factory.mktemp("finished") / "run"
    train(tiny_dataset, output, 8)
    return output


def refused_line(result):
    assert result.returncode == 2, result.stderr[-2000:]
    errors = [line for line in result.stderr.splitlines() if "error" in line]
    assert len(errors) == 1
    return errors[0]


def test_only_a_whole_checkpoint_is_resumed(finished, tiny_dataset, tmp_path):
    newest = find_checkpoint(finished)
    broken = shutil.copytree(finished, tmp_path / "run", symlinks=True)
    state = broken / "checkpoints" / newest.folder.name / "state.ckpt"
    state.write_bytes(state.read_bytes()[:-100])
    line = refused_line(attempt(tiny_dataset, broken, 12))
    assert str(state) in line
    assert "earlier checkpoint" in line
    # the remedy works: an earlier one is named and taken
    earlier = list_checkpoints(broken / "checkpoints")[0]
    result = train(tiny_dataset, broken, 12, "--resume", str(earlier.folder))
    assert f"step {earlier.step} of 12" in result.stdout
    # the damaged one is out of the way, but not gone
    folders = {p.name for p in (broken / "checkpoints").iterdir()}
    assert {f"abandoned-{newest.folder.name}", newest.folder.name, "step-00000012"} <= folders


def test_a_checkpoint_of_another_model_is_refused_and_named(finished, tiny_dataset):
    before = sorted(finished.rglob("*"))
    line = refused_line(attempt(tiny_dataset, finished, 12, "--model.num_layers", "3"))
    assert "model.num_layers 2 → 3" in line
    assert sorted(finished.rglob("*")) == before


def test_other_data_are_refused_and_both_are_named(finished, tmp_path):
    write_corpus(tmp_path / "corpus", 40, seed=5)
    made = prepare(
        PrepareConfig(
            corpus=str(tmp_path / "corpus"), output=str(tmp_path / "shards"), vocab_size=320,
            reserved_tokens=0, val_fraction=0.2, progress=False,
        )
    )  # fmt: skip
    line = refused_line(attempt(tmp_path / "shards", finished, 12))
    assert made.fingerprint in line
    assert find_checkpoint(finished).metadata["data_fingerprint"] in line


def test_never_resuming_does_not_overwrite(finished, tiny_dataset, tmp_path):
    line = refused_line(attempt(tiny_dataset, finished, 8, "--resume", "never"))
    assert str(finished) in line
    train(tiny_dataset, tmp_path / "fresh", 8, "--resume", "never")
    assert curve(tmp_path / "fresh") == curve(finished)


@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_a_full_disk_loses_nothing(finished, tiny_dataset, tmp_path, asynchronous):
    disk = tmp_path / "disk"
    disk.mkdir()
    # room for the first checkpoint and half of the second
    size = sum(p.stat().st_size for p in find_checkpoint(finished).folder.rglob("*") if p.is_file())
    mount = ["mount", "-t", "tmpfs", "-o", f"size={int(1.7 * size) // 4096 * 4}k", "tmpfs", str(disk)]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    try:
        result = attempt(tiny_dataset, disk / "run", 16, "--checkpoint.asynchronous", asynchronous)
        line = refused_line(result)
        assert "Traceback" not in result.stderr
        assert str(disk / "run" / "checkpoints") in line
        assert any(sign in line for sign in ("No space left", "PytorchStreamWriter", "inline_container"))
        assert "make room" in line
        survivors = list_checkpoints(disk / "run" / "checkpoints")
        assert [c.step for c in survivors] == [4]
        assert not list((disk / "run" / "checkpoints").glob(".writing-*"))
        subprocess.run(["mount", "-o", f"remount,size={8 * size // 1024}k", str(disk)], check=True)
        assert "step 4 of 16" in train(tiny_dataset, disk / "run", 16).stdout
    finally:
        subprocess.run(["umount", str(disk)], check=False)


def test_bad_steps_are_skipped_and_counted(tiny_dataset, tmp_path):
    """A weight made infinite for one forward pass: the loss of that step is not finite."""
    script = """
import sys, torch
from dualroute import cli
from dualroute.training.step.module import Pretrain
original = Pretrain.training_step
def training_step(self, batch, batch_idx):
    loss = original(self, batch, batch_idx)
    if self.trainer.global_step == 5:
        loss = loss * float("nan")  # gradients that are not finite, though the loss was
    return loss
Pretrain.training_step = training_step
sys.exit(cli.main(sys.argv[1:]))
"""
    (tmp_path / "spoilt.py").write_text(script)
    result = attempt(tiny_dataset, tmp_path / "run", 12, script=tmp_path / "spoilt.py")
    assert result.returncode == 0, result.stderr[-2000:]
    assert "step 6 is skipped" in result.stderr
    lines = {m["step"]: m for m in read_metrics(tmp_path / "run" / "metrics.jsonl", "train")}
    assert sorted(lines) == list(range(1, 13))
    assert [lines[s]["train/skipped_steps"] for s in (5, 6, 12)] == [0, 1, 1]
    assert lines[6]["optim/grad_norm"] is None
    assert all(math.isfinite(line["train/loss"]) for line in lines.values())
    assert lines[12]["train/loss"] < lines[1]["train/loss"]


def test_nothing_to_resume(tmp_path):
    assert choose_start(tmp_path / "none", "auto").checkpoint is None
    with pytest.raises(UserError, match="no such folder"):
        choose_start(tmp_path / "none", str(tmp_path / "else"))


@pytest.mark.parametrize("values", [{"every_steps": 0}, {"keep_last": 0}])
def test_retention_keeps_at_least_one(values):
    with pytest.raises(UserError, match=next(iter(values))):
        CheckpointConfig(**values)
