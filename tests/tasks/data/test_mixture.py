"""Rows of several files in one training: each in its share, every example once per epoch of its file."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualroute.data.mixture.config import SourceConfig
from dualroute.data.mixture.plan import MixturePlan, split_ids
from dualroute.tasks.data.examples import Example, Examples
from dualroute.tasks.data.module import SourceExamples, TaskDataModule

CONTEXT = 12


def examples(lengths: list[int], first: int) -> Examples:
    """Texts whose ids tell which example they are of."""
    ids = [np.full(length, first + number, dtype=np.int64) for number, length in enumerate(lengths)]
    return Examples((n, Example({"input_ids": one, "labels": one})) for n, one in enumerate(ids))


def module(parts: list[list[int]], weights: list[float], **more: Any) -> TaskDataModule:
    firsts = np.cumsum([0, *map(len, parts)]).tolist()
    joined = Examples.joined(
        [examples(part, first) for part, first in zip(parts, firsts, strict=False)], list(map(len, parts))
    )
    sources = [
        SourceExamples(SourceConfig(f"{number}.jsonl", weight), len(part))
        for number, (part, weight) in enumerate(zip(parts, weights, strict=True))
    ]
    return TaskDataModule("rows", joined, joined, CONTEXT, 2, 4 * CONTEXT, sources=sources, **more)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, CONTEXT), min_size=1, max_size=12), min_size=2, max_size=3),
    st.integers(1, 9),
)
def test_each_file_has_its_share_and_its_examples_once_an_epoch(parts: list[list[int]], tenths: int) -> None:
    weights = [tenths / 10, 1 - tenths / 10, 0.0][: len(parts)]
    data = module(parts, weights)
    plan, windows = data.plan, data.train_windows()
    assert isinstance(plan, MixturePlan)
    ids = plan.ids(np.arange(40))
    owners, own = split_ids(ids)
    assert np.bincount(owners, minlength=len(parts)).tolist() == plan.samples_by_source(40).tolist()
    firsts = np.cumsum([0, *map(len, parts)])
    for number, part in enumerate(plan.parts):
        seen: list[int] = []
        for sample, local in zip(ids[owners == number].tolist(), own[owners == number].tolist(), strict=True):
            window = windows[sample]
            found = sorted(set(window["input_ids"][window["segment_ids"] > 0].tolist()))
            assert found == sorted(window["examples"].tolist())
            assert window["num_targets"] == part.num_targets([local])
            assert plan.num_targets([sample]) == part.num_targets([local])
            seen += window["examples"].tolist()
        whole = len(seen) // len(parts[number])
        for epoch in range(whole):
            piece = seen[epoch * len(parts[number]) : (epoch + 1) * len(parts[number])]
            assert sorted(piece) == list(range(firsts[number], firsts[number + 1]))


def test_rows_keep_their_places_and_other_weights_are_other_data() -> None:
    data = module([[3, 4], [5, 6, 7]], [0.5, 0.5])
    assert data.train.rows.tolist() == [0, 1, 2, 3, 4]
    assert data.fingerprint != module([[3, 4], [5, 6, 7]], [0.25, 0.75]).fingerprint
    assert data.fingerprint == module([[3, 4], [5, 6, 7]], [0.5, 0.5]).fingerprint
    assert data.source_figures()["data/tokens_by_source/0.jsonl"] == 0
    data.advance()
    assert data.source_figures()["data/tokens_by_source/0.jsonl"] == 2 * CONTEXT
    assert data.epochs_at(4)["1.jsonl"] == pytest.approx(data.plan.parts[1].epochs(2))  # type: ignore[union-attr]
