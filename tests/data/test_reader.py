"""Windows hold exactly the tokens that the plan names, and a damaged folder is refused by name."""

from __future__ import annotations

import itertools
import os
import pickle
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from dualroute.data.index import write_header
from dualroute.data.manifest import Manifest, Shard, Split, TokenizerInfo
from dualroute.data.order.document_stream import DocumentStream
from dualroute.data.plan import (
    EMPTY,
    BatchPlan,
    Request,
    SequentialPlan,
    WalkPlan,
    WalkSequence,
)
from dualroute.data.reader import (
    IGNORE_INDEX,
    ShardReader,
    WindowDataset,
    collate,
    open_stream,
)
from dualroute.errors import UserError
from tests.data.shards import numbered, write_dataset

LENGTHS = [5, 2, 17, 9, 1, 30, 4, 8, 3, 3, 12]


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return write_dataset(tmp_path, numbered(LENGTHS), val=numbered([6, 11, 3], first=1000))


def training_plan(manifest: Manifest, context: int, samples_per_batch: int = 4, seed: int = 0) -> BatchPlan:
    return BatchPlan(open_stream(manifest, "train"), manifest.fingerprint, seed, context, samples_per_batch)


def expected_window(ring: list[tuple[int, int, bool]], start: int, context: int) -> dict[str, list[int]]:
    """A window by its definition, token by token. ``ring``: (document, id, has a successor) per token."""
    window: dict[str, list[int]] = {"input_ids": [], "labels": [], "segment_ids": [], "positions": []}
    segment, position = 0, 0
    for at in range(start, start + context):
        (document, token, continues), previous = ring[at % len(ring)], ring[(at - 1) % len(ring)]
        if at == start or previous[0] != document or previous[1] != token - 1:
            segment, position = segment + 1, 0
        window["input_ids"].append(token)
        window["labels"].append(token + 1 if continues else IGNORE_INDEX)
        window["segment_ids"].append(segment)
        window["positions"].append(position)
        position += 1
    return window


class TestWindowDataset:
    @settings(max_examples=25, deadline=None)
    @given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(0, 99), st.data())
    def test_an_epoch_is_what_the_definition_says(
        self, lengths: list[int], seed: int, data: st.DataObject
    ) -> None:
        context = data.draw(st.integers(1, sum(lengths)))
        with tempfile.TemporaryDirectory() as folder:
            manifest = write_dataset(Path(folder), numbered(lengths), documents_per_shard=3)
            plan = training_plan(manifest, context, seed=seed)
            dataset = WindowDataset(ShardReader(manifest, "train"), plan)
            ring = [
                (number, token, token != document[-1])
                for number, document in enumerate(numbered(lengths))
                for token in document
            ]
            targets: list[int] = []
            for sample in plan.sample_ids(0, plan.windows_per_epoch).tolist():
                window = dataset[sample]
                expected = expected_window(ring, int(plan.starts([sample])[0]), context)
                assert {key: window[key].tolist() for key in expected} == expected
                labels = window["labels"][window["labels"] != IGNORE_INDEX].tolist()
                assert window["num_targets"] == len(labels)
                targets += labels
            assert len(targets) == len(set(targets)) == plan.num_targets(np.arange(plan.windows_per_epoch))
            # ids are positions: all targets there are, but those of the less than one window that is left out
            possible = {token + 1 for _, token, continues in ring if continues}
            assert set(targets) <= possible
            assert len(possible) - len(targets) < context

    def test_every_rank_sees_the_count_of_the_whole_batch(self, manifest: Manifest) -> None:
        plan = training_plan(manifest, context=7, samples_per_batch=12)
        dataset = WindowDataset(ShardReader(manifest, "train"), plan)
        ranks = [iter(WalkPlan(plan, rank, 3, 2, lambda: 24)) for rank in range(3)]
        for _ in range(4):  # steps, of two micro batches on each rank
            batches = [collate([dataset[request] for request in next(walk)]) for walk in ranks * 2]
            count = sum(int((batch["labels"] != IGNORE_INDEX).sum()) for batch in batches)
            assert [int(batch["num_targets"]) for batch in batches] == [count] * 6

    def test_batches_have_the_shapes_and_types_of_the_contract(self, manifest: Manifest) -> None:
        plan = training_plan(manifest, context=9)
        dataset = WindowDataset(ShardReader(manifest, "train"), plan)
        batch = collate([dataset[Request(sample, 77)] for sample in plan.batch(0).tolist()])
        names = ["input_ids", "labels", "segment_ids", "positions", "num_targets"]
        assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in batch.items()} == {
            name: (torch.int64, () if name == "num_targets" else (4, 9)) for name in names
        }
        assert int(batch["num_targets"]) == 77

    def test_padding_is_no_document_and_no_target(self, manifest: Manifest) -> None:
        plan = SequentialPlan(open_stream(manifest, "val"), context=8)  # 20 tokens: the last window has 4
        dataset = WindowDataset(ShardReader(manifest, "val"), plan)
        last, empty = dataset[2], dataset[EMPTY]
        assert last["input_ids"].tolist() == [1016, 1017, 1018, 1019, 3, 3, 3, 3]
        assert last["labels"].tolist() == [IGNORE_INDEX, 1018, 1019, IGNORE_INDEX] + [IGNORE_INDEX] * 4
        assert last["segment_ids"].tolist() == [1, 2, 2, 2, 0, 0, 0, 0]
        assert empty["input_ids"].tolist() == [3] * 8
        assert (empty["labels"] == IGNORE_INDEX).all()
        assert not empty["segment_ids"].any()
        assert empty["num_targets"] == 0


class TestWalkSequence:
    @settings(max_examples=60, deadline=None)
    @given(
        tokens=st.integers(1, 400),
        context=st.integers(1, 40),
        world=st.integers(1, 5),
        micro=st.integers(1, 5),
    )
    def test_every_window_on_one_rank_and_equal_counts(
        self, tokens: int, context: int, world: int, micro: int
    ) -> None:
        plan = SequentialPlan(DocumentStream([tokens]), context)
        ranks = [list(WalkSequence(plan, rank, world, micro)) for rank in range(world)]
        assert {len(batches) for batches in ranks} == {len(WalkSequence(plan, 0, world, micro))}
        assert {len(batch) for batches in ranks for batch in batches} == {micro}
        in_order = [request for step in zip(*ranks, strict=True) for batch in step for request in batch]
        assert [r.sample for r in in_order if r.sample != EMPTY] == list(range(plan.windows))
        for step in zip(*ranks, strict=True):
            requests = list(itertools.chain(*step))
            assert {r.num_targets for r in requests} == {plan.num_targets([r.sample for r in requests])}


class TestShardReader:
    def test_webdataset_streams_the_same_documents(self, manifest: Manifest) -> None:
        reader, index = ShardReader(manifest, "train"), manifest.open_index("train")
        shards = [str(path) for path in manifest.shard_paths("train")]
        streamed = list(webdataset.WebDataset(shards, shardshuffle=False).decode())
        assert len(streamed) == len(LENGTHS)
        for number, sample in enumerate(streamed):
            assert sample["npy"].tolist() == reader.read(number, 0, LENGTHS[number]).tolist()
            assert sample["json"]["bytes"] == index[number, 3]

    @pytest.mark.parametrize("vocab_size", [1 << 16, (1 << 16) + 1])
    def test_both_id_types(self, tmp_path: Path, vocab_size: int) -> None:
        ids = [0, 1, vocab_size - 1, 2]
        manifest = write_dataset(tmp_path, [[5], ids], vocab_size=vocab_size)
        assert manifest.dtype == ("uint16" if vocab_size == 1 << 16 else "uint32")
        assert ShardReader(manifest, "train").read(1, 1, 3).tolist() == ids[1:]

    def test_keeps_few_shards_open(self, tmp_path: Path) -> None:
        documents = numbered([4] * 40)
        reader = ShardReader(write_dataset(tmp_path, documents, documents_per_shard=1), "train", max_open=3)
        for number in np.random.default_rng(0).permutation(40).tolist():
            assert reader.read(number, 0, 4).tolist() == documents[number]
            assert len(reader.open_shards) <= 3
            assert reader.open_shards[-1] == number
            if os.path.exists("/proc/self/maps"):
                maps = Path("/proc/self/maps").read_text().splitlines()
                assert sum(str(tmp_path) in line and line.endswith(".tar") for line in maps) <= 3
        reader.close()
        assert reader.open_shards == ()
        assert reader.read(0, 0, 4).tolist() == documents[0]

    def test_a_shard_in_use_stays_open(self, tmp_path: Path) -> None:
        reader = ShardReader(
            write_dataset(tmp_path, numbered([2] * 4), documents_per_shard=1), "train", max_open=2
        )
        for number in (0, 1, 0, 2):
            reader.read(number, 0, 1)
        assert reader.open_shards == (0, 2)

    def test_a_copy_in_another_process_opens_its_own_files(self, manifest: Manifest) -> None:
        reader = ShardReader(manifest, "train")
        ids = reader.read(2, 3, 5)
        copy = pickle.loads(pickle.dumps(reader))
        assert copy.open_shards == ()
        assert copy.read(2, 3, 5).tolist() == ids.tolist()
        dataset = WindowDataset(reader, training_plan(manifest, context=9))
        assert pickle.loads(pickle.dumps(dataset))[5]["labels"].tolist() == dataset[5]["labels"].tolist()


class TestDamage:
    def test_truncated_shard(self, manifest: Manifest) -> None:
        path = manifest.shard_paths("train")[1]
        os.truncate(path, path.stat().st_size - 700)
        reader = ShardReader(manifest, "train")
        reader.read(3, 0, 1)  # the other shards are fine
        with pytest.raises(UserError, match=rf"^{path}: \d+ bytes, but the manifest says \d+; "):
            reader.read(4, 0, 1)

    def test_missing_shard(self, manifest: Manifest) -> None:
        path = manifest.shard_paths("train")[2]
        path.unlink()
        with pytest.raises(UserError, match=rf"^{path}: no such file; copy it again or prepare"):
            ShardReader(manifest, "train").read(10, 0, 1)

    def test_id_outside_the_vocabulary(self, tmp_path: Path) -> None:
        manifest = write_dataset(tmp_path, [[1, 2, 3], [4, 99, 5], [6, 7]], vocab_size=100)
        path, offset = manifest.shard_paths("train")[0], int(manifest.open_index("train")[1, 1])
        with open(path, "r+b") as stream:
            stream.seek(offset + 2)
            stream.write((100).to_bytes(2, "little"))
        dataset = WindowDataset(ShardReader(manifest, "train"), training_plan(manifest, context=8))
        with pytest.raises(
            UserError, match=rf"^{path}: document 1 of split 'train' holds id 100, but .* has 100"
        ):
            dataset[0]

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ((9, 1536, 5, 1), "document 0 is in shard 9, but there are 3"),
            ((0, 10**9, 5, 1), "document 0 of split 'train' lies beyond the end of the shard"),
            ((0, -4, 5, 1), "document 0 of split 'train' lies beyond the end of the shard"),
        ],
    )
    def test_index_that_points_elsewhere(
        self, manifest: Manifest, row: tuple[int, ...], message: str
    ) -> None:
        index = np.array(manifest.open_index("train"))
        index[0] = row
        np.save(manifest.folder / "train.index.npy", index)
        with pytest.raises(UserError, match=message):
            ShardReader(manifest, "train").read(0, 0, 5)

    @pytest.mark.parametrize(
        ("column", "value", "message"),
        [
            (2, 6, r"shard 0 has 34 tokens by the index, 33 by its record"),
            (2, 0, r"document 0 of shard 0 stands as \[0, 640, 0, 15\]"),
            (2, 2000, "document 0 of shard 0 reaches beyond byte"),
            (3, 14, "shard 0 has 98 bytes of text by the index, 99 by its record"),
            (3, -1, "document 0 of shard 0 stands as"),
            (0, 1, "document 0 of shard 0 stands as"),
            (1, 1 << 62, "document 0 of shard 0 stands as"),
            (1, -640, "document 0 of shard 0 stands as"),
            (1, 6400, "document 0 of shard 0 reaches beyond byte"),
        ],
    )
    def test_index_that_contradicts_the_manifest(
        self, manifest: Manifest, column: int, value: int, message: str
    ) -> None:
        index = np.array(manifest.open_index("train"))
        index[0, column] = value
        np.save(manifest.folder / "train.index.npy", index)
        with pytest.raises(UserError, match=rf"train\.index\.npy: contradicts the manifest \({message}"):
            open_stream(manifest, "train")


class TestMemory:
    def test_a_process_keeps_next_to_nothing_of_an_index(self, tmp_path: Path) -> None:
        shards, each = 20, 100_000
        rows = np.empty((each, 4), dtype="<i8")
        with (tmp_path / "train.index.npy").open("wb") as file:
            write_header(file, shards * each)
            for number in range(shards):
                rows[:] = np.array([[number, 0, 9, 20]])
                rows[:, 1] = 512 + 1024 * np.arange(each)
                file.write(rows.tobytes())
        shard = Shard("train.tar", each, 9 * each, 20 * each, 1024 * (each + 1), "")
        total = shards * each
        split = Split("train", total, 9 * total, 20 * total, "train.index.npy", "", (shard,) * shards)
        tokenizer = TokenizerInfo("tokenizer.model", "", 100, 1, 2, 0)
        manifest = Manifest(tmp_path, "uint16", tokenizer, {"train": split})
        tracemalloc.start()
        stream = open_stream(manifest, "train")
        plan = BatchPlan(stream, "f", 0, 64, 256)
        for step in range(4):
            assert plan.num_targets(plan.batch(256 * step)) > 0
        kept, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert stream.tokens == 9 * total
        assert kept < total  # bytes a document: 8 with all cumulative lengths
        assert peak < 8 * total
        assert _mapped(tmp_path / "train.index.npy") == 0
        held = np.load(tmp_path / "train.index.npy", mmap_mode="r")
        assert held[0, 2] == 9
        assert _mapped(tmp_path / "train.index.npy") > 0  # what is mapped is seen
        assert len(pickle.dumps(stream)) < total

    def test_an_index_that_has_become_shorter_is_named(self, manifest: Manifest) -> None:
        stream = open_stream(manifest, "train")
        path = manifest.folder / manifest.split("train").index_file
        os.truncate(path, path.stat().st_size - 32)
        with pytest.raises(UserError, match=r"train\.index\.npy: it has become shorter"):
            stream.targets_before([3])


def _mapped(path: Path) -> int:
    """Bytes of a file that this process has mapped and read."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    at = [number for number, line in enumerate(lines) if line.endswith(str(path))]
    fields = (line.split() for first in at for line in lines[first + 1 : first + 24])
    return sum(1024 * int(words[1]) for words in fields if words[0] == "Rss:")
