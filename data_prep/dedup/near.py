"""Which documents repeat an earlier one, exactly or nearly; on the disk, in bounded memory, the same for
any order of work.

In: the signed parts of all documents, in the order of the corpus.  Out: for each document 0 (stays), 1 (the
same text as an earlier one) or 2 (nearly the same), and which earlier one that is.

A document goes if it resembles an earlier document, be that one kept or not. So a document's fate depends
on the pairs that it is in and on nothing else: bands can be looked at in any order, at once, or by
different tasks. The first of a chain of likenesses always stays, as in the connected components of
datatrove and text-dedup.

One column at a time (digest, then band after band) is sorted by hash. Where it is larger than the memory
allows, it is first dealt out to files by the hash's first bits. Documents with equal hashes are compared by
their signatures: with the first of them, those that differ from it with the first of those, and so on, up
to `_MAX_LEADERS`. A hash that more documents share comes from what all of them have in common, and is no
reason to compare each with each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from data_prep.dedup.signatures import PERMUTATIONS
from data_prep.dedup.signed_part import SignedPart
from dualroute.files import atomic_path

STAYS, SAME, NEAR = 0, 1, 2
RECORDS = (
    1 << 23
)  # of a column that are sorted at once: 8 bytes of hash and 8 of place, and as much again to sort
_PAIRS = 1 << 16  # whose signatures are held at once: 2 × 256 bytes each
_MAX_LEADERS = 64
_NONE = np.iinfo(np.int64).max

Places = NDArray[np.int64]


@dataclass(frozen=True)
class Duplicates:
    """Every document's fate; ``fates`` (documents,) of `STAYS`, `SAME`, `NEAR`; ``of`` the earlier one, or
    -1."""

    fates: NDArray[np.uint8]
    of: Places


class Documents:
    """The documents of all parts, numbered through.

    Args:
        parts: in the order of the corpus; what has been seen before, if anything, in front.
        similarity: share of equal numbers in two signatures from which on texts count as near duplicates.
        records: that are sorted at once; the memory is about 40 bytes for each.
    """

    def __init__(self, parts: Sequence[SignedPart], similarity: float, records: int = RECORDS) -> None:
        self.parts = parts
        self.similarity = similarity
        self.records = records
        self.firsts = np.cumsum([0, *(part.documents for part in parts)])
        self.total = int(self.firsts[-1])
        self.columns = 1 + (parts[0].banding.bands if parts else 0)

    def pairs(self, column: int, scratch: Path) -> tuple[Places, Places]:
        """(later, earlier): who repeats whom by one column, 0 being the digest; sorted, each ``later``
        once."""
        found = [self._in_group(column, *group) for group in self._groups(column, scratch)]
        if not found:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        later = np.concatenate([pair[0] for pair in found])
        earlier = np.concatenate([pair[1] for pair in found])
        order = np.lexsort((earlier, later))
        later, earlier = later[order], earlier[order]
        firsts = np.flatnonzero(np.diff(later, prepend=-1))
        return later[firsts], earlier[firsts]

    def _groups(self, column: int, scratch: Path) -> Iterator[tuple[NDArray[np.uint64], Places]]:
        """(hashes, places) of a column, all equal hashes in one group, places rising."""
        number = 0 if column == 0 else column + 1
        if self.total <= self.records:
            if self.total:
                hashes = np.concatenate([np.asarray(part.column(number)) for part in self.parts])
                yield hashes, np.arange(self.total)
            return
        # as many files as bring each to a third of what may be sorted, since hashes are not spread evenly
        bits = int(np.ceil(np.log2(3 * self.total / self.records)))
        with TemporaryDirectory(prefix="column-", dir=scratch) as folder:
            for part, first in zip(self.parts, self.firsts, strict=False):
                self._deal(part.column(number), int(first), bits, Path(folder))
            for file in sorted(Path(folder).iterdir()):
                records = np.fromfile(file, "<u8").reshape(-1, 2)
                yield records[:, 0].copy(), records[:, 1].astype(np.int64)

    @staticmethod
    def _deal(hashes: NDArray[np.uint64], first: int, bits: int, folder: Path) -> None:
        groups = hashes >> np.uint64(64 - bits)
        order = np.argsort(groups, kind="stable")
        records = np.stack([hashes[order], (order + first).astype(np.uint64)], axis=1)
        borders = np.flatnonzero(np.diff(groups[order])) + 1
        for piece in np.split(records, borders):
            if len(piece):
                with open(folder / f"{int(piece[0, 0]) >> (64 - bits):06d}", "ab") as stream:
                    stream.write(piece.astype("<u8").tobytes())

    def _in_group(self, column: int, hashes: NDArray[np.uint64], places: Places) -> tuple[Places, Places]:
        order = np.argsort(hashes, kind="stable")
        hashes, places = hashes[order], places[order]
        starts = np.flatnonzero(np.diff(hashes, prepend=hashes[0] ^ np.uint64(1)))
        sizes = np.diff(np.append(starts, len(hashes)))
        shared = sizes > 1
        member = np.repeat(shared, sizes)
        places = places[member]
        buckets = np.repeat(np.arange(np.count_nonzero(shared)), sizes[shared])
        later: list[Places] = []
        earlier: list[Places] = []
        for _ in range(_MAX_LEADERS):
            if not len(places):
                break
            leads = np.diff(buckets, prepend=-1) != 0
            leaders = places[leads][np.cumsum(leads) - 1]
            alike = self._alike(column, leaders, places, ~leads)
            later.append(places[alike])
            earlier.append(leaders[alike])
            rest = ~leads & ~alike
            places, buckets = places[rest], buckets[rest]
        return np.concatenate([*later, []]).astype(np.int64), np.concatenate([*earlier, []]).astype(np.int64)

    def _alike(
        self, column: int, first: Places, second: Places, wanted: NDArray[np.bool_]
    ) -> NDArray[np.bool_]:
        """Whether the texts of each wanted pair are the same (column 0), or nearly so."""
        result = np.zeros(len(first), np.bool_)
        chosen = np.flatnonzero(wanted)
        for start in range(0, len(chosen), _PAIRS):
            some = chosen[start : start + _PAIRS]
            if column == 0:
                same = self._gather(first[some], True) == self._gather(second[some], True)
                result[some] = same.all(axis=1)
            else:
                left, right = self._gather(first[some], False), self._gather(second[some], False)
                equal = (left == right).sum(axis=1)
                # a row of ones throughout is a text without any token, which resembles nothing
                result[some] = (equal >= self.similarity * PERMUTATIONS) & (left != 0xFFFF).any(axis=1)
        return result

    def _gather(self, places: Places, digests: bool) -> NDArray:
        """Rows of documents: their digests (places, 2) or signatures (places, 128)."""
        rows = (
            np.zeros((len(places), 2), np.uint64)
            if digests
            else np.zeros((len(places), PERMUTATIONS), np.uint16)
        )
        owners = np.searchsorted(self.firsts, places, side="right") - 1
        order = np.argsort(owners, kind="stable")
        borders = np.flatnonzero(np.diff(owners[order])) + 1
        for piece in np.split(order, borders):
            if not len(piece):
                continue
            owner = int(owners[piece[0]])
            part, inside = self.parts[owner], places[piece] - self.firsts[owner]
            if digests:
                rows[piece, 0], rows[piece, 1] = part.column(0)[inside], part.column(1)[inside]
            else:
                rows[piece] = part.signatures[inside]
        return rows


def write_pairs(path: Path, later: Places, earlier: Places) -> None:
    """Keep what one column showed; appears by rename."""
    with atomic_path(path) as temporary, open(temporary, "wb") as stream:
        stream.write(np.stack([later, earlier]).astype("<i8").tobytes())


def merged(total: int, columns: Sequence[Path]) -> Duplicates:
    """The fates of all documents from the pairs of every column, column 0 first."""
    fates = np.zeros(total, np.uint8)
    of = np.full(total, _NONE, np.int64)
    for number, path in enumerate(columns):
        later, earlier = np.fromfile(path, "<i8").reshape(2, -1)
        if number == 0:
            fates[later], of[later] = SAME, earlier
            continue
        near = fates[later] != SAME
        later, earlier = later[near], earlier[near]
        fates[later] = NEAR
        np.minimum.at(of, later, earlier)
    of[of == _NONE] = -1
    return Duplicates(fates, of)
