"""A checkpoints folder that was copied, or left by killed processes, is put in order and loses nothing."""

import json
import os
import shutil

import pytest

from dualroute.model.checkpoint.format import METADATA, read_checkpoint, scan_checkpoints
from dualroute.training.checkpointing.publishing.upkeep import (
    ABANDONED,
    point_links,
    remove,
    remove_leftovers,
    set_aside_newer,
)
from tests.training.checkpointing.runs import KEPT, killed_in, pretrain, steps_in


def checkpoint(folder, step, **metadata):
    made = folder / f"step-{step:08d}"
    made.mkdir(parents=True)
    (made / METADATA).write_text(json.dumps({"step": step, "mark": os.urandom(4).hex(), **metadata}))
    return made


def links(folder):
    return {name: os.readlink(folder / name) for name in ("last", "best") if (folder / name).is_symlink()}


def test_links_name_what_is_there(tmp_path):
    for step, loss in ((4, 2.0), (8, 1.0), (12, float("nan")), (16, 3.0)):
        checkpoint(tmp_path, step, val_loss=loss)
    point_links(tmp_path)
    assert links(tmp_path) == {"last": "step-00000016", "best": "step-00000008"}
    set_aside_newer(tmp_path, 4)
    assert links(tmp_path) == {"last": "step-00000004", "best": "step-00000004"}
    set_aside_newer(tmp_path, 0)
    assert links(tmp_path) == {}


def test_what_is_set_aside_is_never_written_over(tmp_path):
    marks = set()
    for _ in range(3):
        marks.add(read_checkpoint(checkpoint(tmp_path, 8)).metadata["mark"])
        set_aside_newer(tmp_path, 4)
    assert {read_checkpoint(p).metadata["mark"] for p in tmp_path.glob(f"{ABANDONED}*")} == marks
    assert len(marks) == 3


def test_half_copied_and_damaged_ones_are_set_aside_too(tmp_path):
    checkpoint(tmp_path, 4)
    (checkpoint(tmp_path, 8) / METADATA).unlink()
    (checkpoint(tmp_path, 12) / METADATA).write_text("{")
    set_aside_newer(tmp_path, 4)
    scan = scan_checkpoints(tmp_path)
    assert ([c.step for c in scan.finished], scan.unfinished, scan.damaged) == ([4], [], {})
    assert len(list(tmp_path.glob(f"{ABANDONED}step-*"))) == 2


@pytest.mark.parametrize("original", [True, False], ids=["copy", "only one"])
def test_links_that_were_copied_as_folders_become_links(tmp_path, original):
    """``scp -r``; a copy of what is beside it goes, anything else is set aside."""
    checkpoint(tmp_path, 4)
    newest = checkpoint(tmp_path, 8)
    shutil.copytree(newest, tmp_path / "last")
    if not original:
        (tmp_path / "last" / METADATA).write_text(json.dumps({"step": 12}))
    point_links(tmp_path)
    assert links(tmp_path)["last"] == "step-00000008"
    assert (tmp_path / f"{ABANDONED}last").exists() != original
    assert not list(tmp_path.glob(".deleting-*"))


def test_leftovers_go_and_nothing_else(tmp_path):
    keep = [
        checkpoint(tmp_path, 4),
        tmp_path / "abandoned-step-00000008",
        tmp_path / "resharded-step-00000004",
    ]
    doomed = [
        tmp_path / name
        for name in (".deleting-step-00000001", ".writing-step-00000012", ".writing-resharded-step-00000004",
                     "resharded-step-00000002")
    ]  # fmt: skip
    for folder in (*keep[1:], *doomed):
        folder.mkdir()
        (folder / "state.ckpt").write_text("state")
    (tmp_path / ".last.new").symlink_to("step-00000001")
    remove_leftovers(tmp_path, keep=keep[2])
    assert sorted(tmp_path.iterdir()) == sorted(keep)


def test_a_deletion_that_was_cut_short_does_not_stop_the_next(tmp_path):
    (tmp_path / ".deleting-step-00000004").mkdir()
    (tmp_path / ".deleting-step-00000004" / "state.ckpt").write_text("half")
    remove(checkpoint(tmp_path, 4))
    assert not (tmp_path / "step-00000004").exists()


def test_a_copied_run_trains_on(tiny_dataset, tmp_path, capsys):
    """All of it at once: links as folders, a half-copied step in the way, leftovers of killed processes."""
    source, run = tmp_path / "source", tmp_path / "run"
    with killed_in(10):
        pretrain(tiny_dataset, source, 16, *KEPT)
    shutil.copytree(source, run)  # follows links, as scp -r does
    folder = run / "checkpoints"
    assert not (folder / "last").is_symlink()
    for name in ("step-00000012", ".writing-step-00000012", ".deleting-step-00000001"):
        (folder / name).mkdir()
        (folder / name / "state.ckpt").write_text("half")
    (run / ".config.yaml.partial-99").write_text("half")
    assert pretrain(tiny_dataset, run, 16, *KEPT) == 0
    assert "resuming from" in capsys.readouterr().out
    assert links(folder)["last"] == "step-00000016"
    assert [name for name in steps_in(run) if not name.startswith("step-")] == [
        "abandoned-step-00000012", "best", "last",
    ]  # fmt: skip
    assert not (run / ".config.yaml.partial-99").exists()
    assert [c.step for c in scan_checkpoints(folder).finished] == [4, 8, 12, 16]


def test_something_that_came_in_the_way_of_a_checkpoint_makes_room(tiny_dataset, tmp_path, monkeypatch):
    """Another process without locks, a hand: the next step has a folder of its name while the run goes on."""
    from dualroute.training.checkpointing.publishing import publisher

    original = publisher._flush

    def meddle(folder, flushed):
        original(folder, flushed)
        (folder.parent / folder.name.removeprefix(".writing-")).mkdir()
        (folder.parent / folder.name.removeprefix(".writing-") / "mine").write_text("")

    monkeypatch.setattr(publisher, "_flush", meddle)
    with killed_in(6):
        pretrain(tiny_dataset, tmp_path / "run", 8)
    assert (tmp_path / "run" / "checkpoints" / "abandoned-step-00000004" / "mine").exists()
    assert scan_checkpoints(tmp_path / "run" / "checkpoints").finished[0].step == 4
