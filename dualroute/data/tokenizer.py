"""Text to token ids and back, over a sentencepiece model file or a Hugging Face tokenizer.json.

The model file comes from `data_prep` (or from elsewhere, by `prepare --tokenizer`); it lies beside the shards
as ``tokenizer.model``.  `data_prep` turns documents into ids here; evaluation and sampling do so again later.

Sentencepiece writes a space as U+2581 internally, so a text that really contains U+2581
would come back with a space instead.  `Tokenizer` spells that one character in byte-fallback pieces; with a
model trained by `data_prep`, ``decode(encode(text)) == text`` holds for every text, indentation included.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import sentencepiece

from dualroute.data.tokenizer_json import JsonProcessor
from dualroute.errors import UserError

_SPACE_MARK = "\u2581"
_PART_CHARS = 4000


class Tokenizer:
    """A sentencepiece model, or a tokenizer.json (told apart by what is in the file).

    Attributes:
        path: the model file.
        sha256: of the model file, hexadecimal.
        vocab_size: number of ids, specials included.
        bos_id, eos_id, pad_id, unk_id: ids of the specials; -1 where the model has none.

    Raises:
        UserError: the file is missing, or is neither.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise UserError(
                f"tokenizer {self.path}: cannot be read ({error.strerror}); give a sentencepiece .model file"
            ) from error
        json_file = data.lstrip().startswith(b"{")
        self._processor: Any = JsonProcessor(data, str(self.path)) if json_file else self._sentencepiece(data)
        self.sha256 = hashlib.sha256(data).hexdigest()
        self.vocab_size = int(self._processor.get_piece_size())
        self.bos_id = int(self._processor.bos_id())
        self.eos_id = int(self._processor.eos_id())
        self.pad_id = int(self._processor.pad_id())
        self.unk_id = int(self._processor.unk_id())
        piecewise = not json_file and self._keeps_spaces()
        self._space_mark_ids = self._byte_pieces(_SPACE_MARK) if piecewise else []
        self._cut_at_newlines = piecewise and not self._crosses_newlines()

    def _sentencepiece(self, data: bytes) -> sentencepiece.SentencePieceProcessor:
        processor = sentencepiece.SentencePieceProcessor()
        try:
            loaded = processor.LoadFromSerializedProto(data)
        except RuntimeError:
            loaded = False
        if not data or not loaded:
            raise UserError(
                f"tokenizer {self.path}: not a sentencepiece model; give a sentencepiece .model file, or a "
                f"tokenizer.json"
            )
        return processor

    def pieces(self) -> list[str]:
        """The piece behind each id, as the model file spells it: a space is U+2581, a byte <0x0A>."""
        return [str(piece) for piece in self._processor.id_to_piece(list(range(self.vocab_size)))]

    def same_ids(self, other: Tokenizer) -> bool:
        """Whether an id means the same text to both: the same file, or the same piece for every id."""
        return self.sha256 == other.sha256 or self.pieces() == other.pieces()

    def _keeps_spaces(self) -> bool:
        """Whether white space goes in and out as it is, so that a text may be fed in parts.

        Llama's model, for one, puts a space before every text, and T5's folds white space.
        """
        text = " x \n\n x "
        same = self._processor.decode(self._processor.encode(text)) == text
        return same and not self._processor.encode("x", out_type=str)[0].startswith(_SPACE_MARK)

    def _byte_pieces(self, character: str) -> list[int]:
        """Ids that spell ``character`` byte by byte; empty when this model has none."""
        ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in character.encode()]
        return ids if all(self._processor.is_byte(i) for i in ids) else []

    def _crosses_newlines(self) -> bool:
        """Whether some piece holds a newline and something else."""
        return any("\n" in piece and piece != "\n" for piece in self.pieces())

    def _parts(self, text: str) -> Iterator[str]:
        """``text`` in parts that end with a line; the pieces of the whole are those of the parts.

        A document may be a book. sentencepiece is twice as fast on a page of it (the work fits the cache),
        and a unigram model more exact: it adds up scores in single precision.
        """
        start = 0
        while start < len(text):
            end = len(text)
            if self._cut_at_newlines:
                end = text.find("\n", start + _PART_CHARS) + 1 or len(text)
            yield text[start:end]
            start = end

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[Path]]:
        return Tokenizer, (self.path,)

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Ids of ``text``, optionally with <bos> before and <eos> after it.

        Safe to call from several threads at once; they run in parallel (the native code lets go of the GIL).
        """
        ids = [self.bos_id] if bos else []
        for part in self._parts(text):
            if self._space_mark_ids and _SPACE_MARK in part:
                for number, words in enumerate(part.split(_SPACE_MARK)):
                    ids += (self._space_mark_ids if number else []) + self._processor.encode(words)
            else:
                ids += self._processor.encode(part)
        if eos:
            ids.append(self.eos_id)
        return ids

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
