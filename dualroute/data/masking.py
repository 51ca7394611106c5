"""Masked tokens: which tokens of a window an encoder has to find, and what stands in their place.

In: the windows of `reader`, with next-token labels, and the tokenizer's pieces. Out: the same windows where
``labels`` are the tokens that were hidden (`IGNORE_INDEX` elsewhere) and ``input_ids`` hold the mask id at
their places. `module` puts this between the windows and the loaders, so that the loaders' processes do it.

1. Of t tokens in a window exactly max(1, round(share * t)) are hidden, 30 % by default (Wettig et al. 2023,
   https://arxiv.org/abs/2202.08005; ModernBERT, Warner et al. 2024, https://arxiv.org/abs/2412.13663). The
   number of labels in a global batch is thus known without reading it.
2. Whole words are hidden (`WordPieces`), in the order of keys that a hash of (data, seed, sample, word)
   gives. A word that is too long for what is left makes place for a later one; only if none fits is one
   cut. Specials come last: where documents are so short that nothing else is left.
3. All of them become the mask id. The 10 % random and 10 % unchanged tokens of BERT are left out: at this
   share they do not help (Wettig et al. 2023, section 5).

A sample has the same masks in every process and after every resume, and others in each epoch, since samples
of two epochs have different ids. A window of validation always has the same.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch.utils.data import Dataset

from dualroute.data.order.permutation import mix, seeded_words
from dualroute.data.plan import BatchPlan, Request, SequentialPlan
from dualroute.data.reader import IGNORE_INDEX, WindowDataset
from dualroute.data.text_parts import SPACE_MARK
from dualroute.data.tokenizer import Tokenizer
from dualroute.errors import UserError

Int64 = NDArray[np.int64]
Bools = NDArray[np.bool_]

MASKS = ("[MASK]", "<mask>", "<|mask|>", "<MASK>")
#: Ids that tokenizers keep free: ours, Llama 3's, Gemma's and BERT's.
_RESERVED = re.compile(r"(<reserved_\d+>|<\|reserved_special_token_\d+\|>|<unused_?\d+>|\[unused\d+\])")
#: Scripts that leave no space between words: Thai, Lao, Myanmar, Khmer, kana, CJK.
_WITHOUT_SPACES = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff]"
)


def hidden_tokens(tokens: int, share: float) -> int:
    """How many of a window's tokens are hidden."""
    return min(tokens, max(1, round(share * tokens))) if tokens else 0


def mask_id(tokenizer: Tokenizer) -> int:
    """The id that stands for a hidden token: the tokenizer's own mask, else the last of those it keeps free,
    else that of what is unknown, else padding.

    Raises:
        UserError: the tokenizer has none of them.
    """
    pieces = tokenizer.pieces()
    for name in MASKS:
        if name in pieces:
            return pieces.index(name)
    reserved = [number for number, piece in enumerate(pieces) if _RESERVED.fullmatch(piece)]
    if reserved:
        return reserved[-1]  # chat marks take them from the front
    for number in (tokenizer.unk_id, tokenizer.pad_id):
        if number >= 0 and number not in (tokenizer.bos_id, tokenizer.eos_id):
            return number
    raise UserError(
        f"tokenizer {tokenizer.path} has no id for a masked token (none of {', '.join(MASKS)}, no reserved, "
        f"unknown or padding token): add one to it, or prepare the data with a tokenizer that has one"
    )


@dataclass(frozen=True)
class WordPieces:
    """Where words begin, by token id.

    Words are what white space, punctuation and, in scripts without spaces, single characters set apart.

    Attributes:
        begins: (V,) a word begins with this piece.
        ends: (V,) what follows this piece begins a word.
        special: (V,) no text: beginnings, ends, padding and the mask itself.
    """

    begins: Bools
    ends: Bools
    special: Bools

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> WordPieces:
        pieces = tokenizer.pieces()
        spelled = _spelling(pieces)
        edges = [spelled(piece) for piece in pieces]
        special = np.zeros(len(pieces), dtype=bool)
        specials = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, mask_id(tokenizer))
        special[[number for number in specials if number >= 0]] = True
        begins, ends = (np.array(side, dtype=bool) for side in zip(*edges, strict=True))
        return cls(begins, ends, special)

    def words(self, ids: Int64, segment_ids: Int64) -> Int64:
        """(n,) the number of each token's word in its window, from 0; specials are words of their own."""
        starts = self.begins[ids] | self.special[ids]
        starts[1:] |= (self.ends | self.special)[ids[:-1]] | (segment_ids[1:] != segment_ids[:-1])
        starts[:1] = True
        return np.cumsum(starts) - 1


def _spelling(pieces: Sequence[str]) -> Any:
    """A function piece → (whether a word begins with it, whether one begins behind it), after the way in
    which this vocabulary spells spaces: sentencepiece's U+2581, the bytes of GPT-2, or BERT's ##."""
    held = set(pieces)
    if any(piece.startswith(SPACE_MARK) for piece in held):
        return _sentencepiece_edges
    if "\u0120" in held or any(piece.startswith("\u0120") for piece in held):
        return _byte_level_edges
    if any(piece.startswith("##") for piece in held):
        return lambda piece: (not piece.startswith("##"), False)
    return _edges


def _apart(character: str) -> bool:
    """Whether a character is set apart from its neighbours."""
    if _WITHOUT_SPACES.match(character):
        return True
    return unicodedata.category(character)[0] not in "LMN" and character != "\N{REPLACEMENT CHARACTER}"


def _edges(text: str) -> tuple[bool, bool]:
    return (_apart(text[0]), _apart(text[-1])) if text else (True, True)


def _sentencepiece_edges(piece: str) -> tuple[bool, bool]:
    byte = re.fullmatch(r"<0x([0-9A-F]{2})>", piece)
    if byte is None:
        return _edges(piece.replace(SPACE_MARK, " "))
    value = int(byte[1], 16)
    if value < 0x80:
        return _edges(chr(value))
    return value >= 0xE0, False  # three bytes and more: CJK and symbols; two: accents, Greek, Cyrillic


def _byte_alphabet() -> dict[str, int]:
    """The character by which GPT-2's vocabulary spells each byte, to the byte."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTES = _byte_alphabet()


def _byte_level_edges(piece: str) -> tuple[bool, bool]:
    data = bytes(_BYTES[character] for character in piece if character in _BYTES)
    begins, ends = _edges(data.decode(errors="replace"))
    return begins or data[:1] >= b"\xe0", ends


@dataclass(frozen=True, eq=False)
class Masking:
    """How windows are masked.

    Attributes:
        words: of the tokenizer.
        mask_id: what stands for a hidden token.
        share: of a window's tokens that are hidden, above 0 and at most 1.
        fingerprint, seed: of data and run: other masks for others.
    """

    words: WordPieces
    mask_id: int
    share: float
    fingerprint: str
    seed: int

    @classmethod
    def of(cls, tokenizer: Tokenizer, share: float, fingerprint: str, seed: int) -> Masking:
        """Raises UserError as `mask_id` does."""
        return cls(WordPieces.of(tokenizer), mask_id(tokenizer), share, fingerprint, seed)

    def hidden(self, ids: Int64, segment_ids: Int64, split: str, sample: int) -> Bools:
        """(n,) which tokens of a window are hidden; segment 0 is padding."""
        hidden = np.zeros(len(ids), dtype=bool)
        places = np.flatnonzero(segment_ids)
        missing = hidden_tokens(len(places), self.share)
        if not missing:
            return hidden
        tokens = ids[places]
        words = self.words.words(tokens, segment_ids[places])
        firsts, sizes = np.unique(words, return_index=True, return_counts=True)[1:]
        (key,) = seeded_words(self.fingerprint, self.seed, split, sample, "mask", count=1)
        draws = mix(key + mix(np.arange(len(sizes), dtype=np.uint64)))
        late = self.words.special[tokens[firsts]]  # no text: only if nothing else is left
        order = np.lexsort((draws, late))
        chosen, missing = _fill(order, sizes, late, missing)
        hidden[places] = np.isin(words, chosen)
        if missing:  # every word that is left is longer than what is missing: one is cut
            taken = set(chosen)
            rest = next(word for word in order.tolist() if word not in taken)
            hidden[places[words == rest][:missing]] = True
        return hidden

    def mask(self, window: dict[str, Int64], split: str, sample: int) -> dict[str, Int64]:
        """The window with tokens hidden, and these as labels."""
        ids = window["input_ids"]
        hidden = self.hidden(ids, window["segment_ids"], split, sample)
        labels = np.where(hidden, ids, IGNORE_INDEX)
        return {**window, "input_ids": np.where(hidden, self.mask_id, ids), "labels": labels}


def _fill(order: Int64, sizes: Int64, late: Bools, missing: int) -> tuple[list[int], int]:
    """Words in their order that together have at most ``missing`` tokens, and how many tokens are lacking.

    Those that are ``late`` are taken only if all others were.
    """
    fits = int(np.searchsorted(np.cumsum(sizes[order]), missing, side="right"))
    plain = len(order) - int(np.count_nonzero(late))
    chosen = order[:fits].tolist()
    missing -= int(sizes[chosen].sum())
    for word in itertools.islice(order.tolist(), fits, plain):
        if not missing:
            break
        if sizes[word] <= missing:
            chosen.append(word)
            missing -= int(sizes[word])
    return chosen, missing


class MaskedWindows(Dataset[dict[str, Int64]]):
    """`WindowDataset` with tokens hidden; ``num_targets`` is what its plan, a masked one, says.

    May be pickled: loaders' processes mask what they read.
    """

    def __init__(self, windows: WindowDataset, masking: Masking) -> None:
        self.windows, self.masking = windows, masking

    def __getitem__(self, request: Request | int) -> dict[str, Int64]:
        sample = request.sample if isinstance(request, Request) else request
        return self.masking.mask(self.windows[request], self.windows.reader.split.name, sample)


@dataclass(frozen=True, eq=False)
class MaskedBatchPlan(BatchPlan):
    """`BatchPlan` whose targets are hidden tokens, ``share`` of each window's."""

    share: float

    def num_targets(self, samples: ArrayLike) -> int:
        """Each window is full, so each has the same number."""
        return int(np.size(samples)) * hidden_tokens(self.context, self.share)


@dataclass(frozen=True, eq=False)
class MaskedSequentialPlan(SequentialPlan):
    """`SequentialPlan` whose targets are hidden tokens, ``share`` of each window's."""

    share: float = 0.3

    def num_targets(self, samples: ArrayLike) -> int:
        """Those of each window; the last one may be shorter."""
        windows = (self.spans(int(sample)) for sample in np.atleast_1d(np.asarray(samples)))
        return sum(hidden_tokens(sum(b - a for a, b in spans), self.share) for spans in windows)
