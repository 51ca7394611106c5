"""The folder of copies that all processes of a node share: whose turn it is, how much room there is, what
goes.

    CACHEDIR.TAG               so that backups pass it over
    sets/NAME/                 one data set, its files under their own names; NAME.part where one is
    unfinished sets/NAME/.lease           locked, shared, by every process that has the set open
    locks/NAME.FILE.lock       locked by the process that brings a file; tells the bytes that it has spoken
    for

Everything rests on locks of the kernel (flock), which end with the process that held them, however it ended.

- One process brings a file, the others wait for it; they give up when it does not get ahead any more.
- A reader keeps a shared lock on the shard that it has mapped. What is to go must be locked for this process
  alone first, so nothing in use ever goes; where the file system knows no locks, nothing goes at all.
- Room is made before a file is brought: finished, unfinished and promised bytes together stay below the
  limit. The shards that were read longest ago go first, then sets that nobody has open.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from dualroute.errors import UserError
from dualroute.files import locked, parse_json, read_limited

_TAG = "Signature: 8a477f597d28d172789f06886806bc55\n# copies of data sets; may be removed\n"
_LEASE = ".lease"
_STEP_SECONDS = 1.0
_ROOM_SECONDS = 120.0
_OPEN_SECONDS = 30.0
_SCRATCH_SECONDS = 7 * 24 * 3600.0
_log = logging.getLogger(__name__)


class CacheFull(UserError):
    """All that is in the cache is in use; somebody may let go of it."""


@dataclass(frozen=True)
class _Copy:
    """A file in the cache."""

    path: Path
    size: int
    used: float  # time of the last use


class DiskCache:
    """The folder.

    Args:
        folder: made if it is not there.
        limit: bytes that it may hold.

    Raises:
        UserError: the folder cannot be made or written.
    """

    def __init__(self, folder: str | os.PathLike[str], limit: int) -> None:
        self.folder, self.limit = Path(folder), limit
        try:
            for name in ("sets", "locks"):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
            for scratch in self.folder.glob(".scratch-*"):  # of a process that was killed
                if time.time() - scratch.stat().st_mtime > _SCRATCH_SECONDS:
                    shutil.rmtree(scratch, ignore_errors=True)
            tag = self.folder / "CACHEDIR.TAG"
            if not tag.exists():
                tag.write_text(_TAG)
            if not os.access(self.folder / "sets", os.W_OK | os.X_OK):
                raise PermissionError(13, "Permission denied")
        except OSError as error:
            raise UserError(
                f"data.cache_dir {self.folder}: cannot be written ({error.strerror}); name a folder on "
                "a disk of this machine"
            ) from error

    # ------------------------------------------------------------------ sets and files in use

    def open_set(self, name: str) -> tuple[Path, IO[bytes]]:
        """The folder of a set, and a lease on it: as long as that is open, none of it but shards may go."""
        folder = self.folder / "sets" / name
        until = time.monotonic() + _OPEN_SECONDS
        while time.monotonic() < until:
            folder.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # it is being removed
                lease = open(folder / _LEASE, "ab")  # noqa: SIM115
                if lock_file(lease, shared=True) and _is_at(lease, folder / _LEASE):
                    os.utime(folder / _LEASE)
                    return folder, lease
                lease.close()
            time.sleep(0.01)
        raise UserError(f"{folder}: another process keeps it locked; end it, or name another data.cache_dir")

    @staticmethod
    def open_copy(path: Path) -> IO[bytes] | None:
        """A copy, opened and locked so that it does not go as long as it, or a map of it, is open; None if
        it has gone."""
        until = time.monotonic() + _OPEN_SECONDS
        while time.monotonic() < until:
            try:
                stream = open(path, "rb")  # noqa: SIM115
            except FileNotFoundError:
                return None
            if lock_file(stream, shared=True) and _is_at(stream, path):
                with contextlib.suppress(OSError):
                    os.utime(path, (time.time(), os.fstat(stream.fileno()).st_mtime))
                return stream
            stream.close()
            time.sleep(0.01)
        raise UserError(f"{path}: another process keeps it locked; end it, or name another data.cache_dir")

    # ------------------------------------------------------------------ turns

    @contextlib.contextmanager
    def turn(self, path: Path, size: int, patience: float) -> Iterator[bool]:
        """Wait until nobody else brings ``path``; True to the one who is to bring it, False if it is there.

        Args:
            path: of the file in a set.
            size: bytes that are spoken for meanwhile.
            patience: seconds to wait without a sign that the other one gets ahead.

        Raises:
            UserError: The time to wait is over and the lock is still held.
            CacheFull: there is no room.
        """
        lock = self.folder / "locks" / f"{path.parent.name}.{path.name}.lock"
        part = path.with_name(path.name + ".part")
        seen, until = _signs(part), time.monotonic() + patience
        while True:
            with locked(lock, wait=_STEP_SECONDS) as free:
                if free:
                    if path.exists():
                        yield False
                        return
                    self._make_room(size, part, lock)
                    yield True
                    return
            if (now := _signs(part)) != seen:
                seen, until = now, time.monotonic() + patience
            elif time.monotonic() > until:
                raise UserError(
                    f"{path}: another process{_who(lock)} has been bringing it and does not get ahead for "
                    f"{patience:.0f} s; end that process and run again"
                )

    # ------------------------------------------------------------------ room

    def used(self) -> int:
        """Bytes of all copies, unfinished ones included."""
        return sum(copy.size for copy in self._copies())

    def _make_room(self, size: int, part: Path, lock: Path) -> None:
        """Let go of what was used longest ago until ``size`` more bytes fit, and speak for them in ``lock``.

        Raises:
            CacheFull: they do not, with all that is in use.
        """
        if size > self.limit:
            raise UserError(
                f"data.cache_gib {self.limit / 2**30:g} is less than one file needs ({size:,} bytes): raise "
                "it"
            )
        with locked(self.folder / ".room.lock", wait=_ROOM_SECONDS) as free:
            if not free:
                raise UserError(f"{self.folder}: another process keeps it locked; end it and run again")
            copies = sorted(self._copies(), key=lambda copy: copy.used)
            promised = self._promised()
            begun = part.stat().st_size if part.exists() else 0
            total = sum(copy.size for copy in copies) + sum(promised.values()) - begun
            short = max(total + size - self.limit, size - shutil.disk_usage(self.folder).free - begun)
            in_use = 0
            for copy in copies:
                if short <= 0:
                    break
                if copy.path == part or str(copy.path) in promised:
                    continue
                if copy.path.suffix in (".tar", ".part") and self._remove(copy.path):
                    short -= copy.size
                elif copy.path.suffix == ".tar":
                    in_use += copy.size
            for lease in sorted(self.folder.glob(f"sets/*/{_LEASE}"), key=lambda path: path.stat().st_mtime):
                if short <= 0:
                    break
                short -= self._remove_set(lease)
            if short > 0:
                raise CacheFull(
                    f"data.cache_dir {self.folder} is full: {size:,} bytes more are needed, the limit is "
                    f"{self.limit:,} (data.cache_gib), {shutil.disk_usage(self.folder).free:,} are free on "
                    f"the disk, and {in_use:,} are being read; raise data.cache_gib, make room on the disk, "
                    "or lower data.num_workers"
                )
            lock.write_text(json.dumps({"part": str(part), "bytes": size, "process": os.getpid()}))

    def _copies(self) -> list[_Copy]:
        found = []
        for folder in os.scandir(self.folder / "sets"):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                for entry in os.scandir(folder.path):
                    with contextlib.suppress(FileNotFoundError):
                        status = entry.stat()
                        used = max(status.st_atime, status.st_mtime)
                        found.append(_Copy(Path(entry.path), status.st_size, used))
        return found

    def _promised(self) -> dict[str, int]:
        """{path of the unfinished file: bytes that are still to come} of those who bring one now."""
        promised = {}
        for lock in (self.folder / "locks").glob("*.lock"):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError), open(lock, "rb") as stream:
                if lock_file(stream, shared=False):
                    continue  # of a process that is gone; its unfinished file counts with what it has
                note = parse_json(read_limited(lock, 1 << 12))
                part = Path(note["part"])
                here = part.stat().st_size if part.exists() else 0
                promised[str(part)] = max(int(note["bytes"]) - here, 0)
        return promised

    @staticmethod
    def _remove(path: Path) -> bool:
        """Remove a copy unless it is in use."""
        try:
            with open(path, "rb") as stream:
                if not lock_file(stream, shared=False):
                    return False
                path.unlink()
        except FileNotFoundError:
            return True
        except OSError:
            return False
        if path.suffix == ".part":
            path.with_name(path.name + ".json").unlink(missing_ok=True)
        _log.debug("%s: let go", path)
        return True

    def _remove_set(self, lease: Path) -> int:
        """Remove what is left of a set that nobody has open; the bytes that it had."""
        freed = 0
        with contextlib.suppress(OSError), open(lease, "rb") as stream:
            if not lock_file(stream, shared=False):
                return 0
            for path in lease.parent.iterdir():
                if path.name != _LEASE and (path.suffix not in (".tar", ".part") or self._remove(path)):
                    freed += path.stat().st_size if path.exists() else 0
                    path.unlink(missing_ok=True)
            lease.unlink()
            lease.parent.rmdir()
        return freed


def lock_file(stream: IO[bytes], shared: bool) -> bool:
    """Lock an open file until it, and every map of it, is closed; whether that could be done.

    A shared lock counts as had where the file system knows none; a sole one does not.
    """
    try:
        import fcntl

        fcntl.flock(stream.fileno(), (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return shared
    return True


def _is_at(stream: IO[bytes], path: Path) -> bool:
    """Whether an open file is still the one at ``path``."""
    try:
        return os.path.samestat(os.fstat(stream.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _signs(part: Path) -> tuple[int, float]:
    """What changes while somebody brings a file."""
    try:
        status = part.stat()
    except OSError:
        return 0, 0.0
    return status.st_size, status.st_mtime


def _who(lock: Path) -> str:
    try:
        return f" ({parse_json(read_limited(lock, 1 << 12))['process']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
