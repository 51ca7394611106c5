"""A bounded shuffle: each window once an epoch, from few shards at a time, as exact as any other order."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.prepare import PrepareConfig, prepare
from dualroute.cli import main
from dualroute.data.manifest import Manifest
from dualroute.data.mixture.config import SourceConfig
from dualroute.data.mixture.sources import OpenSource, Reading
from dualroute.data.order.document_stream import DocumentStream
from dualroute.data.order.packing import PackedRows
from dualroute.data.order.permutation import Shuffle, visited
from dualroute.data.plan import BatchPlan
from dualroute.training.monitoring.metrics_log import read_metrics
from tests.conftest import write_corpus

quick = settings(max_examples=60, deadline=None)


def order(windows: int, epoch: int, shuffle: Shuffle | None, seed: int = 0) -> np.ndarray:
    numbers = np.arange(epoch * windows, (epoch + 1) * windows)
    return visited(numbers, windows, "data", seed, "order", shuffle=shuffle)


@quick
@given(
    st.integers(1, 300), st.lists(st.integers(1, 90), min_size=1, max_size=40), st.integers(1, 900),
    st.integers(0, 3),
)  # fmt: skip
def test_each_window_comes_once_an_epoch_whatever_the_bounds(
    windows: int, shards: list[int], tokens: int, epoch: int
) -> None:
    shuffle = Shuffle(tokens, shards)
    ids = order(windows, epoch, shuffle)
    assert sorted(ids.tolist()) == list(range(epoch * windows, (epoch + 1) * windows))
    some = windows * epoch + np.arange(0, windows, 3)  # any of them alone
    fresh = Shuffle(tokens, shards)
    one_by_one = [
        visited(some[k : k + 1], windows, "data", 0, "order", shuffle=fresh) for k in range(len(some))
    ]
    np.testing.assert_array_equal(np.concatenate(one_by_one), ids[::3])


def test_shards_of_any_size_are_read_once_and_no_more_tokens_at_a_time() -> None:
    sizes = [*np.random.default_rng(0).integers(50, 150, 63).tolist(), 9]
    windows, bounds = sum(sizes), np.cumsum(sizes)
    ids = order(windows, 0, Shuffle(800, sizes))
    shards = np.searchsorted(bounds, ids, side="right")
    last = {shard: at for at, shard in enumerate(shards.tolist())}
    first = {shard: at for at, shard in reversed(list(enumerate(shards.tolist())))}
    assert all(last[shard] - first[shard] < 800 for shard in first)
    at_a_time = [sum(first[s] <= at <= last[s] for s in first) for at in range(0, windows, 37)]
    assert max(at_a_time) <= 16


def test_few_shards_are_read_at_a_time_and_each_once() -> None:
    windows, shards, together = 6400, 64, 8
    ids = order(windows, 0, Shuffle(together * 100, [100] * shards))
    parts = ids // 100
    for first in range(0, windows, together * 100):
        assert len(set(parts[first : first + together * 100].tolist())) == together
    groups = [frozenset(parts[first : first + together * 100].tolist()) for first in range(0, windows, 800)]
    assert sum(map(len, groups)) == shards  # none comes back
    # random all the same: parts are no neighbours, windows of a part do not follow one another
    assert max(np.bincount(np.abs(np.diff(sorted(groups[0]))))) <= 3
    assert (np.abs(np.diff(ids)) == 1).mean() < 0.02
    correlation = np.corrcoef(np.arange(800), ids[:800] % 100)[0, 1]
    assert abs(correlation) < 0.15


def test_epochs_and_seeds_differ() -> None:
    shuffle = Shuffle(80, [20] * 16)
    ids = [order(320, epoch, shuffle, seed=seed) % 320 for epoch in (0, 1) for seed in (0, 1)]
    assert len({tuple(some.tolist()) for some in ids}) == 4


def test_without_bounds_the_order_is_what_it_was() -> None:
    """Of runs that are under way."""
    stream = DocumentStream(np.full(50, 20))
    plan = BatchPlan(stream, "data", 0, 10, 4)
    assert (
        plan.ids(np.arange(8)).tolist()
        == BatchPlan(stream, "data", 0, 10, 4, shuffle=None).ids(np.arange(8)).tolist()
    )
    assert plan.ids(np.arange(8)).tolist() == FROZEN
    packed = PackedRows(stream, "data", 0, 45, 4, "best_fit")
    assert packed.ids(np.arange(8)).tolist() == FROZEN_PACKED


#: By the commit before there were bounds.
FROZEN = [87, 38, 86, 99, 48, 16, 49, 39]
FROZEN_PACKED = [15, 2, 20, 17, 10, 12, 0, 3]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of many small shards."""
    folder = tmp_path_factory.mktemp("many")
    write_corpus(folder / "corpus")
    options: Any = {"vocab_size": 320, "reserved_tokens": 0, "shard_size_mb": 0.002, "val_fraction": 0.1}
    prepare(
        PrepareConfig(corpus=str(folder / "corpus"), output=str(folder / "shards"), progress=False, **options)
    )
    return folder / "shards"


def brought(read: list[set[int]], room: int) -> int:
    """How often a cache of ``room`` shards has to bring one, the least recently used being dropped."""
    held: list[int] = []
    count = 0
    for some in read:
        for shard in some:
            count += shard not in held
            held = [*[one for one in held if one != shard][-(room - 1) :], shard]
    return count


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_a_small_cache_brings_each_shard_about_once(packing: Any, shards: Path) -> None:
    manifest = Manifest.load(shards)
    train = manifest.split("train")
    together = 4
    assert len(train.shards) > 4 * together
    rows = manifest.index_rows("train")

    def source(tokens: int | None) -> OpenSource:
        reading = Reading(64, 4, 0, packing=packing, shuffle_tokens=tokens)
        return OpenSource(SourceConfig(str(shards), name="many"), manifest, reading)

    def read(some: OpenSource) -> list[set[int]]:
        return [
            {int(rows[int(document)][0]) for document in some.plan.pieces(int(sample))[:, 0]}
            for sample in some.plan.ids(np.arange(some.plan.windows_per_epoch))
        ]

    bounded, free = source((2 * together + 1) * train.tokens // (2 * len(train.shards))), source(None)
    assert f"random among about {together} of {len(train.shards)} shards" in str(bounded.shuffle_line())
    assert "which is little" in str(bounded.shuffle_line())
    assert free.shuffle_line() is None
    assert source(10**9).shuffle_line() is None
    assert len({bounded.key, free.key, source(10**9).key}) == 3
    if packing == "best_fit":  # packs groups of 64 documents and more: here nearly all
        return
    # once, and once more for the window that ends in the next shard
    assert brought(read(bounded), 2 * together + 2) <= 2.1 * len(train.shards)
    assert brought(read(free), 2 * together + 2) > 4 * len(train.shards)


def test_a_run_resumes_exactly_and_not_with_another_bound(
    tiny_dataset: Path, tmp_path: Path, capsys: Any
) -> None:
    words = (
        f"pretrain --data.path {tiny_dataset} --model.dim 16 --model.num_layers 1 --model.num_heads 2 "
        "--data.context 32 --train.micro_batch 2 --train.tokens_per_batch 128 --train.max_steps 8 "
        "--optim.warmup_steps 1 --checkpoint.every_steps 4 --monitor.log_every_steps 1 "
        "--monitor.sample_every_steps 0 --monitor.router_statistics_every 0 --data.shuffle_tokens"
    ).split()

    def losses(output: Path) -> dict[int, float]:
        return {line["step"]: line["train/loss"] for line in read_metrics(output / "metrics.jsonl", "train")}

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main([*words, "2000", "--output", str(whole)]) == 0
    shutil.copytree(whole, cut, symlinks=True)
    for path in (cut / "checkpoints").iterdir():
        if path.name != "step-00000004":
            path.unlink() if path.is_symlink() else shutil.rmtree(path)
    assert main([*words, "2000", "--output", str(cut), "--train.micro_batch", "1"]) == 0
    assert losses(cut) == pytest.approx(losses(whole), rel=1e-5)
    capsys.readouterr()
    assert main([*words, "4000", "--output", str(cut), "--train.max_steps", "12"]) != 0
    assert "data.shuffle_tokens was 2000 and is 4000" in capsys.readouterr().err
    assert os.listdir(cut / "checkpoints")
