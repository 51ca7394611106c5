"""A path is a starting point once; a start that is refused changes nothing; a folder is claimed first."""

import shutil

import pytest

from data_prep.prepare import PrepareConfig, prepare
from dualroute.errors import UserError
from dualroute.model.checkpoint.format import METADATA, find_checkpoint, list_checkpoints
from dualroute.training import run as run_module
from dualroute.training.checkpointing.publishing.first_write import FirstWrite
from dualroute.training.checkpointing.resume import seen_here
from dualroute.training.checkpointing.starting_points import spelled
from dualroute.training.monitoring.metrics_log import ABANDONED, read_metrics
from dualroute.training.parallel.strategy import OneProcessStrategy
from tests.conftest import write_corpus
from tests.sealed import redescribe, rewrite
from tests.training.checkpointing.runs import KEPT, begun_at, killed_in, pretrain, snapshot, steps_in
from tests.training.step.test_module import attempt, started


@pytest.fixture(scope="module")
def other_data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("other")
    write_corpus(folder / "corpus", 40, seed=5)
    prepare(
        PrepareConfig(
            corpus=str(folder / "corpus"), output=str(folder / "shards"), vocab_size=320,
            reserved_tokens=0, val_fraction=0.2, progress=False,
        )
    )  # fmt: skip
    return folder / "shards"


# -- a path is a starting point, once ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keep", [pytest.param("9", marks=pytest.mark.slow), "1"]
)  # 1: the starting point itself is removed meanwhile
def test_the_same_command_goes_on_from_where_it_came_to(run, tiny_dataset, capsys, keep):
    first = run / "checkpoints" / "step-00000004"
    again = ("--resume", str(first), "--checkpoint.keep_last", keep)
    for end in (11, 15):
        with killed_in(end):
            pretrain(tiny_dataset, run, 20, *again)
    assert pretrain(tiny_dataset, run, 20, *again) == 0
    assert begun_at(capsys) == ["step-00000004", "step-00000008", "step-00000012"]
    assert first.exists() == (keep == "9")
    # set aside once, by the first start
    assert [n for n in steps_in(run) if "abandoned" in n] == [f"abandoned-step-{s:08d}" for s in (8, 12)]
    assert [line["step"] for line in read_metrics(run / "metrics.jsonl", "train")] == list(range(1, 21))


@pytest.mark.slow
def test_going_back_once_more_is_said_and_another_place_is_gone_to(run, tiny_dataset, capsys):
    folder = run / "checkpoints"
    assert pretrain(tiny_dataset, run, 12, "--resume", str(folder / "step-00000008"), *KEPT) == 0
    assert pretrain(tiny_dataset, run, 16, "--resume", str(folder / "step-00000008"), *KEPT) == 0
    assert "has gone on from" in capsys.readouterr().out
    # an earlier place, of which the run has not gone on yet: the newer ones descend from it all the same
    assert pretrain(tiny_dataset, run, 16, "--resume", str(folder / "step-00000004"), *KEPT) == 0
    assert begun_at(capsys) == ["step-00000004"]
    # going back further has forgotten what came after it
    aside = folder / "abandoned-step-00000008"
    assert pretrain(tiny_dataset, run, 20, "--resume", str(aside), *KEPT) == 0
    assert begun_at(capsys) == ["abandoned-step-00000008"]
    names = [name for name in steps_in(run) if name.startswith("abandoned")]
    # nothing that was set aside before has been written over
    assert {f"abandoned-step-{s:08d}{n}" for s in (12, 16) for n in ("", ".2")} <= set(names)


@pytest.mark.slow
def test_a_link_and_another_run_are_starting_points_too(run, trained, tiny_dataset, tmp_path, capsys):
    """What they name moves on; the command means the place it began at."""
    fresh = tmp_path / "fresh"
    for _ in range(2):
        with killed_in(18):
            pretrain(tiny_dataset, fresh, 24, "--resume", str(trained), *KEPT)
    assert begun_at(capsys) == ["step-00000012", "step-00000016"]
    best = run / "checkpoints" / "best"
    best.unlink()
    best.symlink_to("step-00000004")
    for end in (7, 11, 11):
        with killed_in(end):
            pretrain(tiny_dataset, run, 24, "--resume", str(best), *KEPT)
    assert begun_at(capsys) == ["step-00000004", "step-00000004", "step-00000008"]


def test_a_run_that_was_moved_remembers(run, tiny_dataset, tmp_path, capsys):
    given = "checkpoints/step-00000004"
    with killed_in(11):
        pretrain(tiny_dataset, run, 20, "--resume", str(run / given), "--checkpoint.keep_last", "1")
    moved = run.rename(tmp_path / "moved")
    assert not (moved / given).exists()
    assert pretrain(tiny_dataset, moved, 20, "--resume", str(moved / given)) == 0
    assert begun_at(capsys) == ["step-00000004", "step-00000008"]


def test_how_a_path_is_compared(tmp_path, monkeypatch):
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    ways = ["run/checkpoints/best", "./run/checkpoints/../checkpoints/best/", "link/checkpoints/best"]
    assert {spelled(way, folder) for way in ways} == {"checkpoints/best"}
    assert spelled("elsewhere", folder) == str(tmp_path / "elsewhere")


def test_a_requeued_job_that_said_never_goes_on(tiny_dataset, tmp_path, capsys, monkeypatch):
    for name, value in {"SLURM_JOB_ID": "71", "SLURM_NTASKS": "1"}.items():
        monkeypatch.setenv(name, value)
    with killed_in(6):
        pretrain(tiny_dataset, tmp_path / "run", 8, "--resume", "never")
    assert pretrain(tiny_dataset, tmp_path / "run", 8, "--resume", "never") == 0
    assert begun_at(capsys) == ["step-00000004"]
    monkeypatch.setenv("SLURM_JOB_ID", "72")
    assert pretrain(tiny_dataset, tmp_path / "run", 12, "--resume", "never") == 2
    assert "--resume never would write over" in capsys.readouterr().err


# -- a start that is refused changes nothing -----------------------------------------------------------------


def forget_the_data(checkpoint):
    """As older versions wrote it: only the state knows seed, context and data."""
    rewrite(checkpoint, **dict.fromkeys(("seed", "context", "data_fingerprint", "settings"), "removed"))


def without_guard(checkpoint):
    import torch

    state = torch.load(checkpoint / "state.ckpt", weights_only=True)
    del state["spike_guard"]
    torch.save(state, checkpoint / "state.ckpt")
    redescribe(checkpoint, "state.ckpt")


def spoil_the_state(checkpoint):
    data = bytearray((checkpoint / "state.ckpt").read_bytes())
    data[: len(data) // 2] = bytes(len(data) // 2)
    (checkpoint / "state.ckpt").write_bytes(data)


REFUSED = {
    "seed": (("--seed", "3"), ("seed was 0 and is 3", "seed 0")),
    "context": (("--data.context", "32"), ("data.context was 64 and is 32", "context 64")),
    "data": ((), "fingerprint"),
    "model": (("--model.num_layers", "3"), "model.num_layers 2 → 3"),
    "state": ((), "no state of"),
    "damage": (("--checkpoint.verify", "false"), "state.ckpt"),
}


@pytest.mark.parametrize("late", [False, True], ids=["metadata", "state"])
@pytest.mark.parametrize("kind", REFUSED)
def test_a_refused_resume_changes_nothing(run, tiny_dataset, other_data, capsys, kind, late):
    """Neither what the metadata show, nor what comes out when the state is loaded."""
    target = run / "checkpoints" / "step-00000004"
    more, words = REFUSED[kind]
    if late:
        forget_the_data(target)
    if kind == "state":
        without_guard(target)
    if kind == "damage":
        spoil_the_state(target)
    before = snapshot(run)
    data = other_data if kind == "data" else tiny_dataset
    assert pretrain(data, run, 20, "--resume", str(target), *more) == 2
    captured = capsys.readouterr()
    assert (words if isinstance(words, str) else words[late]) in captured.err
    assert captured.err.count("error:") == 1
    assert "Traceback" not in captured.err
    assert snapshot(run) == before


@pytest.mark.slow
def test_a_refused_resume_takes_its_converted_state_away(run, tiny_dataset):
    """Under DeepSpeed, which loads after the engine is made, and from another layout."""
    pytest.importorskip("deepspeed")
    forget_the_data(run / "checkpoints" / "step-00000004")
    before = snapshot(run)
    more = ("--resume", str(run / "checkpoints" / "step-00000004"), "--parallel.strategy", "deepspeed")
    for seed, status in (("3", 2), ("0", 0)):
        result = attempt(tiny_dataset, run, 16, *more, "--seed", seed, "--parallel.zero_stage", "1")
        assert result.returncode == status, result.stderr[-3000:]
        assert "converting" in result.stdout
        after = snapshot(run)
        # the folder in which the converted state came and went has the time of that
        assert (after | {"checkpoints": before["checkpoints"]} == before) == bool(status)


def test_a_folder_that_is_full_is_named_and_changes_nothing(run, tiny_dataset, capsys, monkeypatch):
    from dualroute.training.checkpointing.publishing import first_write

    def full(*_):
        raise OSError(28, "No space left on device", "config.yaml")

    monkeypatch.setattr(first_write, "write_bytes_atomically", full)
    before = snapshot(run)
    assert pretrain(tiny_dataset, run, 20) == 2
    assert "No space left on device" in capsys.readouterr().err
    after = snapshot(run)
    assert after == before


def test_the_folder_is_changed_when_all_ranks_have_loaded(run, tiny_dataset, monkeypatch):
    """Lightning lets ranks wait for each other at the end of loading, where a refused one never comes."""
    seen = []
    write = FirstWrite._write

    def noted(self):
        seen.append("first write")
        write(self)

    monkeypatch.setattr(OneProcessStrategy, "barrier", lambda self, name=None: seen.append(name))
    monkeypatch.setattr(FirstWrite, "_write", noted)
    assert pretrain(tiny_dataset, run, 16) == 0
    assert seen.count("first write") == 1
    assert seen.index("_CheckpointConnector.resume_end") < seen.index("first write")


# -- claimed first, then chosen ------------------------------------------------------------------------------


def test_what_was_published_until_the_folder_is_claimed_is_not_buried(run, tiny_dataset, capsys, monkeypatch):
    """Another process ends between the first look and the lock: the run goes on from its last checkpoint."""
    newest = run / "checkpoints" / "step-00000012"
    hidden = newest.rename(run / "checkpoints" / ".later")
    (run / "checkpoints" / "last").unlink()
    original = run_module.locked

    def locked(output, world):
        hidden.rename(newest)
        return original(output, world)

    monkeypatch.setattr(run_module, "locked", locked)
    assert pretrain(tiny_dataset, run, 16, *KEPT) == 0
    assert begun_at(capsys) == ["step-00000012"]
    assert not [name for name in steps_in(run) if "abandoned" in name]


def test_a_folder_of_another_process_is_not_hashed(run, tiny_dataset, capsys, monkeypatch):
    def locked(output, world):
        raise UserError("somebody is there")

    monkeypatch.setattr(run_module, "locked", locked)
    monkeypatch.setattr(run_module, "refuse_damaged", lambda *_, **__: pytest.fail("hashed before the claim"))
    before = snapshot(run)
    assert pretrain(tiny_dataset, run, 16) == 2
    assert "somebody is there" in capsys.readouterr().err
    assert snapshot(run) == before


def test_a_rank_that_does_not_see_the_checkpoint_says_so(run, tmp_path):
    checkpoint = find_checkpoint(run)
    seen_here(run, checkpoint, patience=0)
    (checkpoint.folder / METADATA).write_text((run / "checkpoints/step-00000004" / METADATA).read_text())
    with pytest.raises(UserError, match="which rank 0 sees, is not there on host"):
        seen_here(run, checkpoint, patience=0)
    with pytest.raises(UserError, match="is not there on host"):
        seen_here(tmp_path / "nowhere", None, patience=0)


# -- what the weights came from may be gone ------------------------------------------------------------------


def test_a_fine_tune_goes_on_without_what_it_began_with(trained, tiny_dataset, tmp_path, capsys):
    start = shutil.copytree(trained, tmp_path / "start", symlinks=True)
    tune = ("--init_from", str(start), "--train.micro_batch", "2")
    with killed_in(6):
        pretrain(tiny_dataset, tmp_path / "run", 8, *tune)
    shutil.copytree(tmp_path / "run", tmp_path / "straight", symlinks=True)
    assert pretrain(tiny_dataset, tmp_path / "straight", 8, *tune) == 0
    shutil.rmtree(start)
    assert pretrain(tiny_dataset, tmp_path / "run", 8, *tune) == 0
    losses = [
        [line["train/loss"] for line in read_metrics(tmp_path / name / "metrics.jsonl", "train")]
        for name in ("run", "straight")
    ]
    assert losses[0] == losses[1]
    assert pretrain(tiny_dataset, tmp_path / "another", 8, *tune) == 2
    assert "init_from: there is no checkpoint at" in capsys.readouterr().err
    assert not (tmp_path / "another").exists()


@pytest.mark.slow
def test_stopped_by_a_signal_a_resumed_run_goes_on_with_the_same_command(run, tiny_dataset):
    """Status 75 says that the same command continues: it does, also where that command names a checkpoint."""
    import signal

    from dualroute.training.resilience.preemption import PREEMPTED
    from tests.training.step.test_module import wait_for_step

    again = ("--resume", str(run / "checkpoints" / "step-00000004"), *KEPT)
    saved = 4
    for until in (17, 40):
        process = started(tiny_dataset, run, 400, *again)
        wait_for_step(process, run / "metrics.jsonl", until)
        process.send_signal(signal.SIGTERM)
        text = "".join(process.communicate(timeout=120))
        assert process.returncode == PREEMPTED, text[-3000:]
        assert f"(step {saved} of 400)" in text
        saved = find_checkpoint(run).step
        assert saved >= until


@pytest.mark.slow
def test_of_two_starts_in_the_same_second_one_trains(tiny_dataset, tmp_path):
    """The other is refused, or comes when all is done; no step is trained twice and nothing set aside."""
    run = tmp_path / "run"
    both = [started(tiny_dataset, run, 40, *KEPT, "--checkpoint.keep_last", "99") for _ in range(2)]
    said = [process.communicate(timeout=240) for process in both]
    lines = [out + error for out, error in said]
    trained = [line for line in lines if "step 40/40" in line]
    assert len(trained) == 1, lines
    (other,) = [line for line in lines if line not in trained]
    assert "is being trained in by process" in other or "nothing to do" in other
    assert [line["step"] for line in read_metrics(run / "metrics.jsonl", "train")] == list(range(1, 41))
    assert not (run / ABANDONED).exists()
    assert [c.step for c in list_checkpoints(run / "checkpoints")] == list(range(4, 41, 4))
