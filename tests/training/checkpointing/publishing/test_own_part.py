"""What ranks write of one checkpoint fits together, and a part that fails is told, not lost."""

import threading

import pytest
import torch
from safetensors.torch import load_file

from dualroute.errors import UserError
from dualroute.model import ModelConfig
from dualroute.model.checkpoint import tree_hash
from dualroute.model.checkpoint.folder import WEIGHTS, Checkpoint, damages, find_checkpoint
from dualroute.training.checkpointing.publishing import own_part
from dualroute.training.checkpointing.publishing.capture import (
    WeightsOfPartitions,
    without_partitioned_weights,
)
from dualroute.training.checkpointing.publishing.own_part import (
    Note,
    OwnPart,
    await_notes,
    entries,
    leave_note,
    remove_notes,
)
from dualroute.training.checkpointing.publishing.publisher import CheckpointPublisher
from dualroute.training.checkpointing.state.reader import IN_PARTITIONS
from dualroute.training.config import CheckpointConfig


@pytest.fixture
def weights():
    torch.manual_seed(0)
    shapes = {"a": (50, 41), "b": (7,), "c": (3000, 2), "d": (0, 4)}
    made = {name: torch.randn(shape) for name, shape in shapes.items()}
    made["b"] = made["b"].bfloat16()
    return made


def layout_of(weights):
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in weights.items()}


@pytest.mark.parametrize("later", [False, True], ids=["now", "later"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_parts_of_all_ranks_are_one_checkpoint(tmp_path, weights, ranks, later):
    layout, parts = layout_of(weights), []
    expected = {name: tensor.clone() for name, tensor in weights.items()}
    for rank in reversed(range(ranks)):  # in whatever order
        part = OwnPart(tmp_path, rank, ranks, later=later)
        part.take_state({"own": torch.full((100,), float(rank))}, tmp_path / "state" / f"{rank}.pt")
        part.take_weights(tmp_path / WEIGHTS, layout, weights.items())
        parts.insert(0, part)
    if later:
        for tensor in weights.values():
            tensor.zero_()  # training goes on
    notes = [part.write() for part in parts]
    described = entries(notes, WEIGHTS, layout)
    assert set(described) == {WEIGHTS, *(f"state/{rank}.pt" for rank in range(ranks))}
    assert not any(tree_hash.wrong_entry(entry) for entry in described.values())
    checkpoint = Checkpoint(tmp_path, 0, {"files": described})
    assert [line for line in damages(checkpoint) if "says nothing of" not in line] == []
    loaded = load_file(tmp_path / WEIGHTS)
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    for rank in range(ranks):
        assert torch.load(tmp_path / "state" / f"{rank}.pt")["own"].tolist() == [rank] * 100


def fail(*_):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("later", [False, True], ids=["now", "later"])
def test_a_full_disk_is_raised_when_no_other_rank_waits_for_this_one(tmp_path, weights, monkeypatch, later):
    monkeypatch.setattr(own_part.HashedFile, "write", fail)
    asked = []

    def gathered():
        for name, tensor in weights.items():
            asked.append(name)
            yield name, tensor

    part = OwnPart(tmp_path, 0, 2, later=later)
    part.take_weights(tmp_path / WEIGHTS, layout_of(weights), gathered())
    assert asked == [*weights]  # to gather one may take every rank
    with pytest.raises(OSError, match="No space left"):
        part.write()


def test_a_state_that_cannot_be_written_raises_oserror(tmp_path, monkeypatch):
    """Raised inside of torch's zip writer it would end the process."""
    monkeypatch.setattr(own_part.HashedFile, "write", fail)
    part = OwnPart(tmp_path, 0, 1, later=False)
    part.take_state({"x": torch.zeros(10)}, tmp_path / "state.ckpt")
    with pytest.raises(OSError, match="No space left"):
        part.write()


def test_notes_come_in_the_order_of_ranks_and_are_removed(tmp_path):
    def leave():
        for rank in (3, 1, 2):
            leave_note(tmp_path, rank, Note(shared=[f"{rank}"]))

    thread = threading.Timer(0.1, leave)
    thread.start()
    found = list(await_notes(tmp_path, 4, lambda: 20.0))
    thread.join()
    assert [note.shared for note in found] == [["1"], ["2"], ["3"]]
    remove_notes(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_rank_that_fails_or_says_nothing_is_named(tmp_path):
    leave_note(tmp_path, 1, Note())
    with pytest.raises(UserError, match="rank 2 has not written its part"):
        list(await_notes(tmp_path, 3, lambda: 0.1))
    leave_note(tmp_path, 2, Note(error="the disk is full"))
    with pytest.raises(UserError, match="rank 2: the disk is full"):
        list(await_notes(tmp_path, 3, lambda: 0.1))


def taken(publisher, weights, rank, ranks=2):
    """What a rank has copied at a step boundary, and what its thread is then called with."""
    aside = publisher.folder / ".writing-step-00000004"
    aside.mkdir(parents=True, exist_ok=True)
    layout = layout_of(weights)
    part = OwnPart(aside, rank, ranks, later=True)
    part.take_state({"own": torch.full((5,), float(rank))}, aside / "state.ckpt" / f"{rank}.pt")
    part.take_weights(aside / WEIGHTS, layout, weights.items())
    config = ModelConfig(vocab_size=320, dim=32, num_layers=1, num_heads=4, window=8, block=16).resolved()
    return part, layout, config, {"step": 4, "state_layout": "DeepSpeed ZeRO-2 partitions of 2 rank(s)"}


@pytest.fixture
def publisher(tmp_path):
    (tmp_path / "tokenizer").write_bytes(b"words")
    return CheckpointPublisher(tmp_path / "checkpoints", CheckpointConfig(), tmp_path / "tokenizer", 10)


def test_threads_of_two_ranks_publish_one_checkpoint(publisher, weights):
    zero = threading.Thread(target=publisher._write_later, args=taken(publisher, weights, 0))
    zero.start()
    zero.join(0.3)
    assert zero.is_alive()  # it waits for the other
    assert not (publisher.folder / "step-00000004").exists()
    publisher._write_later(*taken(publisher, weights, 1))
    zero.join(20)
    checkpoint = find_checkpoint(publisher.folder)
    assert list(damages(checkpoint)) == []
    assert {path.name for path in checkpoint.folder.iterdir()} == {
        WEIGHTS, "model.json", "tokenizer.model", "state.ckpt", "checkpoint.json",
    }  # fmt: skip
    assert (publisher.folder / "last").resolve() == checkpoint.folder


def test_of_a_rank_that_cannot_write_both_tell_and_nothing_stays(publisher, weights, monkeypatch):
    first, second = (taken(publisher, weights, rank) for rank in (0, 1))
    with monkeypatch.context() as patched:
        patched.setattr(own_part.HashedFile, "write", fail)
        with pytest.raises(UserError, match=r"step-00000004 could not be written .*make room"):
            publisher._write_later(*second)
    with pytest.raises(UserError, match=r"rank 1: .*step-00000004 could not be written"):
        publisher._write_later(*first)
    assert list(publisher.folder.iterdir()) == []


class Engine:
    """What is asked of DeepSpeed's."""

    def __init__(self, stage=2, from_float32=True):
        self.stage, self.from_float32, self.updates = stage, from_float32, 0
        self.optimizer = self
        self.module = torch.nn.Module()

    def zero_optimization_stage(self):
        return self.stage

    def zero_load_from_fp32_weights(self):
        return self.from_float32

    def module_state_dict(self):
        return {"w": "current", "tied": "current", "buffer": "current"}

    def update_lp_params(self):
        self.updates += 1


STATE = {
    "module": {"w": "saved", "tied": "saved", "buffer": "saved"},
    "param_shapes": [{"w": (2,)}],
    "shared_params": {"tied": "w"},
}


def test_weights_that_partitions_hold_are_left_out_and_come_back():
    engine = Engine()
    written = without_partitioned_weights(engine, STATE)
    assert written["module"] == {"buffer": "saved"}
    load = WeightsOfPartitions(engine)
    read = load(dict(written), "file")
    assert read["module"] == {"w": "current", "tied": "current", "buffer": "saved"}
    assert IN_PARTITIONS not in read
    load.restore()
    assert engine.updates == 1


@pytest.mark.parametrize("engine", [Engine(stage=3), Engine(stage=0), Engine(from_float32=False)])
def test_where_partitions_do_not_serve_everything_is_written(engine):
    assert without_partitioned_weights(engine, STATE) is STATE
    load = WeightsOfPartitions(engine)
    assert load(STATE, "file") is STATE  # one of an earlier version, too
    load.restore()
    assert engine.updates == 0


def test_a_configuration_that_loads_no_float32_weights_is_refused():
    load = WeightsOfPartitions(Engine(from_float32=False))
    with pytest.raises(UserError, match="load_from_fp32_weights is false"):
        load(without_partitioned_weights(Engine(), STATE), "file")
