"""A Hugging Face ``tokenizer.json`` behind the interface of a sentencepiece processor.

In: the bytes of the file, whatever its name: beside shards and in checkpoints it is called
``tokenizer.model`` like any other.  Here: the library ``tokenizers`` does the work; which specials begin and
end a text is told by their names.  Next: :class:`dualroute.data.tokenizer.Tokenizer` uses it where
sentencepiece does not apply (GPT-2, Qwen, Llama 3).

The file does not say which token ends a text; that stands in files beside it that
differ from version to version.  The usual names do say it, and GPT-2's one special is both.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from dualroute.data.chat.ids import SpecialToken
from dualroute.data.text_parts import JsonParts
from dualroute.errors import UserError

BOS = ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "<|endoftext|>")
EOS = ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|end|>")
PAD = ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>")
UNK = ("<unk>", "[UNK]")
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class JsonProcessor:
    """The part of ``SentencePieceProcessor`` that `Tokenizer` uses, over a tokenizer.json.

    Attributes:
        parts: Cuts long texts; see `JsonParts`.
        is_byte_level: Pieces are spelt in GPT-2's alphabet of bytes.

    Args:
        data: The file.
        place: Its path, for messages.

    Raises:
        UserError: The library is not installed, or the file is no tokenizer.
    """

    def __init__(self, data: bytes, place: str) -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise UserError(
                f"tokenizer {place} is a tokenizer.json, which the library tokenizers reads: "
                f"pip install -e '.[export]'"
            ) from error
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(data.decode())
            json_values: dict[str, Any] = json.loads(data)
            pieces = self._tokenizer.get_vocab()
            self.parts = JsonParts(json_values)
            self.is_byte_level = '"ByteLevel"' in json.dumps(json_values.get("decoder"))
            marked = [token for token in json_values.get("added_tokens") or [] if token.get("special")]
            self._special_tokens = {
                token["content"]: SpecialToken(
                    int(pieces[token["content"]]),  # the library's id, whatever the file says
                    bool(token.get("lstrip")),
                    bool(token.get("rstrip")),
                )
                for token in marked
            }
            self._specials = {piece: token.id for piece, token in self._special_tokens.items()}
        except BaseException as error:  # plain Exception, and BaseException for a panic in Rust
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise UserError(
                f"tokenizer {place}: not a tokenizer.json ({reason}); give another file, or copy it again"
            ) from error
        if not pieces:
            raise UserError(f"tokenizer {place}: its vocabulary is empty; give another file")
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # the name of a special in a text stays text
        self._pieces = {number: piece for piece, number in pieces.items()}
        self._size = max(self._pieces) + 1

    def _special(self, names: Iterable[str]) -> int:
        return next((self._specials[name] for name in names if name in self._specials), -1)

    def special_tokens(self) -> dict[str, SpecialToken]:
        """The special tokens, by how they are written."""
        return self._special_tokens

    def get_piece_size(self) -> int:
        """Ids from 0 to the largest."""
        return self._size

    def bos_id(self) -> int:
        return self._special(BOS)

    def eos_id(self) -> int:
        return self._special(EOS)

    def pad_id(self) -> int:
        return self._special(PAD)

    def unk_id(self) -> int:
        return self._special(UNK)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without specials."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: list[int]) -> str:
        """Text of ids; specials vanish."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def id_to_piece(self, ids: list[int]) -> list[str]:
        """How the vocabulary spells ids; "" where an id is not used."""
        return [self._pieces.get(number, "") for number in ids]

    def token_bytes(self) -> list[bytes]:
        """What each id adds to a text; see `Tokenizer.token_bytes`."""
        added = self._tokenizer.get_added_tokens_decoder()
        alphabet = _byte_alphabet()
        before = self.encode("x")[-1:]  # some decoders treat the first token of a text in their own way
        start = len(self.decode(before))
        spelled = []
        for number, piece in enumerate(self.id_to_piece(list(range(self._size)))):
            if not piece or piece in self._specials:
                spelled.append(b"")
            elif number in added:
                spelled.append(piece.encode())
            elif self.is_byte_level and all(character in alphabet for character in piece):
                spelled.append(bytes(alphabet[character] for character in piece))
            elif byte := _BYTE.fullmatch(piece):
                spelled.append(bytes([int(byte[1], 16)]))
            else:
                spelled.append(self.decode([*before, number])[start:].encode())
        return spelled


def _byte_alphabet() -> dict[str, int]:
    """{character: byte} of GPT-2's spelling: printable characters of Latin-1 stand for themselves, the other
    bytes for the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + place): byte for place, byte in enumerate(others)
    }
