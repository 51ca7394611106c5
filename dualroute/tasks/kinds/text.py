"""A text for a text: translation, summarisation, the next utterance of a dialogue, a state to be tracked.

Row: the columns that ``task.prompt`` names in braces (``source`` by default), and ``answer``.  The model
reads the prompt and learns to write the answer and its end; nothing is learnt from the prompt.  Prediction:
``prediction``, written token by token, the likeliest each time.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from string import Formatter
from typing import Any

import numpy as np

from dualroute.errors import UserError
from dualroute.tasks.baselines import first_sentence, majority, nearest_source
from dualroute.tasks.config import TaskConfig
from dualroute.tasks.data.examples import Example
from dualroute.tasks.kind import Baseline, Kind, Part, Role, Row, Setting, register
from dualroute.tasks.metrics import text_metrics

#: How often a prompt is shortened until it fits.
_ATTEMPTS = 16


@register("text")
class Texts(Kind):
    roles = {
        "source": Role("what is answered"),
        "answer": Role("the text to write", is_target=True),
    }
    metrics = {
        **dict.fromkeys(("bleu", "chrf", "rouge1", "rouge2", "rougeL", "exact_match"), True),
        "perplexity": False,
    }
    writes_text = True

    def __init__(self, task: TaskConfig, setting: Setting) -> None:
        try:
            named = {name for _, name, _, _ in Formatter().parse(task.prompt) if name is not None}
        except ValueError as error:
            raise UserError(f"task.prompt is no template ({error}): write columns as {{source}}") from error
        wrong = next((name for name in named if not re.fullmatch(r"\w+", name) or name == "answer"), None)
        if wrong is not None or not named:
            raise UserError(
                f"task.prompt {task.prompt!r} names {wrong!r}: it must name columns of the question, as "
                f"{{source}}"
            )
        inputs = {name: Role(f"part of task.prompt {task.prompt!r}") for name in sorted(named)}
        self.roles = {**inputs, "answer": type(self).roles["answer"]}  # type: ignore[misc]
        super().__init__(task, setting)

    def _prompt(self, row: Row, room: int) -> list[int]:
        """Ids of the prompt, its longest column shortened until there are at most ``room``."""
        values = {name: self.text(row, name) for name in self.roles if name != "answer"}
        tokenizer = self.setting.tokenizer
        bos = [tokenizer.bos_id] if tokenizer.bos_id >= 0 else []
        ids = bos + tokenizer.encode(self.task.prompt.format(**values))
        if len(ids) <= room:
            return ids
        self.too_long(len(ids))
        for _ in range(_ATTEMPTS):
            longest = max(values, key=lambda name: len(values[name]))
            kept = int(len(values[longest]) * room / len(ids) * 0.98)
            text = values[longest]
            values[longest] = text[:kept] if self.task.keep == "beginning" else text[len(text) - kept :]
            ids = bos + tokenizer.encode(self.task.prompt.format(**values))
            if len(ids) <= room:
                return ids
        return ids[:room] if self.task.keep == "beginning" else bos + ids[len(ids) - room + len(bos) :]

    def prompt(self, row: Row) -> list[int]:
        length = self.setting.max_length
        return self._prompt(row, max(length - self.task.max_new_tokens, length // 2))

    def encode(self, row: Row, *, with_target: bool = True) -> list[Example]:
        if not with_target:
            return [Example({"input_ids": np.array(self.prompt(row), dtype=np.int32)})]
        tokenizer, length = self.setting.tokenizer, self.setting.max_length
        answer = tokenizer.encode(self.text(row, "answer").strip())
        end = [tokenizer.eos_id] if tokenizer.eos_id >= 0 else []
        if len(answer) + len(end) > length // 2:
            self.too_long(len(answer))
            answer = answer[: length // 2 - len(end)]
        prompt = self._prompt(row, length + 1 - len(answer) - len(end))
        ids = np.array([*prompt, *answer, *end], dtype=np.int32)
        labels = ids[1:].copy()
        labels[: len(prompt) - 1] = -100
        return [Example({"input_ids": ids[:-1], "labels": labels})]

    def target(self, row: Row) -> str:
        return self.text(row, "answer").strip()

    def decode(self, row: Row, parts: Sequence[Part]) -> Row:
        return {"prediction": parts[0].output}

    def score(self, targets: Sequence[Any], predictions: Sequence[Row]) -> dict[str, float]:
        return text_metrics(targets, [row["prediction"] for row in predictions])

    def texts(self, row: Row) -> list[str]:
        return [
            str(row[self.column(name)]) for name in self.roles if isinstance(row.get(self.column(name)), str)
        ]

    def baselines(self) -> dict[str, Baseline]:
        def source(row: Row) -> str:
            return "\n".join(self.text(row, name) for name in self.roles if name != "answer")

        def memory(train: Sequence[Row], rows: Sequence[Row]) -> list[Row]:
            answers = [self.target(row) for row in train]
            found = nearest_source([source(row) for row in train], [source(row) for row in rows])
            return [{"prediction": answers[k]} for k in found]

        def lead(train: Sequence[Row], rows: Sequence[Row]) -> list[Row]:
            return [{"prediction": first_sentence(source(row))} for row in rows]

        def most(train: Sequence[Row], rows: Sequence[Row]) -> list[Row]:
            return [{"prediction": majority([self.target(row) for row in train])}] * len(rows)

        return {"nearest source": memory, "lead-1": lead, "majority": most}
