"""Files that appear whole or not at all.

Everything this project publishes (shards, manifests, checkpoints, reports) is first written to a temporary
name in the same folder, flushed to the disk, and then renamed: a reader sees the old file, or the new one,
never half of it - whatever kills the writer.

The rename itself is only durable once the *folder* has been flushed, so that is done
too.  A process that is killed outright (SIGKILL, power) leaves its temporary file behind; `remove_leftovers`
is for the next run in that folder.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from dualroute.errors import UserError

_MARK = ".partial-"  # .NAME.partial-PID


def fsync_folder(folder: str | os.PathLike[str]) -> None:
    """Make the renames inside ``folder`` durable (a no-op where folders cannot be opened)."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:  # some network file systems refuse to flush a folder
        pass
    finally:
        os.close(descriptor)


def make_durable(folder: Path) -> None:
    """Flush every file and folder below ``folder`` to the disk."""
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            fsync_folder(path)
        else:
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
    fsync_folder(folder)


def publish(temporary: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Flush the finished file ``temporary`` and give it its real name ``path`` (same file system)."""
    with open(temporary, "rb+") as stream:
        os.fsync(stream.fileno())
    os.replace(temporary, path)
    fsync_folder(Path(path).parent)


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it is flushed and renamed to ``path``.

    When the body raises, the temporary file is removed and ``path`` is left as it was.  The body has to
    create the file and close it.

    Raises:
        FileNotFoundError: the body wrote nothing.
        OSError: whatever the file system says (no space, no permission).
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}{_MARK}{os.getpid()}")
    try:
        yield temporary
        publish(temporary, path)
    finally:
        # after the rename there is nothing left to remove
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def write_bytes_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Write ``data`` to ``path`` so that ``path`` holds all of it or is left as it was."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def sole_writer(lock: Path, output: Path) -> Iterator[None]:
    """Keep other processes from writing ``output`` meanwhile; ``lock`` is a file that is there as long.

    The lock is one of a process (POSIX record lock): processes that are forked inside do not keep it, and it
    goes with the process however that ends.  A file system without locks guards nothing, and says nothing.

    Raises:
        UserError: Another process writes it, or the lock's folder cannot be written.
    """
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        while True:
            stream = open(lock, "a+", encoding="utf-8")  # noqa: SIM115
            if not _lock(stream.fileno()):
                stream.seek(0)
                who = stream.read(200).strip() or "another process"
                stream.close()
                raise UserError(
                    f"--output {output} is being written by {who}: wait for it, or choose another"
                )
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(stream.fileno()), os.stat(lock)):
                    break
            stream.close()  # the one before has removed it since we opened it
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        stream.flush()
    except OSError as error:
        raise UserError(f"--output {output} cannot be written ({error})") from error
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        stream.close()


def _lock(descriptor: int) -> bool:
    """Whether the lock is ours, or there is no such thing here."""
    try:
        import fcntl

        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        return True
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)
    return True


@contextlib.contextmanager
def appearing_folder(output: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a folder to write in, which becomes ``output`` when the body has succeeded and is gone otherwise.

    Raises:
        UserError: ``output`` exists already, cannot be written, or another process is writing it.
    """
    output = Path(output)
    if output.exists() or output.is_symlink():
        raise UserError(f"--output {output} exists already: choose another folder")
    aside = output.with_name(f".writing-{output.name}")
    with sole_writer(output.with_name(f".writing-{output.name}.lock"), output):
        yield from _appearing(aside, output)


def _appearing(aside: Path, output: Path) -> Iterator[Path]:
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        yield aside
        make_durable(aside)
        os.rename(aside, output)
        fsync_folder(output.parent)
    except OSError as error:
        raise UserError(f"--output {output} cannot be written ({error})") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def remove_leftovers(folder: str | os.PathLike[str]) -> list[Path]:
    """Remove temporary files that a killed writer left in ``folder``; give back what was removed.

    Only for a folder that no other process is writing to: a live writer's file looks the same.
    """
    leftovers = [path for path in Path(folder).glob(f".*{_MARK}*") if path.is_file()]
    for path in leftovers:
        path.unlink(missing_ok=True)
    return leftovers


def file_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, hexadecimal, in constant memory."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
