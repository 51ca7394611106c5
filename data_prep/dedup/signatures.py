"""MinHash signatures of texts, by `rensa`, and their bands.

In: texts.  Out: a row of 128 numbers for each; two texts agree in about the share of places that is the
Jaccard similarity of their shingles (Broder 1997), with a standard error of at most 0.044. Bands of rows
(locality-sensitive hashing: Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, §3.4) bring together
those that are to be compared; `near` compares them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_prep.dedup.shingles import BLOCK, Hashes, lower, mixed, ngrams, shingles, tokens
from dualroute.errors import UserError

PERMUTATIONS = 128
SHINGLE_TOKENS = 5
_SEED = 42
_FLAT = 1 << 20  # hashes that are signed at once
_TOGETHER = 1 << 14  # characters of a text that is looked at with others
_WANTED = 0.95  # of the pairs that are exactly as similar as asked for share a bucket


def signer() -> type:
    """`rensa.RMinHash`; an error that says how to get it if it is not there."""
    os.environ.setdefault(
        "RAYON_NUM_THREADS", "1"
    )  # its threads do not survive a fork, and processes do the work
    try:
        from rensa import RMinHash
    except ImportError as error:
        raise UserError("near_duplicates needs rensa: pip install -e '.[prepare]'") from error
    found: type = RMinHash
    return found


def signatures(texts: Sequence[str]) -> NDArray[np.uint32]:
    """MinHash of each text, (texts, 128); of a text without any token a row of the largest number."""
    rows = np.full((len(texts), PERMUTATIONS), 0xFFFFFFFF, np.uint32)
    flat: list[Hashes] = []
    owners: list[int] = []
    size = 0
    for number, hashes in _shingles_of(texts):
        flat.append(hashes)
        owners.append(number)
        size += len(hashes)
        if size >= _FLAT:
            _sign(rows, flat, owners)
            flat, owners, size = [], [], 0
    if flat:
        _sign(rows, flat, owners)
    return rows


def _shingles_of(texts: Sequence[str]) -> Iterator[tuple[int, Hashes]]:
    """(number of the text, hashes); short texts are looked at together, in a fraction of the time."""
    group: list[int] = []
    size = 0
    for number, text in enumerate(texts):
        if len(text) > _TOGETHER:
            yield from ((number, hashes) for hashes in shingles(text, SHINGLE_TOKENS))
            continue
        if size + len(text) >= BLOCK:
            yield from _together(texts, group)
            group, size = [], 0
        group.append(number)
        size += len(text) + 1
    yield from _together(texts, group)


def _together(texts: Sequence[str], group: list[int]) -> Iterator[tuple[int, Hashes]]:
    """The shingles of some texts that make one block, as `shingles` gives them of each."""
    if not group:
        return
    folded = [lower(texts[number]) for number in group]
    borders = np.cumsum([0, *(len(text) + 1 for text in folded)])
    for hashes, starts, _ in tokens("\n".join(folded)):
        owners = np.searchsorted(borders, starts, side="right") - 1
        counts = np.bincount(owners, minlength=len(group))
        ends = np.cumsum(counts)
        runs = ngrams(hashes, SHINGLE_TOKENS) if len(hashes) >= SHINGLE_TOKENS else hashes[:0]
        for place in np.flatnonzero(counts).tolist():
            first, last = int(ends[place] - counts[place]), int(ends[place])
            if last - first < SHINGLE_TOKENS:
                yield group[place], ngrams(hashes[first:last], last - first)
            else:
                yield group[place], runs[first : last - SHINGLE_TOKENS + 1]


def _sign(rows: NDArray[np.uint32], flat: list[Hashes], owners: list[int]) -> None:
    offsets = np.zeros(len(flat) + 1, np.uint64)
    np.cumsum([len(hashes) for hashes in flat], out=offsets[1:])
    matrix = signer().digest_matrix_from_flat_token_hashes(  # type: ignore[attr-defined]
        np.concatenate(flat), offsets, PERMUTATIONS, _SEED
    )
    np.minimum.at(rows, np.array(owners), np.array(matrix.to_rows(), np.uint32))


@dataclass(frozen=True)
class Banding:
    """How many bands of how many numbers; two texts are compared where one band agrees."""

    bands: int
    rows: int

    @classmethod
    def of(cls, similarity: float) -> Banding:
        """The longest rows, hence the fewest comparisons, that bring pairs of this similarity together."""
        for rows in range(PERMUTATIONS, 0, -1):
            bands = PERMUTATIONS // rows
            if 1 - (1 - similarity**rows) ** bands >= _WANTED:
                # no more bands than it takes: each is a column to sort
                while bands > 1 and 1 - (1 - similarity**rows) ** (bands - 1) >= _WANTED:
                    bands -= 1
                return cls(bands, rows)
        return cls(PERMUTATIONS, 1)

    def hashes(self, signed: NDArray[np.uint32]) -> Hashes:
        """One hash for each band, (bands, texts)."""
        cut = signed[:, : self.bands * self.rows].reshape(len(signed), self.bands, self.rows)
        total = np.zeros((len(signed), self.bands), np.uint64)
        for place in range(self.rows):
            total = mixed(total ^ cut[:, :, place].astype(np.uint64) ^ np.uint64(place << 40))
        return np.ascontiguousarray(total.T)
