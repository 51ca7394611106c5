"""A class for a text, or for a pair of texts: sentiment, acceptability, paraphrase, entailment, topic.

Row: ``text`` (and ``pair``), ``label``.  Output: at one token, or the mean of all (``task.pooling``).
Prediction: ``prediction`` (the label's name), ``probability``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from dualroute.errors import UserError
from dualroute.model.ends_config import TaskHeadConfig
from dualroute.tasks.baselines import majority, tfidf_classifier, tfidf_cosine_classifier
from dualroute.tasks.data.examples import Example
from dualroute.tasks.kind import BadRow, Baseline, Floats, Kind, Part, Role, Row, at_place, register
from dualroute.tasks.metrics import classification_metrics

#: With more labels than these, most of which name one row, the column is no column of classes.
FEW_LABELS = 50


@register("sequence")
class Sequences(Kind):
    roles = {
        "text": Role("the text"),
        "pair": Role("a second text to judge beside it", required=False),
        "label": Role("the class", is_target=True),
    }
    metrics = {"accuracy": True, "f1": True, "macro_f1": True, "matthews": True}

    def fit(self, rows: Iterable[Row]) -> None:
        counts: Counter[str] = Counter()
        for row in rows:
            name = self._name(row)
            if name is not None:
                counts[name] += 1
        if self.task.labels is None:
            self.labels = sorted(counts, key=label_order)
        seen = [name for name in self.labels if counts[name]]
        if len(seen) < 2:
            shown = f"one, {seen[0]!r}" if seen else "none"
            raise UserError(
                f"the training rows have {shown} of the labels in column {self.column('label')!r}: a class "
                f"cannot be learnt from fewer than two; give other rows, or another column (task.columns)"
            )
        if len(self.labels) > FEW_LABELS and len(self.labels) > sum(counts.values()) / 2:
            raise UserError(
                f"column {self.column('label')!r} has {len(self.labels):,} different labels, which looks "
                f"like a "
                f"text or a number: name the column of classes (task.columns), or use task.kind number or "
                f"text"
            )
        if self.task.class_weights == "balanced":
            total = sum(counts[name] for name in seen)
            self.class_weights = [
                total / (len(seen) * counts[name]) if counts[name] else 1.0 for name in self.labels
            ]

    def head(self) -> TaskHeadConfig:
        return TaskHeadConfig("sequence", self.labels, self.pooling())

    def _name(self, row: Row) -> str | None:
        """A label as text; 1, 1.0 and "1" are one label, as columns of numbers come either way."""
        return label_name(row.get(self.column("label")))

    def target(self, row: Row) -> str:
        name = self._name(row)
        assert name is not None
        return name

    def encode(self, row: Row, *, with_target: bool = True) -> list[Example]:
        number = self.label_number(row) if with_target else None
        ids = text_ids(self, row)
        return [Example(self.pooled(ids, number))]

    def label_number(self, row: Row) -> int:
        """The output of a row's label.

        Raises:
            BadRow: It has none, or one that the training rows do not have.
        """
        name = self._name(row)
        if name is None:
            raise BadRow(f"no {self.column('label')}")
        number = self.numbers.get(name)
        if number is None:
            raise BadRow(f"{self.column('label')} that the training rows do not have")
        return number

    def warnings(self, rows: Iterable[Row]) -> Iterator[str]:
        known = ((name, row) for name, row in ((self._name(row), row) for row in rows) if name is not None)
        if all(len(name) > 2 and name.lower() in " ".join(self.texts(row)).lower() for name, row in known):
            yield (
                f"the label of every training row stands in its own text: the answer can be read off "
                f"column {self.column('text')!r}; remove it there unless that is the task"
            )

    @cached_property
    def numbers(self) -> dict[str, int]:
        """The output of each label."""
        return {name: number for number, name in enumerate(self.labels)}

    def reduce(self, outputs: Floats, example: Example) -> tuple[int, float]:
        shifted = np.exp(outputs[0] - outputs[0].max())
        best = int(shifted.argmax())
        return best, float(shifted[best] / shifted.sum())

    def decode(self, row: Row, parts: Sequence[Part]) -> Row:
        number, probability = parts[0].output
        return {"prediction": self.labels[number], "probability": round(probability, 4)}

    def score(self, targets: Sequence[Any], predictions: Sequence[Row]) -> dict[str, float]:
        return classification_metrics(targets, [row["prediction"] for row in predictions])

    def baselines(self) -> dict[str, Baseline]:
        def tfidf(train: Sequence[Row], rows: Sequence[Row]) -> list[Row]:
            texts = [[" \n ".join(self.texts(row)) for row in some] for some in (train, rows)]
            names = tfidf_classifier(texts[0], [self.target(row) for row in train], texts[1])
            return [{"prediction": name} for name in names]

        def most(train: Sequence[Row], rows: Sequence[Row]) -> list[Row]:
            return [{"prediction": majority([self.target(row) for row in train])}] * len(rows)

        def cosine(train: Sequence[Row], rows: Sequence[Row]) -> list[Row]:
            pairs = [[(self.text(row), self.text(row, "pair")) for row in some] for some in (train, rows)]
            names = tfidf_cosine_classifier(pairs[0], [self.target(row) for row in train], pairs[1])
            return [{"prediction": name} for name in names]

        return {
            "TF-IDF + logistic regression": tfidf,
            "majority": most,
            "TF-IDF cosine of the pair": cosine,  # of rows that have one
        }


def text_ids(kind: Kind, row: Row) -> list[int]:
    """The row's text, and its second one where it has one, as :meth:`Kind.joined` joins them."""
    texts = [kind.text(row)]
    if kind.column("pair") in row:
        texts.append(kind.text(row, "pair"))
    return kind.joined(*(kind.setting.tokenizer.encode(text) for text in texts))


class Steps(Sequences):
    """A class for what is no text, but numbers for each step (images, recordings)."""

    reads_text = False

    def pooling(self) -> Any:
        return "mean" if self.task.pooling == "auto" else self.task.pooling

    def example(self, steps: Floats, number: int | None) -> Example:
        """``steps`` (n, features) with the output ``number``, read where ``task.pooling`` says."""
        place = 0 if self.pooling() == "first" else len(steps) - 1
        return Example({"inputs": steps, **at_place(len(steps), place, number)})

    def warnings(self, rows: Iterable[Row]) -> Iterator[str]:
        yield from ()

    def texts(self, row: Row) -> list[str]:
        return [self.name, self._name(row) or ""]


def label_name(value: Any) -> str | None:
    """A label as text, null where there is none.

    1, 1.0 and "1" are one label, because a column of numbers comes either way; so are true and True.
    """
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | int | float | bool):
        return None
    return str(value).strip() or None


def label_order(name: str) -> tuple[int, float, str]:
    """Numbers by value before names by letter."""
    try:
        return 0, float(name), name
    except ValueError:
        return 1, 0.0, name
