"""The cache that processes share: one brings a file, a killed one leaves no harm, what is in use stays."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import pickle
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from dualroute.data.manifest import Manifest
from dualroute.data.reader import ShardReader
from dualroute.data.remote.config import RemoteOptions
from dualroute.data.remote.disk_cache import DiskCache
from dualroute.data.remote.prefetch import Wanted, read_ahead
from dualroute.errors import UserError
from tests.data.remote.conftest import quick
from tests.data.remote.test_http import batches, module, same
from tests.data.remote.web_server import WebServer

fork = multiprocessing.get_context("fork")


def read_all(url: str, options: RemoteOptions) -> None:
    manifest = Manifest.load(url, options)
    reader = ShardReader(manifest, "train")
    for document in range(manifest.split("train").documents):
        reader.read(document, 0, 1)


def read_one(url: str, options: RemoteOptions) -> None:
    ShardReader(Manifest.load(url, options), "train").read(0, 0, 10)


def copies(options: RemoteOptions, pattern: str = "*.tar") -> list[Path]:
    return sorted(Path(options.cache_dir).glob(f"sets/*/{pattern}"))


def test_one_process_brings_a_file_and_the_others_wait(web: WebServer, options: RemoteOptions) -> None:
    web.delay = 0.05
    ranks = [fork.Process(target=read_all, args=(web.url, options)) for _ in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [0] * 4
    asked = web.count()
    assert asked.pop("manifest.json") == 4
    assert set(asked.values()) == {1}


def test_a_file_that_came_while_it_was_looked_for_is_not_thrown_away(
    web: WebServer, options: RemoteOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Absent at the first look, and there at the second, since another process has brought it in between."""
    read_one(web.url, options)
    mirror = Manifest.load(web.url, options).mirror
    assert mirror is not None
    before, there, looks = web.count(), mirror._is_there, iter([False])
    monkeypatch.setattr(
        mirror, "_is_there", lambda path, size: next(looks, None) is None and there(path, size)
    )
    assert mirror.get("train-00000.tar", "", None).exists()
    assert web.count() == before


def test_a_killed_process_leaves_its_lock_and_its_half_to_the_next(
    web: WebServer, options: RemoteOptions
) -> None:
    web.faults["train-00000.tar"] = [("stall", 16_000)]
    rank = fork.Process(target=read_one, args=(web.url, dataclasses.replace(options, timeout=60.0)))
    rank.start()
    until = time.monotonic() + 30
    while time.monotonic() < until and not any(
        one.stat().st_size >= 8000 for one in copies(options, "*.part")
    ):
        time.sleep(0.02)
    assert rank.pid is not None
    os.kill(rank.pid, signal.SIGKILL)
    rank.join(30)
    begin = time.monotonic()
    read_one(web.url, options)
    assert time.monotonic() - begin < 20
    assert web.count(206) == {"train-00000.tar": 1}  # it went on where the other was killed
    assert not copies(options, "*.part*")


def test_who_does_not_get_ahead_is_not_waited_for_for_ever(
    web: WebServer, options: RemoteOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = Manifest.load(web.url, options)
    assert manifest.mirror is not None
    cache = DiskCache(options.cache_dir, options.cache_bytes)
    path = manifest.folder / "train-00000.tar"
    monkeypatch.setattr("dualroute.data.remote.disk_cache._STEP_SECONDS", 0.05)
    monkeypatch.setattr(manifest.mirror, "_patience", lambda: 0.2)
    with cache.turn(path, 1, 1.0) as mine:
        assert mine
        with pytest.raises(UserError, match=rf"another process \({os.getpid()}\).* does not get ahead"):
            ShardReader(manifest, "train").read(0, 0, 1)
    ShardReader(manifest, "train").read(0, 0, 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_cache_smaller_than_the_set(web: WebServer, local: Manifest, tmp_path: Path, workers: int) -> None:
    options = quick(tmp_path, size=140_000, timeout=20.0)
    assert same(batches(web.url, options, num_workers=workers), batches(local.folder))
    assert DiskCache(options.cache_dir, options.cache_bytes).used() <= 140_000
    assert web.count()["train-00000.tar"] >= 1
    assert sum(web.count().values()) > 12  # shards came more than once


def test_the_shard_that_was_read_longest_ago_goes_first(web: WebServer, tmp_path: Path) -> None:
    manifest = Manifest.load(web.url, quick(tmp_path, size=110_000))
    reader = ShardReader(manifest, "train", max_open=1)
    for document in (0, 3, 0, 6):  # shards 0, 1, 0, 2
        reader.read(document, 0, 1)
        time.sleep(0.02)
    reader.read(9, 0, 1)
    assert {path.name for path in manifest.folder.glob("*.tar")} == {
        "train-00000.tar", "train-00002.tar", "train-00003.tar",
    }  # fmt: skip


def test_what_is_in_use_never_goes(web: WebServer, tmp_path: Path) -> None:
    manifest = Manifest.load(web.url, quick(tmp_path, size=80_000, timeout=0.5))
    held = [ShardReader(manifest, "train") for _ in range(2)]
    assert [reader.read(document, 0, 1)[0] for reader, document in zip(held, (0, 3), strict=True)] == [
        0,
        2701,
    ]
    with pytest.raises(
        UserError, match=r"is full: 30,720 bytes more are needed, the limit is .*data.cache_gib"
    ):
        ShardReader(manifest, "train").read(6, 0, 1)
    assert len(list(manifest.folder.glob("train-*.tar"))) == 2
    held[0].close()  # its shard may go now
    assert ShardReader(manifest, "train").read(6, 0, 1).tolist() == [7731]
    assert held[1].read(3, 5, 1).tolist() == [2706]


def test_a_reader_gives_up_its_own_maps_before_it_gives_up(web: WebServer, tmp_path: Path) -> None:
    manifest = Manifest.load(web.url, quick(tmp_path, size=80_000))
    assert manifest.mirror is not None
    manifest.mirror.holds_all = True  # or it would keep two maps only
    reader = ShardReader(manifest, "train")
    for document in range(20):
        reader.read(document, 0, 1)


def test_sets_that_nobody_has_open_go_last(web: WebServer, local: Manifest, tmp_path: Path) -> None:
    options = quick(tmp_path, size=75_000, timeout=0.5)
    first = Manifest.load(f"{web.url}?one", options)
    first.check_index("train")
    folder = first.folder
    assert first.mirror is not None
    second = Manifest.load(f"{web.url}?two", options)
    filler = folder / "filler.npy"
    filler.write_bytes(bytes(50_000))
    with pytest.raises(UserError, match="is full"):  # the first is still open
        ShardReader(second, "train").read(3, 0, 1)
    first.mirror._lease.close()  # type: ignore[union-attr]
    ShardReader(second, "train").read(3, 0, 1)
    assert not folder.exists()


def test_copies_that_were_cut_off_come_anew(web: WebServer, options: RemoteOptions) -> None:
    read_one(web.url, options)
    (shard,) = copies(options)
    os.truncate(shard, 100)
    read_one(web.url, options)
    assert web.count()["train-00000.tar"] == 2


def test_a_cache_that_cannot_be_used(web: WebServer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data.cache_dir .*file.*: cannot be written \(Not a directory\)"):
        Manifest.load(web.url, quick(tmp_path / "file"))
    with pytest.raises(
        UserError, match=r"data.cache_gib .* is too little for .*two shards have 62,\d\d\d bytes"
    ):
        Manifest.load(web.url, quick(tmp_path / "small", size=40_000))


def test_a_full_disk(web: WebServer, options: RemoteOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    manifest = Manifest.load(web.url, options)
    manifest.open_index("train")
    monkeypatch.setattr("dualroute.data.remote.http_transfer.os.fsync", full)
    with pytest.raises(
        UserError, match=r"train-00000.tar: cannot be written \(No space left.*lower data.cache_gib"
    ):
        ShardReader(manifest, "train").read(0, 0, 1)


def test_a_disk_that_others_have_filled(
    web: WebServer, options: RemoteOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = Manifest.load(web.url, dataclasses.replace(options, timeout=0.5))
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("dualroute.data.remote.disk_cache.shutil.disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"is full: .*1,000 are free on the disk"):
        ShardReader(manifest, "train").read(0, 0, 1)


def test_a_pickled_manifest_keeps_its_set(web: WebServer, options: RemoteOptions) -> None:
    manifest = pickle.loads(pickle.dumps(Manifest.load(web.url, options)))
    assert ShardReader(manifest, "train").read(0, 0, 3).tolist() == [0, 1, 2]


class TestAhead:
    def test_the_shards_of_the_batches_to_come(
        self, web: WebServer, local: Manifest, options: RemoteOptions
    ) -> None:
        data = module(web.url, options)
        wanted = Wanted([data.manifest], "train", [data.plan])
        batch = next(iter(data.train_sampler(0, 1).sampler))
        files = {shard.file for _, shard in wanted.of(batch)}
        documents = [int(row[0]) for request in batch for row in data.plan.pieces(request.sample)]
        rows = data.manifest.open_index("train")
        assert files == {f"train-{int(rows[document][0]):05d}.tar" for document in documents}

    def test_no_more_than_asked_for(self) -> None:
        class Sampler:
            batch_size = 1

            def __iter__(self) -> Any:
                return iter(range(100))

            def __len__(self) -> int:
                return 100

        class Shelf:
            limit = 1 << 40

            def __init__(self) -> None:
                self.brought: list[str] = []

            def holds(self, file: str, size: int) -> bool:
                return False

            def get(self, file: str, sha256: str, size: int) -> None:
                self.brought.append(file)

        from dualroute.data.manifest_parts import Shard

        shelf = Shelf()
        shards = [Shard(f"{number}.tar", 1, 1, 1, 10, "") for number in range(100)]
        ahead = read_ahead(Sampler(), lambda batch: [(shelf, shards[batch // 10])], shards_ahead=3)  # type: ignore[list-item]
        assert len(ahead) == 100  # type: ignore[arg-type]
        batches = iter(ahead)
        assert [next(batches) for _ in range(5)] == [0, 1, 2, 3, 4]
        until = time.monotonic() + 5
        while time.monotonic() < until and len(shelf.brought) < 3:
            time.sleep(0.01)
        assert set(shelf.brought) <= {"0.tar", "1.tar", "2.tar"}
        assert list(batches) == list(range(5, 100))
