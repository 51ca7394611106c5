"""Data sets of tasks that are made: what is promised of them."""

from __future__ import annotations

import itertools
import random

from benchmarks.data.interactions import SERIES, histories
from benchmarks.data.retrieval import pairs


def test_films_of_a_series_follow_each_other() -> None:
    found = histories(300, 80, follow=0.7, seed=0)
    assert all(len(set(films)) == len(films) and 20 <= len(films) <= 60 for films in found)
    steps = [(a, b) for films in found for a, b in itertools.pairwise(films)]
    following = {a: max(set(bs), key=bs.count) for a in range(80) if (bs := [b for x, b in steps if x == a])}
    share = sum(following[a] == b for a, b in steps) / len(steps)
    assert 0.4 < share < 0.7  # 0.7 where a next film is there and has not been seen
    assert SERIES > 1
    assert found == histories(300, 80, follow=0.7, seed=0)


def test_passages_are_of_the_books_that_the_label_says_and_never_the_same_one() -> None:
    books = {name: "".join(f"{name}{number:03d}" for number in range(100)) for name in "abc"}
    rows = pairs(books, 60, 40, random.Random(0))
    assert [row["label"] for row in rows].count("same") == 30
    for row in rows:
        assert (row["text"][0] == row["pair"][0]) == (row["label"] == "same")
        assert row["text"] != row["pair"]
        assert len(row["text"]) == len(row["pair"]) == 40
