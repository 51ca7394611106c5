"""Counterfactual augmentation: a text with the gender of all its words, names and pronouns swapped.

In: the text of a document and lists of what is swapped (``data_prep/swaps``, or files of your own).  Out: the
same text as it would be told of the other gender.  Everything in a document is swapped at once, so names and
pronouns go on agreeing.  `clean` gives the documents; `with_counterfactuals` adds to them before they are
tokenised.  (Zhao et al. 2018, https://arxiv.org/abs/1804.06876, §4; Lu et al. 2018,
https://arxiv.org/abs/1807.11714.)

A list has one rule a line:

    he <-> she                     both ways
    his -> hers                    one way
    his -> her | before *          one way, in front of a word
    her -> him | before a the to   one way, in front of one of these words
    keep 其他                      never touched, though a shorter rule would fit inside

The first rule that fits a word is taken.  Words of alphabets are whole words, upper and lower case follow the
text; words of scripts without spaces are found inside a line, longer ones first.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from data_prep.clean import CleanDocument
from dualroute.errors import UserError
from dualroute.files import read_limited

SHIPPED = Path(__file__).parent / "swaps"
#: Of a list.
MOST_BYTES = 1 << 20
Mode = Literal["add", "replace"]

_UNSPACED = "\u2e80-\u9fff\uac00-\ud7ff\uf900-\ufaff"  # Han, kana, Hangul
_WORD = re.compile(rf"[^\W\d_{_UNSPACED}]+(?:['’][^\W\d_{_UNSPACED}]+)?")
_RULE = re.compile(r"(\S+)\s+(<->|->)\s+(\S+)(?:\s+\|\s+before\s+(.+))?")


@dataclass(frozen=True)
class _Rule:
    to: str
    before: frozenset[str] | None = None  # null: wherever it stands; "*" is any word


class Swaps:
    """The rules of some lists.

    Args:
        lists: Names of shipped ones (``english``, ``chinese``) or files.

    Attributes:
        sha256: Of all rules, for a preparation's plan.

    Raises:
        UserError: A list cannot be read, or a line of it is no rule.
    """

    def __init__(self, lists: Sequence[str]) -> None:
        self._words: dict[str, list[_Rule]] = {}
        self._inside: dict[str, str] = {}
        data = b""
        for name in lists:
            path = SHIPPED / f"{name}.txt" if name in shipped_names() else Path(name)
            content = read_limited(path, MOST_BYTES)
            data += content + b"\0"
            try:
                lines = content.decode().splitlines()
            except UnicodeDecodeError as error:
                raise UserError(f"counterfactual {path} is not UTF-8 text: convert it first") from error
            for number, line in enumerate(lines, 1):
                if line.strip() and not line.startswith("#"):
                    self._add(line.strip(), f"{path}:{number}")
        if not self._words and not self._inside:
            raise UserError(
                f"counterfactual {', '.join(lists)}: there is no rule in it; give a list with some"
            )
        self.sha256 = hashlib.sha256(data).hexdigest()
        longest_first = sorted(self._inside, key=len, reverse=True)
        self._found_inside = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def _add(self, line: str, place: str) -> None:
        if line.startswith("keep "):
            self._rule(line[5:].strip(), line[5:].strip(), None, place)
            return
        rule = _RULE.fullmatch(line)
        if rule is None:
            raise UserError(
                f"counterfactual {place}: {line[:60]!r} is no rule; write A <-> B, A -> B, "
                f"A -> B | before WORDS, or keep A"
            )
        first, arrow, second, before = rule.groups()
        words = None if before is None else frozenset(before.lower().split())
        if words is not None and arrow == "<->":
            raise UserError(f"counterfactual {place}: a condition goes with -> alone; write two rules")
        self._rule(first, second, words, place)
        if arrow == "<->":
            self._rule(second, first, None, place)

    def _rule(self, word: str, to: str, before: frozenset[str] | None, place: str) -> None:
        if not _is_spaced(word):
            if before is not None:
                raise UserError(
                    f"counterfactual {place}: a script without spaces has no word behind {word!r}"
                )
            if self._inside.setdefault(word, to) != to:
                raise UserError(f"counterfactual {place}: {word!r} is swapped already; keep one rule")
            return
        if _WORD.fullmatch(word) is None:
            raise UserError(f"counterfactual {place}: {word!r} is not one word; write one word a rule")
        rules = self._words.setdefault(word.lower(), [])
        if rules and rules[-1].before is None:
            raise UserError(f"counterfactual {place}: an earlier rule takes every {word!r}; keep one of them")
        rules.append(_Rule(to, before))

    def swap(self, text: str) -> str:
        """The text with everything swapped."""
        if self._words:
            text = _WORD.sub(lambda found: self._word(found, text), text)
        return self._found_inside.sub(lambda found: self._inside[found[0]], text)

    def _word(self, found: re.Match[str], text: str) -> str:
        word = found[0]
        rules, ending = self._words.get(word.lower()), ""
        if rules is None and (mark := max(word.find("'"), word.find("’"))) > 0:
            rules, ending = self._words.get(word[:mark].lower()), word[mark:]  # the king's
            word = word[:mark]
        if rules is None:
            return found[0]
        following: str | None = None
        for rule in rules:
            if rule.before is not None:
                if following is None:
                    following = _next_word(text, found.end())
                if not following or not ("*" in rule.before or following in rule.before):
                    continue
            return _like(word, rule.to) + ending
        return found[0]


def _is_spaced(word: str) -> bool:
    return re.search(f"[{_UNSPACED}]", word) is None


def _next_word(text: str, place: int) -> str:
    """The word behind white space at a place, in lower case; "" where something else follows."""
    gap = re.compile(r"\s+").match(text, place)
    found = None if gap is None else _WORD.match(text, gap.end())
    return "" if found is None else found[0].lower()


def _like(word: str, to: str) -> str:
    """``to`` in the case of ``word``; a name keeps its capital."""
    if word.isupper() and len(word) > 1:
        return to.upper()
    return to[0].upper() + to[1:] if word[0].isupper() else to


def shipped_names() -> tuple[str, ...]:
    """The lists that come with dualroute."""
    return tuple(sorted(path.stem for path in SHIPPED.glob("*.txt")))


def with_counterfactuals(
    documents: Iterable[CleanDocument], swaps: Swaps, mode: Mode, seed: int = 0
) -> Iterator[CleanDocument]:
    """Documents of the training side with their counterfactuals; what is held out stays as it is.

    Args:
        documents: From `clean.select`.
        swaps: What is swapped.
        mode: ``add`` puts the swapped text behind each one that it changes; ``replace`` takes the swapped
            text instead for half of the documents, by the hash of their text.
        seed: Changes which half.
    """
    for document in documents:
        swapped = swaps.swap(document.text) if document.split == "train" else document.text
        if swapped == document.text:
            yield document
            continue
        data = swapped.encode()
        other = replace(
            document,
            name=f"{document.name}#counterfactual",
            text=swapped,
            num_bytes=len(data),
            digest=hashlib.sha256(data).digest(),
        )
        if mode == "add":
            yield document
            yield other
        else:
            key = (seed % (1 << 64)).to_bytes(8, "little")
            coin = hashlib.blake2b(document.digest, digest_size=1, key=key, person=b"counterfact").digest()[0]
            yield other if coin & 1 else document
