"""Answers of a model to rows: what prediction, evaluation and benchmarks have in common.

In: a checkpoint with a ``task.json``, and rows.  Here: rows are encoded, packed and run through the model a
few hundred at a time; a kind that writes text has the model write it.  Out: a prediction for each row, or why
there is none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dualroute.data.reader import IGNORE_INDEX
from dualroute.evaluate.load import Loaded, load
from dualroute.evaluate.writing import not_finite, write_texts
from dualroute.model.checkpoint.folder import Checkpoint, find_checkpoint
from dualroute.tasks.data.encode import Encoded
from dualroute.tasks.data.examples import Example, Examples
from dualroute.tasks.data.module import PackedWindows, collate_examples
from dualroute.tasks.data.packing import PackedSequence
from dualroute.tasks.description import task_of
from dualroute.tasks.kind import BadRow, Kind, Part, Row
from dualroute.tasks.module import reduced, task_outputs

#: Rows that are encoded and packed together.
ROWS_AT_ONCE = 512


class Answer(NamedTuple):
    """One row's.

    Attributes:
        row: As it was read.
        prediction: Its new columns; null where there is none.
        problem: Why there is none, or "".
    """

    row: Row
    prediction: Row | None
    problem: str = ""


def task_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint that a path stands for: the best one of a run folder, where there is one.

    Raises:
        UserError: Nothing finished there.
    """
    best = Path(path) / "checkpoints" / "best"
    return find_checkpoint(best if best.exists() else path)


class Answerer:
    """A model that answers rows.

    Args:
        checkpoint: A run folder or a checkpoint folder.
        device, dtype: See :func:`dualroute.evaluate.load.load`.
        batch_size: Windows in one forward pass.
        loaded: The checkpoint, where it is loaded already.

    Raises:
        UserError: The checkpoint cannot be used, or was not trained for a task.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        device: str = "auto",
        dtype: str = "auto",
        batch_size: int = 8,
        loaded: Loaded | None = None,
    ) -> None:
        found = task_checkpoint(checkpoint) if loaded is None else loaded.checkpoint
        self.loaded: Loaded = loaded or load(found.folder, device, dtype)
        causal = self.loaded.model.config.causal
        self.kind, self.said = task_of(found, self.loaded.tokenizer, causal)
        self.kind.setting.too_long = "truncate"  # a row that is asked is to be answered
        self.batch_size = batch_size

    @property
    def context(self) -> int:
        """Slots of a window: as in training, where the checkpoint says it."""
        said = self.loaded.checkpoint.metadata.get("context")
        return max(int(said or 0), self.kind.setting.max_length)

    def answers(self, rows: Iterable[Row]) -> Iterator[Answer]:
        """An answer for each row, in their order."""
        for some in batched(rows, ROWS_AT_ONCE):
            yield from self._answers(some)

    def _answers(self, rows: Sequence[Row]) -> list[Answer]:
        parts: list[list[Example] | str] = []
        for row in rows:
            try:
                parts.append(self.kind.encode(row, with_target=False))
            except BadRow as error:
                parts.append(str(error))
        asked = [(row, found) for row, found in zip(rows, parts, strict=True) if not isinstance(found, str)]
        predictions = iter(self._predictions(asked))
        return [
            Answer(row, None, found) if isinstance(found, str) else Answer(row, next(predictions))
            for row, found in zip(rows, parts, strict=True)
        ]

    @torch.no_grad()
    def next_token_loss(self, rows: Sequence[Row]) -> float:
        """Mean loss of the targets' tokens in nats, of a kind without a head."""
        examples = Examples((k, one) for k, row in enumerate(rows) for one in self.kind.answer_examples(row))
        loaded, total, count = self.loaded, 0.0, 0
        for batch in window_batches(loaded, self.kind, examples, self.context, self.batch_size):
            labels = batch["labels"].flatten()
            wanted = labels != IGNORE_INDEX
            hidden = hidden_states(loaded, batch).flatten(0, 1)[wanted]
            logits = loaded.model.head(hidden).float()
            total += float(F.cross_entropy(logits, labels[wanted], reduction="sum"))
            count += int(wanted.sum())
        return total / max(count, 1)

    def _predictions(self, asked: list[tuple[Row, list[Example]]]) -> list[Row]:
        kind, loaded = self.kind, self.loaded
        if not asked:
            return []
        if kind.writes_text:
            texts = write_texts(
                loaded.model,
                loaded.tokenizer,
                [kind.prompt(row) for row, _ in asked],
                kind.task.max_new_tokens,
            )
            return [
                kind.decode(row, [Part(found[0], text)])
                for (row, found), text in zip(asked, texts, strict=True)
            ]
        numbered = ((number, example) for number, (_, found) in enumerate(asked) for example in found)
        encoded = Encoded([row for row, _ in asked], Examples(numbered))
        outputs = dict(run_examples(loaded, kind, encoded.examples, self.context, self.batch_size))
        found: list[list[Part]] = [[] for _ in asked]
        for number, row in enumerate(encoded.examples.rows.tolist()):
            found[row].append(Part(encoded.examples[number], outputs[number]))
        return [kind.decode(row, mine) for row, mine in zip(encoded.rows, found, strict=True)]


def window_batches(
    loaded: Loaded, kind: Kind, examples: Examples, context: int, batch_size: int
) -> Iterator[dict[str, Any]]:
    """Batches of packed examples on the model's device; ``examples`` in them is a list."""
    plan = PackedSequence(examples.lengths, examples.targets, context)
    fills = {"input_ids": max(loaded.tokenizer.pad_id, 0), **kind.fills}
    windows = PackedWindows(examples, plan, fills)
    for numbers in batched(range(plan.windows), batch_size):
        batch = collate_examples([windows[number] for number in numbers])
        order = batch.pop("examples").tolist()
        yield {**{name: value.to(loaded.device) for name, value in batch.items()}, "examples": order}


def hidden_states(loaded: Loaded, batch: dict[str, Any]) -> Tensor:
    """(B, n, dim) of a batch."""
    return loaded.model.hidden_states(
        batch["inputs"] if "inputs" in batch else batch["input_ids"],
        segment_ids=batch["segment_ids"],
        positions=batch["positions"],
    )


@torch.no_grad()
def run_examples(
    loaded: Loaded, kind: Kind, examples: Examples, context: int, batch_size: int
) -> Iterator[tuple[int, Any]]:
    """(number of the example, what the kind keeps of its outputs), window by window."""
    for batch in window_batches(loaded, kind, examples, context, batch_size):
        outputs = task_outputs(loaded.model, batch, hidden_states(loaded, batch))
        if bool(torch.isnan(outputs).any()):
            raise not_finite(str(loaded.checkpoint.folder))
        yield from reduced(kind, examples, batch["examples"], outputs)


def batched(values: Iterable[Any], count: int) -> Iterator[list[Any]]:
    """Lists of ``count`` values, the last one shorter."""
    values = iter(values)
    while some := list(islice(values, count)):
        yield some
