"""Training for a task: pretraining's LightningModule with the task's loss and metric.

In: batches of :mod:`dualroute.tasks.data.module`.  Here: hidden states go through the task's head at the
tokens whose outputs are wanted, then the kind's loss; a validation also collects predictions and has them
scored. Out: gradients and figures, as of pretraining.

A kind without a head learns the next token: nothing but the metric differs from pretraining then.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dualroute.data.window_module import Batch
from dualroute.model import DualRoutingTransformer
from dualroute.tasks.data.encode import Encoded
from dualroute.tasks.data.examples import Examples
from dualroute.tasks.kind import Kind, LossSums, Part, Row
from dualroute.tasks.writing import PERPLEXITY, WrittenMetrics
from dualroute.training.parallel.agreement import told_by_all
from dualroute.training.step.module import Pretrain


class Finetune(Pretrain):
    """Training of a model for a task.

    Args:
        kind: Of the task, fitted.
        validation: The rows that are validated on.
        arguments: Those of :class:`Pretrain`.
    """

    #: The metrics of a kind that writes text are those of what is written.
    writes_metrics = True

    def __init__(self, kind: Kind, validation: Encoded, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.kind, self.validation = kind, validation
        self.label_smoothing = kind.task.label_smoothing  # of a kind without a head; others have it in theirs
        scored = kind.metrics and not kind.writes_text
        metric = kind.task.metric or (next(iter(kind.metrics)) if scored else "loss")
        self.best_by = (metric, kind.metrics.get(metric, False))
        writes = kind.writes_text and metric not in ("loss", PERPLEXITY) and self.writes_metrics
        self.written = WrittenMetrics(kind, validation, self.tokenizer) if writes else None
        if self.model.task_head is not None:
            self.generate_sample = None  # type: ignore[method-assign, assignment]

    def on_fit_start(self) -> None:
        if self.written is not None and self.trainer.is_global_zero:
            self.written.tell()

    def _loss_sums(self, batch: Batch, z_loss: float = 0.0) -> Any:
        if self.model.task_head is None:
            return super()._loss_sums(batch, z_loss)
        return self._with_outputs(batch, z_loss)[0]

    def _with_outputs(self, batch: Batch, z_loss: float = 0.0) -> tuple[LossSums, Tensor]:
        outputs = task_outputs(self.model, batch, self.hidden_states(batch))
        return self.kind.loss(outputs, batch, z_loss), outputs

    # ------------------------------------------------------------------ validation

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self._reduced: list[tuple[int, Any]] = []

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        if self.model.task_head is None:
            super().validation_step(batch, batch_idx)
            return
        sums, outputs = self._with_outputs(batch)
        self._val_sums += torch.stack([sums.loss_sum.double(), sums.count.double()])
        self._reduced += reduced(self.kind, self.validation.examples, batch["examples"].tolist(), outputs)

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        if self.model.task_head is None:
            if self.best_by is not None and self.best_by[0] == PERPLEXITY:
                self.validation_metrics[PERPLEXITY] = math.exp(min(self.validation_metrics["loss"], 700.0))
            elif self.written is not None:
                self.validation_metrics |= self.written(self.model)
            return
        gathered = dict(pair for part in told_by_all(lambda: self._reduced) for pair in part)
        rows, predictions = answered(self.kind, self.validation, gathered)
        if rows:
            targets = [self.kind.target(row) for row in rows]
            self.validation_metrics |= self.kind.score(targets, predictions)


def task_outputs(model: DualRoutingTransformer, batch: Batch, hidden: Tensor) -> Tensor:
    """(R, outputs) of the task's head at the batch's ``output_rows``; ``hidden`` is (B, n, dim)."""
    assert model.task_head is not None
    outputs: Tensor = model.task_head(hidden, batch["output_rows"], batch["segment_ids"])
    return outputs


def reduced(kind: Kind, examples: Examples, numbers: Sequence[int], outputs: Tensor) -> list[tuple[int, Any]]:
    """(number of the example, what the kind keeps of its outputs), for the examples of a batch in order."""
    values, at, found = outputs.detach().float().cpu().numpy(), 0, []
    for number in numbers:
        example = examples[number]
        count = int(example.fields["outputs"].sum())
        found.append((number, kind.reduce(values[at : at + count], example)))
        at += count
    return found


def answered(kind: Kind, encoded: Encoded, outputs: dict[int, Any]) -> tuple[list[Row], list[Row]]:
    """The rows all of whose examples have outputs, and a prediction for each."""
    parts: dict[int, list[Part] | None] = {}
    for number, row in enumerate(encoded.examples.rows.tolist()):
        if number not in outputs:  # beyond data.val_tokens
            parts[row] = None
        elif (known := parts.setdefault(row, [])) is not None:
            known.append(Part(encoded.examples[number], outputs[number]))
    whole = [(encoded.rows[row], found) for row, found in sorted(parts.items()) if found is not None]
    return [row for row, _ in whole], [kind.decode(row, found) for row, found in whole]
