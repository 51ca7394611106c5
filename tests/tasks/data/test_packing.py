"""Packing: every example once an epoch, whole, in an order that depends on nothing but what it says."""

import numpy as np
import pytest

from dualroute.data.plan import EMPTY, WalkPlan
from dualroute.tasks.data.packing import PackedPlan, PackedSequence, pack

LENGTHS = np.random.default_rng(0).integers(1, 40, 300)
TARGETS = np.random.default_rng(1).integers(0, 3, 300)


def plan(seed: int = 0, samples_per_batch: int = 4) -> PackedPlan:
    return PackedPlan(LENGTHS, TARGETS, "data", seed, 64, samples_per_batch)


def test_every_example_is_in_one_window_and_no_window_is_too_full() -> None:
    packed = pack(LENGTHS, np.random.default_rng(2).permutation(300), 64)
    assert sorted(packed.members.tolist()) == list(range(300))
    assert int(packed.sums(LENGTHS).max()) <= 64
    assert packed.windows <= 1.1 * LENGTHS.sum() / 64  # little room is wasted


def test_an_example_longer_than_a_window_is_a_defect() -> None:
    with pytest.raises(ValueError, match="do not fit into 64"):
        pack(np.array([3, 65]), np.arange(2), 64)


def test_epochs_follow_each_other_in_new_orders() -> None:
    one = plan()
    count = one.windows_per_epoch
    first = np.concatenate([one.examples(s) for s in range(count)])
    assert sorted(first.tolist()) == list(range(300))
    second_windows = one.samples_in(2.0) - count
    second = np.concatenate([one.examples(count + s) for s in range(second_windows)])
    assert sorted(second.tolist()) == list(range(300))
    assert first.tolist() != second.tolist()
    assert one.epochs(count) == 1.0
    assert one.samples_in(1.0) == count
    assert one.samples_in(0.5) == -(-count // 2)


def test_any_sample_may_be_asked_for_first() -> None:
    """A resumed run asks for sample 50 without having seen those before it."""
    whole = plan()
    expected = [whole.examples(s).tolist() for s in range(60)]
    assert [plan().examples(s).tolist() for s in (50, 3, 59)] == [expected[s] for s in (50, 3, 59)]
    assert [plan(seed=1).examples(s).tolist() for s in range(60)] != expected


@pytest.mark.parametrize(("world", "micro"), [(1, 2), (2, 2), (2, 1), (4, 1)])
def test_ranks_and_micro_batches_see_the_same_samples_of_a_step(world: int, micro: int) -> None:
    seen: list[int] = []
    counts = set()
    for rank in range(world):
        walk = iter(WalkPlan(plan(), rank, world, micro, lambda: 8))
        for _ in range(4 // (world * micro)):
            requests = next(walk)
            seen += [request.sample for request in requests]
            counts |= {request.num_targets for request in requests}
    assert sorted(seen) == [8, 9, 10, 11]
    assert counts == {int(TARGETS[np.concatenate([plan().examples(s) for s in seen])].sum())}


def test_validation_reads_each_example_once_and_knows_padding() -> None:
    sequence = PackedSequence(LENGTHS, TARGETS, 64)
    read = np.concatenate([sequence.examples(s) for s in range(sequence.windows)])
    assert sorted(read.tolist()) == list(range(300))
    assert sequence.tokens == LENGTHS.sum()
    assert sequence.num_targets([EMPTY]) == 0
    assert sequence.num_targets(range(sequence.windows)) == TARGETS.sum()


def test_a_part_for_validation_is_spread_over_all_rows_and_reads_them_whole() -> None:
    rows = np.repeat(np.arange(100), 3)  # three examples of each
    for limit in (1, 64, 200, 1000, int(LENGTHS.sum()) * 2):
        part = PackedSequence(LENGTHS, TARGETS, 64, limit, rows)
        read, times = np.unique(rows[part.packed.members], return_counts=True)
        assert set(times) == {3}
        assert part.tokens == LENGTHS[np.isin(rows, read)].sum()
        if limit == 1000:  # a file sorted by class has some of each in any part of it
            assert part.windows in (13, 14, 15)
            assert np.diff(read).max() <= np.diff(read).min() + 1
        elif limit > 1000:
            assert len(read) == 100
        else:
            assert part.windows <= limit // 64 or len(read) == 1
    assert PackedSequence(LENGTHS, TARGETS, 64, limit=200).windows == 3
