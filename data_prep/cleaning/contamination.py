"""Documents that hold what a model is to be tested on.

In: evaluation sets (files or folders, in any format that a corpus has) and a document's text.  Out: the
runs of at least ``ngram`` words that they share, and the text without them, or none.

Words are `dedup.shingles`' tokens: case, punctuation and white space make no difference. A letter of a
script without spaces counts as 0.6 of a word, so 13 words are 22 letters of Chinese. (13 words: Brown et
al. 2020, appendix C.)

Of JSON records, tables and columns every text is taken, whatever its key. A question of fewer words than
``ngram`` cannot be told from a common phrase; such ones are counted and not looked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.dedup.shingles import Hashes, mixed, tokens
from data_prep.readers.documents import Document, ReadOptions
from data_prep.readers.folder import scan
from data_prep.readers.formats import read_documents
from data_prep.tally import readable
from dualroute.errors import UserError
from dualroute.files import require_regular

MOST_NGRAMS = 50_000_000  # 12 bytes each
_SPACED, _UNSPACED = 5, 3  # of a word's weight
_TABLE_BITS = 22
_BASE = 0xC2B2AE3D27D4EB4F
_MOST_EXAMPLES = 5
_PASSAGE = 300


def runs(text: str, ngram: int) -> Iterator[tuple[Hashes, NDArray[np.int64], NDArray[np.int64]]]:
    """(hashes, starts, ends) of every run of tokens that weighs ``ngram`` words; characters of the text.

    The end is where the run's last token begins.
    """
    held = np.zeros(0, np.uint64), np.zeros(0, np.int64), np.zeros(0, np.bool_)
    for block in tokens(text):
        hashes, starts, unspaced = (np.concatenate(pair) for pair in zip(held, block, strict=True))
        weights = np.concatenate([[0], np.cumsum(np.where(unspaced, _UNSPACED, _SPACED))])
        lasts = np.searchsorted(
            weights, weights[:-1] + _SPACED * ngram
        )  # one behind the last token of each run
        count = int(np.count_nonzero(lasts <= len(hashes)))  # those that are whole come first
        if count:
            powers, inverse = _powers(len(hashes) + 1)
            sums = np.zeros(len(hashes) + 1, np.uint64)
            np.cumsum(hashes * powers[:-1], out=sums[1:])
            ends = lasts[:count]
            yield mixed((sums[ends] - sums[:count]) * inverse[:count]), starts[:count], starts[ends - 1]
        held = hashes[count:], starts[count:], unspaced[count:]


def _powers(count: int) -> tuple[Hashes, Hashes]:
    found = []
    for base in (_BASE, pow(_BASE, -1, 1 << 64)):
        steps = np.full(count, base, np.uint64)
        steps[0] = 1
        found.append(np.cumprod(steps, dtype=np.uint64))
    return found[0], found[1]


@dataclass(frozen=True)
class Hit:
    """A stretch of a document that an evaluation set holds too: characters, and where it stands there."""

    start: int
    end: int
    example: str


class Contamination:
    """The n-grams of evaluation sets.

    Args:
        paths: files or folders.
        ngram: words that have to agree in a row.

    Attributes:
        examples: texts that were read.
        too_short: those with fewer words.

    Raises:
        UserError: nothing to read at a path, or more n-grams than fit into memory.
    """

    def __init__(self, paths: Sequence[str], ngram: int) -> None:
        self.ngram = ngram
        self.examples = self.too_short = 0
        self._names: list[str] = []
        found: list[Hashes] = []
        owners: list[NDArray[np.int32]] = []
        total = 0
        for path in paths:
            before = self.examples
            for document in evaluation_texts(path):
                self.examples += 1
                pieces = [hashes for hashes, _, _ in runs(document.text, ngram)]
                if not pieces:
                    self.too_short += 1
                    continue
                hashes = np.unique(np.concatenate(pieces))
                found.append(hashes)
                owners.append(np.full(len(hashes), len(self._names), np.int32))
                self._names.append(readable(document.name)[:200])
                total += len(hashes)
                if total > MOST_NGRAMS:
                    raise UserError(
                        f"decontaminate {readable(path)}: more than {MOST_NGRAMS:,} n-grams, which is no "
                        f"evaluation set; give the test files alone"
                    )
            if self.examples == before:
                raise UserError(
                    f"decontaminate {readable(path)}: holds no text; give files of texts or records"
                )
        if not total:
            raise UserError(
                f"decontaminate: none of {self.examples:,} texts has {ngram} words; lower decontaminate_ngram"
            )
        hashes = np.concatenate(found)
        self._hashes, firsts = np.unique(hashes, return_index=True)
        self._owners = np.concatenate(owners)[firsts]
        self._table = np.zeros(1 << _TABLE_BITS, np.bool_)  # tells most that are not there without a search
        self._table[self._hashes >> np.uint64(64 - _TABLE_BITS)] = True

    def hits(self, text: str) -> list[Hit]:
        """Stretches that some evaluation text holds too, in order, each as long as it agrees."""
        found: list[Hit] = []
        for hashes, starts, ends in runs(text, self.ngram):
            likely = np.flatnonzero(self._table[hashes >> np.uint64(64 - _TABLE_BITS)])
            where = np.searchsorted(self._hashes, hashes[likely])
            there = self._hashes[np.minimum(where, len(self._hashes) - 1)] == hashes[likely]
            for place, owner in zip(likely[there].tolist(), where[there].tolist(), strict=True):
                start, end = int(starts[place]), int(ends[place]) + 1
                if found and start <= found[-1].end:
                    found[-1] = replace(found[-1], end=max(end, found[-1].end))
                else:
                    found.append(Hit(start, end, self._names[self._owners[owner]]))
        return found

    def without(self, text: str, hits: list[Hit]) -> str:
        """The text without the lines that hold a hit."""
        kept, place = [], 0
        for hit in hits:
            start = text.rfind("\n", 0, hit.start) + 1
            end = text.find("\n", hit.end)
            end = len(text) if end < 0 else end + 1
            if start > place:
                kept.append(text[place:start])
            place = max(place, end)
        return "".join([*kept, text[place:]])


def described(text: str, name: str, hits: list[Hit], outcome: str) -> dict[str, Any]:
    """A line of the list of what was removed."""
    examples = list(dict.fromkeys(hit.example for hit in hits))
    return {
        "document": readable(name),
        "removed": outcome,
        "passages": len(hits),
        "of": examples[:_MOST_EXAMPLES],
        "first": text[hits[0].start : hits[0].end][:_PASSAGE],
    }


def evaluation_texts(path: str) -> Iterator[Document]:
    """Every text of a file or folder."""
    options = ReadOptions(on_decode_error="replace", all_text=True)
    where = Path(path).expanduser()
    if not where.exists():
        raise UserError(f"decontaminate {readable(path)}: no such file or folder; give an existing path")
    if not where.is_dir():
        require_regular(where, "decontaminate")
        yield from read_documents(where, readable(where.name), options)
        return
    for name, file in scan(where, options).files:
        yield from read_documents(file, name, options)
