"""What each token of a tokenizer spells, worked out once for all texts that are written with it."""

from __future__ import annotations

import functools
from typing import Any

from dualroute.data.tokenizer import Tokenizer
from dualroute.errors import UserError


class Vocabulary:
    """The tokens of a tokenizer as bytes.

    Attributes:
        spelled: UTF-8 of each id, b"" for specials.
        eos_ids: Ids that end a text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.spelled = tokenizer.token_bytes()
        self._encode = tokenizer.encode
        self.eos_ids = tokenizer.eos_ids
        self._bos_id = tokenizer.bos_id
        self._place = tokenizer.path

    def encode(self, text: str) -> list[int]:
        """Ids that spell exactly a text, in the middle of another one.

        Those of the tokenizer, or where these spell something else (Llama's puts a space in front of every
        text) the longest token that fits at each place; a byte that no token spells is left out.
        """
        data = text.encode()
        ids = self._encode(text)
        if b"".join(self.spelled[number] for number in ids) == data:
            return ids
        ids, place = [], 0
        while place < len(data):
            lengths = range(min(self._longest, len(data) - place), 0, -1)
            length = next((one for one in lengths if data[place : place + one] in self._by_bytes), 0)
            if length:
                ids.append(self._by_bytes[data[place : place + length]])
            place += length or 1
        return ids

    @functools.cached_property
    def _by_bytes(self) -> dict[bytes, int]:
        return {text: number for number, text in reversed(list(enumerate(self.spelled))) if text}

    @functools.cached_property
    def _longest(self) -> int:
        return max(map(len, self._by_bytes), default=0)

    @functools.cached_property
    def for_llguidance(self) -> Any:
        """The tokenizer as llguidance has it.

        Raises:
            UserError: llguidance is not installed, or no token ends a text.
        """
        llguidance = require_llguidance()
        if not self.eos_ids:
            raise UserError(
                f"tokenizer {self._place} has no token that ends a text, which a grammar needs: name it as "
                f"eos_token in tokenizer_config.json"
            )

        encode = self.encode
        specials = [number for number, text in enumerate(self.spelled) if not text]

        class Described:
            eos_token_id = self.eos_ids[0]
            bos_token_id = self._bos_id if self._bos_id >= 0 else None
            tokens = self.spelled
            special_token_ids = specials

            def __call__(self, text: str) -> list[int]:  # of what a grammar leaves no choice about
                return encode(text) if isinstance(text, str) else encode(text.decode())

        return llguidance.LLTokenizer(llguidance.TokenizerWrapper(Described()))


@functools.lru_cache(maxsize=4)
def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
    """The vocabulary of a tokenizer, made at the first call."""
    return Vocabulary(tokenizer)


def require_llguidance() -> Any:
    """The library llguidance.

    Raises:
        UserError: It is not installed.
    """
    try:
        import llguidance
    except ImportError as error:
        raise UserError(
            "sampling.json_schema, regex and grammar need llguidance: pip install -e '.[control]'"
        ) from error
    return llguidance
