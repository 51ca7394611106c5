"""The index of a split: where each document lies inside the tars.

In: rows that `data_prep.shards` collected while it wrote the tars. Here: their file, ``{split}.index.npy``,
and the rules that they must keep. Out: a memory map, of which `manifest` checks every row, and `IndexRows`,
from which `reader` takes the places of the documents' ids, and their lengths for `plan`.

    int64 (documents, 4): shard number, byte offset of the first id inside the tar, number of tokens, UTF-8
    bytes of the text; in the order of the shards, and inside a shard in the order of the tar

The check reads 32 bytes a document, so it is made at every start, on every rank.
"""

from __future__ import annotations

import mmap
import os
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from dualroute.errors import UserError, other_remedy
from dualroute.files import require_regular

INDEX_COLUMNS = ("shard", "offset", "tokens", "bytes")
ROW_BYTES = 8 * len(INDEX_COLUMNS)
#: In front of the rows, at most.
HEADER_BYTES = 1 << 10


def write_header(stream: IO[bytes], documents: int) -> None:
    """Begin an index file of ``documents`` rows, which follow as little-endian int64."""
    shape = (documents, len(INDEX_COLUMNS))
    header: dict[str, Any] = {"descr": "<i8", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)


def map_index(path: str | os.PathLike[str], documents: int, remedy: str) -> NDArray[np.int64]:
    """Memory map of an index file of ``documents`` rows.

    Raises:
        UserError: missing, no .npy file, or of another type, shape or length; ``remedy`` ends the line.
    """
    try:
        require_regular(path)
    except UserError as error:
        raise other_remedy(error, remedy) from error
    try:
        index = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # numpy's parser of headers raises what it likes for damaged ones
        reason = str(error).partition("\n")[0][:200]
        raise UserError(f"{path}: the index cannot be read ({reason}); {remedy}") from error
    shape = (documents, len(INDEX_COLUMNS))
    if index.dtype != np.dtype("<i8") or index.shape != shape or not index.flags.c_contiguous:
        raise UserError(
            f"{path}: {index.dtype} {index.shape}, the manifest says int64 {shape} by rows; {remedy}"
        )
    if (found := os.stat(path).st_size) != index.offset + ROW_BYTES * documents:
        raise UserError(f"{path}: {found} bytes, {documents} rows need another length; {remedy}")
    return index


def release_pages(index: NDArray[np.int64]) -> None:
    """Let go of the pages of a memory map (or of a view of one) that this process has read.

    They stay in the memory of the node as long as it has room, for all processes, and come back unread when
    they are asked for.
    """
    owner: Any = index
    while isinstance(owner, np.ndarray):
        owner = owner.base
    if isinstance(owner, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        owner.madvise(mmap.MADV_DONTNEED)


class IndexRows:
    """Rows of an index file, read when they are asked for.

    What has been read stays in the memory of the node as long as that has room, for all processes; this one
    keeps nothing. May be pickled, and used after a fork.

    Args:
        path: of the file.
        offset: of its first row, in bytes.
        documents: its number of rows.
        remedy: ends the line of an error.
    """

    def __init__(self, path: str | os.PathLike[str], offset: int, documents: int, remedy: str) -> None:
        self.path, self.offset, self.documents, self.remedy = path, offset, documents, remedy
        self._stream: IO[bytes] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_stream": None}

    def blocks(self, numbers: NDArray[np.int64], size: int) -> NDArray[np.int64]:
        """Rows [k * size, (k + 1) * size) for each k of ``numbers``: (k, size, 4), 0 where there are none.

        Raises:
            UserError: the file cannot be read, or is shorter than it was.
        """
        rows = np.zeros((len(numbers), size, len(INDEX_COLUMNS)), dtype="<i8")
        target = rows.reshape(-1).view(np.uint8).data
        step = size * ROW_BYTES
        try:
            if self._stream is None:
                self._stream = open(self.path, "rb", buffering=0)  # noqa: SIM115
            descriptor, found = self._stream.fileno(), 0
            for place, number in enumerate(numbers.tolist()):
                part = target[place * step : (place + 1) * step]
                found += os.preadv(descriptor, [part], self.offset + number * step)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror}); {self.remedy}") from error
        if found < ROW_BYTES * int(np.clip(self.documents - numbers * size, 0, size).sum()):
            raise UserError(f"{self.path}: it has become shorter; {self.remedy}")
        return rows

    def __getitem__(self, document: int) -> NDArray[np.int64]:
        """(4,): the row of one document."""
        return self.blocks(np.array([document]), 1)[0, 0]


def check_rows(
    rows: NDArray[np.int64], number: int, tokens: int, text_bytes: int, size: int, itemsize: int
) -> None:
    """Check the rows of one shard against what is known of it.

    Args:
        rows: (documents, 4), at least one.
        number: of the shard.
        tokens, text_bytes: totals over its documents.
        size: bytes of the tar.
        itemsize: bytes of an id.

    Raises:
        ValueError: says which rule is broken and at which document of the shard.
    """
    shards, offsets, lengths, texts = rows.T
    in_range = (shards == number) & (offsets > 0) & (offsets < size) & (lengths > 0) & (lengths <= size)
    in_range &= (texts >= 0) & (texts <= text_bytes)
    if not in_range.all():
        first = int(np.argmin(in_range))
        raise ValueError(f"document {first} of shard {number} stands as {rows[first].tolist()}")
    ends = offsets + itemsize * lengths  # no overflow: both are at most the size of a file
    overlapping = ends > np.append(offsets[1:], size)
    if overlapping.any():
        first = int(np.argmax(overlapping))
        raise ValueError(f"document {first} of shard {number} reaches beyond byte {int(ends[first]) - 1}")
    for word, column, total in (("tokens", lengths, tokens), ("bytes of text", texts, text_bytes)):
        if (found := int(column.sum())) != total:
            raise ValueError(f"shard {number} has {found} {word} by the index, {total} by its record")
