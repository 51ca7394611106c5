"""Words and sentences for rules that count them, without asking that a script writes spaces.

Comes in: text. Goes out: words to `quality`, whose rules are datatrove's and take any tokenizer of its
kind.

- Scripts with spaces: runs of letters and digits, marks inside them (don't, e-mail, 3.14) included; every
  other character that is no space is a word too, as in NLTK's and spaCy's rules.
- Chinese: `rjieba`, whose dictionary comes with it.
- Kana, Thai, Lao, Khmer, Burmese, Tibetan: two letters a word, which is near enough for rules on means.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import Any

from dualroute.errors import UserError

HAN = "\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
OTHER_UNSPACED = "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3031-\u3035\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9f"
UNSPACED = HAN + OTHER_UNSPACED
_WORD = re.compile(
    rf"(?P<han>[{HAN}]+)|[{OTHER_UNSPACED}]{{1,2}}|[^\W{UNSPACED}]+(?:['’.\-][^\W{UNSPACED}]+)*|[^\w\s]"
)
_LETTERS = re.compile(rf"[^\W\d_{UNSPACED}]")
_UNSPACED = re.compile(f"[{UNSPACED}]")
_SENTENCE = re.compile(r"[.!?]+[\"'”’)\]»]*(?=\s|$)|[。！？…｡]+[”’」』）\"]*|[।॥۔؟]+")
_LONG = 1 << 16  # characters of one run of Chinese that are cut at once


@functools.cache
def _segment() -> Any:
    try:
        import rjieba
    except ImportError as error:
        raise UserError("quality rules need rjieba for Chinese: pip install -e '.[prepare]'") from error
    return rjieba.cut


def words_of(text: str) -> list[str]:
    """Words and punctuation marks, in order."""
    found: list[str] = []
    for match in _WORD.finditer(text):
        if match.lastgroup == "han":
            run = match[0]
            for start in range(0, len(run), _LONG):
                found += _segment()(run[start : start + _LONG])
        else:
            found.append(match[0])
    return found


def sentence_spans(text: str) -> Iterator[tuple[int, int]]:
    """(start, end) of the sentences, by their last mark; what is left at the end is one too."""
    start = 0
    for match in _SENTENCE.finditer(text):
        yield start, match.end()
        start = match.end()
    if text[start:].strip():
        yield start, len(text)


def unspaced_share(text: str) -> float:
    """Share of a text's letters that belong to scripts without spaces; a letter of those weighs as two."""
    sample = text if len(text) <= 3 * _LONG else text[:_LONG] + text[len(text) // 2 :][:_LONG] + text[-_LONG:]
    if sample.isascii():
        return 0.0
    unspaced = 2 * len(_UNSPACED.findall(sample))
    return unspaced / max(1, unspaced + len(_LETTERS.findall(sample)))


def word_count(line: str) -> float:
    """About how many words a line has, for a limit of few; 1.6 letters of Chinese are one."""
    return len(_UNSPACED.sub(" ", line).split()) + len(_UNSPACED.findall(line)) / 1.6


@functools.cache
def datatrove_tokenizer() -> Any:
    """The same as a `datatrove.utils.word_tokenizers.WordTokenizer`."""
    from datatrove.utils.word_tokenizers import WordTokenizer

    class Words(WordTokenizer):
        def word_tokenize(self, text: str) -> list[str]:
            return words_of(text)

        def sent_tokenize(self, text: str) -> list[str]:
            return [text[start:end].strip() for start, end in sentence_spans(text)]

        def span_tokenize(self, text: str) -> list[tuple[int, int]]:
            return list(sentence_spans(text))

    return Words()
