"""Quality rules of Gopher, C4 and FineWeb, by datatrove's classes, for scripts with and without spaces.

Comes in: a document's text and name. Goes out: None, or which rule it breaks; C4 also takes lines away.

- ``gopher``: number and length of words, symbols, bullets, stop words (Rae et al. 2021, table A1).
- ``gopher_repetition``: repeated lines, paragraphs and n-grams (the same).
- ``c4``: lines without an end mark or of few words, and of scripts and policies, go; so do documents with
  braces, lorem ipsum or fewer than five sentences (Raffel et al. 2020, §2.2).
- ``fineweb``: marks at the ends of lines, short lines, repeated letters, lists (Penedo et al. 2024, §3.6).
- ``code``: for source code, which the others leave alone: lines of at most 1,000 characters, 100 in the
  mean, a quarter of the characters letters or digits (Li et al. 2023, StarCoder, §3.1).

The thresholds are the papers', and for text of mostly Chinese those that FineWeb-2 found for it (Penedo et
al. 2025). Stop words are English or Chinese ones: a document that is known to be of another language is not
asked for them.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any, Literal

from data_prep.cleaning.words import datatrove_tokenizer, unspaced_share, word_count
from data_prep.readers.formats import CODE_ENDINGS
from dualroute.errors import UserError

Rules = Literal["gopher", "gopher_repetition", "c4", "fineweb", "code"]
RULES = ("gopher", "gopher_repetition", "c4", "fineweb", "code")

_CODE = re.compile(rf"(?:{'|'.join(re.escape(ending) for ending in CODE_ENDINGS)})(?::\d+)?$", re.IGNORECASE)
_CLOSING = "\"'”’»)]）」』】"
_STOP_WORDS_ZH = "的 年 在 月 是 和 日 了 於 · 為 有 被 人 中 为 他 與 後 也 而 由".split()
_GOPHER = {
    "en": {},
    "zh": {
        "min_avg_word_length": 1,
        "max_avg_word_length": 5,
        "max_non_alpha_words_ratio": 0.735,
        "stop_words": _STOP_WORDS_ZH,
    },
}
_REPETITION = {
    "en": {},
    "zh": {
        "dup_line_frac": 0.287,
        "top_n_grams": ((2, 0.256), (3, 0.201), (4, 0.171)),
        "dup_n_grams": ((5, 0.198), (6, 0.182), (7, 0.167), (8, 0.154), (9, 0.14), (10, 0.127)),
    },
}
_FINEWEB = {"en": {}, "zh": {"line_punct_thr": 0.106, "new_line_ratio": 0.178, "short_line_length": 15}}

Check = Callable[[str], tuple[str, str | None]]  # text -> (text, what is wrong)


def is_code(name: str) -> bool:
    """Whether a document is source code, by the ending of its name."""
    return _CODE.search(name) is not None


def require_rules() -> None:
    """Raise a UserError that says how to get the libraries, if they are not there."""
    try:
        import datatrove.pipeline.filters  # noqa: F401
        import rjieba  # noqa: F401
    except ImportError as error:
        raise UserError(f"quality needs {error.name}: pip install -e '.[prepare]'") from error


def judge(text: str, name: str, rules: tuple[str, ...], language: str | None) -> tuple[str, str | None]:
    """The text that stays and, if none does, the rule that it breaks (``gopher: short_doc``).

    Args:
        text: cleaned.
        name: of the document, which tells source code.
        rules: of `RULES`; applied in that order.
        language: if it is known.
    """
    if is_code(name):
        return text, f"code: {why}" if "code" in rules and (why := _bad_code(text)) else None
    script = "zh" if unspaced_share(text) > 0.5 else "en"
    stop_words = language in (None, "en", "zh")
    for rule in rules:
        if rule == "code":
            continue
        text, why = _check(rule, script, stop_words)(text)
        if why:
            return text, f"{rule}: {why.removeprefix('gopher_')}"
    return text, None


def _bad_code(text: str) -> str | None:
    lines = text.splitlines()
    if max(map(len, lines), default=0) > 1000:
        return "long_line"
    if sum(map(len, lines)) > 100 * len(lines):
        return "long_lines_in_the_mean"
    letters = sum(map(str.isalnum, text))
    return "few_letters" if letters < 0.25 * len(text) else None


@functools.cache
def _check(rule: str, script: str, stop_words: bool) -> Check:
    from datatrove.data import Document
    from datatrove.pipeline.filters import (
        FineWebQualityFilter,
        GopherQualityFilter,
        GopherRepetitionFilter,
    )

    language = datatrove_tokenizer()
    filter: Any
    if rule == "gopher":
        options = _GOPHER[script] | ({} if stop_words else {"min_stop_words": None})
        filter = GopherQualityFilter(language=language, **options)
    elif rule == "gopher_repetition":
        filter = GopherRepetitionFilter(language=language, **_REPETITION[script])
    elif rule == "fineweb":
        filter = FineWebQualityFilter(language=language, **_FINEWEB[script])
    else:
        filter = _c4(language)

    def check(text: str) -> tuple[str, str | None]:
        document = Document(text=text, id="")
        result = filter.filter(document)
        if isinstance(result, tuple):
            return document.text, None if result[0] else str(result[1])
        return document.text, None if result else rule

    return check


def _c4(language: Any) -> Any:
    """datatrove's C4 rules, with lines that end in marks of any script or in quotation marks after them."""
    from datatrove.pipeline.filters import C4QualityFilter
    from datatrove.utils.text import TERMINAL_PUNCTUATION

    marks = tuple(TERMINAL_PUNCTUATION)

    class C4(C4QualityFilter):
        def filter(self, doc: Any) -> bool | tuple[bool, str]:
            doc.text = "\n".join(line for line in doc.text.splitlines() if self._stays(line.strip()))
            result: bool | tuple[bool, str] = super().filter(doc)
            return result

        @staticmethod
        def _stays(line: str) -> bool:
            end = line.rstrip(_CLOSING) if line.endswith(tuple(_CLOSING)) else line
            return end.endswith(marks) and not end.endswith("...") and word_count(line) >= 3

    return C4(language=language, filter_no_terminal_punct=False, min_words_per_line=-1)
