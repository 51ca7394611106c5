"""The tokenizer of llama2.c as a sentencepiece model.

In: ``tokNNN.bin``: the longest piece's length, then (score, length, bytes) of each piece in the order of the
ids.  Out: the bytes of a ``tokenizer.model`` that `Tokenizer` reads, with the same id for the same piece.
Layout: https://github.com/karpathy/llama2.c, ``tokenizer.py`` (export).

These files come from sentencepiece in the first place; what was lost on the way (which
pieces are specials and which are bytes) is fixed by Llama's ids: <unk> <s> </s>, then 256 bytes.
"""

from __future__ import annotations

import importlib
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dualroute.errors import UserError
from dualroute.files import read_limited

MAX_FILE_BYTES = 64 << 20  # a vocabulary of 32,000 has 0.5 MB
_SPACE_MARK = "\u2581"
_FIRST_PIECE = 3 + 256


def sentencepiece_model(path: str | Path) -> bytes:
    """The ModelProto of a llama2.c tokenizer: BPE with byte fallback and a space before each text.

    Raises:
        UserError: The file is missing or is not a llama2.c tokenizer.
    """
    proto: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    pieces = list(_pieces(Path(path)))
    if len(pieces) <= _FIRST_PIECE:
        raise UserError(
            f"{path} holds {len(pieces)} pieces: not a llama2.c tokenizer, which has 259 specials"
        )
    model = proto.ModelProto()
    kinds = proto.ModelProto.SentencePiece
    for number, (score, text) in enumerate(pieces):
        piece = model.pieces.add()
        piece.score = score
        piece.type = kinds.NORMAL
        if number < 3:
            text = ("<unk>", "<s>", "</s>")[number]  # some exports write newlines around them
            piece.type = kinds.CONTROL if number else kinds.UNKNOWN
        elif number < _FIRST_PIECE:
            piece.type = kinds.BYTE
            if text != f"<0x{number - 3:02X}>":
                raise UserError(f"{path}: piece {number} is {text!r}, not a byte: not a llama2.c tokenizer")
        piece.piece = text.replace(" ", _SPACE_MARK) if piece.type == kinds.NORMAL else text
    model.trainer_spec.model_type = proto.TrainerSpec.BPE
    model.trainer_spec.vocab_size = len(pieces)
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.unk_id, model.trainer_spec.bos_id, model.trainer_spec.eos_id = 0, 1, 2
    model.trainer_spec.pad_id = -1
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = True
    model.normalizer_spec.remove_extra_whitespaces = False
    return bytes(model.SerializeToString())


def _pieces(path: Path) -> Iterator[tuple[float, str]]:
    try:
        data = read_limited(path, MAX_FILE_BYTES)
    except UserError as error:
        raise UserError(f"tokenizer {error}") from error
    offset = 4
    try:
        while offset < len(data):
            score, length = struct.unpack_from("<fi", data, offset)
            offset += 8
            if not 0 <= length <= len(data) - offset:
                raise ValueError(f"a piece of {length} bytes")
            yield score, data[offset : offset + length].decode()
            offset += length
    except (struct.error, ValueError) as error:
        raise UserError(f"tokenizer {path}: not a llama2.c tokenizer ({error})") from error
