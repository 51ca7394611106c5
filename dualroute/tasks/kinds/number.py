"""A number for a text, or for a pair of texts: similarity, price, grade.

Row: ``text`` (and ``pair``), ``label``, a number.  Learnt as a squared error in units of the training rows'
standard deviation.  Prediction: ``prediction``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from dualroute.errors import UserError
from dualroute.model.ends_config import TaskHeadConfig
from dualroute.tasks.baselines import tfidf_regression
from dualroute.tasks.data.examples import Example
from dualroute.tasks.kind import BadRow, Baseline, Floats, Kind, LossSums, Part, Role, Row, register
from dualroute.tasks.kinds.sequence import text_ids
from dualroute.tasks.metrics import number_metrics


@register("number")
class Numbers(Kind):
    roles = {
        "text": Role("the text"),
        "pair": Role("a second text to judge beside it", required=False),
        "label": Role("the number", is_target=True),
    }
    metrics = {"spearman": True, "pearson": True, "mse": False}
    mean, deviation = 0.0, 1.0

    def fit(self, rows: Iterable[Row]) -> None:
        values = [value for row in rows if (value := self._value(row)) is not None]
        if len(set(values)) < 2:
            raise UserError(
                f"the training rows have {len(set(values))} different numbers in column "
                f"{self.column('label')!r}: nothing can be learnt; name another column (task.columns)"
            )
        self.mean, self.deviation = float(np.mean(values)), float(np.std(values))

    def state(self) -> dict[str, Any]:
        return {"mean": self.mean, "deviation": self.deviation}

    def load_state(self, state: dict[str, Any]) -> None:
        self.mean, self.deviation = float(state.get("mean", 0.0)), float(state.get("deviation", 1.0))

    def head(self) -> TaskHeadConfig:
        return TaskHeadConfig("number", [], self.pooling())

    def _value(self, row: Row) -> float | None:
        value = row.get(self.column("label"))
        try:
            number = float(value) if isinstance(value, str | int | float) else math.nan
        except ValueError:
            return None
        return number if math.isfinite(number) else None

    def target(self, row: Row) -> float:
        value = self._value(row)
        assert value is not None
        return value

    def encode(self, row: Row, *, with_target: bool = True) -> list[Example]:
        ids = text_ids(self, row)
        fields = self.pooled(ids, None)
        if not with_target:
            return [Example(fields)]
        value = self._value(row)
        if value is None:
            raise BadRow(f"{self.column('label')} is no number")
        numbers = np.where(fields["outputs"], (value - self.mean) / self.deviation, np.nan)
        return [Example({**fields, "numbers": numbers.astype(np.float32)}, targets=1)]

    def loss(self, outputs: Any, batch: dict[str, Any], z_loss: float = 0.0) -> LossSums:
        from dualroute.tasks.losses import regression

        return regression(outputs, batch["numbers"].flatten()[batch["output_rows"]])

    def reduce(self, outputs: Floats, example: Example) -> float:
        return float(outputs[0, 0]) * self.deviation + self.mean

    def decode(self, row: Row, parts: Sequence[Part]) -> Row:
        return {"prediction": round(parts[0].output, 6)}

    def score(self, targets: Sequence[Any], predictions: Sequence[Row]) -> dict[str, float]:
        return number_metrics(targets, [row["prediction"] for row in predictions])

    def baselines(self) -> dict[str, Baseline]:
        def ridge(train: Sequence[Row], rows: Sequence[Row]) -> list[Row]:
            texts = [[" \n ".join(self.texts(row)) for row in some] for some in (train, rows)]
            values = tfidf_regression(texts[0], [self.target(row) for row in train], texts[1])
            return [{"prediction": value} for value in values]

        return {"TF-IDF + ridge regression": ridge}
