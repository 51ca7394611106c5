"""An answer that stands in a text: extractive question answering.

Row: ``context``, ``question``, ``answers``: SQuAD's list of {text, answer_start}, the hub's {text: […],
answer_start: […]}, a text, or a list of texts; offsets count characters.  One that does not match the text is
repaired where the answer stands there exactly once, else the row is left out; both are counted.

A context that does not fit is read in windows that have ``task.stride`` tokens in common; a window without
the answer points at its first token.  Prediction: ``prediction``, the text of the answer, ``start`` and
``end``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dualroute.errors import UserError
from dualroute.model.ends_config import TaskHeadConfig
from dualroute.tasks.baselines import overlap_answers
from dualroute.tasks.data.examples import Example
from dualroute.tasks.data.spans import encoded_with_places, occurrences
from dualroute.tasks.kind import BadRow, Baseline, Floats, Kind, LossSums, Part, Role, Row, register
from dualroute.tasks.metrics import answer_metrics

#: In a field ``labels``: the answer begins here, ends here, both, or neither.
START, END = 1, 2
#: Longest answer, in tokens, and starts and ends of a window that are tried.
MOST_TOKENS, TRIED = 48, 20


class Span(NamedTuple):
    """The likeliest answer of a window: how much likelier than none, and its first and last output."""

    score: float
    first: int
    last: int


@register("span")
class Spans(Kind):
    roles = {
        "question": Role("the question"),
        "context": Role("the text that the answer stands in"),
        "answers": Role("answers and where they begin", is_target=True),
    }
    metrics = {"f1": True, "exact_match": True}

    def head(self) -> TaskHeadConfig:
        return TaskHeadConfig("span")

    def _answers(self, row: Row) -> list[tuple[str, int | None]]:
        """(text, offset or null) of every answer that is given."""
        value = row.get(self.column("answers"))
        if isinstance(value, dict):
            texts, starts = value.get("text"), value.get("answer_start", value.get("start"))
            if isinstance(texts, list) and isinstance(starts, list) and len(texts) == len(starts):
                value = [{"text": t, "answer_start": s} for t, s in zip(texts, starts, strict=True)]
            else:
                value = [value]
        found: list[tuple[str, int | None]] = []
        for one in value if isinstance(value, list) else [value]:
            text = one.get("text") if isinstance(one, dict) else one
            start = one.get("answer_start", one.get("start")) if isinstance(one, dict) else None
            if isinstance(text, str) and text.strip():
                if isinstance(start, int) and not isinstance(start, bool):
                    found.append((text.strip(), start + len(text) - len(text.lstrip())))
                else:
                    found.append((text.strip(), None))
        return found

    def target(self, row: Row) -> list[str]:
        return [text for text, _ in self._answers(row)]

    def _place(self, row: Row, context: str) -> tuple[int, int]:
        """Characters [start, end) of the first answer that stands in the text."""
        answers = self._answers(row)
        if not answers:
            raise BadRow(f"no {self.column('answers')}")
        given = [(text, start) for text, start in answers if start is not None]
        right = [(s, s + len(text)) for text, s in given if s >= 0 and context.startswith(text, s)]
        for _ in range(len(given) - len(right)):
            self.tally.add("answers whose offset does not match the text")
        if right:
            return right[0]
        for text, start in answers:
            places = list(occurrences(context, text))
            if len(places) == 1:
                if start is not None:
                    self.tally.add("rows whose answer's offset was repaired")
                return places[0], places[0] + len(text)
        raise BadRow("no answer stands at its place in the text, nor exactly once elsewhere")

    def encode(self, row: Row, *, with_target: bool = True) -> list[Example]:
        context, tokenizer = self.text(row, "context"), self.setting.tokenizer
        answer = self._place(row, context) if with_target else None
        question = tokenizer.encode(self.text(row, "question"))
        bos = [tokenizer.bos_id] if tokenizer.bos_id >= 0 else []
        eos = [tokenizer.eos_id] if tokenizer.eos_id >= 0 else bos
        if len(question) > self.setting.max_length // 2:
            self.too_long(len(question))
            question = question[: self.setting.max_length // 2]
        before = [*bos, *question, *eos]
        ids, places = encoded_with_places(tokenizer, context)
        room = self.setting.max_length - len(before) - len(eos)
        step = room - min(self.task.stride, room // 2)
        if room < 2:
            raise UserError(f"data.max_length {self.setting.max_length} has no room for a text: raise it")
        windows = []
        for start in range(0, max(len(ids) - room + step, 1), step):
            stop = min(start + room, len(ids))
            windows.append(self._window(before, ids[start:stop], eos, places[start:stop], answer))
        return windows

    def _window(
        self,
        before: list[int],
        part: list[int],
        after: list[int],
        places: list[tuple[int, int]],
        answer: tuple[int, int] | None,
    ) -> Example:
        ids = np.array([*before, *part, *after], dtype=np.int32)
        outputs = np.zeros(len(ids), dtype=bool)
        outputs[0] = True  # no answer here
        outputs[len(before) : len(before) + len(part)] = True
        fields: dict[str, Any] = {"input_ids": ids, "outputs": outputs}
        if answer is not None:
            inside = [k for k, (s, e) in enumerate(places) if s < answer[1] and e > answer[0]]
            whole = inside and places[0][0] <= answer[0] and places[-1][1] >= answer[1]
            first, last = (len(before) + inside[0], len(before) + inside[-1]) if whole else (0, 0)
            labels = np.zeros(len(ids), dtype=np.int32)
            labels[first] += START
            labels[last] += END
            fields["labels"] = labels
        return Example(fields, targets=int(answer is not None), note=places)

    def loss(self, outputs: Any, batch: dict[str, Any], z_loss: float = 0.0) -> LossSums:
        """The mean of two cross-entropies over the tokens of a window: of the first and of the last token."""
        from dualroute.tasks.losses import within_segments

        labels = batch["labels"].flatten()[batch["output_rows"]]
        return within_segments(outputs, labels, (START, END), batch["segment_ids"], batch["output_rows"])

    def reduce(self, outputs: Floats, example: Example) -> Span:
        none = float(outputs[0].sum())
        starts, ends = outputs[1:, 0], outputs[1:, 1]
        best = Span(-np.inf, 0, 0)
        for first in np.argsort(-starts)[:TRIED].tolist():
            for last in np.argsort(-ends)[:TRIED].tolist():
                score = float(starts[first] + ends[last]) - none
                if first <= last < first + MOST_TOKENS and score > best.score:
                    best = Span(score, first, last)
        if best.score == -np.inf:  # no likely end follows a likely start
            first = int(starts.argmax())
            best = Span(float(starts[first] + ends[first]) - none, first, first)
        return best

    def decode(self, row: Row, parts: Sequence[Part]) -> Row:
        best = max(parts, key=lambda part: part.output.score)
        start, end = best.example.note[best.output.first][0], best.example.note[best.output.last][1]
        return {"prediction": self.text(row, "context")[start:end], "start": start, "end": end}

    def score(self, targets: Sequence[Any], predictions: Sequence[Row]) -> dict[str, float]:
        return answer_metrics(targets, [row["prediction"] for row in predictions])

    def baselines(self) -> dict[str, Baseline]:
        def overlap(train: Sequence[Row], rows: Sequence[Row]) -> list[Row]:
            asked = [(self.text(row, "question"), self.text(row, "context")) for row in rows]
            known = [(self.text(row, "question"), self.text(row, "context")) for row in train]
            targets = [self.target(row) for row in train]
            return [{"prediction": text} for text in overlap_answers(known, targets, asked)]

        return {"sliding window of word overlap": overlap}
