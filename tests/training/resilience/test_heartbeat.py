"""The file in which a rank tells of itself."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from dualroute.training.resilience import heartbeat
from dualroute.training.resilience.heartbeat import Heart, beat_path, process_is_gone, read_beat


def beat_for_ever(run: Path) -> None:
    heart = Heart(run, 1)
    number = 0
    while True:
        number += 1
        heart.mark("forward", number)
        heart.beat(error="x" * (number % 7 * 400))  # long and short ones in turn


def test_a_killed_rank_leaves_a_whole_beat_and_a_reader_never_sees_half_of_one(tmp_path: Path) -> None:
    seen = 0
    for _ in range(8):
        process = os.fork()
        if process == 0:
            try:
                beat_for_ever(tmp_path)
            finally:
                os._exit(1)
        try:
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:  # until the new one has written, over what the last one left
                beat = read_beat(tmp_path, 1)
                if beat is not None and beat.pid == process:
                    break
                time.sleep(0.001)
            until = time.monotonic() + 0.05
            while time.monotonic() < until:
                assert read_beat(tmp_path, 1) is not None
                seen += 1
        finally:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
        beat = read_beat(tmp_path, 1)
        assert beat is not None
        assert beat.pid == process
        assert process_is_gone(beat)
    assert seen > 8


def test_a_shorter_beat_over_a_longer_one_is_read(tmp_path: Path) -> None:
    heart = Heart(tmp_path, 0)
    heart.beat(error="a long word " * 200)
    written = heart.beat(error="")
    assert read_beat(tmp_path, 0) == written
    assert json.loads(beat_path(tmp_path, 0).read_text())["error"] == ""
    beat_path(tmp_path, 0).write_text('{"rank": 0, "half of a')
    assert read_beat(tmp_path, 0) is None
    again = heart.beat()
    assert read_beat(tmp_path, 0) == again


def test_a_reader_that_comes_while_it_is_copied_looks_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = Heart(tmp_path, 0).beat()
    whole = beat_path(tmp_path, 0).read_bytes()
    seen = iter([b"", whole[:40], whole[:40] + whole[:40], whole])
    monkeypatch.setattr(heartbeat, "_content", lambda path: next(seen))
    assert read_beat(tmp_path, 0) == written
    assert next(seen, None) is None
