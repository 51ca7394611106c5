"""What one rank writes of a checkpoint, and hashes while it writes it.

In: the training state at a step boundary, as Lightning or DeepSpeed hands it over file by file, and the whole
weights, parameter by parameter.  Here: :class:`OwnPart` takes what is this rank's (its partitions; an equal
share of the bytes of ``model.safetensors``), at once or as a copy in the memory of the host, and writes it.
Next: its :class:`Note` goes to rank 0 (``training/checkpointing/publishing/publisher.py``), which puts the
hashes of all ranks together and reads none of their files.

The files of other ranks lie on other hosts' caches: each rank flushes its own to the disk.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from dualroute.errors import UserError
from dualroute.files import write_bytes_atomically
from dualroute.model.checkpoint import tree_hash
from dualroute.model.checkpoint.tree_hash import HashedFile
from dualroute.model.checkpoint.weights_file import pieces_of, size_of
from dualroute.training.checkpointing.publishing.background_writer import copy_to_host

Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
_NOTES = ".part-"  # rank, in the folder of the checkpoint in the making


@dataclass
class Note:
    """What a rank has written.

    Attributes:
        files: Entries of the files that are all its own, by relative path.
        shared: Digests of its chunks of ``model.safetensors``.
        error: Why it could not, or "".
    """

    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    shared: list[str] = field(default_factory=list)
    error: str = ""


class OwnPart:
    """The part of rank ``rank`` of ``ranks`` in the checkpoint that is made in ``folder``.

    Args:
        folder: The hidden folder; all ranks see it.
        rank: This process.
        ranks: How many write.
        later: Copy what is taken to the host, so that training can go on before :meth:`write`.
    """

    def __init__(self, folder: Path, rank: int, ranks: int, *, later: bool) -> None:
        self.folder, self.rank, self.ranks, self.later = folder, rank, ranks, later
        self._states: list[tuple[Path, Any]] = []
        self._bytes: list[Tensor] = []
        self._shared: tuple[Path, int, int] | None = None
        self._note = Note()
        self._failure: Exception | None = None

    def take_state(self, state: Any, path: Path) -> None:
        """A file of tensors and plain values, which only this rank writes."""
        self._states.append((path, copy_to_host(state) if self.later else state))

    def copied_weights(self) -> dict[str, Tensor]:
        """The weights in a copy that was taken of a whole state, by their names there; else none."""
        states = [state for _, state in self._states if self.later and isinstance(state, dict)]
        whole: dict[str, Any] = next((state for state in states if "state_dict" in state), {})
        return dict(whole.get("state_dict", {}))

    def take_weights(
        self, path: Path, layout: Layout, weights: Iterable[tuple[str, Tensor]], *, copied: bool = False
    ) -> None:
        """This rank's bytes of the one file of weights; all ranks call it, since gathering may take them all.

        What fails here is raised by :meth:`write`, so that no rank leaves the others alone in a gathering.
        Weights that are ``copied`` already are not copied again.
        """
        size = size_of(layout)
        start, stop = tree_hash.own_range(size, self.ranks, self.rank)
        own = pieces_of(layout, weights, start, stop)
        chunk_bytes = tree_hash.shared_chunk_bytes(size, self.ranks)
        self._shared = (path, start, chunk_bytes)
        if self.later:
            self._bytes = list(own) if copied else [copy_to_host(piece) for piece in own]
            return
        self._write_shared(own)

    def _write_shared(self, own: Iterable[Tensor]) -> None:
        assert self._shared is not None
        path, start, chunk_bytes = self._shared
        pieces = iter(own)
        first = next(pieces, None)
        if first is None:
            return
        try:
            with HashedFile(path, start, chunk_bytes) as stream:
                for piece in chain([first], pieces):
                    stream.write(piece.cpu().numpy())
            self._note.shared = stream.chunks
        except OSError as error:
            self._failure = error
            deque(pieces, maxlen=0)  # the gathering goes on

    def write(self) -> Note:
        """Write what was taken and is not written yet, flush it, and say what it is.  Raises OSError."""
        if self._bytes:  # copied before
            self._write_shared(self._bytes)
        if self._failure is not None:
            raise self._failure
        for path, state in self._states:
            self._note.files[str(path.relative_to(self.folder))] = _save(state, path)
        self._describe_swapped()
        self._states, self._bytes = [], []
        return self._note

    def _describe_swapped(self) -> None:
        """What DeepSpeed has copied here from this rank's NVMe."""
        swapped = self.folder / "state.ckpt" / "checkpoint" / "offloaded_tensors" / f"rank{self.rank:02d}"
        for path in sorted(swapped.rglob("*")) if swapped.is_dir() else ():
            if path.is_file():
                with path.open("rb") as stream:
                    os.fsync(stream.fileno())
                self._note.files[str(path.relative_to(self.folder))] = tree_hash.describe(path)


class _Patient:
    """Takes what torch.save writes.  A write that fails is told afterwards: torch dies of one that raises."""

    def __init__(self, stream: HashedFile) -> None:
        self.stream = stream
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        if self.error is None:
            try:
                self.stream.write(data)
            except OSError as error:
                self.error = error
        return size

    def flush(self) -> None:
        pass


def _save(state: Any, path: Path) -> dict[str, Any]:
    """torch.save, hashed on the way; the file's entry."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with HashedFile(path) as stream:
        patient = _Patient(stream)
        torch.save(state, cast(IO[bytes], patient))
        if patient.error is not None:
            raise patient.error
    return stream.entry()


def entries(notes: Sequence[Note], weights: str, layout: Layout) -> dict[str, dict[str, Any]]:
    """The entries of all files that the ranks have written: the leaves of the tree.

    Args:
        notes: Of all ranks, in their order.
        weights: Name of the file that they have written together.
        layout: Of that file.
    """
    size = size_of(layout)
    chunks = [digest for note in notes for digest in note.shared]
    found = {weights: tree_hash.entry(size, tree_hash.shared_chunk_bytes(size, len(notes)), chunks)}
    for note in notes:
        found |= note.files
    return found


def leave_note(folder: Path, rank: int, note: Note) -> None:
    """Tell rank 0, from a thread, where no collective may be started."""
    write_bytes_atomically(folder / f"{_NOTES}{rank:05d}.json", json.dumps(asdict(note)).encode())


def await_notes(folder: Path, ranks: int, seconds: Callable[[], float]) -> Iterator[Note]:
    """The notes of ranks 1, 2, … of ``ranks``, when all of them are there.

    Args:
        folder: Of the checkpoint in the making.
        ranks: How many write.
        seconds: How long to wait for the next one of them, asked for again and again.

    Raises:
        UserError: A rank could not write its part, or says nothing.
    """
    names = [f"{_NOTES}{rank:05d}.json" for rank in range(1, ranks)]
    seen, since = 0, time.monotonic()
    while missing := sorted(set(names) - set(os.listdir(folder))):
        if len(names) - len(missing) != seen:
            seen, since = len(names) - len(missing), time.monotonic()
        if time.monotonic() - since > seconds():
            raise UserError(
                f"{folder}: rank {names.index(missing[0]) + 1} has not written its part of the checkpoint "
                f"({len(missing)} of {ranks} ranks missing): see its own message, and run the same again"
            )
        time.sleep(0.05)
    for rank, name in enumerate(names, 1):
        note = Note(**json.loads((folder / name).read_text(encoding="utf-8")))
        if note.error:
            raise UserError(f"rank {rank}: {note.error}")
        yield note


def remove_notes(folder: Path) -> None:
    """Take the notes away again, before the folder is published."""
    for path in folder.glob(f"{_NOTES}*"):
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
