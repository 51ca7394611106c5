"""Tokens are counted: whatever the batch was before, totals, the end and the schedule are right."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualroute.errors import UserError
from dualroute.model.checkpoint.format import Checkpoint
from dualroute.training.config import TrainConfig
from dualroute.training.optim_config import OptimConfig
from dualroute.training.step.optim import learning_rate, lr_at
from dualroute.training.step.token_count import TokenCount

Batches = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 64)), min_size=1, max_size=5)


def checkpoint(step: int, **metadata: object) -> Checkpoint:
    return Checkpoint(Path("run/checkpoints/step"), step, metadata)


@given(Batches)
def test_a_run_that_changes_its_batch_counts_what_it_read(batches: list[tuple[int, int]]) -> None:
    """(steps, batch) of each start; the reference adds up step by step."""
    resume, done, read = None, 0, [0]
    for steps, batch in batches:
        count = TokenCount.resumed(resume, batch)
        for _ in range(steps):
            read.append(read[-1] + batch)
        done += steps
        assert [count.at(step) for step in range(done + 1)] == read
        resume = checkpoint(done, tokens=count.at(done), token_changes=[list(c) for c in count.changes])
    unchanged = TokenCount.resumed(resume, batches[-1][1])
    assert unchanged.changes == count.changes, "a resume with the same batch changes nothing"


def test_a_checkpoint_from_before_is_believed_in_its_total() -> None:
    """Its metadata hold tokens alone."""
    assert TokenCount.resumed(checkpoint(10, tokens=1000), 100) == TokenCount(100)
    count = TokenCount.resumed(checkpoint(10, tokens=1000), 300)
    assert [count.at(step) for step in (0, 5, 10, 11)] == [0, 500, 1000, 1300]


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"tokens": None},
        {"tokens": "many"},
        {"tokens": 5, "token_changes": []},
        {"tokens": 5, "token_changes": [[3, 5]]},
        {"tokens": 5, "token_changes": [[0, 0], [9, 5]]},
        {"tokens": 5, "token_changes": 7},
    ],
)
def test_damaged_metadata_are_refused(metadata: dict[str, object]) -> None:
    with pytest.raises(UserError, match=r"checkpoint.json does not count tokens"):
        TokenCount.resumed(checkpoint(5, **metadata), 10)


def test_the_run_ends_when_its_tokens_are_read() -> None:
    train = TrainConfig(max_tokens=1000, tokens_per_batch=100)
    assert TokenCount(100).total_steps(train) == train.total_steps == 10
    doubled = TokenCount.resumed(checkpoint(4, tokens=400), 200)
    assert doubled.total_steps(train) == 7
    assert doubled.at(7) == 1000
    halved = TokenCount.resumed(checkpoint(4, tokens=400), 50)
    assert (halved.total_steps(train), halved.at(16)) == (16, 1000)
    past = TokenCount.resumed(checkpoint(12, tokens=1200), 200)
    assert past.total_steps(train) <= 12, "there is nothing left to train"
    by_steps = TrainConfig(max_steps=10, tokens_per_batch=200)
    assert doubled.total_steps(by_steps) == 10


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_the_schedule_follows_the_tokens_and_does_not_jump(schedule: str) -> None:
    config = OptimConfig(lr=1.0, warmup_steps=10, schedule=schedule, min_lr_ratio=0.0)
    train = TrainConfig(max_tokens=100_000, tokens_per_batch=100)
    whole = TokenCount(100)
    # to the last bit what a run by steps does, where the batch never changes
    assert [learning_rate(s, train, config, whole) for s in range(1001)] == [
        lr_at(s, 1000, config) for s in range(1001)
    ]
    changed = TokenCount.resumed(checkpoint(500, tokens=50_000), 400)
    total = changed.total_steps(train)
    assert total == 625
    for step in range(total + 1):
        by_tokens = learning_rate(changed.at(step) // 100, train, config, whole)
        assert learning_rate(step, train, config, changed) == pytest.approx(by_tokens, abs=0.02), step
    last = learning_rate(total, train, config, changed)
    assert last == pytest.approx(1.0 if schedule == "constant" else 0.0, abs=1e-9)
