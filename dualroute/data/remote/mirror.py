"""One data set that lies elsewhere: its files by name, brought when they are asked for, compared, kept.

In: an address and the options. Here: `Store` brings a file into the folder of the set in the `DiskCache`;
    what
fails is tried again, later each time; a file counts only once its length and SHA-256 are those that the
manifest
states. Out: paths and open files, to `dualroute.data.manifest` and `dualroute.data.reader`, for which the
folder is a data set as any other.
"""

from __future__ import annotations

import hashlib
import logging
import os
import random
import shutil
import tempfile
import time
from pathlib import Path
from typing import IO, Any

from dualroute.data.remote.address import file_address, shown
from dualroute.data.remote.config import GIB, RemoteOptions
from dualroute.data.remote.disk_cache import CacheFull, DiskCache
from dualroute.data.remote.http_transfer import Part, Unreachable
from dualroute.data.remote.stores import store_of
from dualroute.errors import UserError
from dualroute.files import file_sha256, publish

_LONGEST_SECONDS = 30.0  # between two attempts
_LONGEST_ASKED = 120.0  # that a server may ask for
_AHEAD_BYTES = 1 << 20  # an attempt that brought so much more does not count as failed
_log = logging.getLogger(__name__)


class UnusableData(UserError):
    """Data that are damaged, or cannot be had: what ``data.on_bad_data`` is about."""


class Mirror:
    """A set elsewhere and its copies here. May be pickled, and used after a fork.

    Args:
        address: of the set.
        options: None for the defaults.

    Raises:
        UserError: the address or the cache cannot be used.
    """

    def __init__(self, address: str, options: RemoteOptions | None = None) -> None:
        self.address, self.options = address, options or RemoteOptions()
        self._store = store_of(address)
        self._cache = DiskCache(os.path.abspath(self.options.cache_dir), self.options.cache_bytes)
        self._name = hashlib.sha256(address.encode(errors="surrogateescape")).hexdigest()[:16]
        self.folder = Path()
        self._lease: IO[bytes] | None = None
        self.holds_all = False  # whether the cache has room for the whole set

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lease": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.folder != Path():
            self.folder, self._lease = self._cache.open_set(self.folder.name)

    @property
    def shown(self) -> str:
        """The address without secrets."""
        return shown(self.address)

    @property
    def limit(self) -> int:
        """Bytes that the cache may hold."""
        return self._cache.limit

    # ------------------------------------------------------------------ opening

    def read_first(self, file: str, limit: int) -> bytes:
        """The content of a file that says what the others are; always asked for anew.

        Args:
            file: plain name.
            limit: bytes that it may have.

        Raises:
            UserError: it cannot be had.
        """
        scratch = Path(tempfile.mkdtemp(prefix=".scratch-", dir=self._cache.folder))
        try:
            part = Part(scratch / file, file_address(self.address, file), checked=False, limit=limit)
            self._try(file, part)
            return part.path.read_bytes()
        except Unreachable as error:
            if error.permanent:
                remedy = "correct the path, or make the set with `dualroute prepare` and copy it there"
                raise UserError(f"{self.shown}/{file}: {error}; {remedy}") from error
            raise
        except OSError as error:
            raise self._of_disk(error, file) from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def use(self, fingerprint: str) -> None:
        """From now on the copies are those of the set with this fingerprint."""
        self.folder, self._lease = self._cache.open_set(f"{self._name}-{fingerprint[:16]}")

    def use_last(self) -> bool:
        """Take the copies of the set as it was last seen at this address; False if there are none."""
        found = sorted(
            self._cache.folder.glob(f"sets/{self._name}-*/manifest.json"),
            key=lambda path: path.stat().st_mtime,
        )
        if not found:
            return False
        self.folder, self._lease = self._cache.open_set(found[-1].parent.name)
        return True

    def check_fits(self, small_files: int, largest_shard: int, all_files: int) -> None:
        """Refuse a cache that cannot work, and warn of one in which shards will come and go.

        Raises:
            UserError: names data.cache_gib and what it has to be.
        """
        least = small_files + 2 * largest_shard
        if least > self.limit:
            raise UserError(
                f"data.cache_gib {self.limit / GIB:.3g} is too little for {self.shown}: its index and two "
                f"shards have {least:,} bytes; give at least {_round_up(least / GIB)}"
            )
        self.holds_all = all_files <= self.limit
        if not self.holds_all:
            _log.warning(
                "%s has %.3g GiB and data.cache_gib is %.3g: shards will be brought more than once, "
                "which an order that is random over all of them makes slow; give %s GiB where there is room, "
                "or let the order be random among what fits (data.shuffle_tokens)",
                self.shown,
                all_files / GIB,
                self.limit / GIB,
                _round_up(all_files / GIB),
            )

    # ------------------------------------------------------------------ files

    def get(self, file: str, sha256: str, size: int | None = None, limit: int | None = None) -> Path:
        """The path of a copy, brought if it is not there.

        Args:
            file: plain name.
            sha256: that it must have.
            size: that it must have; None where it is not known.
            limit: bytes that it may have where the size is not known.

        Raises:
            UnusableData: it cannot be had, or is not what it should be.
            CacheFull: there is no room.
            UserError: another process that brings it does not get ahead.
        """
        path = self.folder / file
        if self._is_there(path, size):
            return path
        if os.path.lexists(path) and not self._is_there(path, size):  # cut off by what is not ours
            self.discard(file)  # (one that another process has just brought is there by now)
        with self._cache.turn(path, size or 0, self._patience()) as mine:
            if mine:
                self._bring(file, path, sha256, size, size if size is not None else limit or 0)
        return path

    def open(self, file: str, sha256: str, size: int, wait: bool = False) -> IO[bytes]:
        """A copy, opened, that stays as long as it, or a map of it, is open; raises as `get` does.

        Args:
            wait: in a cache that is full, as long as for an answer of the store: others may let go of
                something.
        """
        until = time.monotonic() + self.options.timeout
        for _ in range(10):
            path = self._get_when_there_is_room(file, sha256, size, until if wait else 0.0)
            stream = self._cache.open_copy(path)
            if stream is not None:
                return stream
        raise UserError(
            f"{path}: goes as soon as it is there; data.cache_gib {self.limit / GIB:.3g} is too little "
            "for so many processes: raise it"
        )

    def _get_when_there_is_room(self, file: str, sha256: str, size: int, until: float) -> Path:
        while True:
            try:
                return self.get(file, sha256, size)
            except CacheFull:
                if time.monotonic() > until:
                    raise
            time.sleep(random.uniform(0.02, 0.1))

    def holds(self, file: str, size: int) -> bool:
        """Whether a copy is there."""
        return self._is_there(self.folder / file, size)

    def discard(self, file: str) -> None:
        """Forget a copy that turned out to be damaged."""
        (self.folder / file).unlink(missing_ok=True)

    def check_there(self, file: str, sha256: str, size: int | None, limit: int) -> str | None:
        """Bring a file past the copies and compare it; the line that says what is wrong, if anything is."""
        scratch = Path(tempfile.mkdtemp(prefix=".scratch-", dir=self._cache.folder))
        try:
            self._bring(file, scratch / file, sha256, size, limit)
        except UserError as error:
            return str(error)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return None

    @staticmethod
    def _is_there(path: Path, size: int | None) -> bool:
        try:
            return size is None or path.stat().st_size == size if path.is_file() else False
        except OSError:
            return False

    def _bring(self, file: str, path: Path, sha256: str, size: int | None, limit: int) -> None:
        part = Part(path, file_address(self.address, file), checked=True, limit=limit, keep_all=True)
        whole = f"{self.shown}/{file}"
        try:
            for last in (False, True):
                self._try(file, part)
                found = file_sha256(part.path)
                if found == sha256 and (size is None or part.size == size):
                    publish(part.path, path)
                    part.discard()
                    return
                length = part.size
                part.discard()
                if last:
                    other = (
                        f"{length:,} bytes, {size:,} expected"
                        if size not in (None, length)
                        else f"sha256 {found}"
                    )
                    raise UnusableData(
                        f"{whole}: contents differ from the manifest ({other}, expected sha256 {sha256}); "
                        "copy it there again"
                    )
                _log.warning("%s: contents differ from the manifest; brought once more", whole)
        except Unreachable as error:
            raise UnusableData(f"{whole}: {error}; {_remedy(error)}") from error
        except OSError as error:
            raise self._of_disk(error, file) from error

    def _try(self, file: str, part: Part) -> None:
        """Attempt after attempt, later each time, until one succeeds or there have been too many."""
        options = self.options
        best, failed = part.size, 0
        while True:
            try:
                return self._store.fetch(file, part, options.timeout)
            except Unreachable as error:
                failed = 1 if part.size >= best + _AHEAD_BYTES else failed + 1
                best = max(best, part.size)
                if error.permanent or failed > options.retries:
                    raise
                pause = min(options.retry_seconds * 2 ** (failed - 1), _LONGEST_SECONDS)
                pause *= random.uniform(0.5, 1.5)
                if error.after is not None:
                    pause = max(pause, min(error.after, _LONGEST_ASKED))
                _log.warning(
                    "%s/%s: %s; attempt %d of %d in %.1f s",
                    self.shown,
                    file,
                    error,
                    failed + 1,
                    options.retries + 1,
                    pause,
                )
                time.sleep(pause)

    def _patience(self) -> float:
        """Seconds in which one who brings a file shows a sign, or has given up."""
        return 60 + 2 * self.options.timeout + _LONGEST_ASKED * 1.5

    def _of_disk(self, error: OSError, file: str) -> UserError:
        return UserError(
            f"{self.folder / file}: cannot be written ({error.strerror or error}); make room there, lower "
            "data.cache_gib, or name another data.cache_dir"
        )


def _remedy(error: Unreachable) -> str:
    if error.permanent:
        return "correct the path or the access, and run again"
    return "check the connection and run again (data.fetch_retries and data.retry_seconds allow more)"


def _round_up(gib: float) -> str:
    return f"{gib * 1.02 + 0.01:.2f}"
