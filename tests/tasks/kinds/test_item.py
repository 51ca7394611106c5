"""The next item of a user: files of interactions, leave-one-out, and a set whose structure is known."""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dualroute.cli import main
from dualroute.errors import UserError
from dualroute.model.checkpoint.format import find_checkpoint
from dualroute.tasks.baselines import cosine_neighbours, popular
from dualroute.tasks.config import TaskConfig
from dualroute.tasks.data.encode import encode_rows
from dualroute.tasks.data.problems import Problems
from dualroute.tasks.data.rows import read_rows
from dualroute.tasks.kind import BadRow, Setting
from dualroute.tasks.kinds.item import Items, best_of
from tests.tasks.made import SMALL

ITEMS = 40


def kind_of(max_length: int = 50, **columns: str) -> Items:
    return Items(TaskConfig("item", columns), Setting(None, max_length))  # type: ignore[arg-type]


def walks(users: int = 150, seed: int = 0) -> list[tuple[str, str, int]]:
    """(user, item, time): each user goes on in steps of their own (1, 3 or 7) through a ring of items."""
    draw = random.Random(seed)
    rows = []
    for user in range(users):
        place, step = draw.randrange(ITEMS), draw.choice((1, 3, 7))
        for time in range(draw.randint(8, 14)):
            rows.append((f"u{user}", f"film{place}", 1000 + time))
            place = (place + step) % ITEMS
    draw.shuffle(rows)
    return rows


def write(path: Path, rows: list[tuple[str, str, int]], form: str) -> Path:
    if form == "100K":
        path = path / "u.data"
        path.write_text("".join(f"{user}\t{item}\t3\t{time}\n" for user, item, time in rows))
    elif form == "1M":
        path = path / "ratings.dat"
        path.write_text("".join(f"{user}::{item}::3.5::{time}\n" for user, item, time in rows))
    elif form == "20M":
        path = path / "ratings.csv"
        lines = [
            "userId,movieId,rating,timestamp",
            *(f"{user},{item},4.0,{time}" for user, item, time in rows),
        ]
        path.write_text("\n".join(lines) + "\n")
    else:
        path = path / "events.csv"
        lines = ["who,what,when", *(f"{user},{item},{time}" for user, item, time in rows)]
        path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("form", ["100K", "1M", "20M", "generic"])
def test_every_form_of_interactions_is_the_same_users(form: str, tmp_path: Path) -> None:
    rows = walks(20)
    columns = {"user": "who", "item": "what", "time": "when"} if form == "generic" else {}
    parts = kind_of(**columns).divide(list(read_rows(str(write(tmp_path, rows, form)), Problems())))
    for user in {user for user, _, _ in rows}:
        items = [item for _, item, _ in sorted((r for r in rows if r[0] == user), key=lambda r: r[2])]
        found = {name: next(row for _, row in part if row["user"] == user) for name, part in parts.items()}
        assert found["train"] == {"user": user, "items": items[:-2]}
        assert found["validation"] == {"user": user, "items": items[:-2], "next": items[-2]}
        assert found["test"] == {"user": user, "items": items[:-1], "next": items[-1]}


def test_malformed_lines_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path, walks(3), "1M")
    path.write_text(path.read_text() + "7::9\n")
    problems = Problems()
    assert len(list(read_rows(str(path), problems))) == problems.rows - 1
    assert problems.counts == {"not user, item, rating and time between tabs or '::'": 1}


def test_short_histories_and_unknown_items_are_counted() -> None:
    events = [("one", "a", 1), ("two", "a", 1), ("two", "b", 2)]
    events += [("three", item, time) for time, item in enumerate("abc")]
    events += [("four", item, time) for time, item in enumerate("abx")]
    rows = [("", {"user": user, "item": item, "time": time}) for user, item, time in events]
    kind = kind_of()
    parts = kind.divide(rows)
    assert [row["user"] for _, row in parts["train"]] == ["one", "two", "three", "four"]
    assert [row["user"] for _, row in parts["test"]] == ["three", "four"]
    kind.fit(row for _, row in parts["train"])
    assert kind.labels == ["a", "b"]  # c and x are never in the training
    trained = encode_rows(kind, parts["train"], Problems(), keep_rows=True)
    assert trained.examples.lengths.tolist() == [1]  # of user two; the others have one item
    asked = encode_rows(kind, parts["test"], Problems(), keep_rows=True)
    assert asked.examples.targets.tolist() == [0, 0]
    assert kind.tally.counts == {
        "of users with one event, from whom nothing is learnt": 3,
        "of users who are asked for an item that the training does not have (missed)": 2,
    }
    missed = kind.score(["c", "x"], [{"best": ["a", "b"]}] * 2)
    assert missed == {"ndcg@10": 0.0, "hr@10": 0.0}


def test_long_histories_are_learnt_in_pieces_and_asked_by_their_latest() -> None:
    kind = kind_of(max_length=4)
    items = [f"i{number}" for number in range(11)]
    kind.fit([{"items": items}])
    pieces = kind.encode({"items": items})
    pairs = [
        (kind.labels[i - 1], kind.labels[label])
        for piece in pieces
        for i, label in zip(piece.fields["input_ids"].tolist(), piece.fields["labels"].tolist(), strict=True)
    ]
    assert pairs == list(itertools.pairwise(items))
    (asked,) = kind.encode({"items": items}, with_target=False)
    assert [kind.labels[i - 1] for i in asked.fields["input_ids"].tolist()] == items[-4:]
    assert asked.fields["outputs"].tolist() == [False] * 3 + [True]
    assert kind.reduce(np.zeros((1, 11), np.float32), asked) == []  # all of them were had


@pytest.mark.parametrize("items", [None, [], "i1", [["i1"]], [None]])
def test_what_is_no_history_is_told(items: Any) -> None:
    kind = kind_of()
    kind.fit([{"items": ["a", "b"]}])
    with pytest.raises(BadRow, match="items"):
        kind.encode({"items": items}, with_target=False)


def test_the_measures_are_those_of_the_ranks() -> None:
    predictions = [{"best": list("abc")}] * 3
    found = kind_of().score(["a", "c", "z"], predictions)
    assert found["hr@10"] == pytest.approx(2 / 3)
    assert found["ndcg@10"] == pytest.approx((1 + 1 / math.log2(4)) / 3)
    assert best_of(np.array([1.0, 3.0, 3.0, -math.inf])) == [1, 2, 0]


def test_the_baselines_are_counted_by_hand() -> None:
    train, asked = [[0, 1], [0, 1, 2], [2, 3], [0, 0]], [[1]]
    assert next(popular(train, asked, 4)).tolist() == [4, 2, 2, 1]
    users = [{0, 1, 3}, {0, 1}, {1, 2}, {2}]  # of each item
    want = [len(users[1] & own) / math.sqrt(len(users[1]) * len(own)) for own in users]
    np.testing.assert_allclose(next(cosine_neighbours(train, asked, 4)), want)


@pytest.mark.slow
def test_a_model_finds_what_counting_cannot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The step of a user is in the order of their items: neither popularity nor cosines know it."""
    path = write(tmp_path, walks(), "100K")
    kind_options = "--task.kind item --data.max_length 16 --train.epochs 12 --data.context 64".split()
    run = tmp_path / "run"
    assert main(["finetune", *SMALL[:-2], *kind_options, "--data.path", str(path), "--output", str(run)]) == 0
    score = find_checkpoint(run).metadata["score"]
    assert score["name"] == "ndcg@10"
    kind = kind_of()
    parts = kind.divide(list(read_rows(str(path), Problems())))
    rows = {name: [row for _, row in part] for name, part in parts.items()}
    kind.fit(rows["train"])
    targets = [kind.target(row) for row in rows["validation"]]
    baselines = {
        name: kind.score(targets, answer(rows["train"], rows["validation"]))["ndcg@10"]
        for name, answer in kind.baselines().items()
    }
    assert score["value"] > 0.9 > max(baselines.values()) + 0.2, baselines
    said = tmp_path / "score.json"
    assert main(["evaluate", "--checkpoint", str(run), "--output", str(said)]) == 0  # the last items
    metrics: dict[str, Any] = json.loads(said.read_text())["metrics"]
    assert metrics["hr@10"] >= metrics["ndcg@10"] > 0.5
    asked, answers = tmp_path / "asked.jsonl", tmp_path / "answers.jsonl"
    asked.write_text(json.dumps({"items": ["film0", "film3", "film6", "film9"]}) + "\n")
    arguments = ["predict", "--checkpoint", str(run), "--input", str(asked), "--output", str(answers)]
    assert main(arguments) == 0
    answer = json.loads(answers.read_text())["prediction"]
    assert answer == "film12"


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match="no column 'item'"):
        kind_of().divide([("a:1", {"user": 1, "thing": 2})])
    with pytest.raises(UserError, match="a:1: column 'time' is 'noon', not a number"):
        kind_of().divide([("a:1", {"user": 1, "item": 2, "time": "noon"})])
    for time in ("nan", "1e999", None):
        with pytest.raises(UserError, match=f"a:1: column 'time' is {time!r}, not a number"):
            kind_of().divide([("a:1", {"user": 1, "item": 2, "time": time})])
    with pytest.raises(UserError, match="fewer than two items"):
        kind_of().fit([{"items": ["a", "a"]}])
    with pytest.raises(UserError, match="no column 'items'"):
        kind_of().check_columns(["user", "item"])


def test_an_event_without_a_user_or_an_item_is_left_out_and_counted() -> None:
    kind = kind_of()
    rows = [{"user": user, "item": item, "time": 1} for user, item in (("u", "a"), ("", "b"), ("v", None))]
    parts = kind.divide([("a", row) for row in rows])
    assert [row for _, row in parts["train"]] == [{"user": "u", "items": ["a"]}]
    assert kind.tally.counts == {"of events without a user or without an item, which are left out": 2}
