"""Places in a text: which characters a token stands for, and where an answer lies."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from functools import lru_cache

from dualroute.data.text_parts import SPACE_MARK
from dualroute.data.tokenizer import Tokenizer

#: Chinese, Japanese and Korean characters: words of their own, written without spaces.
_WIDE = (
    r"\u2e80-\u303f\u3040-\u30ff\u3100-\u312f\u31a0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
    r"\uff00-\uffef\U00020000-\U0003134f"
)
_UNIT = re.compile(rf"\s*([{_WIDE}]|[^\W{_WIDE}]+|[^\w\s])", re.UNICODE)
_IS_WIDE = re.compile(f"[{_WIDE}]")
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def is_wide(character: str) -> bool:
    """Whether a character is of a script without spaces."""
    return _IS_WIDE.match(character) is not None


def units(text: str) -> list[str]:
    """Words, signs, and each wide character."""
    return [match[1] for match in _UNIT.finditer(text)]


def encoded_with_places(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids of a text, and the characters [start, end) that each stands for, without leading spaces.

    Where the pieces do not spell the text (another normalisation, or bytes in disguise), words are encoded
    one by one, and each piece stands for its whole word.
    """
    ids = tokenizer.encode(text)
    places = _spelt(_pieces(tokenizer), ids, text)
    if places is not None:
        return ids, places
    ids, places, at = [], [], 0
    for match in _UNIT.finditer(text):
        own = tokenizer.encode(text[at : match.end()])
        ids += own
        places += [match.span(1)] * len(own)
        at = match.end()
    return ids, places


@lru_cache(maxsize=2)
def _pieces_of(path: str, sha256: str) -> list[str]:
    return Tokenizer(path).pieces()


def _pieces(tokenizer: Tokenizer) -> list[str]:
    return _pieces_of(str(tokenizer.path), tokenizer.sha256)


def _spelt(pieces: list[str], ids: list[int], text: str) -> list[tuple[int, int]] | None:
    """The characters of each piece, or null where the pieces do not spell the text."""
    places: list[tuple[int, int]] = []
    at, pending = 0, b""  # bytes of a character that is spelt byte by byte
    for number in ids:
        byte = _BYTE.fullmatch(pieces[number])
        if byte:
            if at >= len(text):
                return None
            pending += bytes.fromhex(byte[1])
            places.append((at, at + 1))
            if pending == text[at].encode("utf-8", "surrogatepass"):
                at, pending = at + 1, b""
            continue
        piece = pieces[number].replace(SPACE_MARK, " ")
        if pending or not text.startswith(piece, at):
            return None
        blank = len(piece) - len(piece.lstrip())
        places.append((at + blank if blank < len(piece) else at, at + len(piece)))
        at += len(piece)
    return places if at == len(text) and not pending else None


def occurrences(text: str, part: str) -> Iterator[int]:
    """Where ``part`` begins in ``text``."""
    at = text.find(part)
    while part and at >= 0:
        yield at
        at = text.find(part, at + 1)


def plain(text: str) -> str:
    """Lower case, without punctuation."""
    return "".join(c for c in text.lower() if not unicodedata.category(c).startswith(("P", "S")))
