"""Tokens that were added beside a sentencepiece model, put into it.

In: the folder of a ``tokenizer.model`` that transformers saved after ``add_tokens``: the model is as it was,
and the new tokens stand in ``tokenizer_config.json`` or ``added_tokens.json``.  Out: a model that holds them,
special ones as control pieces, which no text makes, others as user-defined ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dualroute.data.tokenizer_settings import SETTINGS
from dualroute.errors import UserError
from dualroute.files import read_json, read_limited

_CONTROL, _USER_DEFINED = 3, 4  # sentencepiece's numbers
_MAX_BYTES = 256 << 20


def with_added_tokens(path: Path) -> bytes | None:
    """The sentencepiece model ``path`` with the tokens that were added beside it; null where there are none.

    Raises:
        UserError: Their ids leave a gap, or a file is damaged.
    """
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

    added = _added(path.parent)
    if not added:
        return None
    data = read_limited(path, _MAX_BYTES)
    try:
        known = int(SentencePieceProcessor(model_proto=data).get_piece_size())
    except RuntimeError:
        return None  # its reader says what is wrong with it
    new = {number: token for number, token in added.items() if number >= known}
    if not new:
        return None
    if sorted(new) != list(range(known, known + len(new))):
        raise UserError(
            f"{path.parent}: the ids of added tokens go from {min(new)} to {max(new)}, and the {known} of "
            f"{path.name} should go on with {known}, without a gap: give a tokenizer.json (save the "
            f"tokenizer as a fast one)"
        )
    model: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    model.ParseFromString(data)
    for number in sorted(new):
        piece, special = new[number]
        model.pieces.add(piece=piece, score=0.0, type=_CONTROL if special else _USER_DEFINED)
    return bytes(model.SerializeToString())


def _added(folder: Path) -> dict[int, tuple[str, bool]]:
    """{id: (token, is it special)} of both files."""
    found: dict[int, tuple[str, bool]] = {}
    older, newer = folder / "added_tokens.json", folder / SETTINGS
    if older.is_file():
        values = read_json(older, limit=_MAX_BYTES)
        for piece, number in values.items() if isinstance(values, dict) else []:
            if isinstance(number, int):
                found[number] = (piece, True)
    if newer.is_file():
        values = read_json(newer, limit=_MAX_BYTES)
        said = values.get("added_tokens_decoder") if isinstance(values, dict) else None
        for number, token in said.items() if isinstance(said, dict) else []:
            if str(number).isdecimal() and isinstance(token, dict) and isinstance(token.get("content"), str):
                found[int(number)] = (token["content"], bool(token.get("special")))
    return found
