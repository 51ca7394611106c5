"""WikiText's conventions: how its words are counted, and its spaces taken back.

The corpus is tokenised (``film @-@ maker , 's``).  Two ways of scoring a model of another vocabulary on it
are in use, and their figures differ, so each is named wherever one stands:

- wikitext (Merity et al. 2017, https://arxiv.org/abs/1609.07843): the loss of the whole text, divided by the
  words of the tokenised file, where the end of each line is a word (245,569 in the test set);
- lm_eval: that of the task ``wikitext`` of lm-evaluation-harness, article by article, divided by the words
  between white space.

Either way the model reads the text detokenised, and bytes are those of the file.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

_HEADING = re.compile(r"^ ?= [^=].*[^=] = ?$", re.MULTILINE)
#: Marks that the corpus puts in place of a character between two parts of a word or number.
_JOINED = {" @-@ ": "-", " @,@ ": ",", " @.@ ": "."}
_BRACKETS = [(re.compile(rf"\{a}\s*([^\{b}]*?)\s*\{b}"), rf"{a}\1{b}") for a, b in ("()", "[]", "{}")]
_QUOTES = [(re.compile(rf"{mark}\s*([^{mark}]*?)\s*{mark}"), rf"{mark}\1{mark}") for mark in "\"'"]


class Document(NamedTuple):
    """A text with what its loss is divided by.

    Attributes:
        text: As the model reads it.
        bytes: Of the file.
        words: Of the file, by the convention.
    """

    text: str
    bytes: int
    words: int


def detokenise(text: str) -> str:
    """WikiText with its spaces where a writer puts them; the steps and their order are those of
    lm-evaluation-harness, so that figures agree with it."""
    text = text.replace("s '", "s'")
    for marked, plain in _JOINED.items():
        text = text.replace(marked, plain)
    for mark in ":;.!?,":
        text = text.replace(f" {mark} ", f"{mark} ")
    for pattern, plain in (*_BRACKETS, *_QUOTES):
        text = pattern.sub(plain, text)
    for signs in ("= = = =", "= = =", "= ="):
        text = text.replace(signs, signs.replace(" ", ""))
    for before, after in ((" ° ", "°"), (" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s")):
        text = text.replace(before, after)
    return text


def articles(text: str) -> list[str]:
    """The parts of a WikiText file that begin with a heading of the first level."""
    starts = [match.start() for match in _HEADING.finditer(text)]
    if not starts:
        return [text]
    return [text[a:b] for a, b in zip([0, *starts[1:]], [*starts[1:], len(text)], strict=True)]


def _as_one(text: str, change: Callable[[str], str], words: int) -> list[Document]:
    return [Document(change(text), len(text.encode()), words)]


def documents(text: str, convention: str) -> list[Document]:
    """A file's text as the documents that are scored.

    Args:
        text: Of the file.
        convention: none, wikitext or lm_eval; see
            :class:`~dualroute.evaluate.suite.config.PerplexitySettings`.
    """
    if convention == "wikitext":
        return _as_one(text, detokenise, len(text.split()) + text.count("\n"))
    if convention == "lm_eval":
        pages = [page for page in articles(text) if page.strip()]
        return [Document(detokenise(page), len(page.encode()), len(re.split(r"\s+", page))) for page in pages]
    return _as_one(text, str, len(text.split()))
