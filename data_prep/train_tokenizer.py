"""A vocabulary from a sample of the training side.

Comes in: the cleaned training documents of `clean`, one by one. Goes out: the bytes of a sentencepiece
model, which `shards` encodes with. Memory is bounded by the sample, whatever the size of the corpus.

- byte fallback: every text can be encoded, no <unk> in practice.
- identity normalisation, no dummy space, white space kept: decode(encode(text)) == text.
- newline and tab are pieces of their own; no piece crosses a line.
- ids 0 to 3 are <pad> <bos> <eos> <unk>, then the reserved ones (<reserved_0> ...), which no text can
  produce.

Two habits of sentencepiece are worked around. It silently skips training texts that
contain U+2585 (its mark for the unknown), so the sample is cut there; and a unigram model depends on the
number of threads, so that number is fixed.
"""

from __future__ import annotations

import hashlib
import heapq
import io
import re
from collections.abc import Iterable, Iterator
from typing import Literal

import sentencepiece

from dualroute.data.tokenizer import MAX_VOCABULARY
from dualroute.errors import UserError

TokenizerType = Literal["bpe", "unigram"]

PIECE_CHARS = 2000
_THREADS = 4  # fixed: unigram's sums, hence the model's bytes, depend on it
_SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>")
_OWN_PIECES = ("\n", "\t")
_UNKNOWN_MARK = "\u2585"


def cut(text: str, limit: int = PIECE_CHARS) -> Iterator[str]:
    """Pieces of ``text`` of at most ``limit`` characters, cut after a newline where there is one."""
    start = 0
    while start < len(text):
        end = start + limit
        if end < len(text):
            newline = text.rfind("\n", start, end)
            end = newline + 1 if newline >= start else end
        yield text[start:end]
        start = end


class Sample:
    """A uniform sample of pieces of text that holds at most ``budget`` bytes.

    Each piece draws a number from the hash of its document and its place in it, and the smallest numbers
    stay: the result depends neither on the order of the documents nor on when the sample is asked for.
    """

    def __init__(self, budget: int, seed: int = 0) -> None:
        self._budget = budget
        self._key = (seed % (1 << 64)).to_bytes(8, "little")
        self._held: list[tuple[int, int, str]] = []  # a heap with the largest draw on top
        self._bytes = 0
        self._worst: int | None = None  # draws from here on are refused, once the budget was full

    def add(self, digest: bytes, text: str) -> None:
        """Offer the pieces of a document whose SHA-256 is ``digest``."""
        for number, piece in enumerate(cut(text)):
            message = digest + number.to_bytes(8, "little")
            draw = int.from_bytes(hashlib.blake2b(message, digest_size=8, key=self._key).digest(), "big")
            if self._worst is not None and draw >= self._worst:
                continue
            size = len(piece.encode())
            heapq.heappush(self._held, (-draw, size, piece))
            self._bytes += size
            while self._bytes > self._budget and len(self._held) > 1:
                worst, size, _ = heapq.heappop(self._held)
                self._bytes -= size
                self._worst = -worst

    @property
    def size(self) -> int:
        """Bytes held now."""
        return self._bytes

    def texts(self) -> list[str]:
        """The sample, in the order of the draws."""
        return [piece for _, _, piece in sorted(self._held, reverse=True)]


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, tokenizer_type: TokenizerType = "bpe", reserved_tokens: int = 16
) -> bytes:
    """Train, and give back the model file's bytes: equal for equal arguments.

    Args:
        texts: the sample.
        vocab_size: number of ids, the 4 specials, the reserved ones and 256 byte pieces included.
        tokenizer_type: ``bpe`` (trains fast, compresses a little better) or ``unigram`` (encodes faster).
        reserved_tokens: ids kept free for later stages (chat marks, masks).

    Raises:
        UserError: the vocabulary is too large or too small for the sample; the message names the limit.
    """
    if not reserved_tokens < vocab_size <= MAX_VOCABULARY:
        raise UserError(
            f"vocab_size {vocab_size} must be more than reserved_tokens {reserved_tokens} and at most "
            f"{MAX_VOCABULARY}; change vocab_size"
        )
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts),
            model_writer=model,
            model_type=tokenizer_type,
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            character_coverage=0.9995,
            max_sentence_length=4 * PIECE_CHARS,
            user_defined_symbols=list(_OWN_PIECES),
            control_symbols=[f"<reserved_{number}>" for number in range(reserved_tokens)],
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            pad_piece=_SPECIALS[0],
            bos_piece=_SPECIALS[1],
            eos_piece=_SPECIALS[2],
            unk_piece=_SPECIALS[3],
            num_threads=_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _explain(error, vocab_size, reserved_tokens) from error
    return model.getvalue()


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        yield from (part for part in text.split(_UNKNOWN_MARK) if part)


def _explain(error: RuntimeError, vocab_size: int, reserved_tokens: int) -> UserError:
    message = " ".join(str(error).split())
    if found := re.search(r"Please set it to a value <= (\d+)", message):
        return UserError(
            f"vocab_size {vocab_size} is larger than the corpus allows; the largest possible is "
            f"{found[1]}: lower vocab_size, or give more text"
        )
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return UserError(
            f"vocab_size {vocab_size} is too small: 256 bytes, {len(_SPECIALS) + reserved_tokens} "
            f"specials and the characters of the corpus need at least {found[1]}; raise vocab_size"
        )
    return UserError(
        f"the tokenizer cannot be trained on this text: {message}; give more text, or a tokenizer model"
    )
