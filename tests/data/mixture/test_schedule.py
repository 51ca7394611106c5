"""Turns: each source has its share after every sample, whatever the weights; any turn is found at once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualroute.data.mixture.schedule import LONGEST_PERIOD, Schedule, turns_of

quick = settings(max_examples=60, deadline=None)
WEIGHTS = st.lists(st.integers(0, 40), min_size=1, max_size=7).filter(any)


def keyed(weights: list[int]) -> dict[str, float]:
    return {f"source {number}": weight / 40 for number, weight in enumerate(weights)}


@quick
@given(WEIGHTS)
def test_after_every_sample_each_source_has_its_share_but_for_less_than_one(weights: list[int]) -> None:
    by_key = keyed(weights)
    schedule = Schedule(tuple(by_key), ((0, turns_of(by_key)),))
    samples = 2 * sum(weights) + 5
    sources, indices = schedule.turns(np.arange(samples))
    shares = np.array(weights) / sum(weights)
    counts = np.zeros(len(weights), dtype=int)
    for sample in range(samples):
        assert (schedule.counts(sample) == counts).all()
        assert indices[sample] == counts[sources[sample]]  # the next of its source, none left out
        counts[sources[sample]] += 1
        assert (abs(counts - shares * (sample + 1)) < 1 - 1e-9).all()


@quick
@given(WEIGHTS, WEIGHTS, st.integers(1, 200), st.integers(0, 10**12))
def test_a_stage_goes_on_where_each_source_was_and_any_turn_is_found_alone(
    before: list[int], after: list[int], start: int, far: int
) -> None:
    keys = tuple(keyed([1] * max(len(before), len(after))))
    schedule = Schedule(keys, ((0, turns_of(keyed(before))), (start, turns_of(keyed(after)))))
    sources, indices = schedule.turns(np.arange(start + 100))
    for number in range(len(keys)):
        mine = indices[sources == number]
        assert mine.tolist() == list(range(len(mine)))
    shuffled = np.random.default_rng(0).permutation(start + 100)
    again = schedule.turns(shuffled)
    assert (again.sources == sources[shuffled]).all()
    assert (again.indices == indices[shuffled]).all()
    one = schedule.turns([far])  # however far
    assert schedule.counts(far)[one.sources[0]] == one.indices[0]
    assert schedule.counts(far).sum() == far


@quick
@given(WEIGHTS, st.randoms())
def test_neither_the_order_of_the_sources_nor_one_without_turns_changes_anything(
    weights: list[int], random: object
) -> None:
    by_key = keyed(weights)
    keys = [*by_key, "another"]
    stages = ((0, turns_of(by_key)),)
    plain = Schedule(tuple(by_key), stages).turns(np.arange(100))
    random.shuffle(keys)  # type: ignore[attr-defined]
    other = Schedule(tuple(keys), stages).turns(np.arange(100))
    assert [keys[n] for n in other.sources] == [list(by_key)[n] for n in plain.sources]
    assert (other.indices == plain.indices).all()


def test_turns_are_the_weights_as_they_were_written() -> None:
    assert turns_of({"a": 0.7, "b": 0.3, "c": 0}) == {"a": 7, "b": 3}
    assert turns_of({"a": 0.333, "b": 0.333, "c": 0.333}) == {"a": 1, "b": 1, "c": 1}
    assert turns_of({"a": 0.9, "b": 0.1}, temperature=2) == {"a": 3, "b": 1}
    assert turns_of({"a": 123_456_789_012, "b": 1}) == {"a": LONGEST_PERIOD - 1, "b": 1}
    many = turns_of({str(number): 0.001 + 1e-9 * number for number in range(1000)})
    assert sum(many.values()) <= LONGEST_PERIOD
    assert min(many.values()) > 0


@quick
@given(st.lists(st.floats(1e-6, 1), min_size=1, max_size=6), st.floats(0.2, 5))
def test_rounded_turns_are_within_one_of_a_hundred_thousand(weights: list[float], temperature: float) -> None:
    turns = turns_of({str(number): weight for number, weight in enumerate(weights)}, temperature)
    powers = np.array(weights) ** (1 / temperature)
    shares = np.array([turns[str(number)] for number in range(len(weights))]) / sum(turns.values())
    assert abs(shares - powers / powers.sum()).max() <= (len(weights) + 1) / LONGEST_PERIOD


def test_the_order_is_part_of_the_checkpoint_format() -> None:
    # a saved run resumes under every later version only if these never change
    schedule = Schedule(("x", "y", "z"), ((0, {"x": 5, "y": 3, "z": 2}), (7, {"y": 1, "z": 1})))
    sources, indices = schedule.turns(np.arange(14))
    assert sources.tolist() == [0, 1, 0, 2, 0, 1, 0, 1, 2, 1, 2, 1, 2, 1]
    assert indices.tolist() == [0, 0, 1, 0, 2, 1, 3, 2, 1, 3, 2, 4, 3, 5]


@pytest.mark.parametrize("parts", [1, 3])
def test_one_source_has_every_turn(parts: int) -> None:
    schedule = Schedule(("x", "y"), ((0, {"x": parts}),))
    sources, indices = schedule.turns([0, 5, 10**15])
    assert sources.tolist() == [0, 0, 0]
    assert indices.tolist() == [0, 5, 10**15]
