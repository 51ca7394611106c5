"""Checkpoints written while training goes on: the same files, and no failure is lost."""

import threading

import pytest
import torch

from dualroute.model.checkpoint.format import find_checkpoint, list_checkpoints, verify_checkpoint
from dualroute.training.checkpointing.publishing.background_writer import BackgroundWriter, copy_to_host
from dualroute.training.checkpointing.state.reader import open_state
from tests.training.checkpointing.state.test_reshard import assert_equal_states
from tests.training.step.test_module import attempt, curve, train

ASYNCHRONOUS = ("--checkpoint.asynchronous", "true", "--checkpoint.keep_last", "9")


def test_the_next_job_waits_for_the_one_before():
    writer, release, done = BackgroundWriter(), threading.Event(), []
    writer.submit(lambda: (release.wait(10), done.append("first")))
    second = threading.Thread(target=lambda: writer.submit(lambda: done.append("second")))
    second.start()
    second.join(timeout=0.2)
    assert second.is_alive()  # it waits
    release.set()
    second.join(timeout=10)
    writer.wait()
    assert done == ["first", "second"]


def test_a_failure_is_raised_once_at_the_next_boundary():
    writer = BackgroundWriter()
    writer.submit(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        writer.wait()
    writer.raise_failure()
    writer.submit(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        writer.submit(lambda: None)


def test_a_copy_is_apart_and_keeps_what_is_tied():
    weight = torch.arange(4.0)
    state = {
        "a": weight,
        "tied": weight,
        "slice": weight[1:],
        "list": [torch.zeros(2), 3],
        "pair": (weight, "x"),
    }
    copy = copy_to_host(state)
    weight.fill_(-1)
    assert copy["a"].tolist() == [0, 1, 2, 3]
    assert copy["slice"].tolist() == [1, 2, 3]
    assert copy["a"] is copy["tied"] is copy["pair"][0]
    assert copy["list"][1] == 3


@pytest.mark.slow
def test_the_checkpoints_are_those_of_a_run_that_waits(tiny_dataset, tmp_path):
    train(tiny_dataset, tmp_path / "waits", 12, "--checkpoint.keep_last", "9")
    train(tiny_dataset, tmp_path / "goes-on", 9, *ASYNCHRONOUS)
    train(tiny_dataset, tmp_path / "goes-on", 12, *ASYNCHRONOUS, "--optim.schedule", "cosine")
    pairs = [list_checkpoints(tmp_path / name / "checkpoints") for name in ("waits", "goes-on")]
    assert [c.step for c in pairs[0]] == [4, 8, 12]
    assert [c.step for c in pairs[1]] == [4, 8, 9, 12]
    first_waits, first_goes_on = pairs[0][0], pairs[1][0]
    verify_checkpoint(first_goes_on)
    # the schedule of 9 steps and that of 12 part after the warm-up of 4
    for name in ("model.safetensors", "model.json", "tokenizer.model"):
        assert (first_waits.folder / name).read_bytes() == (first_goes_on.folder / name).read_bytes()
    assert_equal_states(open_state(first_waits), open_state(first_goes_on))
    assert find_checkpoint(tmp_path / "goes-on" / "checkpoints" / "last").step == 12
    assert len(curve(tmp_path / "goes-on")) == 12


@pytest.mark.slow
def test_a_failed_write_ends_the_run_and_spoils_nothing(tiny_dataset, tmp_path):
    script = """
import sys
from dualroute import cli
from dualroute.training.checkpointing.publishing import own_part
original = own_part._save
calls = []
def save(*args):
    calls.append(args)
    if len(calls) == 2:
        raise OSError(28, "No space left on device")
    return original(*args)
own_part._save = save
sys.exit(cli.main(sys.argv[1:]))
"""
    (tmp_path / "full.py").write_text(script)
    result = attempt(tiny_dataset, tmp_path / "run", 40, *ASYNCHRONOUS, script=tmp_path / "full.py")
    assert result.returncode == 2, result.stderr[-2000:]
    assert "step-00000008 could not be written" in result.stderr
    assert "make room" in result.stderr
    assert [c.step for c in list_checkpoints(tmp_path / "run" / "checkpoints")] == [4]
    assert not list((tmp_path / "run" / "checkpoints").glob(".writing-*"))
    assert max(curve(tmp_path / "run")) < 40  # it did not train on to the end
