"""Properties of the order: a bijection, the same for every division of the work, nothing twice."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualroute.data.order.document_stream import DocumentStream
from dualroute.data.plan import (
    EMPTY,
    BatchPlan,
    SequentialPlan,
    derive_accumulation,
    micro_batches,
)
from dualroute.errors import UserError

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=30)
quick = settings(max_examples=60, deadline=None)


def labelled(lengths: list[int]) -> np.ndarray:
    """(tokens,) bool: has this token a next one in its document?  The definition, token by token."""
    return np.concatenate([np.arange(n) < n - 1 for n in lengths])


class TestDeriveAccumulation:
    @quick
    @given(*[st.integers(1, 64)] * 4)
    def test_multiplies_back(self, accumulation: int, context: int, micro: int, world: int) -> None:
        assert (
            derive_accumulation(accumulation * context * micro * world, context, micro, world) == accumulation
        )

    @quick
    @given(st.integers(1, 10_000), *[st.integers(1, 12)] * 3)
    def test_every_value_it_suggests_is_valid(
        self, tokens: int, context: int, micro: int, world: int
    ) -> None:
        try:
            derive_accumulation(tokens, context, micro, world)
        except UserError as error:
            unit = context * micro * world
            assert tokens % unit
            advice = str(error).split("nearest valid values are ")[1]
            values, _, smaller = advice.partition("; or keep it and set micro_batch=")
            for value in values.split(" or "):
                batch, accumulation = value.rstrip(")").split(" (accumulation ")
                assert derive_accumulation(int(batch), context, micro, world) == int(accumulation)
                assert abs(int(batch) - tokens) < unit
            if smaller:
                assert derive_accumulation(tokens, context, int(smaller), world) > 0
        else:
            assert tokens % (context * micro * world) == 0

    def test_explains(self) -> None:
        with pytest.raises(UserError) as caught:
            derive_accumulation(100_000, 1024, 8, 4)
        assert str(caught.value) == (
            "tokens_per_batch=100000 is not a multiple of context * micro_batch * world_size = "
            "1024 * 8 * 4 = 32768: "
            "the nearest valid values are 98304 (accumulation 3) or 131072 (accumulation 4)"
        )
        with pytest.raises(UserError, match=r"or keep it and set micro_batch=6$"):
            derive_accumulation(1024 * 4 * 12, 1024, 8, 4)

    @pytest.mark.parametrize("name", ["tokens_per_batch", "context", "micro_batch", "world_size"])
    def test_names_what_is_below_one(self, name: str) -> None:
        numbers = {"tokens_per_batch": 8, "context": 2, "micro_batch": 1, "world_size": 1, name: 0}
        with pytest.raises(UserError, match=f"^{name} must be at least 1, not 0"):
            derive_accumulation(**numbers)


@st.composite
def plans(draw: st.DrawFn) -> tuple[list[int], BatchPlan]:
    lengths = draw(LENGTHS)
    context = draw(st.integers(1, sum(lengths)))
    plan = BatchPlan(
        DocumentStream(lengths), "data", draw(st.integers(0, 9)), context, draw(st.integers(1, 12))
    )
    return lengths, plan


def stream_positions(plan: BatchPlan, sample: int) -> list[int]:
    return [position for span in plan.spans(sample) for position in range(*span)]


class TestBatchPlan:
    @quick
    @given(plans(), st.integers(0, 5))
    def test_an_epoch_reads_no_token_twice_and_leaves_out_less_than_a_window(
        self, drawn: tuple[list[int], BatchPlan], epoch: int
    ) -> None:
        lengths, plan = drawn
        windows = plan.windows_per_epoch
        read = [
            stream_positions(plan, sample) for sample in plan.sample_ids(epoch * windows, windows).tolist()
        ]
        assert all(len(positions) == plan.context for positions in read)
        flat = list(itertools.chain(*read))
        assert len(set(flat)) == len(flat)
        assert set(flat) <= set(range(sum(lengths)))
        assert sum(lengths) - len(flat) < plan.context

    @quick
    @given(plans(), st.integers(0, 1000))
    def test_num_targets_counts_tokens_with_a_successor(
        self, drawn: tuple[list[int], BatchPlan], consumed: int
    ) -> None:
        lengths, plan = drawn
        batch = plan.batch(consumed)
        read = list(itertools.chain(*(stream_positions(plan, sample) for sample in batch.tolist())))
        assert plan.num_targets(batch) == labelled(lengths)[read].sum()

    @quick
    @given(plans(), st.lists(st.integers(1, 30), min_size=1, max_size=8), st.integers(0, 10**12))
    def test_the_order_does_not_depend_on_where_one_stops(
        self, drawn: tuple[list[int], BatchPlan], cuts: list[int], first: int
    ) -> None:
        _, plan = drawn
        parts, at = [], first
        for count in cuts:
            parts += plan.sample_ids(at, count).tolist()
            at += count
        assert parts == plan.sample_ids(first, sum(cuts)).tolist()

    def test_a_batch_goes_on_in_the_next_epoch(self) -> None:
        plan = BatchPlan(DocumentStream([50]), "data", 0, context=10, samples_per_batch=7)  # 5 windows
        epochs = np.concatenate([plan.batch(0), plan.batch(7)]) // plan.windows_per_epoch
        assert epochs.tolist() == [0] * 5 + [1] * 5 + [2] * 4

    def test_epochs_seeds_and_data_have_their_own_order_and_offset(self) -> None:
        def order(fingerprint: str, seed: int, epoch: int) -> tuple[tuple[int, ...], int]:
            plan = BatchPlan(DocumentStream([5000]), fingerprint, seed, context=50, samples_per_batch=1)
            ids = plan.sample_ids(epoch * 100, 100)
            return tuple((ids % 100).tolist()), int(plan.starts([epoch * 100])[0])

        seen = [order("a", 0, 0), order("a", 0, 1), order("a", 1, 0), order("b", 0, 0)]
        assert len({ids for ids, _ in seen}) == 4
        assert len({offset for _, offset in seen}) > 1
        assert all(0 <= offset < 50 for _, offset in seen)
        assert order("a", 0, 0) == seen[0]

    def test_the_order_is_part_of_the_checkpoint_format(self) -> None:
        # a saved run resumes under every later version only if these never change
        plan = BatchPlan(DocumentStream([1000, 24]), "0123abcd", seed=7, context=16, samples_per_batch=6)
        assert plan.batch(60).tolist() == [14, 55, 23, 54, 117, 77]  # 64 windows an epoch
        assert plan.starts(plan.batch(60)).tolist() == [235, 891, 379, 875, 859, 219]

    def test_ten_trillion_tokens_are_no_different(self) -> None:
        plan = BatchPlan(DocumentStream([10**12] * 10), "data", 0, context=4096, samples_per_batch=1000)
        batch = plan.batch(10**9)
        assert len(set(batch.tolist())) == 1000
        assert plan.num_targets(batch) in range(1000 * 4096 - 10, 1000 * 4096 + 1)

    def test_epochs(self) -> None:
        plan = BatchPlan(DocumentStream([5, 2, 17, 9]), "f", 0, context=8, samples_per_batch=3)  # 4 windows
        assert [plan.epochs(samples) for samples in (0, 3, 4, 9)] == [0, 0.75, 1, 2.25]
        for samples in range(12):  # the number of the pass is that of the sample's id
            assert int(plan.epochs(samples)) == plan.sample_ids(samples, 1)[0] // plan.windows_per_epoch

    def test_needs_one_window(self) -> None:
        with pytest.raises(UserError, match=r"context=11 .* 10 tokens"):
            BatchPlan(DocumentStream([6, 4]), "data", 0, context=11, samples_per_batch=1)
        assert (
            BatchPlan(DocumentStream([6, 4]), "data", 0, context=10, samples_per_batch=1).windows_per_epoch
            == 1
        )


class TestMicroBatches:
    @quick
    @given(*[st.integers(1, 6)] * 3)
    def test_ranks_and_micro_steps_put_together_are_the_batch(
        self, steps: int, world: int, micro: int
    ) -> None:
        batch = np.arange(100, 100 + steps * world * micro)
        parts = [micro_batches(batch, rank, world, micro) for rank in range(world)]
        assert all(part.shape == (steps, micro) for part in parts)
        assert np.stack(parts, axis=1).reshape(-1).tolist() == batch.tolist()

    def test_refuses_what_does_not_divide(self) -> None:
        with pytest.raises(ValueError, match="10 samples do not divide into 2 ranks of 3"):
            micro_batches(np.arange(10), 0, 2, 3)


class TestSequentialPlan:
    @quick
    @given(LENGTHS, st.integers(1, 50), st.none() | st.integers(1, 500))
    def test_every_token_up_to_the_limit_once_and_in_order(
        self, lengths: list[int], context: int, limit: int | None
    ) -> None:
        plan = SequentialPlan(DocumentStream(lengths), context, limit)
        tokens = sum(lengths) if limit is None else min(limit, sum(lengths))
        read = [p for window in range(plan.windows) for span in plan.spans(window) for p in range(*span)]
        assert read == list(range(tokens))
        assert plan.num_targets([*range(plan.windows), EMPTY]) == labelled(lengths)[:tokens].sum()
        assert plan.spans(EMPTY) == []

    @pytest.mark.parametrize(("context", "limit", "name"), [(0, None, "context"), (4, 0, "val_tokens")])
    def test_names_what_is_below_one(self, context: int, limit: int | None, name: str) -> None:
        with pytest.raises(UserError, match=f"^{name} must be at least 1"):
            SequentialPlan(DocumentStream([9]), context, limit)
