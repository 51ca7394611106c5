"""Fill-in-the-middle: some documents are told in another order, to learn writing between texts.

In: the lengths of the documents and their ids. Out: the same documents, some of which are, by three tokens
longer, prefix, suffix and middle (Bavarian et al. 2022, https://arxiv.org/abs/2207.14255):

    PSM:  <bos> PRE prefix SUF suffix MID middle <eos>
    SPM:  <bos> PRE SUF suffix MID prefix middle <eos>

Which documents these are, where they are cut and in which of the two orders they are told is a hash of (data,
seed, document). So lengths are known without reading a document (`InfilledLengths`, of which `plan` and
`packing` make samples like any others), and any part of it can be read alone (`InfilledReader`). It is the
same in all epochs. Cuts lie between tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dualroute.data.index import IndexRows
from dualroute.data.order.document_stream import Int64, Lengths
from dualroute.data.order.permutation import mix, seeded_words
from dualroute.data.tokenizer import Tokenizer
from dualroute.errors import UserError

#: Tokens that a document becomes longer by.
MARKS = 3
_LEAST = 3  # tokens of a text that is cut
#: Names that tokenizers have for prefix, suffix and middle: Qwen's, StarCoder's, Code Llama's, DeepSeek's.
KNOWN = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<PRE>", "<SUF>", "<MID>"),
    ("\u2581<PRE>", "\u2581<SUF>", "\u2581<MID>"),
    ("<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581hole\uff5c>", "<\uff5cfim\u2581end\uff5c>"),
)


def mark_ids(tokenizer: Tokenizer, names: Sequence[str] | None) -> tuple[int, int, int]:
    """Ids that mark prefix, suffix and middle.

    Args:
        names: of the three tokens; None looks for those in `KNOWN`.

    Raises:
        UserError: the tokenizer has not all of them.
    """
    ids = {piece: number for number, piece in enumerate(tokenizer.pieces())}
    ids |= {name: token.id for name, token in tokenizer.special_tokens.items()}
    for trio in KNOWN if names is None else [tuple(names)]:
        if all(name in ids for name in trio):
            found = tuple(ids[name] for name in trio)
            if len(set(found)) != len(KNOWN[0]):
                raise UserError(f"data.fim_tokens must be three different tokens, not {', '.join(trio)}")
            return found[0], found[1], found[2]
    free = [name for name in ids if "reserved" in name][:3]
    remedy = (
        f"name three that it keeps free, as in --data.fim_tokens {' '.join(map(repr, free))}, or "
        if (len(free) == MARKS)
        else ""
    )
    if names is not None:
        missing = ", ".join(name for name in names if name not in ids)
        raise UserError(
            f"data.fim_tokens: the tokenizer {tokenizer.path} has no {missing}; {remedy}leave it out"
        )
    raise UserError(
        f"data.fim_rate: the tokenizer {tokenizer.path} has no tokens for prefix, suffix and middle (such as "
        f"{', '.join(KNOWN[1])}): {remedy}train a tokenizer with them"
    )


@dataclass(frozen=True, eq=False)
class Infill:
    """Which documents are told in another order, and how.

    Attributes:
        rate: share of the documents.
        spm_rate: share of these that are SPM.
        marks: ids of PRE, SUF and MID.
        bos, eos: tokens before and behind the text of a document, 0 or 1.
        fingerprint, seed: of data and run.
    """

    rate: float
    spm_rate: float
    marks: tuple[int, int, int]
    bos: int
    eos: int
    fingerprint: str
    seed: int

    @cached_property
    def _keys(self) -> NDArray[np.uint64]:
        return seeded_words(self.fingerprint, self.seed, "infill", count=4)

    def _draws(self, key: int, documents: Int64) -> NDArray[np.float64]:
        """Numbers in [0, 1), one a document."""
        words = mix(self._keys[key] + mix(documents.astype(np.uint64)))
        return (words >> np.uint64(11)).astype(np.float64) / float(1 << 53)

    def chosen(self, documents: Int64, lengths: Int64) -> NDArray[np.bool_]:
        """Which documents of these lengths are told in another order."""
        long_enough = lengths - self.bos - self.eos >= _LEAST
        return np.asarray(long_enough & (self._draws(0, documents) < self.rate))

    def parts(self, document: int, length: int) -> list[tuple[int, int] | int]:
        """A chosen document in its new order: ranges of its tokens, and marks."""
        number = np.array([document])
        text = length - self.bos - self.eos
        cuts = sorted(int(self._draws(key, number)[0] * (text + 1)) for key in (2, 3))
        first, second, end = self.bos + cuts[0], self.bos + cuts[1], self.bos + text
        prefix, middle, suffix = (self.bos, first), (first, second), (second, end)
        before, pre, suf, mid = (0, self.bos), *self.marks
        behind = (end, length)
        if self._draws(1, number)[0] < self.spm_rate:
            return [before, pre, suf, suffix, mid, prefix, middle, behind]
        return [before, pre, prefix, suf, suffix, mid, middle, behind]


class InfilledLengths:
    """`Lengths` of documents some of which are told in another order."""

    def __init__(self, lengths: Lengths, infill: Infill) -> None:
        self.lengths, self.infill = lengths, infill

    def __len__(self) -> int:
        return len(self.lengths)

    def blocks(self, numbers: Int64, size: int) -> Int64:
        """See `Lengths.blocks`."""
        lengths = self.lengths.blocks(numbers, size)
        documents = numbers[:, None] * size + np.arange(size)
        return lengths + MARKS * self.infill.chosen(documents, lengths)


class InfilledReader:
    """A `ShardReader` whose documents are those of `InfilledLengths`. May be pickled.

    Args:
        reader: of the documents as they are stored.
        rows: of their index.
        infill: how they are told.
    """

    def __init__(self, reader: Any, rows: IndexRows, infill: Infill) -> None:
        self.reader, self.rows, self.infill = reader, rows, infill
        self.manifest, self.split = reader.manifest, reader.split

    def read(self, document: int, start: int, count: int) -> Int64:
        """See `ShardReader.read`."""
        length = int(self.rows[document][2])
        if not self.infill.chosen(np.array([document]), np.array([length]))[0]:
            return np.asarray(self.reader.read(document, start, count))
        found, at, stop = [np.zeros(0, dtype=np.int64)], 0, start + count
        for part in self.infill.parts(document, length):
            first, last = (0, 1) if isinstance(part, int) else part
            low, high = max(start - at, 0), min(stop - at, last - first)
            if low < high:
                found.append(
                    np.array([part], dtype=np.int64)
                    if isinstance(part, int)
                    else self.reader.read(document, first + low, high - low)
                )
            at += last - first
        return np.concatenate(found)
