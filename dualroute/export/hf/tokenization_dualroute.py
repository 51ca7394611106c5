"""A sentencepiece model as a transformers tokenizer: for the models that tokenizer.json cannot express
exactly.

In: text.  Out: the ids that :class:`dualroute.data.tokenizer.Tokenizer` gives, since that class gives them,
    with <bos> in front as in the training data.

A special token that stands in a text becomes its id, as templates of chats and trainers expect it;
``split_special_tokens=True`` takes it for text, as the training data did.
"""

from __future__ import annotations

import itertools
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
        end_with_eos: Put <eos> behind each text, as models of tasks read them (transformers saves no
            add_eos_token).
        kwargs: As for `PreTrainedTokenizer`.
    """

    vocab_files_names = {"vocab_file": VOCABULARY}  # noqa: RUF012
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(self, vocab_file: str, end_with_eos: bool = False, **kwargs: Any) -> None:
        self.vocab_file, self.end_with_eos = vocab_file, end_with_eos
        self._own = Tokenizer(vocab_file)
        self._pieces: list[str] = self._own.pieces()
        self._ids = {piece: number for number, piece in enumerate(self._pieces)}
        super().__init__(end_with_eos=end_with_eos, **kwargs)

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
        parts: list[str] = []
        for is_added, group in itertools.groupby(tokens, self.added_tokens_encoder.__contains__):
            some = list(group)
            parts += some if is_added else [self._own.decode(self._ids[token] for token in some)]
        return "".join(parts)

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        return [token for token, _ in self._marked(token_ids_0, token_ids_1)]

    def get_special_tokens_mask(
        self,
        token_ids_0: list[int],
        token_ids_1: list[int] | None = None,
        already_has_special_tokens: bool = False,
    ) -> list[int]:
        if already_has_special_tokens:
            special = set(self.all_special_ids)
            return [int(token in special) for token in token_ids_0]
        return [mark for _, mark in self._marked(token_ids_0, token_ids_1)]

    def _marked(self, first: list[int], second: list[int] | None) -> list[tuple[int, int]]:
        """Ids of one text or two with what is put around them, which is marked 1."""
        begin = [(self.bos_token_id, 1)] if self.bos_token_id is not None else []
        eos = self._own.eos_id if self._own.eos_id >= 0 else self._own.bos_id
        end = [(eos, 1)] if self.end_with_eos and eos >= 0 else []
        marked = begin + [(token, 0) for token in first] + end
        if second is None:
            return marked
        return marked + ([] if end else begin) + [(token, 0) for token in second] + end

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        target = Path(save_directory) / (f"{filename_prefix}-{VOCABULARY}" if filename_prefix else VOCABULARY)
        if Path(self.vocab_file).resolve() != target.resolve():
            shutil.copyfile(self.vocab_file, target)
        return (str(target),)
