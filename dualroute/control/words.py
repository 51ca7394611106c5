"""Words that must not, or must, be written, whatever tokens spell them.

A text can be spelled by many sequences of tokens ("hello" is also "hel" + "lo").  So bytes are compared and
not ids: a token is forbidden where it would complete a banned text, in whatever way that began.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dualroute.control.vocabulary import vocabulary_of
from dualroute.data.tokenizer import Tokenizer
from dualroute.model.decoding.sampler import Constraint


class BannedTexts:
    """Forbids tokens that would complete one of some texts.

    Args:
        tokenizer: The model's.
        texts: None of them is written, not across tokens and not inside a longer word; upper and lower case
            differ.
        until: Forbids nothing once this is satisfied (a :class:`RequiredTexts`).
    """

    def __init__(self, tokenizer: Tokenizer, texts: Sequence[str], until: Constraint | None = None) -> None:
        self._spelled = vocabulary_of(tokenizer).spelled
        self._words = [text.encode() for text in texts]
        self._until = until
        self._tail = b""  # as much of what was written as a text may have begun in
        self._inside = [self._ids(lambda token, word=word: word in token) for word in self._words]
        self._after: dict[tuple[int, int], Tensor] = {}  # ids by (number of the word, bytes of it written)

    @property
    def is_finished(self) -> bool:
        return False

    def restrict(self, logits: Tensor, room: int) -> None:
        """See :class:`Constraint`."""
        if isinstance(self._until, RequiredTexts) and not self._until.missing:
            return
        for number, word in enumerate(self._words):
            logits[self._inside[number]] = -torch.inf
            for count in range(1, len(word)):
                if self._tail.endswith(word[:count]):
                    logits[self._completing(number, count)] = -torch.inf

    def accept(self, token: int) -> None:
        """See :class:`Constraint`."""
        longest = max(len(word) for word in self._words)
        self._tail = (self._tail + self._spelled[token])[-longest:]

    def _completing(self, number: int, count: int) -> Tensor:
        """Ids that begin with what follows the first ``count`` bytes of a word."""
        if (number, count) not in self._after:
            rest = self._words[number][count:]
            self._after[number, count] = self._ids(lambda token: token.startswith(rest))
        return self._after[number, count]

    def _ids(self, is_meant: object) -> Tensor:
        return torch.tensor(
            [number for number, token in enumerate(self._spelled) if is_meant(token)],  # type: ignore[operator]
            dtype=torch.long,
        )


class RequiredTexts:
    """Forbids the end while texts are missing, and writes them where the room would else not suffice.

    The model is free to write them where it likes.  When only as many tokens are left as the missing ones
    need, they are written one after the other, with spaces between words; a limit that is too small for them
    leaves the last ones out.

    Args:
        tokenizer: The model's.
        texts: All of them are to be written.

    Attributes:
        missing: Those that are not written yet.
    """

    def __init__(self, tokenizer: Tokenizer, texts: Sequence[str]) -> None:
        vocabulary = vocabulary_of(tokenizer)
        self._vocabulary = vocabulary
        self._spelled, self._eos_ids = vocabulary.spelled, list(vocabulary.eos_ids)
        self._written = b""
        self._forced: list[int] = []
        self.missing = list(texts)

    @property
    def is_finished(self) -> bool:
        return False

    def restrict(self, logits: Tensor, room: int) -> None:
        """See :class:`Constraint`."""
        if not self.missing:
            return
        if not self._forced:
            ids = self._missing_ids()
            if room <= len(ids) + 1:  # one less may not suffice: what is written next changes the spelling
                self._forced = ids
        if self._forced:
            kept = logits[self._forced[0]].clone()
            logits.fill_(-torch.inf)
            logits[self._forced[0]] = kept
        else:
            logits[self._eos_ids] = -torch.inf

    def accept(self, token: int) -> None:
        """See :class:`Constraint`."""
        self._written += self._spelled[token]
        self.missing = [text for text in self.missing if text.encode() not in self._written]
        if self._forced:
            self._forced = self._forced[1:] if token == self._forced[0] else []

    def _missing_ids(self) -> list[int]:
        """Ids that write what is missing, after what is written."""
        text = self._written.decode(errors="ignore")
        begun = len(text)
        for word in self.missing:
            glued = text[-1:].isalnum() and word[0].isalnum() and text[-1:].isascii() and word[0].isascii()
            text += f" {word}" if glued else word
        return self._vocabulary.encode(text[begun:])
