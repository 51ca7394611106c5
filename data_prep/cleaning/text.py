"""What becomes of a text before anything looks at it: newlines, control characters, Unicode NFC."""

from __future__ import annotations

import functools
import re
import sys
import unicodedata
from collections.abc import Iterator

import numpy as np

_MAX_MARKS = 64
_BLOCK_CHARS = 1 << 18
_NEWLINES = re.compile("\r\n?|\x85")
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff]")


def clean_text(text: str) -> str:
    """Steps 2 to 4 of `data_prep.clean`; idempotent."""
    if "\r" in text or "\x85" in text:  # to look for them costs a tenth of what the expression does
        text = _NEWLINES.sub("\n", text)
    text = _CONTROLS.sub("", text)
    return text if text.isascii() else _nfc(text)


def _nfc(text: str) -> str:
    """NFC, in a time that grows with the text: sorting a run of accents takes the square of its length.

    Hours for a megabyte of them. The longest run of a language is far below 30, where Unicode's own
    stream-safe format ends.
    """
    parts, start = [], 0
    for first, end in _long_runs(text) if len(text) >= 1000 else ():
        parts += [unicodedata.normalize("NFC", text[start:first]), text[first:end]]
        start = end
    parts.append(unicodedata.normalize("NFC", text[start:]))
    return "".join(parts)


def _long_runs(text: str) -> Iterator[tuple[int, int]]:
    """(start, end) of every run of more than `_MAX_MARKS` accents."""
    is_mark = np.zeros(len(text) + 2, dtype=np.int8)  # one more at each end, which is none
    for start in range(0, len(text), _BLOCK_CHARS):
        codes = np.frombuffer(text[start : start + _BLOCK_CHARS].encode("utf-32-le", "surrogatepass"), "<u4")
        is_mark[start + 1 : start + 1 + len(codes)] = _marks()[codes]
    if np.count_nonzero(is_mark) > _MAX_MARKS:
        edges = np.flatnonzero(np.diff(is_mark)).reshape(-1, 2)
        yield from map(tuple, edges[edges[:, 1] - edges[:, 0] > _MAX_MARKS].tolist())


@functools.cache
def _marks() -> np.ndarray:
    """For each code point, whether it is an accent, whose order NFC may change (1,114,112)."""
    table = np.zeros(sys.maxunicode + 1, dtype=np.int8)
    table[[code for code in range(0x300, 0x20000) if unicodedata.combining(chr(code))]] = 1
    return table
