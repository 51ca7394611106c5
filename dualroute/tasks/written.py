"""The metric of a task whose answers are texts, in training: the model writes them at each validation.

In: the rows of the validation.  Out: :class:`WrittenMetrics` scores what the model writes on some of them, by
which the best checkpoint of a run is known and early stopping goes.
"""

from __future__ import annotations

import logging

from dualroute.data.tokenizer import Tokenizer
from dualroute.errors import UserError
from dualroute.evaluate.writing import write_texts
from dualroute.model import DualRoutingTransformer
from dualroute.tasks.data.encode import Encoded
from dualroute.tasks.kind import BadRow, Kind, Part, Row
from dualroute.training.parallel.agreement import place, told_by_all

log = logging.getLogger(__name__)
#: The one metric of texts that follows from the loss.
PERPLEXITY = "perplexity"


class WrittenMetrics:
    """Scores what a model writes on the first ``task.metric_rows`` of the rows that a run validates on.

    Each rank has the model write its share of the answers; all of them where weights are divided, since then
    all ranks have to run together.

    Args:
        kind: Of the task; ``task.metric`` is one of its metrics.
        validation: The rows.
        tokenizer: Of the model.

    Raises:
        UserError: The library of the metrics is missing, or no row can be asked.
    """

    def __init__(self, kind: Kind, validation: Encoded, tokenizer: Tokenizer) -> None:
        self.kind, self.tokenizer = kind, tokenizer
        numbers = sorted(set(validation.examples.rows.tolist()))[: kind.task.metric_rows]
        self._asked: list[tuple[Row, Part, list[int]]] = []
        kept, kind.setting.too_long = kind.setting.too_long, "truncate"  # what is asked is to be answered
        counts = kind.tally.counts.copy()  # these rows have been counted
        try:
            for row in (validation.rows[number] for number in numbers):
                try:
                    example = kind.encode(row, with_target=False)[0]
                    self._asked.append((row, Part(example, None), kind.prompt(row)))
                except BadRow:
                    continue
        finally:
            kind.setting.too_long = kept
            kind.tally.counts = counts
        if not self._asked:
            raise UserError(
                f"task.metric {kind.task.metric}: no validation row leaves room for an answer: raise "
                f"data.max_length, or lower task.max_new_tokens"
            )
        self._of = len(set(validation.examples.rows.tolist()))
        target = kind.target(self._asked[0][0])
        kind.score([target], [kind.decode(self._asked[0][0], [Part(self._asked[0][1].example, "")])])

    def tell(self) -> None:
        """Log how many rows are written on."""
        log.info(
            "%s",
            f"task.metric {self.kind.task.metric}: the model writes on {len(self._asked):,} of {self._of:,} "
            f"validation rows at each validation (task.metric_rows)",
        )

    def __call__(self, model: DualRoutingTransformer) -> dict[str, float]:
        """The kind's metrics of ``model``.  All ranks."""
        rank, ranks = place()
        divided = any(hasattr(parameter, "ds_id") for parameter in model.parameters())
        own = range(len(self._asked)) if divided else range(rank, len(self._asked), ranks)
        prompts = [self._asked[number][2] for number in own]
        texts = write_texts(model, self.tokenizer, prompts, self.kind.task.max_new_tokens)
        written = list(zip(own, texts, strict=True))
        found = dict(pair for part in told_by_all(lambda: written) for pair in part)
        rows = [row for row, _, _ in self._asked]
        predictions = [
            self.kind.decode(row, [Part(part.example, found[number])])
            for number, (row, part, _) in enumerate(self._asked)
        ]
        return self.kind.score([self.kind.target(row) for row in rows], predictions)
