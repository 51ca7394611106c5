"""Whatever happens to a file of a data set: one line that names it and a remedy, or the very same batches."""

from __future__ import annotations

import builtins
import copy
import errno
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dualroute.data.manifest import MANIFEST_FILE, Manifest
from dualroute.data.module import ShardDataModule
from dualroute.data.verify import VERIFIED_FILE
from dualroute.errors import UserError
from tests.data.shards import numbered, write_dataset

FILES = [MANIFEST_FILE, VERIFIED_FILE, "tokenizer.model", "train.index.npy", "train-00000.tar"]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set that was verified, and beside it another one: the same sizes, other tokens."""
    folder = tmp_path_factory.mktemp("sound") / "data"
    write_dataset(folder, numbered([5, 2, 17, 9, 1, 30]), val=numbered([6, 11], first=1000))
    other = folder.with_name("other")
    write_dataset(other, numbered([4, 3, 17, 9, 1, 30], 7), val=numbered([6, 11], first=1001))
    start(folder), start(other)
    return folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    shutil.copytree(sound, tmp_path / "data")  # with the modification times
    return tmp_path / "data"


def start(folder: Path) -> list[dict[str, Any]]:
    """What a training does with a data set before and in its first steps."""
    data = ShardDataModule(folder, context=8, micro_batch=2, tokens_per_batch=16, verify="sha256")
    data.prepare_data()
    data.setup(None)
    batches = [*islice(data.train_dataloader(), 10), *data.val_dataloader()]
    return [{key: value.tolist() for key, value in batch.items()} for batch in batches]


def check(sound: Path, folder: Path, *named: str) -> bool:
    """Start ``folder``; True if it was refused as it should be, False if it made the batches of ``sound``."""
    try:
        batches = start(folder)
    except UserError as error:
        line = str(error)
        assert "\n" not in line
        assert len(line) < 500
        assert any(str(folder / name) in line for name in named), line
        assert "; " in line  # the remedy
        assert "again" in line or "dualroute prepare" in line
        return True
    assert batches == start(sound)
    return False


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0" * 512)


def noise(path: Path) -> None:
    path.write_bytes(random.Random(0).randbytes(path.stat().st_size))


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def missing(path: Path) -> None:
    path.unlink()


def zip_instead(path: Path) -> None:
    """numpy opens it as a dictionary of arrays."""
    with open(path, "wb") as stream:
        np.savez(stream, a=np.zeros(3))


def pickle_instead(path: Path) -> None:
    with open(path, "wb") as stream:
        np.save(stream, np.array([{}], dtype=object), allow_pickle=True)


def nested(path: Path) -> None:
    path.write_bytes(b"[" * 200_000)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(
    "damage",
    [
        truncate, empty, lengthen, noise, folder_instead, fifo, dangling, loop, missing, zip_instead,
        pickle_instead, nested,
    ],
)  # fmt: skip
def test_damaged_files(sound: Path, folder: Path, file: str, damage: Callable[[Path], None]) -> None:
    damage(folder / file)
    refused = check(sound, folder, file)
    assert refused == (file != VERIFIED_FILE)


@pytest.mark.parametrize("file", FILES)
def test_a_file_that_may_not_be_read(sound, folder, file, monkeypatch) -> None:
    """Also for root, who may read everything."""
    opened = builtins.open

    def refuse(path: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(path, int) and Path(path) == folder / file:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", refuse)
    assert check(sound, folder, file) == (file != VERIFIED_FILE)


@pytest.mark.parametrize("file", FILES)
def test_flipped_bits(sound: Path, folder: Path, file: str) -> None:
    original, draw = (folder / file).read_bytes(), random.Random(file)
    for _ in range(40):
        data = bytearray(original)
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        (folder / file).write_bytes(data)
        # a manifest may come to name another file
        names = [file, ""] if file == MANIFEST_FILE else [file]
        check(sound, folder, *names)


@pytest.mark.parametrize("file", FILES)
def test_a_file_of_another_data_set(sound: Path, folder: Path, file: str) -> None:
    shutil.copy2(sound.with_name("other") / file, folder / file)
    # the manifest that does not belong here is noticed by what it says of the other files
    expected = ["train.index.npy"] if file == MANIFEST_FILE else [file]
    assert check(sound, folder, *expected) == (file not in (VERIFIED_FILE, "tokenizer.model"))


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of everything inside a JSON value."""
    if not isinstance(value, dict | list):
        return
    for key, child in value.items() if isinstance(value, dict) else enumerate(value):
        yield (*path, key)
        yield from leaves(child, (*path, key))


WRONG = [None, True, -1, 0, 1.5, 10**30, float("nan"), float("inf"), "", "x\ny\x1b[31m", "a/b", [], {}, [[]]]


def test_every_key_of_the_manifest_with_every_wrong_value(sound: Path, folder: Path) -> None:
    path = folder / MANIFEST_FILE
    content = json.loads(path.read_text())
    tried = 0
    for place in leaves(content):
        *parents, key = place
        for value in [*WRONG, "gone"]:
            damaged = copy.deepcopy(content)
            holder = damaged
            for parent in parents:
                holder = holder[parent]
            if value == "gone":
                del holder[key]
            else:
                holder[key] = value
            if (*place, value) in [("checksum", "gone"), ("preparation", {})]:
                continue  # as an older program writes it; as it was
            path.write_text(json.dumps(damaged))
            tried += 1
            with pytest.raises(UserError) as error:
                Manifest.load(folder)
            line = str(error.value)
            assert line.startswith(f"{path}: "), (place, value)
            assert line.isprintable(), (place, value)
            assert len(line) < 500
    assert tried > 500


@pytest.mark.parametrize(
    "text", ['{"format": 1, "format": 2}', '{"a": NaN}', "1" * 5000, '"\\ud800"', '{"a": 1']
)
def test_json_that_is_read_strictly(folder: Path, text: str) -> None:
    (folder / MANIFEST_FILE).write_text(text)
    with pytest.raises(UserError, match=r"manifest\.json: not ") as error:
        Manifest.load(folder)
    assert "\n" not in str(error.value)


def test_a_manifest_without_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dualroute.data.manifest.MAX_MANIFEST_BYTES", 100)
    with pytest.raises(
        UserError, match=r"manifest\.json: longer than the 100 bytes that it may have; copy it again"
    ):
        Manifest.load(folder)


def test_a_file_named_twice(folder: Path) -> None:
    path = folder / MANIFEST_FILE
    content = json.loads(path.read_text())
    content["splits"]["val"]["shards"][0]["file"] = content["splits"]["train"]["shards"][0]["file"]
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"names the file train-00000\.tar twice"):
        Manifest.load(folder)
