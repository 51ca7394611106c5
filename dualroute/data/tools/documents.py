"""The documents of a split one after the other, with what is noted of each, without unpacking a tar.

In: a manifest. Here: the index says where the ids of a document end; its KEY.json is the next member of the
    tar. Out:
`Document`s, to the commands of this folder.

A tar that is laid out otherwise (by another program) gives documents without notes; their digest is that of
the ids.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dualroute.data.manifest import Manifest
from dualroute.data.manifest_parts import Shard

_BLOCK = tarfile.BLOCKSIZE
_MAX_NOTE_BYTES = 1 << 20
_ROWS_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class Document:
    """A document of a split.

    Attributes:
        number: in the split.
        tokens: <bos> and <eos> included.
        num_bytes: of the text, in UTF-8.
        name: where it came from; "" if nothing is noted.
        language: "" if nothing is noted.
        digest: 16 bytes of the SHA-256 of the text, of the ids where none is noted.
    """

    number: int
    tokens: int
    num_bytes: int
    name: str
    language: str
    digest: bytes

    @property
    def source(self) -> str:
        """The file or folder that the name begins with, as `dualroute prepare` counts sources."""
        return re.split(r"[/!:#]", self.name, maxsplit=1)[0] or "(not noted)"


def documents(manifest: Manifest, split: str, shards: Sequence[int] | None = None) -> Iterator[Document]:
    """The documents of a split, in order.

    Args:
        shards: numbers of those that are read; None for all.

    Raises:
        UserError: a shard or the index cannot be read.
    """
    info = manifest.split(split)
    firsts = np.cumsum([0, *(shard.documents for shard in info.shards)]).tolist()
    rows = manifest.check_index(split)
    for number in range(len(info.shards)) if shards is None else shards:
        shard, first = info.shards[number], firsts[number]
        with (
            manifest.open_shard(shard) as stream,
            mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as tar,
        ):
            for begin in range(first, first + shard.documents, _ROWS_AT_ONCE):
                part = rows[begin : min(begin + _ROWS_AT_ONCE, first + shard.documents)]
                yield from _of_rows(manifest, tar, begin, part)


def document(manifest: Manifest, split: str, number: int) -> Document:
    """One document; raises as `documents` does."""
    row = manifest.index_rows(split)[number]
    shard = manifest.split(split).shards[int(row[0])]
    with manifest.open_shard(shard) as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as tar:
        return next(_of_rows(manifest, tar, number, row[None]))


def _of_rows(manifest: Manifest, tar: mmap.mmap, first: int, rows: NDArray[np.int64]) -> Iterator[Document]:
    itemsize = np.dtype(manifest.dtype).itemsize
    for number, (_, offset, tokens, size) in enumerate(rows.tolist(), start=first):
        end = offset + tokens * itemsize
        note = _note(tar, -(-end // _BLOCK) * _BLOCK)
        sha256 = note.get("sha256")
        if isinstance(sha256, str) and re.fullmatch("[0-9a-f]{64}", sha256):
            digest = bytes.fromhex(sha256[:32])
        else:
            digest = hashlib.sha256(tar[offset:end]).digest()[:16]
        name, language = note.get("source", ""), note.get("language", "")
        yield Document(number, tokens, size, str(name), str(language), digest)


def _note(tar: mmap.mmap, place: int) -> dict[str, Any]:
    """The KEY.json whose header is at ``place``; {} if that is something else."""
    try:
        member = tarfile.TarInfo.frombuf(tar[place : place + _BLOCK], "utf-8", "surrogateescape")
        if not member.name.endswith(".json") or not 0 < member.size <= _MAX_NOTE_BYTES:
            return {}
        found = json.loads(tar[place + _BLOCK : place + _BLOCK + member.size])
    except (tarfile.HeaderError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def spread(shards: Sequence[Shard], most: int) -> list[int]:
    """Numbers of shards from all over a split with at most ``most`` documents, one shard at least."""
    total = sum(shard.documents for shard in shards)
    step = max(1, -(-total // most))
    chosen, count = [0], shards[0].documents
    for number in range(step, len(shards), step):
        if count + shards[number].documents > most:
            break
        chosen.append(number)
        count += shards[number].documents
    return chosen


def length_histogram(manifest: Manifest, split: str) -> tuple[NDArray[np.int64], NDArray[np.int64], int, int]:
    """Lengths of all documents in tokens, from the index, in bounded memory.

    Returns:
        Documents of each bin (n,), the bins' edges (n + 1,) in powers of 2, the shortest and longest length.
    """
    rows = manifest.index_rows(split)
    edges = 2 ** np.arange(0, 49, dtype=np.int64)
    counts, shortest, longest = np.zeros(len(edges) - 1, dtype=np.int64), 1 << 62, 0
    for block in range(-(-rows.documents // _ROWS_AT_ONCE)):
        lengths = rows.blocks(np.array([block]), _ROWS_AT_ONCE)[0, :, 2]
        lengths = lengths[: rows.documents - block * _ROWS_AT_ONCE]
        counts += np.histogram(lengths, edges)[0]
        shortest, longest = min(shortest, int(lengths.min())), max(longest, int(lengths.max()))
    last = int(np.flatnonzero(counts)[-1]) + 1
    first = int(np.flatnonzero(counts)[0])
    return counts[first:last], edges[first : last + 1], shortest, longest
