"""Numbers of packed rows, kept beside the data: the same plan, worked out once, never a damaged one."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from dualroute.data.manifest import Manifest
from dualroute.data.mixture.config import SourceConfig
from dualroute.data.mixture.sources import OpenSource, Reading
from dualroute.data.order import packing
from dualroute.data.order.document_stream import DocumentStream
from dualroute.data.order.kept_arrays import Arrays, kept_arrays
from dualroute.data.order.packing import PackedRows

LENGTHS = np.random.default_rng(0).integers(1, 60, 700)


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "KEPT_FROM", 0)


def plan(folder: Path | None, context: int = 40, decided_by: str = "") -> PackedRows:
    return PackedRows(DocumentStream(LENGTHS), "data", 0, context, 4, "best_fit", folder, decided_by)


def same(one: PackedRows, other: PackedRows) -> None:
    numbers = np.arange(one.windows_per_epoch)
    assert one.windows_per_epoch == other.windows_per_epoch
    np.testing.assert_array_equal(one.ids(numbers), other.ids(numbers))
    for number in numbers.tolist():
        np.testing.assert_array_equal(one.pieces(number), other.pieces(number))
        assert one.num_targets([number]) == other.num_targets([number])


def test_the_next_start_packs_nothing_and_reads_the_same_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "data" / ".packing"
    first = plan(folder)
    same(plan(None), first)
    (kept,) = folder.iterdir()
    assert sorted(path.name for path in kept.iterdir()) == ["arrays.json", "rows.npy", "without.npy"]
    with monkeypatch.context() as patch:
        patch.setattr(PackedRows, "_counted", lambda self: pytest.fail("all groups are packed again"))
        again = plan(folder)
        assert again.windows_per_epoch == first.windows_per_epoch
        assert isinstance(again._table[1], np.memmap)
    same(first, again)


def test_what_decides_the_rows_has_a_place_of_its_own(tmp_path: Path) -> None:
    for more in ({}, {"context": 50}, {"decided_by": "other lengths"}):
        same(plan(None, **more), plan(tmp_path, **more))
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("damage", ["byte", "cut", "note", "gone", "unfinished"])
def test_damaged_arrays_are_worked_out_again(damage: str, tmp_path: Path) -> None:
    first = plan(tmp_path)
    rows = first.windows_per_epoch
    (kept,) = tmp_path.iterdir()
    path = kept / "without.npy"
    data = path.read_bytes()
    if damage == "byte":
        path.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    elif damage == "cut":
        path.write_bytes(data[:-2])
    elif damage == "note":
        (kept / "arrays.json").write_text("[3")
    elif damage == "gone":
        path.unlink()
    else:
        kept.rename(kept.with_name(f".writing-{kept.name}"))
    same(plan(None), plan(tmp_path))
    assert plan(tmp_path).windows_per_epoch == rows
    assert [path.name for path in tmp_path.iterdir()] == [kept.name]
    assert path.read_bytes() == data


def test_a_place_that_cannot_be_written_costs_only_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    same(plan(None), plan(tmp_path / "file" / ".packing"))


def test_small_sets_keep_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "KEPT_FROM", 701)
    assert plan(tmp_path).windows_per_epoch == plan(None).windows_per_epoch
    assert list(tmp_path.iterdir()) == []


def test_one_works_them_out_and_the_others_wait(tmp_path: Path) -> None:
    made, found = [], []

    def compute() -> Arrays:
        made.append(1)
        time.sleep(0.1)
        return {"a": np.arange(5)}

    def ask() -> None:
        found.append(kept_arrays(tmp_path / "place", compute)["a"].tolist())

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert made == [1]
    assert found == [list(range(5))] * 4


def test_a_source_keeps_them_beside_its_shards(tiny_dataset: Path, tmp_path: Path) -> None:
    for file in tiny_dataset.iterdir():
        if file.is_file():
            os.link(file, tmp_path / file.name)
    manifest = Manifest.load(tmp_path)
    for seed in (0, 1):
        reading = Reading(64, 4, seed, packing="best_fit")
        assert OpenSource(SourceConfig(str(tmp_path)), manifest, reading).plan.windows_per_epoch > 0
    assert len(list((tmp_path / ".packing").iterdir())) == 1  # the seed changes the order, not the rows
