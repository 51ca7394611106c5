"""The state of one process goes to its file and nowhere else: not through memory, not through $TMPDIR."""

import tempfile
import tracemalloc

import pytest
import torch
from lightning.pytorch import Trainer

from dualroute.cli import main
from dualroute.model.checkpoint_format import describe_files, find_checkpoint, verify_checkpoint
from dualroute.training.checkpointing.capture import captured
from dualroute.training.checkpointing.own_part import OwnPart
from dualroute.training.parallel.environment import World
from dualroute.training.parallel.strategy import OneProcessStrategy
from tests.training.step.test_module import command


@pytest.fixture
def no_temporary_files(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(28, "No space left on the temporary disk")

    for name in ("mkstemp", "mkdtemp", "NamedTemporaryFile", "TemporaryFile", "SpooledTemporaryFile"):
        monkeypatch.setattr(tempfile, name, refuse)


def test_a_state_is_written_without_a_second_copy_of_it(tmp_path, no_temporary_files):
    trainer = Trainer(
        strategy=OneProcessStrategy(World(), "cpu"), accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    own = trainer.strategy.checkpoint_io
    state = {"weight": torch.arange(2**23, dtype=torch.float32)}  # 32 MiB
    tracemalloc.start()
    try:
        part = OwnPart(tmp_path, 0, 1, later=False)
        with captured(trainer, part):
            trainer.strategy.save_checkpoint(state, tmp_path / "state.ckpt")
        note = part.write()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * 2**20
    assert torch.equal(torch.load(tmp_path / "state.ckpt")["weight"], state["weight"])
    assert {p.name for p in tmp_path.iterdir()} == {"state.ckpt"}
    assert note.files == describe_files(tmp_path)
    assert trainer.strategy.checkpoint_io is own


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_a_training_needs_no_room_in_tmpdir(tiny_dataset, tmp_path, no_temporary_files, asynchronous):
    arguments = command(tiny_dataset, tmp_path / "run", 5)[3:]
    assert main([*arguments, "--checkpoint.asynchronous", asynchronous]) == 0
    checkpoint = find_checkpoint(tmp_path / "run")
    assert checkpoint.step == 5
    verify_checkpoint(checkpoint)
