"""metrics.jsonl holds each step once, whatever was killed and resumed."""

from __future__ import annotations

import json
import math
import random
import tempfile
import warnings
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualroute.errors import UserError
from dualroute.training.monitoring.metrics_log import ABANDONED, MetricsLog, read_metrics


def write_steps(log: MetricsLog, first: int, last: int) -> None:
    for step in range(first, last + 1):
        log.write(step, "train", {"train/loss": random.Random(step).random()})
        if step % 3 == 0:
            log.write(step, "validation", {"val/loss": step / 7})
    log.close()


def test_numbers_keep_their_full_precision(tmp_path: Path) -> None:
    values = [1 / 3, 1e-300, 123456789.123456789, 5e-324]
    log = MetricsLog(tmp_path / "new folder" / "metrics.jsonl")
    for step, value in enumerate(values):
        log.write(step, "train", {"train/loss": value})
    # readable while the run goes on: nothing waits in a buffer
    assert [line["train/loss"] for line in read_metrics(log.path)] == values
    log.close()


def test_what_is_not_finite_is_null_and_the_file_stays_json(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write(1, "train", {"a": math.nan, "b": -math.inf, "c": 0.0})
    log.close()
    text = log.path.read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "step": 1,
        "event": "train",
        "a": None,
        "b": None,
        "c": 0.0,
    }


@settings(max_examples=60, deadline=None)
@given(killed_at=st.integers(0, 100_000), saved=st.integers(0, 12))
def test_killed_anywhere_and_resumed_it_equals_a_run_that_never_stopped(killed_at: int, saved: int) -> None:
    """Any prefix of the file, even a torn line, that holds the ``saved`` steps is as good as the whole."""
    with tempfile.TemporaryDirectory() as folder:
        straight, killed = Path(folder, "straight.jsonl"), Path(folder, "killed.jsonl")
        write_steps(MetricsLog(straight), 1, 12)
        content = straight.read_bytes()
        needed = sum(len(line) for line in content.splitlines(True) if json.loads(line)["step"] <= saved)
        killed.write_bytes(content[: needed + killed_at % (len(content) - needed + 1)])
        write_steps(MetricsLog(killed, resume_step=saved), saved + 1, 12)
        assert killed.read_bytes() == content


def test_a_validation_repeated_after_resume_is_not_logged_twice(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(MetricsLog(path), 1, 6)
    log = MetricsLog(path, resume_step=6)
    log.write(6, "validation", {"val/loss": 0.0})
    log.write(9, "validation", {"val/loss": 1.0})
    log.close()
    assert [line["val/loss"] for line in read_metrics(path, "validation")] == [3 / 7, 6 / 7, 1.0]


def test_the_newest_configuration_of_a_step_stays(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for step, config in ((0, "a"), (2, "b"), (2, "c")):
        log = MetricsLog(path, resume_step=step)
        log.write(step, "config", {"config": config})
        write_steps(log, step + 1, 4)
    assert [(line["step"], line["config"]) for line in read_metrics(path, "config")] == [(0, "a"), (2, "c")]


def test_a_run_from_the_beginning_starts_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.write(0, "validation", {"val/loss": 9.0})
    write_steps(log, 1, 3)
    before = path.read_bytes()
    MetricsLog(path, resume_step=0).close()
    assert path.read_bytes() == b""
    assert (tmp_path / ABANDONED).read_bytes().endswith(before)


def test_nothing_that_was_measured_is_deleted(tmp_path: Path) -> None:
    """However often a run goes back: each line ever written stands in one of the two files."""
    path = tmp_path / "metrics.jsonl"
    written: list[bytes] = []
    for number, step in enumerate((0, 5, 2, 2, 0)):
        log = MetricsLog(path, resume_step=step)
        log.write(step, "config", {"config": f"start {number}"})
        write_steps(log, step + 1, 6)
        with path.open("ab") as stream:
            stream.write(b'{"step": 7, "event": "tra')  # killed here
        written += path.read_bytes().splitlines()
    kept, aside = path.read_bytes().splitlines(), (tmp_path / ABANDONED).read_bytes().splitlines()
    assert set(written) <= {*kept, *aside}
    steps = [line["step"] for line in read_metrics(path, "train")]
    assert steps == [1, 2, 3, 4, 5, 6]
    moves = [json.loads(line) for line in aside if b'"abandoned"' in line]
    assert [move["step"] for move in moves] == [5, 2, 2, 0]


def test_a_whole_line_whose_end_was_cut_off_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(MetricsLog(path), 1, 2)
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    MetricsLog(path, resume_step=2).close()
    assert path.read_bytes() == content
    assert not (tmp_path / ABANDONED).exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/metrics\.jsonl cannot be written .*choose another folder"):
        MetricsLog(tmp_path / "file" / "metrics.jsonl")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics\.jsonl does not exist"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_lines_wait_for_a_disk_that_is_full(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.write(1, "train", {"loss": 1.0})
    disk = log._stream

    class Full:
        room, closed = 10, False

        def write(self, data):
            if not self.room:
                raise OSError(28, "No space left on device")
            part, self.room = data[: self.room], 0
            return disk.write(part)

    log._stream = Full()
    with pytest.warns(UserWarning, match=r"metrics\.jsonl cannot be written \(No space left"):
        log.write(2, "train", {"loss": 1.0})
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once
        log.write(3, "train", {"loss": 1.0})
    assert [line["step"] for line in read_metrics(path)] == [1]  # the torn line is passed over
    log._stream = disk  # somebody has made room
    log.write(4, "train", {"loss": 1.0})
    log.close()
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3, 4]


def test_lines_that_never_found_room_are_counted_and_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("dualroute.training.monitoring.metrics_log._MOST_WAITING", 400)
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log._stream.close()
    log._stream = open("/dev/full", "ab", buffering=0)  # noqa: SIM115
    with pytest.warns(UserWarning, match="training goes on"):
        log.write(0, "train", {"loss": 1.0})
    for step in range(1, 100):
        log.write(step, "train", {"loss": 1.0})
    assert sum(map(len, log._waiting)) <= 400
    with pytest.warns(UserWarning, match=r"\d+ lines of .*metrics\.jsonl are lost \(No space"):
        log.close()
