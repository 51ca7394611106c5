"""A mixture read by any ranks and workers, stopped anywhere: the samples of one unbroken process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dualroute.data.mixture.config import SourceConfig, StageConfig
from dualroute.data.mixture.plan import MixturePlan, split_ids
from dualroute.data.module import ShardDataModule
from dualroute.data.plan import micro_batches
from dualroute.errors import UserError
from tests.data.shards import numbered, write_dataset
from tests.data.test_module import CONTEXT, TOKENS_PER_BATCH, datamodule, stream

LENGTHS = {"a": [5, 2, 17, 9, 1, 30, 4, 8, 3, 3, 12], "b": [20, 31, 7, 7], "c": [3] * 15}
FIRST = {"a": 0, "b": 2000, "c": 4000}
here = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("mixture")
    for name, lengths in LENGTHS.items():
        val = numbered([6, 11, 3], first=FIRST[name] + 1000) if name != "c" else ()
        write_dataset(root / name, numbered(lengths, FIRST[name]), val=val)
    return {name: root / name for name in LENGTHS}


def sources(folders: dict[str, Path], **weights: float) -> list[SourceConfig]:
    return [SourceConfig(str(folders[name]), weight) for name, weight in weights.items()]


def module(folders: dict[str, Path], *stages: StageConfig, **weights: float) -> ShardDataModule:
    return datamodule(folders["a"], sources=sources(folders, **weights), stages=stages)


def shares(*parts: int) -> dict[str, float]:
    return {name: part / sum(parts) for name, part in zip("abc", parts, strict=True)}


PARTS = st.tuples(*[st.integers(0, 5)] * 3).filter(any)
LEGS = st.lists(
    st.tuples(st.integers(1, 3), st.sampled_from([(1, 2), (2, 2), (4, 1), (3, 1), (2, 6)])),
    min_size=1,
    max_size=4,
)


@pytest.mark.slow
@here
@given(
    PARTS, PARTS, st.integers(1, 30), st.integers(0, 3), st.sampled_from(["concatenate", "best_fit"]), LEGS
)
def test_the_order_is_the_same_for_every_division_and_however_often_it_was_stopped(
    folders: dict[str, Path],
    before: tuple[int, ...],
    after: tuple[int, ...],
    start: int,
    seed: int,
    packing: str,
    legs: list[tuple[int, tuple[int, int]]],
) -> None:
    mixed: dict[str, Any] = {
        "sources": sources(folders, **shares(*before)),
        "stages": [StageConfig(start * CONTEXT, shares(*after))],
        "seed": seed,
        "packing": packing,
    }
    state: dict[str, Any] | None = None
    seen: list[list[list[int]]] = []
    for steps, (world, micro_batch) in legs:
        data = datamodule(folders["a"], 0, world, micro_batch=micro_batch, **mixed)
        if state is not None:
            data.load_state_dict(json.loads(json.dumps(state)))
        seen += stream(folders["a"], steps, world, data.samples_consumed, micro_batch=micro_batch, **mixed)
        for _ in range(steps):
            data.advance()
        state = data.state_dict()
    assert seen == stream(folders["a"], len(seen), micro_batch=1, **mixed)


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(PARTS, PARTS, st.integers(1, 100), st.sampled_from(["concatenate", "best_fit", "one_per_row"]))
def test_2_1_4_3_ranks_read_each_sample_once_per_epoch_of_its_source(
    folders: dict[str, Path], before: tuple[int, ...], after: tuple[int, ...], start: int, packing: Any
) -> None:
    data = ShardDataModule(
        folders["a"],
        CONTEXT,
        1,
        TOKENS_PER_BATCH,
        sources=sources(folders, **shares(*before)),
        stages=[StageConfig(start * CONTEXT, shares(*after))],
        packing=packing,
    )
    plan = data.plan
    assert isinstance(plan, MixturePlan)
    read, consumed = [], 0
    for world, micro_batch in ((2, 3), (1, 4), (4, 1), (3, 2)):
        for _ in range(5):
            batch = plan.ids(np.arange(consumed, consumed + plan.samples_per_batch))
            parts = [micro_batches(batch, rank, world, micro_batch) for rank in range(world)]
            read += np.stack(parts, axis=1).reshape(-1).tolist()
            consumed += plan.samples_per_batch
    assert read == plan.sample_ids(0, consumed).tolist()
    owners, ids = split_ids(read)
    counts = plan.samples_by_source(consumed)
    for number, part in enumerate(plan.parts):
        mine = ids[owners == number]
        assert len(mine) == counts[number]
        assert len(set(mine.tolist())) == len(mine)  # ids of two epochs differ
        epochs, windows = np.divmod(mine, part.windows_per_epoch)
        for epoch in range(int(part.epochs(len(mine)))):
            assert sorted(windows[epochs == epoch]) == list(range(part.windows_per_epoch))
        assert (np.diff(epochs) >= 0).all()  # one after the other
        assert mine.tolist() == part.ids(np.arange(len(mine))).tolist()  # as if it were alone


def test_workers_change_nothing(folders: dict[str, Path]) -> None:
    mixed = {"sources": sources(folders, a=0.6, b=0.4)}
    assert stream(folders["a"], 3, num_workers=2, **mixed) == stream(folders["a"], 3, **mixed)


def test_one_source_with_all_the_weight_is_what_it_is_alone(folders: dict[str, Path]) -> None:
    alone, mixed = datamodule(folders["a"]), module(folders, a=1.0, b=0.0)
    assert stream(folders["a"], 4, sources=sources(folders, b=0.0, a=1.0)) == stream(folders["a"], 4)
    assert mixed.fingerprint == alone.fingerprint == alone.manifest.fingerprint
    assert mixed.state_dict().items() > alone.state_dict().items()
    metadata = {"data_fingerprint": alone.fingerprint, "tokens": 64 * CONTEXT}  # of an old run
    later = module(folders, StageConfig(64 * CONTEXT, {"a": 0.5, "b": 0.5}), a=1.0, b=0.0)
    later.refuse_other_past(metadata, "step-1")
    later.load_state_dict(alone.state_dict())
    with pytest.raises(UserError, match=r"from the beginning on a 1, and this start has b 0.7, a 0.3"):
        module(folders, a=0.3, b=0.7).refuse_other_past({**metadata, "mixture": mixed.course.to_json()}, "x")


def checkpoint(data: ShardDataModule, consumed: int) -> dict[str, Any]:
    data.samples_consumed = consumed
    return {
        "data_fingerprint": data.fingerprint,
        "samples_consumed": consumed,
        "tokens": consumed * CONTEXT,
        **json.loads(json.dumps(data.describe_order())),
    }


def test_what_comes_may_change_and_what_was_read_may_not(folders: dict[str, Path]) -> None:
    begun = checkpoint(module(folders, StageConfig(800, {"a": 1.0}), a=0.7, b=0.3), 60)
    same = StageConfig(800, {"a": 1.0})
    module(folders, same, a=0.7, b=0.3).refuse_other_past(begun, "step-5")
    # a planned stage goes, another comes, with a source that was not there
    module(folders, a=0.7, b=0.3).refuse_other_past(begun, "step-5")
    module(folders, StageConfig(480, {"c": 1.0}), a=0.7, b=0.3, c=0).refuse_other_past(begun, "step-5")
    for changed in (
        module(folders, a=0.5, b=0.5),
        module(folders, StageConfig(472, {"a": 0.5, "b": 0.5}), a=0.7, b=0.3),
    ):
        with pytest.raises(UserError) as caught:
            changed.refuse_other_past(begun, "step-5")
        line = str(caught.value)
        assert "a 0.7, b 0.3" in line
        assert "a 0.5, b 0.5" in line
        assert "data.stages: [{from_tokens: 480, weights: {a: 0.5, b: 0.5}}]" in line
    state = {**module(folders, a=0.7, b=0.3).state_dict(), "samples_consumed": 60}
    with pytest.raises(UserError, match="what has been read cannot change"):
        module(folders, StageConfig(472, {"a": 0.5, "b": 0.5}), a=0.7, b=0.3).load_state_dict(state)
    past = checkpoint(module(folders, same, a=0.7, b=0.3), 150)
    with pytest.raises(UserError, match=r"from token 800 on on a 1, and this start has a 0\.7, b 0\.3"):
        module(folders, a=0.7, b=0.3).refuse_other_past(past, "step-9")
    with pytest.raises(UserError, match=r"keep b in data\.sources"):
        datamodule(folders["a"]).refuse_other_past(begun, "step-5")
    with pytest.raises(UserError, match="cannot be read"):
        module(folders, a=0.7, b=0.3).refuse_other_past({**begun, "mixture": {"stages": []}}, "step-5")


def test_folders_that_do_not_go_together_are_named(folders: dict[str, Path], tmp_path: Path) -> None:
    write_dataset(tmp_path / "a", numbered(LENGTHS["a"]), val=numbered([6, 11, 3], first=1000))
    twice = [SourceConfig(str(folders["a"]), 0.5), SourceConfig(str(tmp_path / "a"), 0.5, name="again")]
    with pytest.raises(UserError, match=r"holds the same data as .*leave one out"):
        datamodule(folders["a"], sources=twice)
    other = write_dataset(tmp_path / "b", numbered(LENGTHS["b"]), tokenizer=b"another")
    assert other.tokenizer.sha256 != datamodule(folders["a"]).manifest.tokenizer.sha256
    mixed = [SourceConfig(str(folders["a"]), 0.5), SourceConfig(str(tmp_path / "b"), 0.5)]
    with pytest.raises(UserError, match=r"b was made with another tokenizer .* than .*a .*--tokenizer"):
        datamodule(folders["a"], sources=mixed)
    write_dataset(tmp_path / "short", numbered([3]))
    short = [SourceConfig(str(folders["a"]), 0.5), SourceConfig(str(tmp_path / "short"), 0.5)]
    with pytest.raises(UserError, match=r"short: context=8 is longer than the training data of 3 tokens"):
        datamodule(folders["a"], sources=short)


def test_caps_and_what_was_read_of_each(folders: dict[str, Path]) -> None:
    mixed = sources(folders, a=0.5, b=0.5)
    mixed[1] = SourceConfig(str(folders["b"]), 0.5, max_epochs=2)
    data = datamodule(folders["a"], sources=mixed)
    windows = {source.name: source.plan.windows_per_epoch for source in data.sources}
    assert list(data.over_max_epochs(4 * windows["b"])) == []
    (line,) = data.over_max_epochs(4 * windows["b"] + 2)
    assert "b 2.12 times, more than its max_epochs 2" in line
    for _ in range(3):
        data.advance()
    figures = data.source_figures()
    assert figures["data/tokens_by_source/a"] + figures["data/tokens_by_source/b"] == 3 * TOKENS_PER_BATCH
    assert figures["data/epochs_by_source/b"] == pytest.approx(18 / windows["b"])
    data.skipped_samples = [(0, 6)]  # left out by a roll-back
    assert data.source_figures()["data/tokens_by_source/b"] == 15 * CONTEXT


def test_validation_reads_each_source_once_in_batches_of_its_own(folders: dict[str, Path]) -> None:
    for world, micro_batch in ((1, 1), (2, 2), (3, 4)):
        seen: dict[int, list[int]] = {}
        lengths = set()
        for rank in range(world):
            data = datamodule(
                folders["a"],
                rank,
                world,
                micro_batch=micro_batch,
                sources=sources(folders, a=0.4, b=0.5, c=0.1),
            )
            batches = list(data.val_dataloader())
            lengths.add((len(batches), len(data.val_dataloader())))
            for batch in batches:
                batch = data.transfer_batch_to_device(batch, torch.device("cpu"), 0)
                real = batch["segment_ids"] > 0
                seen.setdefault(batch["source"], []).extend(batch["input_ids"][real].tolist())
        assert len(lengths) == 1
        assert len(set(lengths.pop())) == 1
        for number, name in enumerate("ab"):  # nothing of c is held out
            expected = [token for ids in numbered([6, 11, 3], FIRST[name] + 1000) for token in ids]
            assert sorted(seen[number]) == expected
        assert not seen.get(2)
    assert data.val_sources == ("a", "b", "c")


def test_the_sample_ids_of_a_mixture_are_part_of_no_checkpoint_but_its_order_is(
    folders: dict[str, Path],
) -> None:
    one = module(folders, a=0.7, b=0.3)
    other = datamodule(folders["a"], sources=sources(folders, b=0.3, c=0.0, a=0.7))
    assert one.fingerprint == other.fingerprint
    assert one.order_fingerprint == other.order_fingerprint
    mixed = {"sources": sources(folders, b=0.3, c=0.0, a=0.7)}
    assert stream(folders["a"], 5, **mixed) == stream(folders["a"], 5, sources=sources(folders, a=0.7, b=0.3))
