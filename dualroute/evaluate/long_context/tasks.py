"""All long-context tasks by name, with the files that some of them need."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dualroute.configuration.names import unknown
from dualroute.errors import UserError
from dualroute.evaluate.long_context.counting import common_words_task, frequent_words_task, variable_task
from dualroute.evaluate.long_context.facts import facts_task
from dualroute.evaluate.long_context.needles import CONFIGURATIONS, needle_task, passkey_task
from dualroute.evaluate.long_context.questions import (
    Collection,
    question_task,
    read_hotpot,
    read_paragraphs,
    register_task,
)
from dualroute.evaluate.long_context.sample import Task
from dualroute.evaluate.perplexity import read_text

#: RULER's thirteen, in its order.
RULER = (*CONFIGURATIONS, "vt", "cwe", "fwe", "qa_1", "qa_2")
FACTS = {"facts_1": 1, "facts_2": 2, "facts_3": 3}
#: Not a text with an answer: the loss of a book by position.
POSITIONS = "positions"
NAMES = (*RULER, "passkey", *FACTS, POSITIONS)
#: Characters of a haystack or book that are used: a million tokens of any tokenizer.
MOST_CHARACTERS = 12_000_000


@dataclass(frozen=True)
class Sources:
    """What texts are made from; null where nothing was given.

    Attributes:
        haystack: A text that needles are hidden in.
        paragraphs: SQuAD-like JSON.
        hotpot: HotpotQA's JSON.
        book: A text that facts are hidden in.
    """

    haystack: str | None = None
    paragraphs: str | None = None
    hotpot: str | None = None
    book: str | None = None


def data_file(name: str, *, folders: bool = False) -> str | None:
    """A file (or a folder, if so wanted) below $DUALROUTE_DATA, null where it is not there."""
    folder = os.environ.get("DUALROUTE_DATA")
    path = Path(folder or ".", name)
    return str(path) if folder and (path.is_file() or (folders and path.is_dir())) else None


def missing(name: str, sources: Sources) -> str:
    """What a task lacks, in words; "" if nothing."""
    if name in (*FACTS, POSITIONS) and sources.book is None:
        return "a text to hide facts in or to read: give book"
    if name == "qa_1" and sources.paragraphs is None:
        return "paragraphs with questions: give paragraphs, a file of SQuAD's form"
    if name == "qa_2" and sources.paragraphs is None and sources.hotpot is None:
        return "paragraphs with questions: give hotpot or paragraphs"
    return ""


class Library:
    """The tasks that there is data for.

    Args:
        sources: Files; each is read once, when it is first needed.

    Raises:
        UserError: A file cannot be used.
    """

    def __init__(self, sources: Sources) -> None:
        self.sources = sources
        self._read: dict[str, str | Collection] = {}

    def task(self, name: str, length: int) -> Task:
        """The task of a name, for texts of ``length`` tokens.

        Raises:
            UserError: There is no such task, or it lacks a file.
        """
        if name not in NAMES:
            raise UserError(unknown("task", name, NAMES))
        lacks = missing(name, self.sources)
        if lacks:
            raise UserError(f"{name} needs {lacks}")
        if name in CONFIGURATIONS:
            configuration = CONFIGURATIONS[name]
            hides = self.sources.haystack is not None and configuration.haystack == "text"
            return needle_task(configuration, self._text(self.sources.haystack) if hides else None)
        if name in FACTS:
            return facts_task(FACTS[name], self.book())
        if name == "qa_1":
            return question_task(self._collection(self.sources.paragraphs, read_paragraphs))
        if name == "qa_2" and self.sources.hotpot is not None:
            return question_task(self._collection(self.sources.hotpot, read_hotpot))
        if name == "qa_2":
            return register_task(self._collection(self.sources.paragraphs, read_paragraphs))
        simple: dict[str, Callable[[], Task]] = {
            "vt": variable_task,
            "cwe": lambda: common_words_task(length),
            "fwe": lambda: frequent_words_task(length),
            "passkey": passkey_task,
        }
        return simple[name]()

    def book(self) -> str:
        """The text of the book."""
        return self._text(self.sources.book)

    def _text(self, path: str | None) -> str:
        assert path is not None
        if path not in self._read:
            text = read_text(path)[:MOST_CHARACTERS]
            if not text.strip():
                raise UserError(f"{path} holds no text: give another file")
            self._read[path] = text
        return str(self._read[path])

    def _collection(self, path: str | None, read: Callable[[str], Collection]) -> Collection:
        assert path is not None
        found = self._read.get(path)
        if not isinstance(found, Collection):
            found = self._read[path] = read(path)
        return found
