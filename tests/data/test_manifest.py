"""The manifest comes back as it was saved, and says clearly what is wrong with a damaged folder."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import numpy as np
import pytest

from dualroute.data.manifest import (
    MANIFEST_FILE,
    Manifest,
    Shard,
    Split,
    TokenizerInfo,
    token_dtype,
    verify_shards,
)
from dualroute.errors import UserError


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def manifest(tmp_path):
    """A folder whose files fit the manifest; the shards' contents are arbitrary."""
    splits = {}
    (tmp_path / "tokenizer.model").write_bytes(b"model")
    for name, documents in (("train", (3, 2)), ("val", (1,))):
        shards = []
        for number, count in enumerate(documents):
            data = f"{name}{number}".encode() * 40
            (tmp_path / f"{name}-{number:05d}.tar").write_bytes(data)
            file = f"{name}-{number:05d}.tar"
            shards.append(Shard(file, count, 10 * count, 30 * count, len(data), sha256(data)))
        rows = [(n, 10 + 30 * place, 10, 30) for n, count in enumerate(documents) for place in range(count)]
        np.save(tmp_path / f"{name}.index.npy", np.array(rows, dtype=np.int64))
        total = sum(documents)
        splits[name] = Split(
            name,
            total,
            10 * total,
            30 * total,
            f"{name}.index.npy",
            sha256((tmp_path / f"{name}.index.npy").read_bytes()),
            tuple(shards),
        )
    made = Manifest(
        tmp_path,
        "uint16",
        TokenizerInfo("tokenizer.model", sha256(b"model"), 100, 1, 2, 0),
        splits,
        {"options": {"seed": 1}},
    )
    made.save(tmp_path)
    return made


def rewrite(manifest, change):
    """Edit manifest.json by hand."""
    path = manifest.folder / MANIFEST_FILE
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_load_gives_back_what_was_saved(manifest):
    loaded = Manifest.load(manifest.folder)
    assert loaded == manifest
    assert loaded.fingerprint == manifest.fingerprint
    assert Manifest.load(manifest.folder / MANIFEST_FILE) == manifest


def test_a_manifest_of_an_older_program_has_no_checksum(manifest):
    rewrite(manifest, lambda content: content.pop("checksum"))
    assert Manifest.load(manifest.folder) == manifest


def test_what_the_fingerprint_leaves_out_is_covered_too(manifest):
    rewrite(manifest, lambda content: content["tokenizer"].update(eos_id=3))
    with pytest.raises(UserError, match="the checksum does not match the contents"):
        Manifest.load(manifest.folder)


def test_targets_leave_out_the_first_token_of_each_document(manifest):
    train = manifest.split("train")
    assert train.targets == 50 - 5
    assert train.targets_per_byte == pytest.approx(45 / 150)


def test_the_fingerprint_follows_the_tokens_and_not_the_place(manifest, tmp_path_factory):
    elsewhere = dataclasses.replace(manifest, folder=tmp_path_factory.mktemp("other"), preparation={})
    assert elsewhere.fingerprint == manifest.fingerprint
    other_tokenizer = dataclasses.replace(manifest.tokenizer, sha256=sha256(b"another"))
    assert dataclasses.replace(manifest, tokenizer=other_tokenizer).fingerprint != manifest.fingerprint
    shard = dataclasses.replace(manifest.splits["val"].shards[0], sha256=sha256(b"x"))
    val = dataclasses.replace(manifest.splits["val"], shards=(shard,))
    splits = {**manifest.splits, "val": val}
    assert dataclasses.replace(manifest, splits=splits).fingerprint != manifest.fingerprint


def test_the_index_is_a_memory_map_of_int64(manifest):
    index = manifest.open_index("train")
    assert isinstance(index, np.memmap)
    assert index.shape == (5, 4)
    assert index.dtype == np.int64


@pytest.mark.parametrize(("vocab_size", "dtype"), [(256, "uint16"), (65536, "uint16"), (65537, "uint32")])
def test_the_dtype_holds_every_id(vocab_size, dtype):
    assert token_dtype(vocab_size) == dtype
    assert np.iinfo(dtype).max >= vocab_size - 1


def test_unknown_split_names_those_there_are(manifest):
    with pytest.raises(UserError, match="no split 'test'; it has train, val"):
        manifest.split("test")


def test_missing_manifest(tmp_path):
    with pytest.raises(UserError, match=r"manifest\.json: no such file.*dualroute prepare"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format="tfrecord"), "not a dualroute-shards manifest"),
        (lambda m: m.update(version=2), "version 2, this program reads version 1"),
        (lambda m: m.update(dtype="int8"), "'dtype' must be one of uint16, uint32"),
        (lambda m: m.pop("tokenizer"), "key 'tokenizer' is missing"),
        (lambda m: m["tokenizer"].pop("eos_id"), r"key 'tokenizer\.eos_id' is missing"),
        (lambda m: m["splits"]["train"].update(tokens="5"), r"'splits\.train\.tokens' must be int, not '5'"),
        (lambda m: m["splits"]["train"].update(tokens=True), r"'splits\.train\.tokens' must be int"),
        (lambda m: m["splits"]["val"].update(documents=0), r"'splits\.val\.documents' must be positive"),
        (lambda m: m["splits"]["train"].update(tokens=51), "is 51, its shards add up to 50"),
        (
            lambda m: m["splits"]["train"]["shards"][1].update(file="../x.tar"),
            r"'splits\.train\.shards\[1\]\.file' must be a plain file name",
        ),
        (lambda m: m["tokenizer"].update(sha256="0" * 64), "the fingerprint does not match"),
    ],
)
def test_a_wrong_manifest_is_refused_in_one_line(manifest, change, message):
    rewrite(manifest, change)
    with pytest.raises(UserError, match=message) as error:
        Manifest.load(manifest.folder)
    assert "\n" not in str(error.value)
    assert str(manifest.folder) in str(error.value)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff", b"null"])
def test_bytes_that_are_no_manifest(manifest, data):
    (manifest.folder / MANIFEST_FILE).write_bytes(data)
    with pytest.raises(UserError, match=r"manifest\.json: not "):
        Manifest.load(manifest.folder)


def test_verify_accepts_a_whole_folder(manifest):
    for split in manifest.splits:
        verify_shards(manifest, split, "size")
        verify_shards(manifest, split, "sha256")


def test_verify_names_a_missing_and_a_shortened_shard(manifest):
    path = manifest.folder / "train-00001.tar"
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(UserError, match=rf"train-00001\.tar: {len(data) - 1} bytes, .* says {len(data)}"):
        verify_shards(manifest, "train")
    path.unlink()
    with pytest.raises(UserError, match=r"train-00001\.tar: no such file; copy it again"):
        verify_shards(manifest, "train")
    verify_shards(manifest, "val")


@pytest.mark.parametrize("file", ["train-00000.tar", "train.index.npy", "tokenizer.model"])
def test_a_flipped_byte_is_found_by_content(manifest, file):
    """Of index and tokenizer always; of a shard where its content is asked for."""
    path = manifest.folder / file
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    for level in ("size", "sha256"):
        if (file, level) == ("train-00000.tar", "size"):
            verify_shards(manifest, "train", "size")
            continue
        with pytest.raises(UserError, match=rf"{file}: cont(ents differ|radicts)"):
            verify_shards(manifest, "train", level)


@pytest.mark.parametrize("damage", ["short", "shape", "dtype", "missing"])
def test_a_damaged_index_is_refused(manifest, damage):
    path = manifest.folder / "train.index.npy"
    if damage == "short":
        path.write_bytes(path.read_bytes()[:-8])
    elif damage == "shape":
        np.save(path, np.zeros((4, 4), dtype=np.int64))
    elif damage == "dtype":
        np.save(path, np.zeros((5, 4), dtype=np.float64))
    else:
        path.unlink()
    with pytest.raises(UserError, match=r"train\.index\.npy"):
        manifest.open_index("train")
    with pytest.raises(UserError, match=r"train\.index\.npy"):
        verify_shards(manifest, "train", "size")


def test_verify_refuses_an_unknown_level(manifest):
    with pytest.raises(ValueError, match="'size' or 'sha256'"):
        verify_shards(manifest, "train", "md5")  # type: ignore[arg-type]
