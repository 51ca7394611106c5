"""Text to token ids and back, over a sentencepiece model file or a Hugging Face tokenizer.json.

The model file comes from `data_prep` (or from elsewhere, by `prepare --tokenizer`); it lies beside the shards
as ``tokenizer.model``.  `data_prep` turns documents into ids here; evaluation and sampling do so again later.

Sentencepiece writes a space as U+2581 internally, so a text that really contains U+2581
would come back with a space instead.  `Tokenizer` spells that one character in byte-fallback pieces; with a
model trained by `data_prep`, ``decode(encode(text)) == text`` holds for every text, indentation included.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from numpy.typing import DTypeLike, NDArray

from dualroute.data.chat.ids import Chat, SpecialToken, chat_ids, template_of
from dualroute.data.chat.template import ChatTemplate, Message
from dualroute.data.text_parts import SPACE_MARK, TextParts
from dualroute.data.tokenizer_json import JsonProcessor
from dualroute.data.tokenizer_settings import SETTINGS, TokenizerSettings, read_settings
from dualroute.errors import UserError, other_remedy
from dualroute.files import read_limited

#: Of a model file; the largest in use (a vocabulary of 256,000 as tokenizer.json) has 35 MB.
MAX_FILE_BYTES = 256 << 20
MAX_VOCABULARY = 1 << 24


class Tokenizer:
    """A sentencepiece model, or a tokenizer.json (told apart by what is in the file).

    Attributes:
        path: the model file.
        sha256: of the model file, hexadecimal.
        vocab_size: number of ids, specials included.
        bos_id, eos_id, pad_id, unk_id: ids of the specials; -1 where the model has none.  eos_id ends a
            document of the training data.
        settings: what stands beside the file (chat template, further ids that end a text); see
            `TokenizerSettings`.

    Args:
        path: the model file.
        settings: instead of what stands beside the file.

    Raises:
        UserError: the file is missing, or is neither.
    """

    def __init__(self, path: str | os.PathLike[str], settings: TokenizerSettings | None = None) -> None:
        self.path = Path(path)
        try:
            data = read_limited(self.path, MAX_FILE_BYTES)
        except UserError as error:
            remedy = "give a sentencepiece .model or a tokenizer.json"
            raise UserError(f"tokenizer {other_remedy(error, remedy)}") from error
        json_file = data.lstrip()[:1] == b"{"
        processor: Any = JsonProcessor(data, str(self.path)) if json_file else self._sentencepiece(data)
        self._processor = processor
        self.sha256 = hashlib.sha256(data).hexdigest()
        self.vocab_size = int(self._processor.get_piece_size())
        self.bos_id = int(self._processor.bos_id())
        self.eos_id = int(self._processor.eos_id())
        self.pad_id = int(self._processor.pad_id())
        self.unk_id = int(self._processor.unk_id())
        if self.vocab_size > MAX_VOCABULARY:
            raise UserError(
                f"tokenizer {self.path}: ids go up to {self.vocab_size - 1}, more than "
                f"{MAX_VOCABULARY:,} are not supported; give another model"
            )
        self.settings = read_settings(self.path) if settings is None else settings
        named_eos = self.special_tokens.get(self.settings.named.get("eos_token", ""))
        if self.eos_id < 0 and named_eos is not None:
            self.eos_id = named_eos.id
        self._space_mark_ids: list[int] = []
        self._parts: Callable[[str], Iterator[str]]
        self._parts = processor.parts if json_file else self._sentencepiece_parts(data)

    def _sentencepiece(self, data: bytes) -> sentencepiece.SentencePieceProcessor:
        processor = sentencepiece.SentencePieceProcessor()
        try:
            loaded = processor.LoadFromSerializedProto(data)
            if loaded and processor.unk_id() >= 0:
                processor.decode([processor.unk_id()])  # its spelling stands in the file too
        except (RuntimeError, UnicodeDecodeError):  # the library quotes the file's bytes in its message
            loaded = False
        if not data or not loaded:
            raise UserError(
                f"tokenizer {self.path}: not a sentencepiece model; give a sentencepiece .model file, or a "
                f"tokenizer.json"
            )
        return processor

    def _sentencepiece_parts(self, data: bytes) -> TextParts:
        try:
            parts = TextParts(data, self._processor)
        except UnicodeDecodeError as error:
            raise UserError(
                f"tokenizer {self.path}: damaged, one of its pieces is not UTF-8; copy the file again"
            ) from error
        self._space_mark_ids = self._byte_pieces(SPACE_MARK) if parts.keeps_spaces else []
        return parts

    @functools.cached_property
    def special_tokens(self) -> dict[str, SpecialToken]:
        """The tokens that no text makes, by how they are written."""
        if isinstance(self._processor, JsonProcessor):
            return self._processor.special_tokens()
        numbers = [
            number
            for number in range(self.vocab_size)
            if self._processor.is_control(number) or self._processor.is_unknown(number)
        ]
        return {str(self._processor.id_to_piece(number)): SpecialToken(number) for number in numbers}

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids at which a generated text ends, `eos_id` first; none where the model has none."""
        named = self.special_tokens.get(self.settings.named.get("eos_token", ""))
        said = [self.eos_id, *([] if named is None else [named.id]), *self.settings.stop_ids]
        return tuple(dict.fromkeys(number for number in said if 0 <= number < self.vocab_size))

    @functools.cached_property
    def chat_template(self) -> ChatTemplate:
        """The template that `chat` uses: the tokenizer's, or one spelt from its special tokens.

        Raises:
            UserError: it has none, and nothing that ends a turn.
        """
        return template_of(self)

    def settings_file(self) -> dict[str, bytes]:
        """{name: content} of what is to lie beside the file wherever it goes; empty if there is nothing."""
        return {SETTINGS: self.settings.to_bytes()} if self.settings else {}

    def with_settings(self, settings: TokenizerSettings) -> Tokenizer:
        """The same tokenizer with another template and other ends of a text."""
        return Tokenizer(self.path, settings)

    def chat(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        answers: bool = True,
    ) -> Chat:
        """Ids of a chat, and which of them the assistant wrote.

        The special tokens that the template writes become ids; a message that spells one stays text.  Nothing
        is put around the chat: a template that wants <bos> writes it.

        Args:
            messages: tables with ``role`` (system, user, assistant or tool) and ``content``; see
                `check_messages` for what is refused.
            add_generation_prompt: end with the mark at which the assistant's answer begins.
            tools: JSON schemas of what the assistant may call, for templates that know of tools.
            answers: find the assistant's tokens; without it none is marked, which is quicker.

        Raises:
            UserError: the messages are no chat, or the template does not take them.
        """
        return chat_ids(
            self, messages, add_generation_prompt=add_generation_prompt, tools=tools, answers=answers
        )

    def pieces(self) -> list[str]:
        """The piece behind each id, as the model file spells it: a space is U+2581, a byte <0x0A>."""
        return [str(piece) for piece in self._processor.id_to_piece(list(range(self.vocab_size)))]

    def token_bytes(self) -> list[bytes]:
        """UTF-8 of what each id adds to a text; b"" for specials and ids that are not used.

        The bytes of a text's ids are the text, but for a space that a model like Llama's puts in front.
        """
        processor = self._processor
        if isinstance(processor, JsonProcessor):
            return processor.token_bytes()
        spelled = []
        for number, piece in enumerate(self.pieces()):
            if processor.is_byte(number):
                spelled.append(bytes([int(piece[3:5], 16)]))
            elif processor.is_unknown(number):
                spelled.append(processor.decode([number]).encode())
            elif processor.is_control(number) or processor.is_unused(number):
                spelled.append(b"")
            else:
                spelled.append(piece.replace(SPACE_MARK, " ").encode())
        return spelled

    def same_ids(self, other: Tokenizer) -> bool:
        """Whether an id means the same text to both: the same file, or the same piece for every id.

        A sentencepiece model and the tokenizer.json that an export makes of it are the same.
        """
        return self.sha256 == other.sha256 or self._spelling() == other._spelling()

    def _spelling(self) -> list[str]:
        """The pieces with a space written as one: as U+2581 some files have it, and some do not."""
        if isinstance(self._processor, JsonProcessor) and self._processor.is_byte_level:
            return self.pieces()
        return [piece.replace(SPACE_MARK, " ") for piece in self.pieces()]

    def _byte_pieces(self, character: str) -> list[int]:
        """Ids that spell ``character`` byte by byte; empty when this model has none."""
        ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in character.encode()]
        return ids if all(self._processor.is_byte(i) for i in ids) else []

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[Path, TokenizerSettings]]:
        return Tokenizer, (self.path, self.settings)

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Ids of ``text``, optionally with <bos> before and <eos> after it.

        Safe to call from several threads at once; they run in parallel (the native code lets go of the GIL).
        """
        ids = [self.bos_id] if bos else []
        for part in self._encode_parts(text):
            ids += part
        if eos:
            ids.append(self.eos_id)
        return ids

    def encode_array(
        self, text: str, dtype: DTypeLike = np.uint32, bos: bool = False, eos: bool = False
    ) -> NDArray[Any]:
        """`encode` as an array of ``dtype``, which takes a tenth of the memory of a list."""
        begin, end = [self.bos_id] if bos else [], [self.eos_id] if eos else []
        # one part at a time: as Python's integers the ids of a book would fill hundreds of megabytes
        parts = itertools.chain([begin], self._encode_parts(text), [end])
        return np.concatenate([np.array(part, dtype=dtype) for part in parts])

    def _encode_parts(self, text: str) -> Iterator[list[int]]:
        """The ids of ``text``, a page or so at a time."""
        for part in self._parts(text):
            if self._space_mark_ids and SPACE_MARK in part:
                ids: list[int] = []
                for number, words in enumerate(part.split(SPACE_MARK)):
                    ids += (self._space_mark_ids if number else []) + self._processor.encode(words)
                yield ids
            else:
                yield self._processor.encode(part)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``; specials vanish, a UTF-8 sequence cut in the middle becomes U+FFFD.

        Raises:
            UserError: an id outside the vocabulary.
        """
        ids = [int(i) for i in ids]
        wrong = next((i for i in ids if not 0 <= i < self.vocab_size), None)
        if wrong is not None:
            raise UserError(
                f"token id {wrong} is not in the vocabulary of {self.path} (0 to {self.vocab_size - 1})"
            )
        return self._processor.decode(ids)
