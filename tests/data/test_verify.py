"""``dualroute data verify`` and ``data show``: every damaged file is named, whatever is remembered."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from dualroute.cli import main
from dualroute.data.manifest import MANIFEST_FILE, Manifest
from dualroute.data.verify import VERIFIED_FILE, VerifyDataConfig, verify_data, verify_once
from tests.data.shards import numbered, write_dataset


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return write_dataset(tmp_path / "data", numbered([5, 2, 17, 9, 1, 30, 4]), val=numbered([4, 4]))


def flip(path: Path, place: int = -1) -> None:
    """Change one bit and keep size and time, as a disk does."""
    status, data = path.stat(), bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_good_data_set(manifest, capsys):
    assert main(["data", "verify", "--data", str(manifest.folder)]) == 0
    size = sum(path.stat().st_size for path in manifest.folder.iterdir() if path.suffix != ".json")
    assert capsys.readouterr().out == f"good: {manifest.folder} (6 files, {size:,} bytes)\n"
    assert (manifest.folder / VERIFIED_FILE).exists()


def test_every_damaged_file_is_listed_although_it_was_verified_before(manifest, capsys):
    verify_once(manifest, "sha256")
    for file in ("train-00001.tar", "val-00000.tar", "val.index.npy"):
        flip(manifest.folder / file)
    (manifest.folder / "train-00000.tar").unlink()
    assert main(["data", "verify", "--data", str(manifest.folder)]) == 1
    *damaged, last = capsys.readouterr().out.splitlines()
    assert sorted(line.split(": ")[1] for line in damaged) == [
        str(manifest.folder / file)
        for file in ("train-00000.tar", "train-00001.tar", "val-00000.tar", "val.index.npy")
    ]
    assert all(line.startswith("damaged: ") and "copy it again" in line for line in damaged)
    assert last == f"{manifest.folder}: 4 of 6 files are damaged; copy them again"


def test_what_was_found_damaged_is_hashed_at_the_next_start(manifest, capsys):
    verify_once(manifest, "sha256")
    flip(manifest.folder / "train-00001.tar")
    verify_once(manifest, "sha256")  # size and time are as before: not looked at
    assert verify_data(VerifyDataConfig(str(manifest.folder))) == 1
    with pytest.raises(ValueError, match=r"train-00001\.tar: contents differ"):
        verify_once(manifest, "sha256")
    flip(manifest.folder / "train-00001.tar")
    assert verify_data(VerifyDataConfig(str(manifest.folder))) == 0
    verify_once(manifest, "sha256")


def test_the_tokenizer_is_named_once(manifest, capsys):
    flip(manifest.tokenizer_path)
    assert verify_data(VerifyDataConfig(str(manifest.folder))) == 1
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()] == [
        "damaged", str(manifest.folder),
    ]  # fmt: skip


def test_without_a_manifest(manifest, capsys):
    (manifest.folder / MANIFEST_FILE).unlink()
    for command in ("verify", "show"):
        assert main(["data", command, "--data", str(manifest.folder)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "manifest.json: no such file" in error


def test_show(manifest, capsys):
    assert main(["data", "show", "--data", str(manifest.folder)]) == 0
    shown = capsys.readouterr().out
    assert "train: 7 documents, 68 tokens, 204 bytes (3.00 bytes a token), 2 shards" in shown
    assert f"fingerprint: {manifest.fingerprint}" in shown


@pytest.mark.parametrize("preparation", [{"dropped": 5, "options": []}, {"dropped": {"empty": "x"}}])
def test_show_takes_notes_for_people_as_they_are(manifest, capsys, preparation):
    dataclasses.replace(manifest, preparation=preparation).save(manifest.folder)
    assert main(["data", "show", "--data", str(manifest.folder)]) == 0
    assert "dropped" not in capsys.readouterr().out
