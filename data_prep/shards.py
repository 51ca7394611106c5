"""Cleaned documents to tar shards, in parallel, with bytes that do not depend on how parallel.

Comes in: the documents of `clean`, in order, and the tokenizer. Each is given to a shard of its split by
its text's size alone, tokenised in one of several threads, and written in the original order. Goes out:
the tars and index files that `dualroute.data.manifest` describes.

A shard appears by rename when it is complete, then a record of it in ``.prepare/``. A run that finds such
a record does not tokenise that shard's documents again; it continues with the first shard that is missing.

Threads suffice. sentencepiece lets go of Python's lock while it encodes, and a pool
of threads leaves no processes behind when the run is killed. The lock is held for about a tenth of the
work (reading, cleaning, making arrays), so more than about ten workers bring nothing.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.clean import CleanDocument
from dualroute.data.index import INDEX_COLUMNS
from dualroute.data.manifest import Shard, Split
from dualroute.data.tokenizer import Tokenizer
from dualroute.errors import UserError
from dualroute.files import atomic_path, file_sha256, write_bytes_atomically

STATE_FOLDER = ".prepare"
SPLITS = ("train", "val")
_TASK_BYTES = 1 << 18  # text handed to a thread at once

Item = tuple[CleanDocument, int]  # a document and the number of its shard


def npy_bytes(ids: np.ndarray) -> tuple[bytes, int]:
    """A 1-D array as a .npy file, and the offset of its first element therein."""
    stream = io.BytesIO()
    header = {"descr": ids.dtype.str, "fortran_order": False, "shape": ids.shape}
    np.lib.format.write_array_header_1_0(stream, header)
    offset = stream.tell()
    stream.write(ids.tobytes())
    return stream.getvalue(), offset


class ShardWriter:
    """One tar, written to a temporary name; the bytes depend on the documents only (no times, no owners)."""

    def __init__(self, folder: Path, split: str, number: int) -> None:
        self._folder, self._split, self.number = folder, split, number
        self.file = f"{split}-{number:05d}.tar"
        with ExitStack() as opening:
            temporary = opening.enter_context(atomic_path(folder / self.file))
            self._stream = opening.enter_context(temporary.open("wb"))
            self._cleanup = opening.pop_all()
        self._hash = hashlib.sha256()
        self._size = 0
        self._rows: list[tuple[int, int, int, int]] = []

    def add(self, document: CleanDocument, ids: np.ndarray) -> None:
        """Append KEY.npy and KEY.json."""
        key = f"{self.number:05d}_{len(self._rows):07d}"
        array, header = npy_bytes(ids)
        start = self._member(f"{key}.npy", array)
        self._rows.append((self.number, start + header, len(ids), document.num_bytes))
        about = {"source": document.name, "bytes": document.num_bytes, "sha256": document.digest.hex()}
        self._member(f"{key}.json", json.dumps(about, ensure_ascii=False).encode())

    def _member(self, name: str, data: bytes) -> int:
        """Append a file to the tar; give back the offset of its first byte."""
        info = tarfile.TarInfo(name)  # modification time 0, owner 0
        info.size = len(data)
        self._write(info.tobuf(tarfile.USTAR_FORMAT))
        start = self._size
        self._write(data)
        self._write(b"\0" * (-len(data) % tarfile.BLOCKSIZE))
        return start

    def _write(self, data: bytes) -> None:
        self._stream.write(data)
        self._hash.update(data)
        self._size += len(data)

    def close(self) -> Shard:
        """Finish the tar, give it its name, and record it as done."""
        self._write(b"\0" * (2 * tarfile.BLOCKSIZE))
        self._write(b"\0" * (-self._size % tarfile.RECORDSIZE))
        self._cleanup.close()
        rows = np.array(self._rows, dtype=np.int64)
        _, _, tokens, size = rows.sum(axis=0).tolist()
        shard = Shard(self.file, len(rows), tokens, size, self._size, self._hash.hexdigest())
        state = self._folder / STATE_FOLDER
        write_bytes_atomically(state / f"{self._split}-{self.number:05d}.rows", rows.tobytes())
        record = json.dumps(asdict(shard)).encode()
        write_bytes_atomically(state / f"{self._split}-{self.number:05d}.json", record)
        return shard

    def abandon(self, error: BaseException) -> None:
        """Remove the unfinished tar."""
        with suppress(OSError):  # a full disk refuses the last buffer again
            self._cleanup.__exit__(type(error), error, error.__traceback__)


def finished_shard(folder: Path, split: str, number: int) -> Shard | None:
    """The shard, if an earlier run completed it and its file is still there in full."""
    try:
        shard = Shard(**json.loads((folder / STATE_FOLDER / f"{split}-{number:05d}.json").read_bytes()))
        return shard if (folder / shard.file).stat().st_size == shard.size else None
    except (OSError, ValueError, TypeError):
        return None


@dataclass
class _SplitState:
    """Where a split stands while documents stream by."""

    shards: list[Shard]
    number: int = -1  # of the shard that documents are being assigned to
    assigned: int = 0  # bytes of text assigned to it
    done: Shard | None = None  # set when an earlier run finished it
    writer: ShardWriter | None = None


def write_shards(
    documents: Iterable[CleanDocument],
    tokenizer: Tokenizer,
    folder: Path,
    dtype: str,
    shard_bytes: int,
    workers: int,
    progress: Callable[[int, int, int], None] = lambda documents, size, tokens: None,
) -> dict[str, list[Shard]]:
    """Write every document into a shard of its split; give back the shards, those of earlier runs included.

    Args:
        documents: in stream order.
        tokenizer: must have <bos> and <eos>.
        folder: exists; its ``.prepare`` holds the records of finished shards.
        dtype: of the ids.
        shard_bytes: a shard is closed by the document that brings its text to this size.
        workers: threads that tokenise; the result does not depend on them.
        progress: told (documents, text bytes, tokens) so far.
    """
    states = {split: _SplitState(shards=[]) for split in SPLITS}
    counts = np.zeros(3, dtype=np.int64)

    def assign() -> Iterator[Item]:
        """What has yet to be tokenised."""
        for document in documents:
            state = states[document.split]
            if state.number < 0 or state.assigned >= shard_bytes:
                state.number, state.assigned = state.number + 1, 0
                state.done = finished_shard(folder, document.split, state.number)
                if state.done is not None:
                    state.shards.append(state.done)
                    counts[:] += (state.done.documents, state.done.bytes, state.done.tokens)
                    progress(*counts.tolist())
            state.assigned += document.num_bytes
            if state.done is None:
                yield document, state.number

    def encode(document: CleanDocument) -> np.ndarray:
        return tokenizer.encode_array(document.text, np.dtype(dtype).newbyteorder("<"), bos=True, eos=True)

    try:
        with closing(_in_order(assign(), lambda item: encode(item[0]), workers)) as encoded:
            for (document, number), ids in encoded:
                state = states[document.split]
                if state.writer is not None and state.writer.number != number:
                    state.shards.append(state.writer.close())
                    state.writer = None
                if state.writer is None:
                    state.writer = ShardWriter(folder, document.split, number)
                state.writer.add(document, ids)
                counts += (1, document.num_bytes, len(ids))
                progress(*counts.tolist())
        for state in states.values():
            if state.writer is not None:
                state.shards.append(state.writer.close())
                state.writer = None
    except BaseException as error:
        for state in states.values():
            if state.writer is not None:
                state.writer.abandon(error)
        raise
    return {
        split: sorted(state.shards, key=lambda shard: (len(shard.file), shard.file))
        for split, state in states.items()
    }


def _in_order(
    items: Iterable[Item], work: Callable[[Item], np.ndarray], workers: int
) -> Generator[tuple[Item, np.ndarray], None, None]:
    """(item, work(item)) in the order of ``items``, worked on by threads; few items are held at a time."""
    if workers == 1:
        for item in items:
            yield item, work(item)
        return

    def work_all(task: list[Item]) -> list[np.ndarray]:
        return [work(item) for item in task]

    pool = ThreadPoolExecutor(workers, thread_name_prefix="tokenise")
    pending: deque[tuple[list[Item], Future[list[np.ndarray]]]] = deque()
    try:
        for task in _tasks(items):
            pending.append((task, pool.submit(work_all, task)))
            if len(pending) > 2 * workers:
                finished, future = pending.popleft()
                yield from zip(finished, future.result(), strict=True)
        while pending:
            finished, future = pending.popleft()
            yield from zip(finished, future.result(), strict=True)
    finally:
        pool.shutdown(cancel_futures=True)


def _tasks(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Documents in lots that are worth handing to a thread."""
    task: list[Item] = []
    size = 0
    for item in items:
        task.append(item)
        size += item[0].num_bytes
        if size >= _TASK_BYTES:
            yield task
            task, size = [], 0
    if task:
        yield task


def write_index(folder: Path, split: str, shards: list[Shard]) -> Split:
    """Join the shards' rows into ``{split}.index.npy``, in constant memory."""
    documents = sum(shard.documents for shard in shards)
    path = folder / f"{split}.index.npy"
    width = len(INDEX_COLUMNS)
    with atomic_path(path) as temporary, open(temporary, "wb") as stream:
        header: dict[str, Any] = {"descr": "<i8", "fortran_order": False, "shape": (documents, width)}
        np.lib.format.write_array_header_1_0(stream, header)
        for number, shard in enumerate(shards):
            rows = (folder / STATE_FOLDER / f"{split}-{number:05d}.rows").read_bytes()
            if len(rows) != 8 * width * shard.documents:
                raise UserError(
                    f"{folder / STATE_FOLDER}: the rows of {shard.file} are damaged; use --force true"
                )
            stream.write(rows)
    totals = {key: sum(getattr(shard, key) for shard in shards) for key in ("documents", "tokens", "bytes")}
    return Split(
        name=split, **totals, index_file=path.name, index_sha256=file_sha256(path), shards=tuple(shards)
    )
