"""Runs that go on with other ranks, at another ZeRO stage, with and without DeepSpeed: one run in the end."""

import argparse
import json
import threading
import time

import pytest
import torch

from dualroute.cli import main
from dualroute.errors import UserError
from dualroute.model.checkpoint_format import Checkpoint, find_checkpoint, list_checkpoints
from dualroute.training.checkpointing import reshard
from dualroute.training.checkpointing.state_layout import StateLayout
from dualroute.training.checkpointing.state_reader import KEYS, WEIGHT, open_state
from dualroute.training.checkpointing.state_writer import write_one_file, write_stage_zero, write_universal
from tests.training.checkpointing.elastic_runs import LANES, RANKS, STEPS_PER_LEG
from tests.training.step.test_module import curve

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # the first test waits for ten trainings

LAYOUTS = {
    "stage1": [(1, 2), (1, 1), (1, 4), (1, 2)],
    "stage2": [(2, 2), (2, 1), (2, 4), (2, 2)],
    "stage3": [(3, 2), (3, 1), (3, 4), (3, 2)],
    "mixed": [(3, 2), None, (2, 4), None],
}


def checkpoint_of(elastic, lane, leg):
    return list_checkpoints(elastic.folder / lane / "checkpoints")[leg]


def quiet(done, total):
    pass


@pytest.mark.parametrize("lane", LANES)
def test_two_one_four_two_ranks_are_one_run(elastic, lane):
    run, unbroken = elastic.folder / lane, elastic.folder / "unbroken"
    ours, whole = curve(run), curve(unbroken)
    assert sorted(ours) == list(range(1, STEPS_PER_LEG * len(RANKS) + 1))
    assert max(abs(ours[step] - whole[step]) for step in whole) <= 1e-5
    last = STEPS_PER_LEG * len(RANKS)
    assert curve(run, "validation")[last] == pytest.approx(curve(unbroken, "validation")[last], abs=1e-5)
    layouts = [StateLayout.read(checkpoint) for checkpoint in list_checkpoints(run / "checkpoints")]
    assert layouts == [StateLayout(*layout) if layout else StateLayout() for layout in LAYOUTS[lane]]


@pytest.mark.parametrize("lane", LANES)
def test_the_optimizer_went_on_as_well(elastic, lane):
    """Moments, count of steps and each group's weight decay, which five steps' losses hardly show."""
    ours, whole = (open_state(find_checkpoint(elastic.folder / name)) for name in (lane, "unbroken"))
    assert float(ours.step) == float(whole.step) == STEPS_PER_LEG * len(RANKS)
    assert [group["weight_decay"] for group in ours.hyperparameters] == [0.1, 0.0]
    assert ours.groups == whole.groups
    assert ours.trainer["ShardDataModule"] == whole.trainer["ShardDataModule"]
    for name in whole.shapes:
        for key in KEYS:
            theirs = whole.read(name, key)
            assert (ours.read(name, key) - theirs).abs().max() <= 1e-3 * theirs.abs().max() + 1e-7, (
                name,
                key,
            )


def test_the_conversion_is_said_and_leaves_nothing(elastic):
    second = elastic.printed[1]
    assert (
        "from DeepSpeed ZeRO-2 partitions of 2 rank(s) for DeepSpeed ZeRO-2 partitions of 1 rank(s)" in second
    )
    assert "parameters converted" in second
    for lane in LANES:
        folder = elastic.folder / lane / "checkpoints"
        assert {p.name for p in folder.iterdir()} - {"last", "best"} == {
            f"step-{STEPS_PER_LEG * n:08d}" for n in (1, 2, 3, 4)
        }


def assert_equal_states(a, b):
    assert list(a.shapes.items()) == list(b.shapes.items())
    assert a.step == b.step
    assert a.groups == b.groups
    for name in a.shapes:
        for key in KEYS:
            assert torch.equal(a.read(name, key), b.read(name, key)), (name, key)


@pytest.mark.parametrize(("lane", "leg"), [("stage1", 2), ("stage2", 0), ("stage3", 2), ("mixed", 1)])
def test_whole_files_hold_the_same_to_the_last_bit(elastic, tmp_path, lane, leg):
    state = open_state(checkpoint_of(elastic, lane, leg))
    write_one_file(state, tmp_path / "state.ckpt", quiet)
    assert_equal_states(open_state(Checkpoint(tmp_path, 0, {"state_layout": "one file"})), state)
    (tmp_path / "zero").mkdir()
    write_stage_zero(state, tmp_path / "zero" / "state.ckpt", quiet)
    metadata = {"state_layout": str(StateLayout(0, 1))}
    assert_equal_states(open_state(Checkpoint(tmp_path / "zero", 0, metadata)), state)


@pytest.mark.parametrize("lane", ["stage1", "stage2", "stage3"])
def test_deepspeeds_own_converter_agrees(elastic, tmp_path, lane):
    """On four ranks' partitions, where parameters are cut in the middle and padded."""
    from deepspeed.checkpoint import ds_to_universal

    checkpoint = checkpoint_of(elastic, lane, 2)
    state = open_state(checkpoint)
    write_universal(state, tmp_path / "ours", quiet)
    ds_to_universal.main(
        argparse.Namespace(
            input_folder=str(checkpoint.state / "checkpoint"),
            output_folder=str(tmp_path / "theirs" / "checkpoint"),
            num_extract_workers=1, num_merge_workers=1, keep_temp_folder=False, strict=True,
            inject_missing_state=True,
        )
    )  # fmt: skip
    for name in state.shapes:
        for key in KEYS:
            ours, theirs = (
                torch.load(tmp_path / who / "checkpoint" / "zero" / name / f"{key}.pt", weights_only=False)
                for who in ("ours", "theirs")
            )
            theirs = theirs["param"] if isinstance(theirs, dict) else theirs
            assert torch.equal(ours["param"].view(-1), theirs.view(-1)), (name, key)


class FakeTrainer:
    """What `resumable_state` asks of a Trainer: plain, whatever its rank."""

    strategy = None
    world_size = 1

    def __init__(self, rank):
        self.is_global_zero = rank == 0


def resume(elastic, folder, rank, **more):
    settings = {"precision": "32", "timeout_minutes": 0.5, **more}
    return reshard.resumable_state(checkpoint_of(elastic, "stage2", 0), FakeTrainer(rank), folder, **settings)


def test_others_wait_for_rank_zero_and_a_second_start_converts_nothing(elastic, tmp_path, capsys):
    found = []
    waiting = threading.Thread(target=lambda: found.append(resume(elastic, tmp_path, 1)))
    waiting.start()
    time.sleep(0.5)
    assert not found
    state = resume(elastic, tmp_path, 0)
    waiting.join(timeout=20)
    assert found == [state]
    before = state.stat().st_mtime_ns
    assert "converting" in capsys.readouterr().out
    assert resume(elastic, tmp_path, 0) == state
    assert state.stat().st_mtime_ns == before
    assert "converting" not in capsys.readouterr().out
    # one of another checkpoint under the same name is not taken
    note = state.parent / "resharded.json"
    note.write_text(json.dumps({**json.loads(note.read_text()), "sha256": "0"}))
    resume(elastic, tmp_path, 0)
    assert "converting" in capsys.readouterr().out


def test_a_rank_does_not_wait_for_ever(elastic, tmp_path):
    with pytest.raises(UserError, match=r"parallel\.timeout_minutes"):
        resume(elastic, tmp_path, 1, timeout_minutes=0.005)


def test_what_would_lose_precision_is_refused(elastic, tmp_path):
    with pytest.raises(UserError, match="bf16-true one file has no float32 weights"):
        resume(elastic, tmp_path, 0, precision="bf16-true")
    with pytest.raises(UserError, match="loss scale"):
        resume(elastic, tmp_path, 0, precision="16-mixed")


def test_no_room_is_said_before_anything_is_written(elastic, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(reshard.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match="make room"):
        resume(elastic, tmp_path, 0)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_meanwhile_is_one_line_and_leaves_nothing(elastic, tmp_path, monkeypatch):
    """torch reports it as a RuntimeError of its zip writer."""

    def full(*_, **__):
        raise RuntimeError(
            "[enforce fail at inline_container.cc:672] . PytorchStreamWriter failed writing file"
        )

    monkeypatch.setattr("dualroute.training.checkpointing.state_writer.torch.save", full)
    with pytest.raises(
        UserError, match=r"resharded-.* could not be written .*PytorchStreamWriter.*make room"
    ):
        resume(elastic, tmp_path, 0)
    assert not list(tmp_path.iterdir())
    output = tmp_path / "universal"
    assert main(["checkpoint", "convert", str(elastic.folder / "stage2"), "--output", str(output)]) == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", ["muon", "names", "missing"])
def test_a_state_that_cannot_be_cut_up_says_why(elastic, tmp_path, change):
    checkpoint = checkpoint_of(elastic, "mixed", 1)
    content = torch.load(checkpoint.state, weights_only=True)
    if change == "muon":
        content["optimizer_states"][0]["state"][0] = {"momentum_buffer": torch.zeros(2)}
        expected = "only that of AdamW"
    elif change == "names":
        del content["parameter_names"]
        expected = "which parameter is which"
    else:
        expected = "cannot be read"
    torch.save(content, tmp_path / "state.ckpt")
    if change == "missing":
        (tmp_path / "state.ckpt").write_bytes(checkpoint.state.read_bytes()[:-200])
    with pytest.raises(UserError, match=expected):
        write_universal(open_state(Checkpoint(tmp_path, 0, checkpoint.metadata)), tmp_path / "out", quiet)


def test_without_names_weights_and_partitions_are_read_all_the_same(elastic, tmp_path):
    """As an earlier version wrote them: only a plain optimizer state cannot be told apart."""
    checkpoint = checkpoint_of(elastic, "mixed", 1)
    content = torch.load(checkpoint.state, weights_only=True)
    names = {name for group in content.pop("parameter_names") for name in group}
    torch.save(content, tmp_path / "state.ckpt")
    state = open_state(Checkpoint(tmp_path, 0, checkpoint.metadata))
    assert set(dict(state.tensors(WEIGHT))) == names
    partitions = open_state(checkpoint_of(elastic, "stage2", 2))
    del partitions.trainer["parameter_names"]
    write_universal(partitions, tmp_path / "universal", quiet)
    assert {p.name for p in (tmp_path / "universal" / "checkpoint" / "zero").iterdir()} > names
