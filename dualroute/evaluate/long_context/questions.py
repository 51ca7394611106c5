"""Questions on one of many paragraphs, and questions that need two of them.

In: SQuAD-like JSON (XQuAD, SQuAD, CMRC) or HotpotQA's, of the user's.  Here: the paragraph with the answer
among others.  qa_2 is HotpotQA where its file is given.  Else its second hop is made: the answer to a
question of the paragraphs has a number in a register whose entries stand between the paragraphs, and the
number is asked for.  That is a two-hop question over the same paragraphs, and no figure of RULER's.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from dualroute.errors import UserError
from dualroute.evaluate.long_context.sample import Sample, Task
from dualroute.evaluate.long_context.words import number

_MOST_BYTES = 512 << 20
_ENTRIES = 8  # of the register, besides the one that is asked for
_TEMPLATE = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other "
    "words.\n\nThe following are given documents.\n\n{context}\n\nAnswer the question based on the given "
    "documents. Only give me the answer and do not output any other words.\n\nQuestion: {query} Answer:"
)
_ENTRY = "Register: the number of {name} is {number}."
_REGISTERED = "What is the number in the register of the answer to this question: {question}"


@dataclass(frozen=True)
class Question:
    """Attributes: the question, its answers, numbers of the documents that are needed."""

    text: str
    answers: tuple[str, ...]
    documents: tuple[int, ...]


@dataclass(frozen=True)
class Collection:
    """Documents and questions on them."""

    documents: list[str]
    questions: list[Question]


def read_paragraphs(path: str | Path) -> Collection:
    """A file of SQuAD's form: data → paragraphs → context, qas.

    Raises:
        UserError: It is of another form, or holds no question.
    """
    documents: list[str] = []
    questions: list[Question] = []
    try:
        for article in _read(path)["data"]:
            for paragraph in article["paragraphs"]:
                documents.append(str(paragraph["context"]))
                for asked in paragraph["qas"]:
                    answers = tuple(dict.fromkeys(str(one["text"]) for one in asked.get("answers", [])))
                    if answers and all(answers):
                        text = str(asked["question"])
                        questions.append(Question(text, answers, (len(documents) - 1,)))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not of SQuAD's form (data, paragraphs, context, qas): {error!r}; give such a file"
        ) from error
    return _checked(Collection(documents, questions), path)


def read_hotpot(path: str | Path) -> Collection:
    """A file of HotpotQA's form: a list of questions with their paragraphs.

    Raises:
        UserError: It is of another form, or holds no question.
    """
    numbers: dict[str, int] = {}
    questions: list[Question] = []
    try:
        for asked in _read(path):
            own = []
            for title, lines in asked["context"]:
                document = f"{title}\n{''.join(lines)}"
                own.append(numbers.setdefault(document, len(numbers)))
            questions.append(Question(str(asked["question"]), (str(asked["answer"]),), tuple(own)))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is not of HotpotQA's form (question, answer, context): {error!r}") from error
    return _checked(Collection(list(numbers), questions), path)


def _read(path: str | Path) -> Any:
    try:
        with gzip.open(path) if str(path).endswith(".gz") else open(path, "rb") as stream:
            data = stream.read(_MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            raise UserError(f"{path} holds over {_MOST_BYTES:,} bytes: give a part of it")
        return json.loads(data)
    except (OSError, EOFError, ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} cannot be read as JSON ({error}): give another file") from error


def _checked(collection: Collection, path: str | Path) -> Collection:
    if not collection.questions:
        raise UserError(f"{path} holds no question with an answer: give another file")
    return collection


def question_task(collection: Collection) -> Task:
    """qa_1, and qa_2 of HotpotQA: the needed paragraphs among others."""
    return Task(partial(_asked, collection), new_tokens=32, least=1, match="any")


def register_task(collection: Collection) -> Task:
    """qa_2 without HotpotQA; see the module's docstring."""
    return Task(partial(_registered, collection), new_tokens=32, least=1, match="any")


def _documents(collection: Collection, needed: Sequence[int], count: int, draw: random.Random) -> list[str]:
    others = [k for k in range(len(collection.documents)) if k not in needed]
    draw.shuffle(others)
    chosen = [*needed, *islice(cycle(others), max(count - len(needed), 0) if others else 0)]
    draw.shuffle(chosen)
    return [collection.documents[k] for k in chosen]


def _text(documents: Sequence[str], query: str) -> str:
    context = "\n\n".join(f"Document {place}:\n{one}" for place, one in enumerate(documents, 1))
    return _TEMPLATE.format(context=context, query=query)


def _asked(collection: Collection, count: int, draw: random.Random) -> Sample:
    asked = draw.choice(collection.questions)
    return Sample(
        _text(_documents(collection, asked.documents, count, draw), asked.text), list(asked.answers)
    )


def _registered(collection: Collection, count: int, draw: random.Random) -> Sample:
    asked = draw.choice(collection.questions)
    name = asked.answers[0]
    others = {draw.choice(collection.questions).answers[0] for _ in range(_ENTRIES)} - set(asked.answers)
    entries = {one: number(draw) for one in [name, *sorted(others)]}
    documents = _documents(collection, asked.documents, count, draw)
    for one, registered in entries.items():
        documents.insert(draw.randrange(len(documents) + 1), _ENTRY.format(name=one, number=registered))
    return Sample(_text(documents, _REGISTERED.format(question=asked.text)), [entries[name]])
