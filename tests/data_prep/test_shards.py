"""A shard is a plain WebDataset tar, and the index points at the very bytes of the ids."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile

import numpy as np
import pytest
import webdataset

from data_prep import shards
from data_prep.clean import CleanDocument
from data_prep.notes import npy_bytes
from data_prep.prepare import prepare
from dualroute.data.manifest import verify_shards
from dualroute.data.tokenizer import Tokenizer


@pytest.fixture
def dataset(config):
    return prepare(config())


def through_the_index(manifest, split):
    """(ids, text bytes) of each document, read as the trainer reads them."""
    maps = [np.memmap(path, dtype=np.uint8, mode="r") for path in manifest.shard_paths(split)]
    size = np.dtype(manifest.dtype).itemsize
    for shard, offset, tokens, num_bytes in manifest.open_index(split):
        yield maps[shard][offset : offset + size * tokens].view(manifest.dtype), num_bytes


@pytest.mark.parametrize("split", ["train", "val"])
def test_index_and_tar_hold_the_documents(dataset, corpus, split):
    tokenizer = Tokenizer(dataset.tokenizer_path)
    originals = {path.relative_to(corpus).as_posix(): path.read_text() for path in corpus.rglob("*.txt")}
    indexed = through_the_index(dataset, split)
    seen = []
    for path in dataset.shard_paths(split):
        with tarfile.open(path) as archive:
            members = archive.getmembers()
            for array, about in zip(members[::2], members[1::2], strict=True):
                assert array.name.removesuffix(".npy") == about.name.removesuffix(".json")
                ids = np.load(io.BytesIO(archive.extractfile(array).read()))
                info = json.load(archive.extractfile(about))
                text = originals[info["source"]]
                assert ids.dtype == dataset.dtype
                assert ids[0] == tokenizer.bos_id
                assert ids[-1] == tokenizer.eos_id
                assert tokenizer.decode(ids) == text
                assert info["bytes"] == len(text.encode())
                assert info["sha256"] == hashlib.sha256(text.encode()).hexdigest()
                mapped, num_bytes = next(indexed)
                assert mapped.tolist() == ids.tolist()
                assert num_bytes == info["bytes"]
                seen.append(info["source"])
    assert next(indexed, None) is None
    assert seen == sorted(seen)  # the order of the corpus
    assert len(seen) == dataset.split(split).documents


def test_the_two_splits_are_the_whole_corpus_once(dataset, corpus):
    assert sum(split.documents for split in dataset.splits.values()) == 60
    total = sum(path.stat().st_size for path in corpus.rglob("*.txt"))
    assert sum(split.bytes for split in dataset.splits.values()) == total


def test_webdataset_reads_the_tars(dataset):
    paths = [str(path) for path in dataset.shard_paths("train")]
    samples = list(webdataset.WebDataset(paths, shardshuffle=False).decode())
    assert len({sample["__key__"] for sample in samples}) == dataset.split("train").documents
    assert sum(len(sample["npy"]) for sample in samples) == dataset.split("train").tokens
    assert sum(sample["json"]["bytes"] for sample in samples) == dataset.split("train").bytes


def test_the_manifest_tells_the_truth_about_its_files(dataset):
    for split in ("train", "val"):
        verify_shards(dataset, split, "sha256")
    assert len(dataset.split("train").shards) > 3
    for shard in dataset.split("train").shards[:-1]:
        assert shard.bytes >= 6000  # closed by the document that reached shard_size_mb
        assert shard.bytes < 6000 + 1000


def test_members_carry_neither_time_nor_owner(dataset):
    for path in dataset.shard_paths("val"):
        with tarfile.open(path) as archive:
            for member in archive:
                assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_npy_bytes_are_numpys_own_format(dtype, tmp_path):
    ids = np.arange(7, dtype=dtype)
    data, offset = npy_bytes(ids)
    (tmp_path / "a.npy").write_bytes(data)
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), ids)
    assert offset % 64 == 0
    assert data[offset:] == ids.tobytes()


@pytest.mark.parametrize("workers", [2, 3])
def test_few_long_documents_wait_at_a_time(workers, monkeypatch):
    """Text that waits for its turn is bounded in bytes, not only in documents."""
    monkeypatch.setattr(shards, "_HELD_BYTES", 10_000_000)
    taken = 0

    def items():
        nonlocal taken
        for number in range(40):
            taken += 1
            yield CleanDocument(f"{number}", "", 6_000_000, b"", "train"), number

    given_back = 0
    for (_, number), ids in shards._in_order(items(), lambda item: np.array([item[1]]), workers):
        assert number == ids[0] == given_back
        given_back += 1
        assert taken - given_back <= workers
    assert given_back == 40
