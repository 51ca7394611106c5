"""Files appear whole or not at all."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from dualroute.errors import UserError, other_remedy
from dualroute.files import (
    appearing_folder,
    atomic_path,
    locked,
    read_limited,
    remove_leftovers,
    require_regular,
    sole_writer,
    write_bytes_atomically,
)


def test_write_replaces_the_old_contents_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "file.bin"
    write_bytes_atomically(path, b"old")
    write_bytes_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_the_target_is_untouched_until_the_body_ends(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with atomic_path(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.parent == tmp_path
    assert path.read_text() == "new"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_an_error_in_the_body_leaves_the_old_file_and_no_temporary_one(tmp_path, error):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def fail() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_body_that_writes_nothing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "file.txt"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_a_killed_writer_are_removed_and_nothing_else(tmp_path):
    (tmp_path / "kept.txt").write_text("kept")
    (tmp_path / ".hidden").write_text("kept")
    context = atomic_path(tmp_path / "file.txt")
    temporary = context.__enter__()  # and the process dies
    temporary.write_text("half")
    assert remove_leftovers(tmp_path) == [temporary]
    assert {path.name for path in tmp_path.iterdir()} == {"kept.txt", ".hidden"}
    context.gen.close()


def test_what_is_opened_for_reading_is_a_regular_file(tmp_path, monkeypatch):
    """To open a named pipe is to wait for a writer that may never come: each path is looked at first."""
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    file = tmp_path / "file.txt"
    file.write_text("text")
    os.symlink("file.txt", "link.txt")
    for name in ("file.txt", "link.txt"):
        assert require_regular(name).read_text() == "text"
    os.mkfifo("pipe")
    os.mkdir("folder")
    os.symlink("nowhere", "dangling")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        for name, why in {
            "pipe": "is a named pipe, not a file",
            "folder": "is a folder, not a file",
            "socket": "is a socket, not a file",
            "/dev/null": "is a device, not a file",
            "dangling": "a link to a file that is not there",
            "nowhere": "no such file",
            "file.txt/below": "cannot be read .Not a directory.",
            "x" * 300: "cannot be read .File name too long.",
            "a\0b": "not a possible file name",
        }.items():
            with pytest.raises(UserError, match=f"corpus .*{why}") as error:
                require_regular(name, "corpus")
            assert "\n" not in str(error.value)


def test_a_file_of_limited_length(tmp_path):
    path = tmp_path / "file.txt"
    path.write_bytes(b"12345")
    assert read_limited(path, 5) == b"12345"
    with pytest.raises(UserError, match=r"file\.txt: longer than the 4 bytes that it may have; replace it"):
        read_limited(path, 4)
    with pytest.raises(UserError, match="is a folder, not a file"):
        read_limited(tmp_path, 4)


def test_another_remedy():
    assert str(other_remedy(UserError("a; b.txt: broken; mend it"), "buy it")) == "a; b.txt: broken; buy it"
    assert str(other_remedy(UserError("broken"), "buy it")) == "broken; buy it"


WRITER = """
import os, sys
from dualroute.files import appearing_folder, sole_writer
from pathlib import Path
with appearing_folder(sys.argv[1]) as aside, sole_writer(Path(sys.argv[2]), Path("the cache")):
    if os.fork() == 0:  # as processes that read data are; it neither keeps nor drops the lock
        os._exit(0)
    os.wait()
    (aside / "half").write_text("half")
    print("there", flush=True)
    sys.stdin.read()
"""


def test_of_two_writers_of_one_output_the_second_is_refused_and_spoils_nothing(tmp_path):
    output, lock = tmp_path / "exported", tmp_path / "cache.lock"
    first = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(output), str(lock)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert first.stdout.readline() == "there\n"
        who = rf"exported is being written by process {first.pid} on .*: wait for it, or choose another"
        with pytest.raises(UserError, match=who), appearing_folder(output):
            pass
        with pytest.raises(UserError, match="the other is being written"), sole_writer(lock, "the other"):
            pass
        assert (tmp_path / ".writing-exported" / "half").exists()
        first.stdin.close()  # it ends
        assert first.wait(timeout=20) == 0
    finally:
        first.kill()
        first.wait()
    assert {path.name for path in tmp_path.iterdir()} == {"exported"}
    with sole_writer(lock, "the other"):
        assert lock.exists()


def test_a_killed_writer_keeps_nobody_out(tmp_path):
    output, lock = tmp_path / "exported", tmp_path / "cache.lock"
    first = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(output), str(lock)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert first.stdout.readline() == "there\n"
    first.kill()
    first.wait()
    with appearing_folder(output) as aside, sole_writer(lock, "the cache"):
        assert not list(aside.iterdir())
    assert {path.name for path in tmp_path.iterdir()} == {"exported"}


def test_a_lock_s_file_may_go_while_one_looks_at_it(tmp_path, monkeypatch):
    """Its holder removes it at any moment."""
    asked, stat = [0], os.stat

    def gone_at_the_second_look(path, *arguments, **options):
        asked[0] += 1
        if asked[0] == 2:
            raise FileNotFoundError(path)
        return stat(path, *arguments, **options)

    monkeypatch.setattr(os, "stat", gone_at_the_second_look)
    for _ in range(2):
        with locked(tmp_path / "lock", wait=60) as is_held:
            assert is_held
    assert asked[0] >= 3
