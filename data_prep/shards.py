"""Cleaned documents to tar shards, in parallel, with bytes that do not depend on how parallel.

Comes in: the documents of `clean`, in order, and the tokenizer. Each is given to a shard of its split by
its text's size alone, tokenised in one of several threads, and written in the original order. Goes out:
the tars and index files that `dualroute.data.manifest` describes.

A shard appears by rename when it is complete, then a note of it (`notes`). A run that finds such a note, and
that everything is as it says, does not tokenise that shard's documents again.

Threads suffice. sentencepiece lets go of Python's lock while it encodes, and a pool
of threads leaves no processes behind when the run is killed. The lock is held for about a tenth of the
work (reading, cleaning, making arrays), so more than about ten workers bring nothing.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.clean import CleanDocument
from data_prep.notes import (
    SPLITS,
    STATE_FOLDER,
    Unusable,
    finished_shard,
    npy_bytes,
    shard_rows,
    write_shard_note,
)
from data_prep.readers.chats import chat_ids
from dualroute.data.index import write_header
from dualroute.data.manifest import Shard, Split
from dualroute.data.tokenizer import Tokenizer
from dualroute.files import atomic_path, file_sha256

__all__ = ["SPLITS", "STATE_FOLDER", "ShardWriter", "write_index", "write_shards"]

_TASK_BYTES = 1 << 18  # text handed to a thread at once
_HELD_BYTES = 1 << 26  # text that waits for its turn, beyond one document for each thread

Item = tuple[CleanDocument, int]  # a document and the number of its shard


class ShardWriter:
    """One tar, written to a temporary name; the bytes depend on the documents only (no times, no owners).

    Args:
        folder: of the data set.
        split, number: of the shard.
        origin: what the ids are made from and with, for the note.
    """

    def __init__(self, folder: Path, split: str, number: int, origin: str = "") -> None:
        self._folder, self._split, self.number = folder, split, number
        self._origin, self._dtype = origin, ""
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
        self._dtype = ids.dtype.str
        start = self._member(f"{key}.npy", array)
        self._rows.append((self.number, start + header, len(ids), document.num_bytes))
        about = {"source": document.name, "bytes": document.num_bytes, "sha256": document.digest.hex()}
        if document.language is not None:
            about["language"] = document.language
        # a name that is not UTF-8 becomes what JSON escapes it as
        data = json.dumps(about, ensure_ascii=False).encode(errors="backslashreplace")
        self._member(f"{key}.json", data)

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
        """Finish the tar, give it its name, and note it as finished."""
        self._write(b"\0" * (2 * tarfile.BLOCKSIZE))
        self._write(b"\0" * (-self._size % tarfile.RECORDSIZE))
        self._cleanup.close()
        rows = np.array(self._rows, dtype=np.int64)
        _, _, tokens, size = rows.sum(axis=0).tolist()
        shard = Shard(self.file, len(rows), tokens, size, self._size, self._hash.hexdigest())
        write_shard_note(self._folder, self._split, self.number, shard, rows, self._dtype, self._origin)
        return shard

    def abandon(self, error: BaseException) -> None:
        """Remove the unfinished tar."""
        with suppress(OSError):  # a full disk refuses the last buffer again
            self._cleanup.__exit__(type(error), error, error.__traceback__)


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
    note: Callable[[str], None] = lambda line: None,
    plan: str = "",
    mine: Callable[[str, int], bool] | None = None,
    chats: bool = False,
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
        note: told a line about each shard of an earlier run that has to be made again.
        plan: SHA-256 of options and inputs; a finished shard of another plan is made again.
        mine: which shards (split, number) to write, the others being another task's; by default all.
        chats: the texts are chats, see `data_prep.readers.chats`.
    """
    stored = np.dtype(dtype).newbyteorder("<")
    origin = f"plan {plan}, tokenizer {tokenizer.sha256}"
    states = {split: _SplitState(shards=[]) for split in SPLITS}
    counts = np.zeros(3, dtype=np.int64)

    def earlier(split: str, number: int) -> Shard | None:
        try:
            return finished_shard(folder, split, number, stored.str, origin)
        except Unusable as error:
            note(f"{folder / f'{split}-{number:05d}.tar'}: made again; {error}")
            return None

    def assign() -> Iterator[Item]:
        """What has yet to be tokenised."""
        for document in documents:
            state = states[document.split]
            if state.number < 0 or state.assigned >= shard_bytes:
                state.number, state.assigned = state.number + 1, 0
                others = mine is not None and not mine(document.split, state.number)
                state.done = None if others else earlier(document.split, state.number)
                if state.done is not None:
                    state.shards.append(state.done)
                    counts[:] += (state.done.documents, state.done.bytes, state.done.tokens)
                    progress(*counts.tolist())
            state.assigned += document.num_bytes
            if state.done is None and (mine is None or mine(document.split, state.number)):
                yield document, state.number

    def encode(document: CleanDocument) -> np.ndarray:
        if chats:
            return chat_ids(tokenizer, document.text, document.name, stored)
        return tokenizer.encode_array(document.text, stored, bos=True, eos=True)

    try:
        with closing(_in_order(assign(), lambda item: encode(item[0]), workers)) as encoded:
            for (document, number), ids in encoded:
                state = states[document.split]
                if state.writer is not None and state.writer.number != number:
                    state.shards.append(state.writer.close())
                    state.writer = None
                if state.writer is None:
                    state.writer = ShardWriter(folder, document.split, number, origin)
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
    pending: deque[tuple[list[Item], int, Future[list[np.ndarray]]]] = deque()
    held = 0
    try:
        for task, size in _tasks(items):
            pending.append((task, size, pool.submit(work_all, task)))
            held += size
            while len(pending) > 2 * workers or (len(pending) > workers and held > _HELD_BYTES):
                finished, size, future = pending.popleft()
                held -= size
                yield from zip(finished, future.result(), strict=True)
        while pending:
            finished, _, future = pending.popleft()
            yield from zip(finished, future.result(), strict=True)
    finally:
        pool.shutdown(cancel_futures=True)


def _tasks(items: Iterable[Item]) -> Iterator[tuple[list[Item], int]]:
    """Documents in lots that are worth handing to a thread, with the bytes of their text."""
    task: list[Item] = []
    size = 0
    for item in items:
        task.append(item)
        size += item[0].num_bytes
        if size >= _TASK_BYTES:
            yield task, size
            task, size = [], 0
    if task:
        yield task, size


def write_index(folder: Path, split: str, shards: list[Shard]) -> Split:
    """Join the shards' rows into ``{split}.index.npy``, in constant memory."""
    path = folder / f"{split}.index.npy"
    with atomic_path(path) as temporary, open(temporary, "wb") as stream:
        write_header(stream, sum(shard.documents for shard in shards))
        for number, shard in enumerate(shards):
            stream.write(shard_rows(folder, split, number, shard).tobytes())
    totals = {key: sum(getattr(shard, key) for shard in shards) for key in ("documents", "tokens", "bytes")}
    return Split(
        name=split, **totals, index_file=path.name, index_sha256=file_sha256(path), shards=tuple(shards)
    )
