"""Preference pairs: of two answers to one chat the better is to become likelier than the other (DPO).

Row: ``chosen`` and ``rejected``, texts beside a ``prompt``, or whole chats that begin alike; ``prompt`` may
be a list of messages too.  An example is both chats, side by side as two documents.  The loss is
:mod:`dualroute.tasks.preference`'s.  Prediction: ``prediction``, the answer that the model writes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from dualroute.data.chat.messages import Message
from dualroute.data.reader import IGNORE_INDEX
from dualroute.tasks.data.conversations import messages_of, text_of
from dualroute.tasks.data.encode import Encoded
from dualroute.tasks.data.examples import Example
from dualroute.tasks.kind import BadRow, Baseline, Kind, Role, Row, register
from dualroute.tasks.kinds.chat import Chats

#: Of a pair, in this order; also the numbers in the field ``parts``.
SIDES = ("chosen", "rejected")


@register("preference")
class Preferences(Chats):
    roles = {
        "prompt": Role("what is answered: a text, or a list of messages", required=False),
        "system": Role("what the system says first", required=False),
        "chosen": Role("the better answer, or the chat with it", is_target=True),
        "rejected": Role("the worse one", is_target=True),
    }
    metrics = {"accuracy": True, "margin": True}
    writes_text = True

    @classmethod
    def check_config(cls, config: Any) -> None:
        from dualroute.tasks.dpo.reference import check_preference

        check_preference(config)

    def too_long(self, length: int) -> None:
        if self.setting.too_long == "truncate":
            half = self.setting.max_length // 2
            self.tally.add(f"cut: each side of a pair may have {half} tokens, half of data.max_length")
            return
        super().too_long(length)

    def check_columns(self, *present: Any, **how: Any) -> None:
        Kind.check_columns(self, *present, **how)

    def _asked(self, row: Row) -> list[Message]:
        """The messages of ``prompt``; none without it."""
        value, system = row.get(self.column("prompt")), row.get(self.column("system"))
        if value is None:
            found: list[Message] = []
        elif isinstance(value, list):
            found = self._said(value)
        else:
            found = [{"role": "user", "content": text_of(value, "prompt")}]
        if isinstance(system, str) and system.strip() and (not found or found[0]["role"] != "system"):
            found.insert(0, {"role": "system", "content": system})
        return found

    def _said(self, value: Any) -> list[Message]:
        found, joined = messages_of(value)
        if joined:
            self.tally.add("chats in which turns of one speaker in a row were joined")
        return found

    def side(self, row: Row, name: str) -> list[Message]:
        """One of the chats of a pair.

        Raises:
            BadRow: It is none, or does not end with an answer.
        """
        value = row.get(self.column(name))
        if isinstance(value, list):
            said = self._said(value)
            found = said if said[0]["role"] in ("user", "system") else [*self._asked(row), *said]
        else:
            found = [*self._asked(row), {"role": "assistant", "content": text_of(value, name)}]
        if found[-1]["role"] != "assistant":
            raise BadRow(f"{name} does not end with an answer")
        if not any(message["role"] == "user" for message in found):
            raise BadRow("no prompt")
        return found

    def messages(self, row: Row) -> list[Message]:
        """The chat with the better answer, or what is to be answered where there is none."""
        return self._asked(row) if row.get(self.column("chosen")) is None else self.side(row, "chosen")

    def encode(self, row: Row, *, with_target: bool = True) -> list[Example]:
        if not with_target:
            return super().encode(row, with_target=False)
        sides = [self.side(row, name) for name in SIDES]
        if sides[0][:-1] != sides[1][:-1]:
            raise BadRow("chosen and rejected answer different chats")
        if sides[0] == sides[1]:
            self.tally.add("left out, because both sides of the pair are equal")
            return []
        encoded = [self._of_last(side, self.setting.max_length // 2) for side in sides]
        if encoded[0] == encoded[1]:
            self.tally.add("left out, because what fits of both sides of the pair is equal")
            return []
        fields = {
            "input_ids": np.concatenate([np.array(ids, dtype=np.int32) for ids, _ in encoded]),
            "labels": np.concatenate([np.array(labels, dtype=np.int32) for _, labels in encoded]),
            "parts": np.repeat(np.arange(2, dtype=np.int8), [len(ids) for ids, _ in encoded]),
        }
        return [Example(fields, targets=1)]

    def answer_examples(self, row: Row) -> list[Example]:
        return super().encode(row)  # the better answer

    def _of_last(self, messages: Sequence[Message], room: int) -> tuple[list[int], list[int]]:
        """(ids, labels) of a chat of which only the last answer counts: the turns before are equal."""
        ids, labels = self.learnt(messages, room)
        begins = len(self.setting.tokenizer.chat(messages[:-1], True, answers=False).ids) - 1
        labels = [label if place >= begins else IGNORE_INDEX for place, label in enumerate(labels)]
        if all(label == IGNORE_INDEX for label in labels):
            raise BadRow(f"no answer within the first {room} tokens")
        return ids, labels

    def training(
        self, encoded: Sequence[Encoded], prepared: Any, arguments: Callable[[], dict[str, Any]]
    ) -> Any:
        from dualroute.tasks.dpo.loss import Prefer
        from dualroute.tasks.dpo.reference import add_reference

        parts = [part.examples for part in encoded]
        if prepared.sharded:
            return Prefer(self, encoded[1], partial(add_reference, prepared, parts), **arguments())
        add_reference(prepared, parts)
        return Prefer(self, encoded[1], **arguments())

    def baselines(self) -> dict[str, Baseline]:
        return {}
