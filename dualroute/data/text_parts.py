"""Where a long text may be cut so that the ids of the parts are the ids of the whole.

In: a sentencepiece model and its pieces, or a tokenizer.json. Here: rules for cutting, from what the model
can join. Out: parts of a text, which `tokenizer` encodes one after the other.

A document may be a book, or 40 MB in one line. sentencepiece needs some 30 bytes of memory for each byte that
it is given at once, and is several times slower on much text than on a page (the work leaves the cache); the
library tokenizers needs some 130 bytes. Of sentencepiece:

1. A model joins two neighbouring characters only if some piece holds them side by side. Between any other two
   a cut changes nothing: merges (BPE) and paths (unigram) end there anyway. After a newline is where most
   texts are cut.
2. That holds for a model that leaves the text as it is (identity normalisation, white space kept). One that
   rewrites text, but keeps white space, is cut after newlines only; one that folds white space not at all.
3. A model that puts a space before every text (Llama's) is cut at a space, which is then left out: the model
   puts it back.
4. Without byte fallback neighbouring unknown characters share one <unk>: a part begins with a known one.

A unigram model adds up scores in single precision; of two ways to spell a word that score alike it may take
the other one when it starts to count afresh. On parts it is the more exact.

A tokenizer.json first cuts a text by a regular expression, and joins nothing across these cuts. For the
expressions of GPT-2, Llama 3 and Qwen 2 a space between two letters begins a piece, and a single newline ends
one; other files are not cut.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

PART_CHARS = 4000
SPACE_MARK = "\u2581"
_UNKNOWN_CHARACTER = "\U0010fffe"  # a noncharacter: in no vocabulary


class TextParts:
    """The rules for one model.

    Args:
        model: the bytes of a sentencepiece model.
        processor: its ``SentencePieceProcessor``.
    """

    def __init__(self, model: bytes, processor: Any) -> None:
        self._processor = processor
        self._pieces: list[str] = processor.id_to_piece(list(range(processor.get_piece_size())))
        crosses_lines = any("\n" in piece and piece != "\n" for piece in self._pieces)
        settings = _normalizer(model)
        self.keeps_spaces = self._keeps_spaces()
        self._after_newlines = self.keeps_spaces and not crosses_lines
        as_it_is = (
            settings is not None
            and not settings.get(_CHARSMAP)
            and not settings.get(_REMOVE_EXTRA_WHITESPACE, True)
        )
        adds_space = settings is None or bool(settings.get(_DUMMY_PREFIX, True))
        #: the space between two parts is left out, because the model supplies it
        self._drops_space = as_it_is and adds_space and self._prefixes_space()
        self._anywhere = as_it_is and (self._drops_space or not adds_space)
        self._joined: frozenset[str] | None = None  # made when a text is long enough to need it
        self._has_unknown = processor.unk_id() in processor.encode(_UNKNOWN_CHARACTER)

    def __call__(self, text: str) -> Iterator[str]:
        """The parts of ``text``; one, if it is short or nothing is known to be safe."""
        start = 0
        while start < len(text):
            end = self._end(text, start)
            yield text[start:end]
            start = end + (self._drops_space and end < len(text))

    def _end(self, text: str, start: int) -> int:
        """Where the part that begins at ``start`` ends."""
        first = start + PART_CHARS
        if first >= len(text):
            return len(text)
        if self._after_newlines:
            newline = text.find("\n", first, first + PART_CHARS if self._anywhere else len(text))
            if newline >= 0 or not self._anywhere:
                return newline + 1 or len(text)
        if self._anywhere:
            joined = self._pairs()
            last = len(text) - self._drops_space  # a dropped space must have something behind it
            for place in range(first, last):
                if text[place - 1 : place + 1] not in joined and self._may_begin(text[place]):
                    return place
        return len(text)

    def _may_begin(self, character: str) -> bool:
        if self._drops_space:
            return character == " "
        if not self._has_unknown:
            return True
        number = self._processor.piece_to_id(SPACE_MARK if character == " " else character)
        return bool(number != self._processor.unk_id() and not self._processor.is_unused(number))

    def _pairs(self) -> frozenset[str]:
        """All two characters that stand side by side in a piece, a space spelled both ways."""
        if self._joined is None:
            pairs = {piece[i : i + 2] for piece in self._pieces for i in range(len(piece) - 1)}
            spaced = {pair.replace(SPACE_MARK, " ") for pair in pairs if SPACE_MARK in pair}
            spaced |= {pair.replace(" ", SPACE_MARK) for pair in pairs if " " in pair}
            mixed = {f"{a}{b}" for a in (" ", SPACE_MARK) for b in (" ", SPACE_MARK)}
            self._joined = frozenset(pairs | spaced | mixed)
        return self._joined

    def _keeps_spaces(self) -> bool:
        """Whether white space goes in and out as it is, so that a text may be fed in parts.

        Llama's model, for one, puts a space before every text, and T5's folds white space.
        """
        text = " x \n\n x "
        same = self._processor.decode(self._processor.encode(text)) == text
        return bool(same) and not self._prefixes_space()

    def _prefixes_space(self) -> bool:
        return str(self._processor.encode("x", out_type=str)[0]).startswith(SPACE_MARK)


# Fields of NormalizerSpec, which is field 3 of ModelProto: sentencepiece_model.proto of the library
_NORMALIZER_SPEC = 3
_CHARSMAP, _DUMMY_PREFIX, _REMOVE_EXTRA_WHITESPACE = 2, 3, 4


def _normalizer(model: bytes) -> dict[int, int | bytes] | None:
    """The last value of each field of the model's NormalizerSpec; None where it cannot be read."""
    try:
        for number, value in _fields(memoryview(model)):
            if number == _NORMALIZER_SPEC and isinstance(value, bytes):
                return dict(_fields(memoryview(value)))
    except (IndexError, ValueError):
        pass
    return None


def _fields(data: memoryview) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a protobuf message, one level deep.

    Raises:
        IndexError, ValueError: it is cut off, or is none.
    """
    at = 0

    def varint() -> int:
        nonlocal at
        value, shift = 0, 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7
            if shift > 63:
                raise ValueError("a number of more than 64 bits")

    while at < len(data):
        key = varint()
        number, wire_type = key >> 3, key & 7
        if wire_type == 0:
            yield number, varint()
            continue
        size = {1: 8, 5: 4}.get(wire_type) or (varint() if wire_type == 2 else -1)
        if not 0 <= size <= len(data) - at:
            raise ValueError(f"a field of wire type {wire_type} and {size} bytes")
        yield number, bytes(data[at : at + size])
        at += size


_SOLID = r"[^\s\x00-\x1f\x7f-\xa0\u1680\u180e\u2000-\u200f\u2028-\u202f\u205f-\u206f\u3000\ufeff]"
#: Before a space between letters, or after a newline between characters that nobody takes for white space.
_JSON_CUT = re.compile(rf"(?<=[A-Za-z])(?= [A-Za-z])|(?<={_SOLID}\n)(?={_SOLID})")
#: Llama 3's with its ``{1,3}`` left out is Qwen 2's.
JSON_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class JsonParts:
    """The rules for a tokenizer.json, given as the object that it holds."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        self._cuts = (
            content.get("normalizer") in (None, {"type": "NFC"})
            and (content.get("model") or {}).get("type") == "BPE"
            and _known_expression(content.get("pre_tokenizer"))
            and not any(_reaches_across(token) for token in content.get("added_tokens") or [])
        )

    def __call__(self, text: str) -> Iterator[str]:
        """The parts of ``text``; one, if it is short or nothing is known to be safe."""
        start = 0
        while start < len(text):
            found = _JSON_CUT.search(text, start + PART_CHARS) if self._cuts else None
            end = found.start() if found else len(text)
            yield text[start:end]
            start = end


def _known_expression(pre_tokenizer: Any) -> bool:
    if not isinstance(pre_tokenizer, dict):
        return False
    steps = pre_tokenizer.get("pretokenizers") if pre_tokenizer.get("type") == "Sequence" else [pre_tokenizer]
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        return False
    *before, last = steps or [{}]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space", True):
        return False
    if not before:
        return bool(last.get("use_regex", True))
    split = before[0]
    pattern = split.get("pattern")
    expression = pattern.get("Regex") if isinstance(pattern, dict) else None
    return (
        len(before) == 1
        and split.get("type") == "Split"
        and split.get("behavior") == "Isolated"
        and not split.get("invert")
        and not last.get("use_regex", True)
        and isinstance(expression, str)
        and expression.replace(r"\p{N}{1,3}", r"\p{N}") == JSON_PATTERN
    )


def _reaches_across(token: Mapping[str, Any]) -> bool:
    """Whether an added token that is looked for in texts (specials are not) may hold a place for a cut."""
    sides = token.get("lstrip") or token.get("rstrip") or token.get("normalized")
    return not token.get("special") and bool(sides or re.search(r"\s", token["content"]))
