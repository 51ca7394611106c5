"""Which item comes next for a user: films, articles, songs.

Rows of the data are events: ``user``, ``item`` and ``time`` (MovieLens' own files, or any table); they become
one row a user, ``items`` in the order of time.  The last item of a user is the test, the one before the
validation, those before are learnt from (leave-one-out).  Input: items, read from left to right.  Output: at
each item a score for every item, by which the next one is asked for.  Prediction: ``prediction``, the best
item that the user has not had, and ``best``, the best ten.

HR@10 and NDCG@10 are over all items, not over a sample of them.  An item that the training does not have is
counted as missed where it is asked for.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from dualroute.data.reader import IGNORE_INDEX
from dualroute.errors import UserError
from dualroute.model.ends_config import TaskHeadConfig
from dualroute.tasks.baselines import cosine_neighbours, popular
from dualroute.tasks.data.examples import Example
from dualroute.tasks.kind import BadRow, Baseline, Floats, Kind, Part, PlacedRow, Role, Row, register

BEST = 10
#: Names of the columns where task.columns says nothing; the last are MovieLens'.
ALIASES = {
    "user": ("user", "user_id", "userId"),
    "item": ("item", "item_id", "movieId"),
    "time": ("time", "timestamp"),
}
UNKNOWN = 0  # the id of items that the training does not have


@register("item")
class Items(Kind):
    reads_text = False
    roles = {
        "user": Role("who", required=False),
        "item": Role("what", required=False),
        "time": Role("when, as a number", required=False),
        "items": Role("the items of one user, the latest last"),
        "next": Role("the item that follows", required=False, is_target=True),
    }
    metrics = {"ndcg@10": True, "hr@10": True}
    few_rows = "give events of users who have three or more"

    def divide(self, rows: Sequence[PlacedRow]) -> dict[str, list[PlacedRow]]:
        parts: dict[str, list[PlacedRow]] = {"train": [], "validation": [], "test": []}
        for place, user, items in self._histories(rows):
            known = items if len(items) < 3 else items[:-2]
            parts["train"].append((place, {"user": user, "items": known}))
            if len(items) >= 3:
                parts["validation"].append((place, asked(user, items[:-1])))
                parts["test"].append((place, asked(user, items)))
        return parts

    def _histories(self, rows: Sequence[PlacedRow]) -> Iterable[tuple[str, str, list[str]]]:
        """(place of the first event, user, items in the order of time) of each user."""
        if not rows:
            return
        names = {role: self._event_column(role, rows[0][1]) for role in ALIASES}
        events: dict[str, list[tuple[float, int, str]]] = {}
        places: dict[str, str] = {}
        for number, (place, row) in enumerate(rows):
            if any(row.get(names[role]) in (None, "") for role in ("user", "item")):
                self.tally.add("of events without a user or without an item, which are left out")
                continue
            user, item = str(row[names["user"]]), str(row[names["item"]])
            if names["time"] is None:
                time = 0.0
            else:
                try:
                    time = float(row[names["time"]])
                    if not math.isfinite(time):
                        raise ValueError
                except (KeyError, TypeError, ValueError) as error:
                    raise UserError(
                        f"{place}: column {names['time']!r} is {row.get(names['time'])!r}, not a number: "
                        f"give the time as seconds (task.columns {{time: …}})"
                    ) from error
            events.setdefault(user, []).append((time, number, item))
            places.setdefault(user, place)
        for user, found in events.items():
            yield places[user], user, [item for _, _, item in sorted(found)]

    def _event_column(self, role: str, row: Row) -> Any:
        if role in self.task.columns:
            choices: tuple[str, ...] = (self.task.columns[role],)
        else:
            choices = ALIASES[role]
        found = next((name for name in choices if name in row), None)
        if found is None and (role != "time" or role in self.task.columns):
            raise UserError(
                f"the data have no column {choices[0]!r} (of events: user, item, time), they have "
                f"{', '.join(map(repr, row))}: name the right one (task.columns {{{role}: …}})"
            )
        return found

    def check_columns(
        self, present: Iterable[str], *, with_target: bool = True, source: str = "data"
    ) -> None:
        if self.column("items") not in present:
            raise UserError(
                f"{source} has no column {self.column('items')!r} (a list of one user's items, the latest "
                f"last), it has {', '.join(map(repr, present))}: name the right one (task.columns "
                f"{{items: …}})"
            )

    def fit(self, rows: Iterable[Row]) -> None:
        counts = Counter(item for row in rows for item in row["items"])
        self.labels = self.task.labels or sorted(counts, key=lambda item: (-counts[item], item))
        if len(self.labels) < 2:
            raise UserError("the training rows have fewer than two items: nothing can be learnt of them")

    @cached_property
    def numbers(self) -> dict[str, int]:
        """The output of each item; its id is one more."""
        return {item: number for number, item in enumerate(self.labels)}

    def head(self) -> TaskHeadConfig:
        if not self.setting.causal:
            raise UserError(
                "model.causal is false, and the next item is read from left to right: leave it true"
            )
        return TaskHeadConfig("item", self.labels)

    def num_ids(self) -> int:
        return len(self.labels) + 1

    def texts(self, row: Row) -> list[str]:
        return [" ".join(map(str, row["items"][:100]))]

    def target(self, row: Row) -> str:
        return str(row["next"])

    def encode(self, row: Row, *, with_target: bool = True) -> list[Example]:
        items = row.get(self.column("items"))
        if not isinstance(items, list) or not items:
            raise BadRow(f"{self.column('items')} is no list of items")
        if not all(isinstance(item, str | int | float) for item in items):
            raise BadRow(f"{self.column('items')} holds what is no name of an item")
        items = [str(item) for item in items]
        ids = [self.numbers.get(item, UNKNOWN - 1) + 1 for item in items]
        following = UNKNOWN
        if with_target and "next" in row:
            following = self.numbers.get(self.target(row), UNKNOWN - 1) + 1
            if following == UNKNOWN:
                self.tally.add("of users who are asked for an item that the training does not have (missed)")
        elif with_target:
            if len(ids) < 2:
                self.tally.add("of users with one event, from whom nothing is learnt")
            return self._learnt(ids)
        return [self._asked(ids, following)]

    def _asked(self, history: list[int], following: int) -> Example:
        """The scores of what follows the latest items."""
        shown = history[-self.setting.max_length :]
        outputs = np.zeros(len(shown), dtype=bool)
        outputs[-1] = True
        labels = np.full(len(shown), IGNORE_INDEX, dtype=np.int32)
        if following != UNKNOWN:
            labels[-1] = following - 1
        fields = {"input_ids": np.array(shown, dtype=np.int32), "outputs": outputs, "labels": labels}
        return Example(fields, note=sorted({number - 1 for number in history} - {UNKNOWN - 1}))

    def _learnt(self, ids: list[int]) -> list[Example]:
        """Every item asked for from those before it, in pieces that the model can read."""
        step, found = self.setting.max_length, []
        for begin in range(0, len(ids) - 1, step):
            piece = np.array(ids[begin : begin + step + 1], dtype=np.int32)
            labels = np.where(piece[1:] == UNKNOWN, IGNORE_INDEX, piece[1:] - 1).astype(np.int32)
            outputs = np.ones(len(labels), dtype=bool)
            found.append(Example({"input_ids": piece[:-1], "outputs": outputs, "labels": labels}))
        return found

    def reduce(self, outputs: Floats, example: Example) -> list[int]:
        scores = outputs[-1].copy()
        scores[example.note or []] = -math.inf
        return best_of(scores)

    def decode(self, row: Row, parts: Sequence[Part]) -> Row:
        items = [self.labels[number] for number in parts[0].output]
        return {"prediction": items[0] if items else None, "best": items}

    def score(self, targets: Sequence[Any], predictions: Sequence[Row]) -> dict[str, float]:
        ranks = [
            row["best"].index(target) if target in row["best"] else None
            for target, row in zip(targets, predictions, strict=True)
        ]
        found = [rank for rank in ranks if rank is not None]
        return {
            "ndcg@10": sum(1 / math.log2(rank + 2) for rank in found) / max(len(ranks), 1),
            "hr@10": len(found) / max(len(ranks), 1),
        }

    def baselines(self) -> dict[str, Baseline]:
        def by(score: Any) -> Baseline:
            def answer(train: Sequence[Row], rows: Sequence[Row]) -> list[Row]:
                def known(some: Sequence[Row]) -> list[list[int]]:
                    found = [[self.numbers.get(str(item), -1) for item in row["items"]] for row in some]
                    return [[number for number in numbers if number >= 0] for numbers in found]

                histories = known(rows)
                predictions = []
                for history, scores in zip(
                    histories, score(known(train), histories, len(self.labels)), strict=True
                ):
                    scores = np.array(scores, dtype=np.float64)
                    scores[history] = -math.inf
                    predictions.append({"best": [self.labels[number] for number in best_of(scores)]})
                return predictions

            return answer

        return {"item-item cosine": by(cosine_neighbours), "popularity": by(popular)}


def asked(user: str, items: list[str]) -> Row:
    """The row that asks for the last of a user's items."""
    return {"user": user, "items": items[:-1], "next": items[-1]}


def best_of(scores: Any) -> list[int]:
    """Numbers of the `BEST` highest finite scores, the first of equals first."""
    order = np.argsort(-scores, kind="stable")[:BEST]
    return [int(number) for number in order if np.isfinite(scores[number])]
