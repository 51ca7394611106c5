"""Folders that are not as a run left them: nothing is begun anew, and what is damaged is named."""

import os
import shutil

import pytest

from dualroute.errors import UserError
from dualroute.model.checkpoint_format import METADATA, read_checkpoint
from dualroute.training.checkpointing.resume import choose_start
from dualroute.training.checkpointing.upkeep import PUBLISHED
from dualroute.training.monitoring.metrics_log import ABANDONED, read_metrics
from tests.training.checkpointing.runs import KEPT, begun_at, killed_in, pretrain, snapshot, steps_in

# -- a run whose checkpoints have gone astray ----------------------------------------------------------------


def dangling(folder):
    shutil.rmtree(folder)
    folder.symlink_to(folder.parent.parent / "scratch")


def a_file(folder):
    shutil.rmtree(folder)
    folder.write_text("")


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def only_half_a_copy(folder):
    shutil.rmtree(folder)
    (folder / "step-00000012").mkdir(parents=True)
    (folder / "step-00000012" / "model.json").write_text("{}")


def only_a_copied_link(folder):
    (folder / "last").unlink()
    shutil.copytree(folder / "step-00000012", folder / "last")
    for step in (4, 8, 12):
        shutil.rmtree(folder / f"step-{step:08d}")


def only_set_aside(folder):
    for step in (4, 8, 12):
        (folder / f"step-{step:08d}").rename(folder / f"abandoned-step-{step:08d}")


def only_damaged(folder):
    for step in (4, 8, 12):
        (folder / f"step-{step:08d}" / METADATA).write_text('{"step": "twelve"}')


ASTRAY = {
    dangling: "is a link to",
    a_file: "is no folder",
    empty: "holds no checkpoint, but this run has written some",
    shutil.rmtree: "is not there, but this run has written some",
    only_half_a_copy: "copied in part",
    only_a_copied_link: "rename it to step-00000012",
    only_set_aside: "abandoned-step-00000012",
    only_damaged: "step is 'twelve'",
}


@pytest.mark.parametrize("resume", ["auto", "never"])
@pytest.mark.parametrize("how", ASTRAY, ids=lambda how: how.__name__)
def test_a_run_whose_checkpoints_are_astray_is_not_begun_anew(run, tiny_dataset, capsys, how, resume):
    how(run / "checkpoints")
    before = snapshot(run)
    assert pretrain(tiny_dataset, run, 16, "--resume", resume) == 2
    captured = capsys.readouterr()
    assert ASTRAY[how] in captured.err
    assert captured.err.count("\n") == 1
    assert snapshot(run) == before


def test_checkpoints_that_cannot_be_read_are_not_begun_anew(run, tiny_dataset, capsys, monkeypatch):
    listdir = os.listdir

    def refuse(path="."):
        if str(path).endswith("checkpoints"):
            raise PermissionError(13, "Permission denied", str(path))
        return listdir(path)

    before = snapshot(run)
    monkeypatch.setattr(os, "listdir", refuse)
    assert pretrain(tiny_dataset, run, 16) == 2
    assert "checkpoints cannot be read (Permission denied)" in capsys.readouterr().err
    monkeypatch.undo()
    assert snapshot(run) == before


def test_a_run_of_an_earlier_version_shows_by_its_metrics_that_it_had_some(run, tiny_dataset):
    (run / PUBLISHED).unlink()
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match=r"metrics\.jsonl shows it"):
        choose_start(run, "auto")
    (run / "metrics.jsonl").unlink()
    assert choose_start(run, "auto").checkpoint is None


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(tiny_dataset, tmp_path):
    """And what it had measured stays: in a file beside the metrics, and in TensorBoard's own."""
    run = tmp_path / "run"
    events, metrics = {}, b""
    for _ in range(2):
        with killed_in(3):
            pretrain(tiny_dataset, run, 8)
        events |= {path: path.read_bytes() for path in (run / "tensorboard").glob("events.*")}
        metrics += (run / "metrics.jsonl").read_bytes()
    assert pretrain(tiny_dataset, run, 8) == 0
    assert [line["step"] for line in read_metrics(run / "metrics.jsonl", "train")] == list(range(1, 9))
    assert len(events) == 2
    assert all(path.read_bytes() == content for path, content in events.items())
    assert set(metrics.splitlines()) <= set((run / ABANDONED).read_bytes().splitlines())


def test_killed_before_its_first_checkpoint_it_goes_to_the_path_again(trained, tiny_dataset, tmp_path):
    for _ in range(2):
        with killed_in(14):
            pretrain(tiny_dataset, tmp_path / "run", 16, "--resume", str(trained))
    assert pretrain(tiny_dataset, tmp_path / "run", 16, "--resume", str(trained)) == 0


# -- folders that are not as we left them --------------------------------------------------------------------


def test_a_newest_folder_that_was_copied_in_part_is_passed_over(run, tiny_dataset, capsys):
    (run / "checkpoints" / "step-00000012" / METADATA).unlink()
    assert pretrain(tiny_dataset, run, 12, *KEPT) == 0  # writes a step of that name
    printed = capsys.readouterr().out
    assert "step-00000012 has no checkpoint.json (copied in part?)" in printed
    assert "step-00000008 (step 8 of 12)" in printed
    assert read_checkpoint(run / "checkpoints" / "step-00000012").step == 12
    assert "abandoned-step-00000012" in steps_in(run)


@pytest.mark.parametrize("content", ["", "[]", '{"step": 12, "files": {"../../x": {}}}', "[" * 100_000])
def test_damaged_metadata_of_the_newest_are_named_and_the_remedy_works(run, tiny_dataset, capsys, content):
    (run / "checkpoints" / "step-00000012" / METADATA).write_text(content)
    before = snapshot(run)
    assert pretrain(tiny_dataset, run, 16, *KEPT) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    remedy = line.split("--resume ")[1].split()[0]
    assert snapshot(run) == before
    assert pretrain(tiny_dataset, run, 16, "--resume", remedy, *KEPT) == 0
    assert begun_at(capsys) == ["step-00000008"]


@pytest.mark.parametrize("how", ["folder", "missing", "unreadable", "pipe"])
def test_a_state_that_is_no_readable_file_is_named(run, tiny_dataset, capsys, monkeypatch, how):
    state = run / "checkpoints" / "step-00000012" / "state.ckpt"
    if how == "unreadable":

        def refuse(path, *_):
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr("dualroute.model.tree_hash._digest", refuse)
    else:
        state.unlink()
        if how == "folder":
            state.mkdir()
        if how == "pipe":
            os.mkfifo(state)
    assert pretrain(tiny_dataset, run, 16) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "checkpoints/step-00000012/" in captured.err
