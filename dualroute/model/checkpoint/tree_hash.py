"""Hashes of files that several processes can write, hash and check, each its part; and how much each did.

In: a file, or what is about to become one.  Here: it is hashed in chunks of ``chunk_bytes``, and its own
digest is the sha256 of the chunks' digests, one after the other: a tree of two levels.  Who writes or reads a
chunk needs no other to hash it, and who puts the whole together hashes 32 bytes a chunk.  A file of one chunk
has the plain sha256 of its content.  Next: ``model/checkpoint/folder.py`` keeps the entries in
``checkpoint.json``.

    {"size": 1000, "sha256": "9f…"}                                                     one chunk
    {"size": 300000000, "sha256": "3c…", "chunk_bytes": 67108864, "chunks": ["0a…", …]}

:data:`TRAFFIC` counts the bytes that this process has read, written and hashed for checkpoints.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

CHUNK = 64 * 2**20  #: bytes
_BUFFER = 2**20
_PAGE = 4096


@dataclass
class Traffic:
    """Bytes of checkpoints that went through this process since :meth:`reset`.

    Attributes:
        read: From files, to load or to hash them.
        written: To files.
        hashed: Through sha256.
    """

    read: int = 0
    written: int = 0
    hashed: int = 0

    def __post_init__(self) -> None:
        self._lock = Lock()

    def add(self, *, read: int = 0, written: int = 0, hashed: int = 0) -> None:
        """Count; threads may."""
        with self._lock:
            self.read += read
            self.written += written
            self.hashed += hashed

    def reset(self) -> None:
        """Begin at zero."""
        with self._lock:
            self.read = self.written = self.hashed = 0


TRAFFIC = Traffic()


def digest_of_chunks(chunks: Sequence[str]) -> str:
    """The digest of a file whose chunks have these digests, hexadecimal."""
    if len(chunks) == 1:
        return chunks[0]
    return hashlib.sha256(b"".join(bytes.fromhex(chunk) for chunk in chunks)).hexdigest()


def entry(size: int, chunk_bytes: int, chunks: Sequence[str]) -> dict[str, Any]:
    """What ``checkpoint.json`` says of a file of ``size`` bytes."""
    said: dict[str, Any] = {"size": size, "sha256": digest_of_chunks(chunks)}
    if len(chunks) > 1:
        said |= {"chunk_bytes": chunk_bytes, "chunks": list(chunks)}
    return said


def wrong_entry(said: Any) -> bool:
    """Whether ``said``, as read, is no entry of a file, or one that contradicts itself."""
    if (
        not isinstance(said, dict)
        or not is_count(said.get("size"))
        or not isinstance(said.get("sha256"), str)
    ):
        return True
    if "chunks" not in said:
        return False
    chunks, chunk_bytes = said["chunks"], said.get("chunk_bytes")
    if not isinstance(chunks, list) or not is_count(chunk_bytes) or chunk_bytes == 0:
        return True
    try:
        return len(chunks) != -(-said["size"] // chunk_bytes) or digest_of_chunks(chunks) != said["sha256"]
    except (TypeError, ValueError):  # no text, or no hexadecimal one
        return True


def is_count(value: Any) -> bool:
    """Whether ``value``, as read, is a whole number from 0 on."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


@dataclass(frozen=True)
class Piece:
    """One chunk of one file: what can be checked by itself."""

    path: Path
    start: int
    size: int
    sha256: str

    def is_whole(self) -> bool:
        """Whether the bytes that lie there are those that were written.  Raises OSError."""
        return _digest(self.path, self.start, self.size) == self.sha256


def pieces(path: Path, said: Mapping[str, Any]) -> list[Piece]:
    """The chunks of the file ``path`` that ``said`` describes; a file of earlier versions is one."""
    size = int(said["size"])
    if "chunks" not in said:
        return [Piece(path, 0, size, said["sha256"])]
    step = int(said["chunk_bytes"])
    return [
        Piece(path, start, min(step, size - start), digest)
        for start, digest in zip(range(0, size, step), said["chunks"], strict=True)
    ]


def is_whole(path: Path, said: Mapping[str, Any]) -> bool:
    """Whether the file is the one that ``said`` describes, in its hashes.  Raises OSError."""
    return all(_in_threads(Piece.is_whole, pieces(path, said)))


def describe(path: Path) -> dict[str, Any]:
    """The entry of a file that is there."""
    size = path.stat().st_size
    starts = range(0, max(size, 1), CHUNK)
    chunks = _in_threads(lambda start: _digest(path, start, min(CHUNK, size - start)), starts)
    return entry(size, CHUNK, list(chunks))


def _in_threads(work: Any, items: Iterable[Any]) -> list[Any]:
    """``[work(item) for item in items]``; sha256 leaves the interpreter to the others meanwhile."""
    items = list(items)
    count = min(len(items), _threads())
    if count < 2:
        return [work(item) for item in items]
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(work, items))


def _threads() -> int:
    """Of this process, where several share a node."""
    try:
        beside = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    except ValueError:
        beside = 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, cores // beside))


def _digest(path: Path, start: int, size: int) -> str:
    """sha256 of ``size`` bytes of a file from ``start`` on, or of those that are there."""
    found, left, buffer = hashlib.sha256(), size, memoryview(bytearray(min(_BUFFER, max(size, 1))))
    with open(path, "rb", buffering=0) as stream:
        stream.seek(start)
        while left > 0 and (count := stream.readinto(buffer[: min(left, len(buffer))])):
            found.update(buffer[:count])
            left -= count
    TRAFFIC.add(read=size - left, hashed=size - left)
    return found.hexdigest()


def shared_chunk_bytes(size: int, writers: int) -> int:
    """Chunk of a file of ``size`` bytes that so many processes write: small enough for each to have one."""
    share = -(-size // max(1, writers))
    return max(_PAGE, min(CHUNK, -(-share // _PAGE) * _PAGE))


def own_range(size: int, writers: int, writer: int) -> tuple[int, int]:
    """The bytes [start, stop) of a shared file that are one writer's: whole chunks, next to each other."""
    chunk = shared_chunk_bytes(size, writers)
    chunks = -(-size // chunk)
    first, last = (chunks * number // writers for number in (writer, writer + 1))
    return min(size, first * chunk), min(size, last * chunk)


class HashedFile:
    """A file, or a range of one, written from front to end and hashed on the way.

    Args:
        path: The file; made where it is not there.
        start: Where the range begins; a multiple of ``chunk_bytes``.  None: the file is new and all ours.
        chunk_bytes: See the module.

    Attributes:
        chunks: Digests of the chunks that are complete; all of them once it is closed.
        written: Bytes.
    """

    def __init__(self, path: Path, start: int | None = None, chunk_bytes: int | None = None) -> None:
        self.chunks: list[str] = []
        self.written = 0
        self.chunk_bytes = chunk_bytes or CHUNK
        self._in_chunk, self._hash = 0, hashlib.sha256()
        flags = os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if start is None else 0)
        self._stream = open(os.open(path, flags, 0o666), "wb", buffering=0)  # noqa: SIM115
        self._stream.seek(start or 0)

    def write(self, data: Any) -> int:
        """Append bytes, or anything that shows its bytes."""
        view = memoryview(data).cast("B")
        left = view
        while len(left):
            left = left[self._stream.write(left) :]
        left = view
        while len(left):
            if self._in_chunk == self.chunk_bytes:
                self._end_chunk()
            now = left[: self.chunk_bytes - self._in_chunk]
            self._hash.update(now)
            self._in_chunk += len(now)
            left = left[len(now) :]
        self.written += len(view)
        TRAFFIC.add(written=len(view), hashed=len(view))
        return len(view)

    def _end_chunk(self) -> None:
        self.chunks.append(self._hash.hexdigest())
        self._in_chunk, self._hash = 0, hashlib.sha256()

    def close(self) -> None:
        """Flush to the disk, and end the last chunk."""
        if self._stream.closed:
            return
        try:
            os.fsync(self._stream.fileno())
        finally:
            self._stream.close()
        if self._in_chunk or not self.chunks:
            self._end_chunk()

    def entry(self) -> dict[str, Any]:
        """Of a file that is all ours, once it is closed."""
        return entry(self.written, self.chunk_bytes, self.chunks)

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            self.close()
        else:
            self._stream.close()
