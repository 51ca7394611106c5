"""What is said in a recording: characters, found with connectionist temporal classification (CTC).

Row: ``audio`` (a file, or samples), ``text``.  Input: frames of log-mel energies (``task.audio``).  Output:
at each step a character or none; the loss sums over all ways in which the steps can spell the text (Graves et
al. 2006).  Prediction: ``prediction``, the best character of each step, repetitions and nones left out.

A text needs a step for each character, and one more between two equal ones: a recording that is too short
for its text is left out, counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby, pairwise
from typing import Any

import numpy as np

from dualroute.data.reader import IGNORE_INDEX
from dualroute.errors import UserError
from dualroute.model.ends_config import FrontendConfig, TaskHeadConfig
from dualroute.tasks.baselines import majority
from dualroute.tasks.data.examples import Example
from dualroute.tasks.kind import BadRow, Baseline, Floats, Kind, LossSums, Part, Role, Row, register
from dualroute.tasks.kinds.speech import frontend_of, steps_of
from dualroute.tasks.metrics import library

NONE = ""  # the first output: no character
MOST_CHARACTERS = 20_000


@register("recognition")
class Recognition(Kind):
    reads_text = False
    media = ("audio",)
    roles = {
        "audio": Role("the recording: a file or samples"),
        "text": Role("what is said in it", is_target=True),
    }
    metrics = {"wer": False, "cer": False}

    def fit(self, rows: Iterable[Row]) -> None:
        characters = {character for row in rows for character in self._said(row)}
        if not characters:
            raise UserError(
                f"the training rows have no text in column {self.column('text')!r}: name the right one "
                f"(task.columns {{text: …}})"
            )
        if len(characters) > MOST_CHARACTERS:
            raise UserError(
                f"the training texts have {len(characters):,} different characters: use a kind of text"
            )
        self.labels = [NONE, *(self.task.labels or sorted(characters))]

    def _said(self, row: Row) -> str:
        value = row.get(self.column("text"))
        return " ".join(value.split()) if isinstance(value, str) else ""

    def frontend(self) -> FrontendConfig:
        return frontend_of(self.task.audio)

    def head(self) -> TaskHeadConfig:
        return TaskHeadConfig("ctc", self.labels)

    def texts(self, row: Row) -> list[str]:
        return [self._said(row)]

    def target(self, row: Row) -> str:
        return self._said(row)

    def encode(self, row: Row, *, with_target: bool = True) -> list[Example]:
        steps = steps_of(self, row)
        fields: dict[str, Any] = {"inputs": steps, "outputs": np.ones(len(steps), dtype=bool)}
        if with_target:
            self.text(row)  # refuses a row without one
            text = self._said(row)
            numbers = {character: number for number, character in enumerate(self.labels)}
            if not all(character in numbers for character in text):
                raise BadRow("characters that the training texts do not have")
            if len(steps) < len(text) + sum(a == b for a, b in pairwise(text)):
                raise BadRow("a recording that is too short for its text (see task.audio.stack and hop)")
            # the text's characters stand at the first steps; the loss takes them from there
            labels = np.full(len(steps), IGNORE_INDEX, dtype=np.int32)
            labels[: len(text)] = [numbers[character] for character in text]
            fields["labels"] = labels
        return [Example(fields)]

    def loss(self, outputs: Any, batch: dict[str, Any], z_loss: float = 0.0) -> LossSums:
        from dualroute.tasks.losses import ctc

        rows = batch["output_rows"]
        length = batch["segment_ids"].shape[1]
        segments = batch["segment_ids"].flatten()[rows] + rows // length * (length + 1)
        return ctc(outputs, batch["labels"].flatten()[rows], segments)

    def reduce(self, outputs: Floats, example: Example) -> list[int]:
        return [int(number) for number, _ in groupby(outputs.argmax(1).tolist()) if number]

    def decode(self, row: Row, parts: Sequence[Part]) -> Row:
        return {"prediction": "".join(self.labels[number] for number in parts[0].output).strip()}

    def score(self, targets: Sequence[Any], predictions: Sequence[Row]) -> dict[str, float]:
        jiwer = library("jiwer", "audio")
        said = [row["prediction"] for row in predictions]
        return {"wer": float(jiwer.wer(list(targets), said)), "cer": float(jiwer.cer(list(targets), said))}

    def baselines(self) -> dict[str, Baseline]:
        def most(train: Sequence[Row], rows: Sequence[Row]) -> list[Row]:
            return [{"prediction": majority([self.target(row) for row in train])}] * len(rows)

        return {"commonest text": most}
