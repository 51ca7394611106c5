"""The tokenizer of an exported folder: sentencepiece's model as tokenizer.json, or itself.

In: a checkpoint's tokenizer.model.  Here: a BPE model such as `data_prep` trains becomes a tokenizer.json,
    which needs no sentencepiece and no trusted code; any other model is copied, with a small class that reads
    it (:mod:`dualroute.export.hf.tokenization_dualroute`).  Next: :func:`trial_texts` are encoded by what was
    written and by ours, id by id, before the folder is published.

Sentencepiece's mark for a space, U+2581, is turned back into a space in the vocabulary.  A text that really
holds U+2581 then finds no piece for it and falls back to bytes, exactly as `Tokenizer` does.  (A model that
puts a space before every text keeps the mark: to it, and to `Tokenizer` with it, both are one.)
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

from dualroute.data.chat.ids import named_specials
from dualroute.data.masking import mask_id
from dualroute.data.tokenizer import Tokenizer
from dualroute.data.tokenizer_settings import TEMPLATE
from dualroute.export.hf.bundle import bundle

SPACE_MARK = "\u2581"
_NORMAL, _USER_DEFINED, _BPE = 1, 4, 2  # sentencepiece's numbers for kinds of pieces, and for a BPE model
#: What becomes of spaces: they stay what they are, and no piece crosses a line, so that the parts are short.
_AS_THEY_ARE = {
    "normalizer": None,
    "pre_tokenizer": {
        "type": "Split", "pattern": {"String": "\n"}, "behavior": "Isolated", "invert": False,
    },
    "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
}  # fmt: skip
#: A text begins with one that is not there, as Llama's does.
_PUT_IN_FRONT = {
    "normalizer": {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": SPACE_MARK},
            {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK},
        ],
    },
    "pre_tokenizer": None,
    "decoder": {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    },
}

TRICKY = [
    "", " ", "  ", "   x", "x   ", "\n", "\n\n\n", "\t", "\ta\t\tb", " a  b   c    d", "a\r\nb\rc",
    "\n indented\n\tcode", "naïve café — “quotes” … ﬁ",
    "漢字かな交じり文、한국어", "😀👩\u200d👩\u200d👧🏽 emoji",
    "\x00\x01\x07\x1b control", "\u200b\ufeff\u00a0 spaces", f"a {SPACE_MARK} mark{SPACE_MARK}{SPACE_MARK}",
    "\u2585 the mark of the unknown", "<0x0A> <bos> <eos> <pad> <unk> <s></s>", "<reserved_0>",
    "1234567890 3.14159", "aaaaaaaaaaaaaaaaaaaaa", "-" * 37, " " * 41, "ababababababab", "x" * 5000,
    "Once upon a time, there was a small house.\n\nIt stood — alone — on a hill.\n",
]  # fmt: skip


def trial_texts(tokenizer: Tokenizer, samples: list[str], seed: int = 0) -> list[str]:
    """Texts on which two tokenizers are compared: tricky ones, samples of real text, random pieces."""
    draw = random.Random(seed)
    ids = range(tokenizer.vocab_size)
    drawn = [tokenizer.decode(draw.choices(ids, k=draw.randint(1, 60))) for _ in range(300)]
    few = [tokenizer.decode(draw.choices(draw.sample(ids, 3), k=30)) for _ in range(100)]
    return TRICKY + samples + drawn + few


def marked_texts(tokenizer: Tokenizer) -> list[tuple[str, list[int]]]:
    """Texts that end with a special token, and the ids that they have where it is one."""
    ends = {piece: token.id for piece, token in tokenizer.special_tokens.items() if not token.eats_before}
    first = list(ends.items())[:50]
    return [(f"The end.{piece}", [*tokenizer.encode("The end."), number]) for piece, number in first]


def write_tokenizer(
    tokenizer: Tokenizer, folder: Path, *, ends: bool = False, masks: bool = False
) -> tuple[str, list[str]]:
    """Write all that ``AutoTokenizer.from_pretrained(folder)`` needs.

    Args:
        tokenizer: Whose ids are right.
        folder: Where to.
        ends: Put <eos> behind each text, as a model of a task has read them.
        masks: Name the token that stands for a hidden one, as masked training had it.

    Returns:
        "tokenizer.json" or "tokenizer.model", whichever the ids come from; and the names of the files that
        are code.
    """
    special: dict[str, Any] = dict(_specials(tokenizer))
    mask: dict[str, Any] = {}
    if masks:  # a hidden word was hidden with the space before it
        mask = {**_added(tokenizer.pieces()[mask_id(tokenizer)]), "lstrip": True}
        special["mask_token"] = {**mask, "__type": "AddedToken"}
    settings: dict[str, Any] = {
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,  # transformers' own number for "no limit"
        "padding_side": "left",  # what generate() wants
        # as everywhere: a special token that a text spells is one, which templates and trainers count on
        "split_special_tokens": False,
        **special,
    }
    if tokenizer.settings.chat_template is not None:
        (folder / TEMPLATE).write_text(tokenizer.settings.chat_template, encoding="utf-8")
    fast = tokenizer_json(tokenizer, ends=ends)
    code: list[str] = []
    if not is_json(tokenizer):
        shutil.copyfile(tokenizer.path, folder / "tokenizer.model")
    if fast is None:
        module = "dualroute.export.hf.tokenization_dualroute"
        code = bundle([module], folder)
        settings |= {"tokenizer_class": "DualRoutingTokenizer", "end_with_eos": ends}
        settings["auto_map"] = {"AutoTokenizer": ["tokenization_dualroute.DualRoutingTokenizer", None]}
        settings["added_tokens_decoder"] = {
            str(token.id): mask if piece == mask.get("content") else _added(piece)
            for piece, token in tokenizer.special_tokens.items()
        }
    else:
        if mask:
            others = [each for each in fast.get("added_tokens") or [] if each["content"] != mask["content"]]
            named = [*others, {"id": mask_id(tokenizer), **mask}]
            fast["added_tokens"] = sorted(named, key=lambda token: int(token["id"]))
        (folder / "tokenizer.json").write_text(json.dumps(fast, ensure_ascii=False), encoding="utf-8")
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(
        json.dumps(settings, indent=1, ensure_ascii=False), encoding="utf-8"
    )
    return "tokenizer.model" if fast is None else "tokenizer.json", code


def is_json(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer's file holds a tokenizer.json, whatever its name."""
    with tokenizer.path.open("rb") as stream:
        return stream.read(64).lstrip().startswith(b"{")


def _specials(tokenizer: Tokenizer) -> dict[str, str]:
    found = named_specials(tokenizer)
    # its source said so: an answer ends with another token than a document
    said = tokenizer.settings.named.get("eos_token")
    return {**found, "eos_token": said} if said in tokenizer.special_tokens else found


def tokenizer_json(tokenizer: Tokenizer, *, ends: bool = False) -> dict[str, Any] | None:
    """The model in the format of the tokenizers library; null where that cannot give the same ids.

    A file that is one already stays, but for what it puts around a text: <bos> in front, as in training.

    It can for a BPE model that takes text as it is, but for a space put in front, and spells what it does not
    know in bytes.  Merges are sentencepiece's scores: of two pairs the one with the better score
    first.
    """
    if is_json(tokenizer):
        given: dict[str, Any] = json.loads(tokenizer.path.read_bytes())
        around = _around(tokenizer, ends)
        return {**given, "truncation": None, "padding": None, "post_processor": around}
    from sentencepiece import sentencepiece_model_pb2

    model: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    model.ParseFromString(tokenizer.path.read_bytes())
    if not _is_exact(model):
        return None
    spaces = _PUT_IN_FRONT if model.normalizer_spec.add_dummy_prefix else _AS_THEY_ARE
    vocabulary: dict[str, int] = {}
    scores: dict[str, float] = {}
    for number, piece in enumerate(model.pieces):
        text = piece.piece
        if piece.type == _NORMAL:
            text = text if model.normalizer_spec.add_dummy_prefix else text.replace(SPACE_MARK, " ")
            scores[text] = piece.score
        vocabulary[text] = number
    pieces = tokenizer.pieces()
    control = sorted({*_specials(tokenizer).values(), *_controls(model)}, key=vocabulary.__getitem__)
    own = [piece.piece for piece in model.pieces if piece.type == _USER_DEFINED and len(piece.piece) > 1]
    added = [{"id": vocabulary[piece], **_added(piece, piece in control)} for piece in [*control, *own]]
    added.sort(key=lambda token: int(token["id"]))
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        **spaces,
        "post_processor": _around(tokenizer, ends),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": pieces[tokenizer.unk_id] if tokenizer.unk_id >= 0 else None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": _merges(scores),
        },
    }  # fmt: skip


def _is_exact(model: Any) -> bool:
    """Whether a sentencepiece model can be a tokenizer.json with the same ids."""
    rules, trained = model.normalizer_spec, model.trainer_spec
    plain = (
        trained.model_type == _BPE
        and trained.byte_fallback
        and (rules.name == "identity" or not rules.precompiled_charsmap)
        and not rules.remove_extra_whitespaces
        and rules.escape_whitespaces
        and not trained.treat_whitespace_as_suffix
    )
    if rules.add_dummy_prefix:
        return plain and not any(piece.type == _USER_DEFINED for piece in model.pieces)
    return plain and not any("\n" in piece.piece and piece.piece != "\n" for piece in model.pieces)


def _added(piece: str, special: bool = True) -> dict[str, Any]:
    """A token that is looked for before all else, as both formats describe one."""
    return {
        "content": piece, "special": special,
        "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
    }  # fmt: skip


def _controls(model: Any) -> list[str]:
    return [piece.piece for piece in model.pieces if piece.type in (2, 3)]  # unknown, control


def _merges(scores: dict[str, float]) -> list[list[str]]:
    """Every pair of pieces that makes a piece, the best piece first."""
    ordered = sorted(scores, key=lambda text: -scores[text])
    return [
        [text[:cut], text[cut:]]
        for text in ordered
        for cut in range(1, len(text))
        if text[:cut] in scores and text[cut:] in scores
    ]


def end_of(tokenizer: Tokenizer) -> int:
    """What a model of a task has read behind each text; -1 for nothing."""
    return tokenizer.eos_id if tokenizer.eos_id >= 0 else tokenizer.bos_id


def _around(tokenizer: Tokenizer, ends: bool) -> dict[str, Any] | None:
    """What stands around one text or two: <bos>, and with ``ends`` <eos> behind each."""
    pieces = tokenizer.pieces()
    bos, eos = tokenizer.bos_id, (end_of(tokenizer) if ends else -1)

    def tokens(number: int, kind: int) -> list[dict[str, Any]]:
        return [{"SpecialToken": {"id": pieces[number], "type_id": kind}}] if number >= 0 else []

    def text(name: str, kind: int) -> list[dict[str, Any]]:
        return [{"Sequence": {"id": name, "type_id": kind}}, *tokens(eos, kind)]

    numbers = [number for number in (bos, eos) if number >= 0]
    if not numbers:
        return None
    single = [*tokens(bos, 0), *text("A", 0)]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, *([] if eos >= 0 else tokens(bos, 1)), *text("B", 1)],
        "special_tokens": {
            pieces[number]: {"id": pieces[number], "ids": [number], "tokens": [pieces[number]]}
            for number in numbers
        },
    }
