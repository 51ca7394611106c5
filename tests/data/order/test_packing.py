"""Rows of documents: each token once an epoch, none cut that fits, and what is said of them is so."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualroute.data.order.document_stream import DocumentStream
from dualroute.data.order.packing import PackedRows, best_fit, use_line, use_of
from dualroute.data.plan import BatchPlan
from dualroute.errors import UserError

quick = settings(max_examples=60, deadline=None)
LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=150)
PACKINGS = st.sampled_from(["best_fit", "one_per_row"])


def rows(lengths: list[int], context: int, packing: str, seed: int = 0) -> PackedRows:
    return PackedRows(DocumentStream(lengths), "data", seed, context, 4, packing)  # type: ignore[arg-type]


@quick
@given(LENGTHS, st.integers(1, 50), PACKINGS, st.integers(0, 3))
def test_an_epoch_has_every_token_once_and_cuts_only_what_is_longer(
    lengths: list[int], context: int, packing: str, epoch: int
) -> None:
    plan = rows(lengths, context, packing)
    windows = plan.windows_per_epoch
    ids = plan.ids(np.arange(epoch * windows, (epoch + 1) * windows))
    seen = np.zeros(sum(lengths), dtype=int)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    targets = 0
    for sample in ids.tolist():
        pieces = plan.pieces(sample)
        assert 0 < pieces[:, 2].sum() <= context
        assert packing == "best_fit" or len(pieces) == 1
        assert plan.num_targets([sample]) == pieces[:, 3].sum()
        for document, start, tokens, labels in pieces.tolist():
            seen[starts[document] + start : starts[document] + start + tokens] += 1
            assert labels == tokens - (start + tokens == lengths[document])
            assert start % context == 0  # whole where it fits
            targets += labels
    assert (seen == 1).all()
    assert targets == sum(lengths) - len(lengths)
    assert plan.num_targets(ids) == targets


def naive(lengths: list[int], room: int) -> list[int]:
    """What best-fit-decreasing leaves free in each row, by its definition."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [(left, number) for number, left in enumerate(rooms) if left >= length]
        if fitting:
            rooms[min(fitting)[1]] -= length
        else:
            rooms.append(room - length)
    return sorted(rooms)


@quick
@given(st.integers(1, 40).flatmap(lambda room: st.tuples(st.just(room), st.lists(st.integers(1, room)))))
def test_best_fit_is_best_fit_decreasing(drawn: tuple[int, list[int]]) -> None:
    room, lengths = drawn
    packed = best_fit(np.array(lengths, dtype=np.int64), room)
    assert sorted(item for row in packed for item in row) == list(range(len(lengths)))
    assert sorted(room - sum(lengths[item] for item in row) for row in packed) == naive(lengths, room)


def test_epochs_and_seeds_have_their_own_order_and_a_copy_the_same() -> None:
    lengths = [int(n) for n in np.random.default_rng(0).integers(1, 60, 500)]
    plan, windows = rows(lengths, 32, "best_fit"), rows(lengths, 32, "best_fit").windows_per_epoch
    first, second = (plan.ids(np.arange(e * windows, (e + 1) * windows)) % windows for e in (0, 1))
    other = rows(lengths, 32, "best_fit", seed=1).ids(np.arange(windows))
    assert sorted(first) == sorted(second) == list(range(windows))
    assert first.tolist() != second.tolist()
    assert first.tolist() != other.tolist()
    assert plan.epochs(windows) == 1
    assert plan.samples_in(1.5) == -(-3 * windows // 2)
    assert plan.pieces(7).tolist() == plan.pieces(7 + windows).tolist()


def test_what_is_said_of_padding_and_cuts_is_so() -> None:
    lengths, context = [int(n) for n in np.random.default_rng(1).integers(2, 50, 400)], 32
    stream = DocumentStream(lengths)
    longer = sum(length > context for length in lengths) / len(lengths)
    for packing in ("best_fit", "one_per_row"):
        plan = rows(lengths, context, packing)
        use = use_of(stream, context, plan.packing, plan.windows_per_epoch)
        empty = sum(context - int(plan.pieces(row)[:, 2].sum()) for row in range(plan.windows_per_epoch))
        assert use.padding == pytest.approx(empty / (plan.windows_per_epoch * context))
        assert use.cut == use.longer == pytest.approx(longer)
        assert use.unread == 0
        assert f"{use.padding:.1%} padding" in use_line(use, plan.packing)
    # end to end: counted over all offsets of an epoch
    edges = np.cumsum([0, *lengths])
    cuts = 0
    for offset in range(context):
        places = np.arange(offset, edges[-1], context)
        cuts += sum(bool(((places > a) & (places < b)).any()) for a, b in itertools.pairwise(edges))
    plain = BatchPlan(stream, "data", 0, context, 4)
    use = use_of(stream, context, "concatenate", plain.windows_per_epoch)
    assert use.cut == pytest.approx(cuts / context / len(lengths), abs=2 / len(lengths))
    assert use.padding == 0
    assert use.unread == 1 - plain.windows_per_epoch * context / edges[-1]


def test_the_order_is_part_of_the_checkpoint_format() -> None:
    # a saved run resumes under every later version only if these never change
    plan = PackedRows(DocumentStream([40, 7, 9, 3, 16, 20]), "0123abcd", 7, 16, 2, "best_fit")
    assert plan.ids(np.arange(14)).tolist() == [3, 1, 4, 0, 2, 5, 6, 8, 10, 7, 9, 11, 17, 12]
    pieces = [plan.pieces(row)[:, :3].tolist() for row in range(plan.windows_per_epoch)]
    assert pieces == [
        [[0, 0, 16]],
        [[0, 16, 16]],
        [[4, 0, 16]],
        [[5, 0, 16]],
        [[2, 0, 9], [1, 0, 7]],
        [[0, 32, 8], [5, 16, 4], [3, 0, 3]],
    ]


def test_names_what_is_below_one() -> None:
    with pytest.raises(UserError, match=r"^context must be at least 1, not 0"):
        rows([5], 0, "best_fit")
