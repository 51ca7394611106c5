"""A sentencepiece model as a transformers tokenizer: for the models that tokenizer.json cannot express
exactly.

In: text.  Out: the ids that :class:`dualroute.data.tokenizer.Tokenizer` gives, since that class gives them,
    with <bos> in front as in the training data.

Text that *spells* a special token, "<eos>", stays text, as in training; specials come
from ids alone.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizer

from dualroute.data.tokenizer import Tokenizer

VOCABULARY = "tokenizer.model"


class DualRoutingTokenizer(PreTrainedTokenizer):
    """The tokenizer of a DualRouting model.

    Args:
        vocab_file: The sentencepiece model.
        kwargs: As for `PreTrainedTokenizer`.
    """

    vocab_files_names = {"vocab_file": VOCABULARY}  # noqa: RUF012
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(self, vocab_file: str, **kwargs: Any) -> None:
        self.vocab_file = vocab_file
        self._own = Tokenizer(vocab_file)
        self._pieces: list[str] = self._own.pieces()
        self._ids = {piece: number for number, piece in enumerate(self._pieces)}
        kwargs.setdefault("split_special_tokens", True)
        super().__init__(**kwargs)

    @property
    def vocab_size(self) -> int:
        return self._own.vocab_size

    def get_vocab(self) -> dict[str, int]:
        return {**self._ids, **self.added_tokens_encoder}

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return [self._pieces[number] for number in self._own.encode(text)]

    def _convert_token_to_id(self, token: str) -> int | None:
        return self._ids.get(token, self._own.unk_id)

    def _convert_id_to_token(self, index: int) -> str:
        return self._pieces[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return self._own.decode(self._ids[token] for token in tokens)

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        bos = [] if self.bos_token_id is None else [self.bos_token_id]
        return bos + token_ids_0 + ([] if token_ids_1 is None else bos + token_ids_1)

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        target = Path(save_directory) / (f"{filename_prefix}-{VOCABULARY}" if filename_prefix else VOCABULARY)
        if Path(self.vocab_file).resolve() != target.resolve():
            shutil.copyfile(self.vocab_file, target)
        return (str(target),)
