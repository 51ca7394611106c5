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
import json
import math
import os
import shutil
import socket
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from dualroute.errors import UserError

T = TypeVar("T")
_MARK = ".partial-"  # .NAME.partial-PID
_LARGEST_NOTE = 256 * 2**20  # bytes; a checkpoint of 10,000 partitions is described in 2 MiB


def require_regular(path: str | os.PathLike[str], what: str = "") -> Path:
    """``path``, if it names a regular file or a link to one: to open a FIFO would wait for ever.

    Args:
        path: of the file that is about to be read.
        what: the key or option that named it, put before the path in the message.

    Raises:
        UserError: there is nothing, a folder, a FIFO, a socket or a device, or it cannot be looked at.
    """
    path = Path(path)
    named = f"{what} {path}" if what else str(path)
    try:
        mode = path.stat().st_mode
    except ValueError as error:  # a NUL in the name
        raise UserError(f"{what or 'path'} {str(path)!r}: not a possible file name ({error})") from error
    except FileNotFoundError as error:
        why = "a link to a file that is not there" if path.is_symlink() else "no such file"
        raise UserError(f"{named}: {why}; give the path of an existing file") from error
    except OSError as error:
        raise UserError(f"{named}: cannot be read ({error.strerror or error}); check the path") from error
    if not stat.S_ISREG(mode):
        kinds = {
            stat.S_IFDIR: "folder",
            stat.S_IFIFO: "named pipe",
            stat.S_IFSOCK: "socket",
            stat.S_IFCHR: "device",
            stat.S_IFBLK: "device",
        }
        kind = kinds.get(stat.S_IFMT(mode), "special file")
        raise UserError(f"{named}: is a {kind}, not a file; give the path of a regular file")
    return path


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
def sole_writer(lock: Path, output: Path, option: str = "--output") -> Iterator[None]:
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
            if not lock_of_process(stream.fileno()):
                stream.seek(0)
                who = stream.read(200).strip() or "another process"
                stream.close()
                raise UserError(
                    f"{option} {output} is being written by {who}: wait for it, or choose another"
                )
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(stream.fileno()), os.stat(lock)):
                    break
            stream.close()  # the one before has removed it since we opened it
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        stream.flush()
    except OSError as error:
        raise UserError(f"{option} {output} cannot be written ({error})") from error
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        stream.close()


def lock_of_process(descriptor: int) -> bool:
    """Take a POSIX record lock on an open file; whether it is ours, or there is no such thing here."""
    try:
        import fcntl

        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        return True
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)
    return True


@contextlib.contextmanager
def appearing_folder(output: str | os.PathLike[str], option: str = "--output") -> Iterator[Path]:
    """Yield a folder to write in, which becomes ``output`` when the body has succeeded and is gone otherwise.

    Args:
        output: The folder.
        option: What names it, for messages.

    Raises:
        UserError: ``output`` exists already, cannot be written, or another process is writing it.
    """
    output = Path(output)
    if output.exists() or output.is_symlink():
        raise UserError(f"{option} {output} exists already: choose another folder")
    aside = output.with_name(f".writing-{output.name}")
    with sole_writer(output.with_name(f".writing-{output.name}.lock"), output, option):
        yield from _appearing(aside, output, option)


def _appearing(aside: Path, output: Path, option: str) -> Iterator[Path]:
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        yield aside
        make_durable(aside)
        os.rename(aside, output)
        fsync_folder(output.parent)
    except OSError as error:
        raise UserError(f"{option} {output} cannot be written ({error})") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def locked(path: str | os.PathLike[str], wait: float = 0.0) -> Iterator[bool]:
    """Hold a lock that ends with this process, however that ends; the file is removed afterwards.

    Yields whether it is held: False if another process still has it after ``wait`` seconds. Where the file
    system knows no locks it counts as held: the lock guards against accidents only.
    """
    path, until = Path(path), time.monotonic() + wait
    while True:
        # not to be emptied, whatever stands in its place, nor waited for, if that is a FIFO
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NONBLOCK", 0), 0o644)
        try:
            free = _lock_open_file(descriptor)
            # the last holder may have removed the file after it was opened here: then it locks nobody out
            same = False
            with contextlib.suppress(FileNotFoundError):
                same = os.path.samestat(os.fstat(descriptor), os.stat(path))
            if free and same:
                try:
                    yield True
                finally:
                    path.unlink(missing_ok=True)
                return
            if not free and time.monotonic() >= until:
                yield False
                return
        finally:
            os.close(descriptor)
        time.sleep(0.0 if free else 0.1)


def found_or_made(
    place: Path, look: Callable[[], T | None], make: Callable[[Path], None], option: str
) -> tuple[T, bool]:
    """What lies in a folder, made by the first process that finds nothing there while the others wait.

    Args:
        place: The folder, named by all that decides what lies in it; its parent may be missing.
        look: Reads it; null where there is nothing, or something damaged, which is removed then.
        make: Writes it into the folder that it is given, which appears by rename.
        option: What names ``place``'s parent, for messages.

    Returns:
        What ``look`` found, and whether it was made by this call.

    Raises:
        UserError: The parent cannot be written.
    """
    found = look()
    if found is not None:
        return found, False
    with contextlib.ExitStack() as held:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(place.with_name(f".{place.name}.lock"), wait=math.inf))
        except OSError as error:
            raise UserError(
                f"{option} {place.parent} cannot be written ({error}): name another folder"
            ) from error
        found = look()
        if found is not None:
            return found, False
        shutil.rmtree(place, ignore_errors=True)
        with appearing_folder(place, option) as aside:
            make(aside)
        found = look()
        assert found is not None
        return found, True


def _lock_open_file(descriptor: int) -> bool:
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except ImportError:
        pass
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
            raise
    return True


def remove_leftovers(folder: str | os.PathLike[str]) -> list[Path]:
    """Remove temporary files that a killed writer left in ``folder``; give back what was removed.

    Only for a folder that no other process is writing to: a live writer's file looks the same.
    """
    leftovers = [path for path in Path(folder).glob(f".*{_MARK}*") if path.is_file()]
    for path in leftovers:
        path.unlink(missing_ok=True)
    return leftovers


def read_limited(path: str | os.PathLike[str], limit: int) -> bytes:
    """The content of a regular file of at most ``limit`` bytes.

    Raises:
        UserError: no regular file (`require_regular`), longer, or not readable.
    """
    require_regular(path)
    try:
        with open(path, "rb") as stream:
            data = stream.read(limit + 1)
    except OSError as error:
        raise UserError(f"{os.fspath(path)}: cannot be read ({error.strerror}); try again") from error
    if len(data) > limit:
        raise UserError(f"{os.fspath(path)}: longer than the {limit:,} bytes that it may have; replace it")
    return data


def file_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, hexadecimal, in constant memory."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def parse_json(data: bytes) -> Any:
    """The value of a JSON text, strictly: no NaN or Infinity, no key twice, no nesting without end.

    Raises:
        ValueError: it is none; the message is one line.
    """

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no number of JSON")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a key stands twice")
        return found

    try:
        return json.loads(data, parse_constant=refuse, object_pairs_hook=once)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read_json(path: str | os.PathLike[str], *, limit: int = _LARGEST_NOTE) -> Any:
    """Content of one of our own JSON files (metadata, notes).

    Args:
        path: The file; a pipe or a device is not opened, since reading it could last for ever.
        limit: Largest size in bytes.

    Raises:
        FileNotFoundError: There is nothing.
        UserError: It is no regular file, cannot be read, is too large, or is not JSON.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "no regular file"
            raise UserError(f"{path} is {kind}, and a JSON file is expected there: restore it")
        if status.st_size > limit:
            raise UserError(f"{path} has {status.st_size:,} bytes (at most {limit:,}): this is not our file")
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): restore it") from error
    except UserError:
        raise
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, nested without end
        raise UserError(f"{path} is damaged ({error}): restore it") from error
