"""Trivial predictions that are this project's own."""

from __future__ import annotations

import random

from dualroute.tasks.baselines import tfidf_cosine_classifier


def test_pairs_are_told_by_the_words_they_share_whichever_they_are() -> None:
    """Each pair is about a word of its own, so that no word is known from the training."""
    draw = random.Random(0)
    common = "the of and to a in that he was it".split()

    def pair(number: int, same: bool) -> tuple[str, str]:
        def text(name: str) -> str:
            return " ".join([*draw.choices(common, k=30), *[name] * 3])

        return text(f"name{number}"), text(f"name{number if same else number + 1000}")

    pairs = [pair(number, number % 2 == 0) for number in range(80)]
    labels = [("other", "same")[number % 2 == 0] for number in range(80)]
    answers = tfidf_cosine_classifier(pairs[:60], labels[:60], pairs[60:])
    assert sum(a == b for a, b in zip(answers, labels[60:], strict=True)) >= 17
