"""A tokenizer in the words of GGUF: pieces, their kinds, and scores or merges.

In: a checkpoint's tokenizer.  Here: a sentencepiece BPE model becomes what llama.cpp calls ``llama``, a
byte-level tokenizer.json ``gpt2`` with the name of its regular expression.  Out: a `Vocabulary`; next,
:mod:`dualroute.export.gguf_file` writes it.

What llama.cpp would read otherwise is refused: unigram models, those that rewrite the text, and expressions
that it does not know.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from dualroute.data.text_parts import JSON_PATTERN
from dualroute.data.tokenizer import Tokenizer
from dualroute.errors import UserError
from dualroute.export.hf.tokenizer_files import is_json

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
#: sentencepiece's number of a kind → GGUF's
_KINDS = {1: NORMAL, 2: UNKNOWN, 3: CONTROL, 4: USER_DEFINED, 5: UNUSED, 6: BYTE}
_BPE = 2


@dataclass(frozen=True)
class Vocabulary:
    """What GGUF says of a tokenizer.

    Attributes:
        model: ``llama`` or ``gpt2``.
        pieces: The piece of each id.
        kinds: NORMAL, CONTROL and so on.
        scores: Of a ``llama``: the better one of two pairs is joined first.
        merges: Of a ``gpt2``: pairs, the first one first.
        pre: The name of a ``gpt2``'s regular expression.
        space_in_front: A text is read as if a space stood before it.
    """

    model: str
    pieces: list[str]
    kinds: list[int]
    scores: list[float] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)
    pre: str | None = None
    space_in_front: bool = False


def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    """The vocabulary of a tokenizer.

    Raises:
        UserError: llama.cpp would give other ids.
    """
    return _byte_level(tokenizer) if is_json(tokenizer) else _sentencepiece(tokenizer)


def _refused(tokenizer: Tokenizer, reason: str) -> UserError:
    return UserError(
        f"tokenizer {tokenizer.path}: {reason}, which llama.cpp would read otherwise: use --format hf, or a "
        f"model whose tokenizer is a sentencepiece BPE model or a byte-level tokenizer.json"
    )


def _sentencepiece(tokenizer: Tokenizer) -> Vocabulary:
    from sentencepiece import sentencepiece_model_pb2

    model: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    model.ParseFromString(tokenizer.path.read_bytes())
    rules, trained = model.normalizer_spec, model.trainer_spec
    for wrong, reason in (
        (trained.model_type != _BPE, "it is a unigram model"),
        (not trained.byte_fallback, "it has no pieces for bytes"),
        (rules.name != "identity" and bool(rules.precompiled_charsmap), "it rewrites characters"),
        (rules.remove_extra_whitespaces, "it folds white space"),
        (trained.treat_whitespace_as_suffix, "it has spaces at the end of pieces"),
    ):
        if wrong:
            raise _refused(tokenizer, reason)
    return Vocabulary(
        "llama",
        [piece.piece for piece in model.pieces],
        [_KINDS[piece.type] for piece in model.pieces],
        scores=[piece.score for piece in model.pieces],
        space_in_front=bool(rules.add_dummy_prefix),
    )


def _byte_level(tokenizer: Tokenizer) -> Vocabulary:
    content = json.loads(tokenizer.path.read_bytes())
    model = content["model"]
    pre = _expression(content.get("pre_tokenizer"))
    if model.get("type") != "BPE" or model.get("byte_fallback") or pre is None:
        raise _refused(tokenizer, "it is no byte-level BPE with the expression of GPT-2, Llama 3 or Qwen 2")
    if content.get("normalizer") not in (None, {"type": "NFC"}):
        raise _refused(tokenizer, "it rewrites characters")
    added = {token["content"]: token for token in content.get("added_tokens") or []}
    kinds = []
    for piece in tokenizer.pieces():
        if piece in tokenizer.special_tokens:
            kinds.append(CONTROL)
        else:
            kinds.append(USER_DEFINED if piece in added else NORMAL if piece else UNUSED)
    pieces = [piece or f"[PAD{number}]" for number, piece in enumerate(tokenizer.pieces())]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges") or []]
    return Vocabulary("gpt2", pieces, kinds, merges=merges, pre=pre)


def _expression(pre_tokenizer: Any) -> str | None:
    """llama.cpp's name of what cuts a text before merges, null where it has none."""
    if not isinstance(pre_tokenizer, dict):
        return None
    steps = pre_tokenizer.get("pretokenizers") if pre_tokenizer.get("type") == "Sequence" else [pre_tokenizer]
    *before, last = steps or [{}]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space", True):
        return None
    if not before:
        return "gpt-2" if last.get("use_regex", True) else None
    expression = (before[0].get("pattern") or {}).get("Regex")
    if len(before) > 1 or before[0].get("type") != "Split" or not isinstance(expression, str):
        return None
    if expression == JSON_PATTERN:
        return "qwen2"
    return "llama-bpe" if expression.replace(r"\p{N}{1,3}", r"\p{N}") == JSON_PATTERN else None
