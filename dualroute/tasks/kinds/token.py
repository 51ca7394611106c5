"""A class for each word: entities (BIO), parts of speech.

Row: ``tokens``, the words, and ``tags``, one for each; lists, or texts with spaces between them.  A word's
output is at its last piece in a model that reads from left to right, which has read all of the word by then,
else at its first.  Prediction: ``prediction``, the tags, and ``entities`` where the tags are BIO.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from dualroute.errors import UserError
from dualroute.model.ends_config import TaskHeadConfig
from dualroute.tasks.baselines import dictionary_tags
from dualroute.tasks.data.examples import Example
from dualroute.tasks.data.spans import is_wide
from dualroute.tasks.kind import BadRow, Baseline, Floats, Kind, Part, Role, Row, register
from dualroute.tasks.metrics import tag_metrics

OUTSIDE = "O"


@register("token")
class Tokens(Kind):
    roles = {"tokens": Role("the words"), "tags": Role("a tag for each word", is_target=True)}
    metrics = {"f1": True, "precision": True, "recall": True, "accuracy": True}

    def fit(self, rows: Iterable[Row]) -> None:
        counts = Counter(tag for row in rows for tag in self._listed(row, "tags"))
        if self.task.labels is None:
            self.labels = sorted(counts, key=lambda tag: (tag != OUTSIDE, tag))
        if len([tag for tag in self.labels if counts[tag]]) < 2:
            raise UserError(
                f"the training rows have fewer than two tags in column {self.column('tags')!r}: nothing "
                f"can be "
                f"learnt; give other rows, or another column (task.columns)"
            )
        if self.task.class_weights == "balanced":
            total, seen = sum(counts.values()), len([tag for tag in self.labels if counts[tag]])
            self.class_weights = [total / (seen * counts[tag]) if counts[tag] else 1.0 for tag in self.labels]

    def head(self) -> TaskHeadConfig:
        return TaskHeadConfig("token", self.labels)

    @cached_property
    def numbers(self) -> dict[str, int]:
        """The output of each tag."""
        return {tag: number for number, tag in enumerate(self.labels)}

    def _listed(self, row: Row, role: str) -> list[str]:
        value = row.get(self.column(role))
        if isinstance(value, str):
            return value.split()
        return [str(one) for one in value] if isinstance(value, list | tuple) else []

    def texts(self, row: Row) -> list[str]:
        return [" ".join(self._listed(row, "tokens"))]

    def target(self, row: Row) -> list[str]:
        return self._listed(row, "tags")

    def encode(self, row: Row, *, with_target: bool = True) -> list[Example]:
        words = self._listed(row, "tokens")
        if not words or not all(word.strip() for word in words):
            raise BadRow(f"empty {self.column('tokens')}" if not words else "an empty word")
        tags: list[int] = []
        if with_target:
            named = self._listed(row, "tags")
            if len(named) != len(words):
                raise BadRow(f"{self.column('tags')} are not as many as {self.column('tokens')}")
            if any(tag not in self.numbers for tag in named):
                raise BadRow("a tag that the training rows do not have")
            tags = [self.numbers[tag] for tag in named]
        tokenizer = self.setting.tokenizer
        bos = [tokenizer.bos_id] if tokenizer.bos_id >= 0 else []
        ids, places = list(bos), list[int]()
        before = ""
        for word in words:
            joined = not before or (is_wide(before[-1]) and is_wide(word[0]))
            pieces = tokenizer.encode(word if joined else f" {word}") or [max(tokenizer.unk_id, 0)]
            if len(ids) + len(pieces) > self.setting.max_length:
                self.too_long(self.setting.max_length + 1)
                break
            ids += pieces
            places.append(len(ids) - 1 if self.setting.causal else len(ids) - len(pieces))
            before = word
        if not places:
            raise BadRow("a word longer than the model reads")
        outputs = np.zeros(len(ids), dtype=bool)
        outputs[places] = True
        fields = {"input_ids": np.array(ids, dtype=np.int32), "outputs": outputs}
        if with_target:
            labels = np.full(len(ids), -100, dtype=np.int32)
            labels[places] = tags[: len(places)]
            fields["labels"] = labels
        return [Example(fields)]

    def reduce(self, outputs: Floats, example: Example) -> list[int]:
        return [int(number) for number in outputs.argmax(1)]

    def decode(self, row: Row, parts: Sequence[Part]) -> Row:
        words = self._listed(row, "tokens")
        tags = [self.labels[number] for number in parts[0].output]
        tags += [OUTSIDE if OUTSIDE in self.labels else self.labels[0]] * (len(words) - len(tags))  # cut off
        found: Row = {"prediction": tags}
        if any(tag.startswith("B-") for tag in self.labels):
            found["entities"] = [
                {"type": kind, "text": " ".join(words[start:stop]), "start": start, "end": stop}
                for kind, start, stop in entities(tags)
            ]
        return found

    def score(self, targets: Sequence[Any], predictions: Sequence[Row]) -> dict[str, float]:
        return tag_metrics(targets, [row["prediction"] for row in predictions])

    def baselines(self) -> dict[str, Baseline]:
        def dictionary(train: Sequence[Row], rows: Sequence[Row]) -> list[Row]:
            known = [(self._listed(row, "tokens"), entities(self.target(row))) for row in train]
            tags = dictionary_tags(known, [self._listed(row, "tokens") for row in rows])
            return [{"prediction": found} for found in tags]

        return {"dictionary of the training entities": dictionary}


def entities(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """(type, first word, word after the last) of BIO tags; an I- that continues nothing begins an entity, as
    conlleval counts it."""
    found: list[tuple[str, int, int]] = []
    start, kind = 0, ""
    for place, tag in enumerate([*tags, OUTSIDE]):
        prefix, _, name = tag.partition("-")
        continues = kind and prefix == "I" and name == kind
        if kind and not continues:
            found.append((kind, start, place))
            kind = ""
        if not continues and prefix in ("B", "I") and name:
            start, kind = place, name
    return found
