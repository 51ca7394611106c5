"""Instruction data: chats of any number of turns, of which the assistant's answers are learnt.

Row: one of the forms of :data:`FORMS`.  The tokenizer's own chat template makes ids of it; labels are set at
what the assistant wrote and at the token that ends its turn.  Prediction: ``prediction``, the answer to the
last turn that has none (or, to be scored, in place of the last answer).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from dualroute.data.chat.messages import Message
from dualroute.data.reader import IGNORE_INDEX
from dualroute.errors import UserError
from dualroute.evaluate.conversation import without_oldest
from dualroute.tasks.baselines import majority, nearest_source
from dualroute.tasks.data.conversations import messages_of, text_of
from dualroute.tasks.data.examples import Example
from dualroute.tasks.kind import BadRow, Baseline, Kind, Part, Role, Row, register
from dualroute.tasks.metrics import text_metrics

#: Columns that make a chat; the first form whose columns are there is read.
FORMS: tuple[tuple[str, ...], ...] = (
    ("messages",),
    ("conversations",),
    ("prompt", "completion"),
    ("instruction", "output"),
)


@register("chat")
class Chats(Kind):
    roles = {
        "messages": Role("a list of {role, content}", required=False),
        "conversations": Role("a list of {from, value}", required=False),
        "system": Role("what the system says first", required=False),
        "prompt": Role("what the user says", required=False),
        "completion": Role("what the assistant answers", required=False, is_target=True),
        "instruction": Role("what the user asks for", required=False),
        "input": Role("what the instruction is about", required=False),
        "output": Role("what the assistant answers", required=False, is_target=True),
    }
    metrics = dict.fromkeys(("bleu", "chrf", "rouge1", "rouge2", "rougeL", "exact_match"), True)
    writes_text = True

    def check_columns(
        self, present: Iterable[str], *, with_target: bool = True, source: str = "data"
    ) -> None:
        present = list(present)
        super().check_columns(present, with_target=with_target, source=source)
        if self._form(present, with_target) is None:
            forms = "; ".join(" and ".join(form) for form in FORMS)
            raise UserError(
                f"{source} has the columns {', '.join(map(repr, present[:20]))} and none of what makes a "
                f"chat ({forms}): name them (task.columns {{messages: …}})"
            )

    def _form(self, present: Iterable[str], with_target: bool = True) -> tuple[str, ...] | None:
        columns = set(present)
        for form in FORMS:
            wanted = [name for name in form if with_target or not self.roles[name].is_target]
            if all(self.column(name) in columns for name in wanted):
                return form
        return None

    # ------------------------------------------------------------------ a row as messages

    def messages(self, row: Row) -> list[Message]:
        """The chat of a row; its last turn may be the user's.

        Raises:
            BadRow: It is none; see :func:`messages_of`.
        """
        form = self._form(row, with_target=False)
        if form is None:
            raise BadRow("no messages")
        value = row.get(self.column(form[0]))
        if form[0] in ("messages", "conversations"):
            found, joined = messages_of(value)
            if joined:
                self.tally.add("chats in which turns of one speaker in a row were joined")
        else:
            asked, answer = text_of(value, form[0]), row.get(self.column(form[1]))
            about = row.get(self.column("input")) if form[0] == "instruction" else None
            if isinstance(about, str) and about.strip():
                asked = f"{asked}\n\n{about}"
            found = [{"role": "user", "content": asked}]
            if answer is not None:
                found.append({"role": "assistant", "content": text_of(answer, "answer")})
        system = row.get(self.column("system"))
        if isinstance(system, str) and system.strip() and found[0]["role"] != "system":
            found.insert(0, {"role": "system", "content": system})
        first = found[0]["role"] != "system"
        if len(found) < 2 - first or found[1 - first]["role"] != "user":
            raise BadRow("a chat that does not begin with the user")
        return found

    def answered(self, row: Row) -> list[Message]:
        """The chat up to its last answer.

        Raises:
            BadRow: There is none.
        """
        found = self.messages(row)
        while found and found[-1]["role"] != "assistant":
            found.pop()
        if not found:
            raise BadRow("no answer of the assistant")
        return found

    def asked(self, row: Row) -> list[Message]:
        """The chat without its last answer."""
        found = self.messages(row)
        return found[:-1] if found[-1]["role"] == "assistant" else found

    # ------------------------------------------------------------------ what all kinds have

    def learnt(self, messages: Sequence[Message], room: int) -> tuple[list[int], list[int]]:
        """(ids, labels) of a chat, of at most ``room`` tokens; labels are the next ids where these are an
        answer's.

        Raises:
            BadRow: The template does not take it, or no answer begins within ``room``.
        """
        try:
            chat = self.setting.tokenizer.chat(messages)
        except UserError as error:
            raise BadRow(str(error)) from error
        labels = [
            token if is_answer else IGNORE_INDEX
            for token, is_answer in zip(chat.ids[1:], chat.answer[1:], strict=True)
        ]
        if len(labels) > room:
            self.too_long(len(labels))
            labels = labels[:room]
        if not any(label != IGNORE_INDEX for label in labels):
            raise BadRow(f"no answer within the first {room} tokens")
        return chat.ids[: len(labels)], labels

    def encode(self, row: Row, *, with_target: bool = True) -> list[Example]:
        if not with_target:
            return [Example({"input_ids": np.array(self.prompt(row), dtype=np.int32)})]
        ids, labels = self.learnt(self.answered(row), self.setting.max_length)
        return [
            Example({"input_ids": np.array(ids, dtype=np.int32), "labels": np.array(labels, dtype=np.int32)})
        ]

    def prompt(self, row: Row) -> list[int]:
        """Ids up to where the answer begins; earlier turns go where there is no room for all."""
        messages = self.asked(row)
        room = max(self.setting.max_length - self.task.max_new_tokens, self.setting.max_length // 2)
        while True:
            try:
                ids = self.setting.tokenizer.chat(messages, add_generation_prompt=True, answers=False).ids
            except UserError as error:
                raise BadRow(str(error)) from error
            if len(ids) <= room:
                return ids
            self.too_long(len(ids))
            shorter = without_oldest(messages)
            if shorter is None:
                raise BadRow(f"a turn that is longer than {room} tokens")
            messages = shorter

    def target(self, row: Row) -> str:
        return str(self.answered(row)[-1]["content"]).strip()

    def decode(self, row: Row, parts: Sequence[Part]) -> Row:
        return {"prediction": parts[0].output}

    def score(self, targets: Sequence[Any], predictions: Sequence[Row]) -> dict[str, float]:
        return text_metrics(targets, [row["prediction"] for row in predictions])

    def texts(self, row: Row) -> list[str]:
        try:
            return [str(message["content"]) for message in self.messages(row)]
        except BadRow:
            return []

    def baselines(self) -> dict[str, Baseline]:
        def question(row: Row) -> str:
            return str(self.asked(row)[-1]["content"])

        def memory(train: Sequence[Row], rows: Sequence[Row]) -> list[Row]:
            answers = [self.target(row) for row in train]
            found = nearest_source([question(row) for row in train], [question(row) for row in rows])
            return [{"prediction": answers[k]} for k in found]

        def most(train: Sequence[Row], rows: Sequence[Row]) -> list[Row]:
            return [{"prediction": majority([self.target(row) for row in train])}] * len(rows)

        return {"nearest question": memory, "majority": most}
