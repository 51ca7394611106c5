"""One attempt to bring a file of a data set to the disk, by whatever way its address names.

In: the name of a file and the unfinished copy (`Part`). Out: the copy grown to its end, which nobody has
    compared
with a checksum yet, or `Unreachable`, which says whether another attempt may help.

- http(s): `http_transfer`, with its ranges and versions.
- every other URL: fsspec, range by range, going on where an earlier attempt stopped if the store still has
  the same version (ETag, or time and size).
- ``pipe:`` a command, through webdataset's opener; always from the start.

An answer is waited for in a thread of its own, for a store's client may never come back.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import psutil

from dualroute.data.remote.address import PIPE, file_address, is_http, shown
from dualroute.data.remote.http_transfer import Pace, Part, Unreachable, attempt
from dualroute.errors import UserError, one_line

_RANGE_BYTES = 8 << 20
_PIPE_BYTES = 1 << 20
T = TypeVar("T")


class Store(Protocol):
    """Where the files of a set lie."""

    def fetch(self, file: str, part: Part, timeout: float) -> None:
        """Bring what is missing of ``file``.

        Args:
            file: a plain name.
            part: of the copy; made for this file's `file_address`.
            timeout: seconds to wait for an answer.

        Raises:
            Unreachable: it was not brought.
            UserError: a package is missing.
            OSError: of the disk.
        """
        ...


def store_of(address: str) -> Store:
    """The store of a set.

    Raises:
        UserError: the address cannot be one.
    """
    if any(ord(character) < 32 for character in address):
        raise UserError(f"data path {address!r} holds a control character: correct it")
    if address.startswith(PIPE):
        if "{}" not in address:
            raise UserError(
                f"data path {address}: the command must hold {{}} where the name of a file is to stand, as "
                f"in 'pipe:aws s3 cp s3://bucket/set/{{}} -'"
            )
        return _Command(address)
    return _Http(address) if is_http(address) else _Fsspec(address)


class _Http:
    def __init__(self, address: str) -> None:
        self._address = address

    def fetch(self, file: str, part: Part, timeout: float) -> None:
        attempt(part, None, timeout)


class _Fsspec:
    """Any store that fsspec knows. Its clients do not survive a fork, so each process makes its own."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._opened: tuple[int, Any, str] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_address": self._address, "_opened": None}

    def fetch(self, file: str, part: Part, timeout: float) -> None:
        system, root = self._open(timeout)
        path = f"{root.rstrip('/')}/{file}"
        info = self._ask(lambda: system.info(path), timeout)
        size = info.get("size")
        if not isinstance(size, int) or size < 0:
            raise Unreachable("the store does not say how long the file is", permanent=True)
        if size > part.limit:
            raise Unreachable(
                f"the file has {size:,} bytes, more than the {part.limit:,} allowed", permanent=True
            )
        version = str(info.get("ETag") or f"{info.get('mtime') or info.get('LastModified') or ''} {size}")
        version = "".join(character for character in version if character.isprintable())[:500]
        start, earlier = part.begun()
        if start and (start > size or earlier != version):
            part.discard()
            start = 0
        with part.open("ab" if start else "wb") as stream:
            done = start
            part.keep(version, size, done)
            while done < size:
                stop = min(done + _RANGE_BYTES, size)
                block = self._ask(lambda a=done, b=stop: system.cat_file(path, start=a, end=b), timeout)
                if len(block) != stop - done:
                    raise Unreachable(f"the store sends {len(block):,} bytes for {stop - done:,}")
                stream.write(block)
                stream.flush()
                os.fsync(stream.fileno())
                done = stop
                part.keep(version, size, done)

    def _open(self, timeout: float) -> tuple[Any, str]:
        if self._opened is None or self._opened[0] != os.getpid():
            import fsspec

            options: dict[str, Any] = {"use_listings_cache": False}
            if self._address.lower().startswith(("s3://", "s3a://")):
                waits = {"connect_timeout": timeout, "read_timeout": timeout, "retries": {"max_attempts": 1}}
                options["config_kwargs"] = waits
            try:
                system, root = self._ask(lambda: fsspec.core.url_to_fs(self._address, **options), timeout)
            except ImportError as error:
                raise UserError(
                    f"{shown(self._address)}: {one_line(str(error))}: for S3 pip install -e '.[remote]'"
                ) from error
            system.retries = 1  # of s3fs: ours wait longer, and say what they wait for
            self._opened = (os.getpid(), system, root)
        return self._opened[1], self._opened[2]

    @staticmethod
    def _ask(question: Callable[[], T], timeout: float) -> T:
        try:
            return within(timeout, question)
        except (Unreachable, ImportError):
            raise
        except Exception as error:
            raise Unreachable(_reason(error), permanent=_is_permanent(error)) from error


def _is_permanent(error: Exception) -> bool:
    """Whether a store's error will be the same next time; what is not known may pass."""
    if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | NotImplementedError):
        return True
    return type(error).__name__ in (
        "NoCredentialsError",
        "ParamValidationError",
        "ProfileNotFound",
        "PartialCredentialsError",
    ) or (isinstance(error, ValueError | TypeError))


def _reason(error: Exception) -> str:
    said = one_line(str(error))[:200]
    if isinstance(error, PermissionError) or type(error).__name__.endswith("CredentialsError"):
        return (
            f"access is refused ({said or type(error).__name__}): check the store's credentials, which its "
            "client takes from the environment"
        )
    if isinstance(error, FileNotFoundError):
        return f"there is no such file, bucket or folder ({said})"
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def within(seconds: float, question: Callable[[], T]) -> T:
    """The answer to ``question``, asked in another thread.

    Raises:
        Unreachable: there was none within ``seconds``; the thread is left to itself.
    """
    answers: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put((question(), None))
        except BaseException as error:
            answers.put((None, error))

    threading.Thread(target=ask, name="data store", daemon=True).start()
    try:
        answer, error = answers.get(timeout=seconds)
    except queue.Empty:
        raise Unreachable(f"no answer within {seconds:g} s") from None
    if error is not None:
        raise error
    return answer  # type: ignore[return-value]


class _Command:
    """A command that writes a file to its standard output."""

    def __init__(self, address: str) -> None:
        self._address = address

    def fetch(self, file: str, part: Part, timeout: float) -> None:
        from webdataset.gopen import gopen

        done, pace = 0, Pace(timeout)
        with part.open("wb") as stream:
            pipe = gopen(file_address(self._address, file), "rb", _PIPE_BYTES)
            try:
                while block := within(timeout, lambda: pipe.stream.read1(_PIPE_BYTES)):
                    done += len(block)
                    if done > part.limit:
                        raise Unreachable(
                            f"the command writes more than the {part.limit:,} bytes allowed", True
                        )
                    stream.write(block)
                    pace.add(len(block))
            except BaseException:
                _kill(pipe.proc.pid)
                raise
            status = within(timeout, pipe.proc.wait)
            pipe.stream.close()
        if status:
            raise Unreachable(f"the command ends with status {status}")


def _kill(pid: int) -> None:
    """End a command and all that it started: one of them left would keep the pipe open."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for one in [*process.children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()


logging.getLogger("aiobotocore").setLevel(logging.WARNING)  # it tells where it finds credentials
