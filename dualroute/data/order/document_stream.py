"""The documents of a split laid end to end: which of them a position lies in, and what follows it there.

In: the lengths of the documents, held or in the manifest's index. Out: `DocumentStream`, of which `plan`
makes windows. The lengths stay in the index; what is held is a quarter of a bit per document.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

Int64 = NDArray[np.int64]
#: A half-open range [start, stop) of stream positions.
Span = tuple[int, int]

#: Documents between two cumulative lengths that are held: 8 KiB of the index.
_BLOCK = 256
_BLOCKS_AT_ONCE = 512


class Lengths(Protocol):
    """Tokens of each document; read in parts, so that they may lie in a file."""

    def __len__(self) -> int: ...

    def blocks(self, numbers: Int64, size: int) -> Int64:
        """Documents [k * size, (k + 1) * size) for each k of ``numbers``: (k, size), 0 for none."""
        ...


class HeldLengths:
    """`Lengths` that are in memory."""

    def __init__(self, lengths: ArrayLike) -> None:
        self._lengths = np.asarray(lengths, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._lengths)

    def blocks(self, numbers: Int64, size: int) -> Int64:
        """See `Lengths.blocks`."""
        documents = numbers[:, None] * size + np.arange(size)
        held = self._lengths[np.minimum(documents, len(self._lengths) - 1)]
        return np.where(documents < len(self._lengths), held, 0)


class DocumentStream:
    """Documents laid end to end: positions 0..tokens-1.

    Of the cumulative lengths every `_BLOCK`-th is held in memory, 31 MB for 10^9 documents, so that the
    processes of a node may each hold their own. What lies between two of them is summed up when it is asked
    for, from ``lengths``.

    Args:
        lengths: of the documents.

    Raises:
        ValueError: a document without tokens.
    """

    def __init__(self, lengths: Lengths | Sequence[int] | Int64) -> None:
        self.lengths: Lengths = (
            HeldLengths(lengths) if isinstance(lengths, Sequence | np.ndarray) else lengths
        )
        self.documents = len(self.lengths)
        sums = [np.zeros(1, dtype=np.int64)]
        many = _BLOCK * _BLOCKS_AT_ONCE
        for number, first in enumerate(range(0, self.documents, many)):
            part = self.lengths.blocks(np.array([number]), many)[0]
            shortest = part[: self.documents - first]
            if int(shortest.min()) < 1:
                bad = int(np.argmin(shortest))
                raise ValueError(f"document {first + bad} has {int(part[bad])} tokens")
            blocks = -(-len(shortest) // _BLOCK)
            sums.append(part.reshape(-1, _BLOCK).sum(axis=1, dtype=np.int64)[:blocks])
        #: tokens before documents 0, _BLOCK, 2 * _BLOCK, ..., and those of all
        self._marks: Int64 = np.cumsum(np.concatenate(sums), dtype=np.int64)

    @property
    def tokens(self) -> int:
        return int(self._marks[-1])

    def ended_before(self, positions: ArrayLike) -> Int64:
        """How many documents end at or before each position in [0, tokens]: the document that it lies in."""
        positions = np.asarray(positions, dtype=np.int64)
        if not self.documents:
            return np.zeros_like(positions)
        flat = positions.reshape(-1)
        parts = [
            self._ended_before(flat[first : first + _BLOCKS_AT_ONCE])
            for first in range(0, len(flat), _BLOCKS_AT_ONCE)
        ]
        return np.concatenate([np.zeros(0, dtype=np.int64), *parts]).reshape(positions.shape)

    def _ended_before(self, positions: Int64) -> Int64:
        last = len(self._marks) - 2
        blocks = np.minimum(np.searchsorted(self._marks, positions, side="right") - 1, last)
        different, of_position = np.unique(blocks, return_inverse=True)
        lengths = self.lengths.blocks(different, _BLOCK)
        ends = self._marks[different][:, None] + np.cumsum(lengths, axis=1, dtype=np.int64)
        inside = (ends[of_position] <= positions[:, None]).sum(axis=1)
        found: Int64 = np.minimum(blocks * _BLOCK + inside, self.documents)
        return found

    def targets_before(self, positions: ArrayLike) -> Int64:
        """How many tokens at positions < p have a next token in their document, for each p in [0, tokens]."""
        positions = np.asarray(positions, dtype=np.int64)
        # the last token of a document stands one before its end, so it counts as passed once that is <= p
        return positions - self.ended_before(positions)

    def pieces(self, start: int, stop: int) -> Int64:
        """The documents that [start, stop) is made of, in order.

        Returns:
            (pieces, 4): document number; offset of the piece inside its document; tokens in the piece;
            targets in the piece, which is one less than tokens where the document ends with it.
        """
        ends_of_piece = [start, stop - 1]
        blocks = np.searchsorted(self._marks, ends_of_piece, side="right") - 1
        low, high = np.minimum(blocks, len(self._marks) - 2).tolist()
        lengths = self.lengths.blocks(np.arange(low, high + 1), _BLOCK).reshape(-1)
        edges = np.empty(len(lengths) + 1, dtype=np.int64)
        edges[0] = 0
        np.cumsum(lengths, out=edges[1:])
        edges += self._marks[low]
        first, last = np.searchsorted(edges[1:], ends_of_piece, side="right").tolist()
        edges = edges[first : last + 2]
        begins, ends = edges[:-1], edges[1:]
        lows, highs = np.maximum(begins, start), np.minimum(ends, stop)
        counts = highs - lows
        targets = np.minimum(counts, ends - lows - 1)
        numbers = np.arange(first, last + 1) + low * _BLOCK
        return np.stack([numbers, lows - begins, counts, targets], axis=1)
