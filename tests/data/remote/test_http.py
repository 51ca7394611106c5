"""Sets on an HTTP server that drops, stalls, lies and refuses: the batches of the folder, or one line that
says why."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from dualroute.data.manifest import MANIFEST_FILE, Manifest
from dualroute.data.module import ShardDataModule
from dualroute.data.reader import ShardReader
from dualroute.data.remote.config import BadDataPolicy, RemoteOptions
from dualroute.data.remote.mirror import UnusableData
from dualroute.errors import UserError
from tests.data.remote.conftest import quick
from tests.data.remote.web_server import WebServer

Batches = list[dict[str, Any]]


def module(path: object, remote: RemoteOptions | None = None, **others: Any) -> ShardDataModule:
    data = ShardDataModule(
        str(path), context=64, micro_batch=2, tokens_per_batch=256, remote=remote, **others
    )
    data.prepare_data()
    data.setup(None)
    return data


def batches(path: object, remote: RemoteOptions | None = None, count: int = 50, **others: Any) -> Batches:
    data = module(path, remote, **others)
    return [*islice(data.train_dataloader(), count), *data.val_dataloader()]


def same(first: Batches, second: Batches) -> bool:
    return len(first) == len(second) and all(
        one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
        for one, other in zip(first, second, strict=True)
    )


@pytest.fixture(scope="module")
def expected(local: Manifest) -> Batches:
    return batches(local.folder)


@pytest.mark.parametrize(("workers", "ahead"), [(0, 0), (0, 4), (2, 2)])
def test_the_batches_are_those_of_the_folder(
    web: WebServer, options: RemoteOptions, expected: Batches, workers: int, ahead: int
) -> None:
    assert same(batches(web.url, options, num_workers=workers, prefetch_shards=ahead), expected)
    assert set(web.count().values()) == {1}  # however many processes and threads wanted a file
    web.asked.clear()
    assert same(batches(web.url, options), expected)
    assert web.count() == {MANIFEST_FILE: 1}  # the rest was there


def test_what_breaks_goes_on_where_it_broke(web: WebServer, tmp_path: Path, expected: Batches) -> None:
    web.faults = {
        "train.index.npy": [("drop", 200), ("status", 503)],
        "tokenizer.model": [("status", 500), ("drop", 3)],
        "train-00000.tar": [("drop", 3000), ("status", 500), ("status", 429)],
        "train-00001.tar": [("length", 5)],  # the rest of the file is missing
        "train-00002.tar": [("flip", 2000)],
        "train-00003.tar": [("drop", 4000), ("range", "bytes 0-9/10")],
        "train-00004.tar": [("stall", 100)],
        "train-00005.tar": [("drip", 100)],
        "val-00000.tar": [("length", 10**6)],  # more than the manifest allows, once
    }
    del web.faults["val-00000.tar"]
    assert same(batches(web.url, quick(tmp_path, timeout=0.4)), expected)
    assert ("train-00000.tar", "bytes=3000-", 206) in web.asked
    assert ("train-00004.tar", "bytes=100-", 206) in web.asked


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        (("status", 404), r"answers 404 Not Found; correct the path or the access"),
        (("status", 403), r"answers 403 Forbidden; correct the path"),
        (("status", 410), r"answers 410 Gone"),
        (("status", 416), r"answers 416"),
        (("status", 500), r"answers 500 Internal Server Error; check the connection and run again"),
        (("drop", 0), r"the connection broke after 0 of \d+ bytes; check the connection"),
        (("length", 10**9), r"has 1,000,000,000 bytes, more than the 20,480 allowed"),
        (("length", 3), r"contents differ from the manifest \(3 bytes, 20,480 expected"),
        (("flip", 1000), r"contents differ from the manifest \(sha256 [0-9a-f]{64}, expected sha256"),
    ],
)
def test_what_stays_broken_is_named(
    web: WebServer, options: RemoteOptions, fault: tuple[str, int | str], line: str
) -> None:
    web.always["train-00000.tar"] = fault
    manifest = Manifest.load(web.url, options)
    with pytest.raises(UnusableData, match=line) as error:
        ShardReader(manifest, "train").read(0, 0, 10)
    assert str(error.value).startswith(f"{web.url}/train-00000.tar: ")
    assert "\n" not in str(error.value)
    assert not list(Path(options.cache_dir).glob("sets/*/train-00000.tar"))  # nothing half-written
    web.always.clear()
    assert ShardReader(manifest, "train").read(0, 0, 10).tolist() == list(range(10))


def test_permanent_answers_are_not_asked_for_again(web: WebServer, options: RemoteOptions) -> None:
    web.always["train-00000.tar"] = ("status", 404)
    with pytest.raises(UnusableData):
        ShardReader(Manifest.load(web.url, options), "train").read(0, 0, 10)
    assert web.count()["train-00000.tar"] == 1
    web.always["train-00000.tar"] = ("status", 500)
    with pytest.raises(UnusableData):
        ShardReader(Manifest.load(web.url, options), "train").read(0, 0, 10)
    assert web.count()["train-00000.tar"] == 1 + 1 + options.retries


def test_a_wait_that_the_server_asks_for_is_kept(
    web: WebServer, options: RemoteOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr("dualroute.data.remote.mirror.time.sleep", waits.append)
    web.headers["Retry-After"] = "7"
    web.faults["train-00000.tar"] = [("status", 429)]
    ShardReader(Manifest.load(web.url, options), "train").read(0, 0, 10)
    web.headers["Retry-After"] = "999999"
    web.faults["train-00001.tar"] = [("status", 503)]
    ShardReader(Manifest.load(web.url, options), "train").read(4, 0, 10)
    assert [wait for wait in waits if wait > 1] == [7.0, 120.0]


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        (("status", 404), r"manifest.json: the server answers 404 Not Found; correct the path"),
        (
            ("status", 500),
            r"manifest.json: the server answers 500 Internal Server Error; check the connection",
        ),
        (("flip", 3), r"manifest.json: not (JSON|a dualroute-shards manifest)"),
        (("length", 1 << 40), r"manifest.json: the file has 1,099,511,627,776 bytes, more than"),
    ],
)
def test_a_manifest_that_cannot_be_had(
    web: WebServer, options: RemoteOptions, fault: tuple[str, int | str], line: str
) -> None:
    web.always[MANIFEST_FILE] = fault
    with pytest.raises(UserError, match=line):
        Manifest.load(web.url, options)


def test_without_the_server_what_was_seen_last_is_read(
    web: WebServer, options: RemoteOptions, expected: Batches, caplog: pytest.LogCaptureFixture
) -> None:
    batches(web.url, options)
    web.always[MANIFEST_FILE] = ("drop", 0)
    assert same(batches(web.url, options), expected)
    web.always[MANIFEST_FILE] = ("status", 403)  # an answer is not silence
    with pytest.raises(UserError, match="403"):
        Manifest.load(web.url, options)


def test_credentials_come_from_netrc(
    web: WebServer, options: RemoteOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    web.wanted = "Basic bWU6c2VjcmV0"
    with pytest.raises(UserError, match="401 Unauthorized"):
        Manifest.load(web.url, options)
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret\n")
    (tmp_path / "netrc").chmod(0o600)
    assert Manifest.load(web.url, options).split("train").documents == 20


def test_a_query_is_sent_and_not_shown(web: WebServer, options: RemoteOptions) -> None:
    manifest = Manifest.load(f"{web.url}?token=secret", options)
    assert manifest.place == web.url
    web.always["train-00000.tar"] = ("status", 404)
    with pytest.raises(UserError) as error:
        ShardReader(manifest, "train").read(0, 0, 1)
    assert "secret" not in str(error.value)
    cached = [path.read_bytes() for path in Path(options.cache_dir).rglob("*") if path.is_file()]
    assert not any(b"secret" in content for content in cached)


class TestBadData:
    def test_windows_of_a_lost_shard_become_padding(
        self, web: WebServer, options: RemoteOptions, expected: Batches
    ) -> None:
        web.always["train-00003.tar"] = ("status", 404)
        skip = BadDataPolicy("skip", max_bad_windows=100)
        found = batches(web.url, options, policy=skip)
        skipped = torch.stack([batch.pop("skipped") for batch in found[:50]])
        assert 0 < int(skipped.sum()) < skipped.numel()
        for got, should, lost in zip(found, expected, skipped, strict=False):
            assert got["num_targets"] == should["num_targets"]  # the loss of the others keeps its weight
            assert torch.equal(got["input_ids"][lost == 0], should["input_ids"][lost == 0])
            assert (got["labels"][lost == 1] == -100).all()
            assert (got["segment_ids"][lost == 1] == 0).all()

    def test_too_many_end_the_run(self, local: Manifest, web: WebServer, options: RemoteOptions) -> None:
        web.always["train-00003.tar"] = ("status", 404)
        data = module(web.url, options, policy=BadDataPolicy("skip", max_bad_windows=2))
        loader, cpu = data.train_dataloader(), torch.device("cpu")
        moved = (data.transfer_batch_to_device(batch, cpu, 0) for batch in loader)
        with pytest.raises(UserError, match=r"3 windows could not be read .* than data.max_bad_windows 2"):
            assert all("skipped" not in batch for batch in moved)
        assert data.bad_windows == 3

    def test_a_folder_with_a_lost_shard(
        self, local: Manifest, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        import shutil

        shutil.copytree(local.folder, tmp_path / "set")
        (tmp_path / "set" / "train-00003.tar").unlink()
        with pytest.raises(UserError, match=r"train-00003.tar: no such file"):
            module(tmp_path / "set")
        data = module(tmp_path / "set", verify="sha256", policy=BadDataPolicy("skip"))
        found = list(islice(data.train_dataloader(), 50))
        assert 0 < sum(int(batch["skipped"].sum()) for batch in found) < 100
        (tmp_path / "set" / "train.index.npy").unlink()  # which everything depends on
        with pytest.raises(UserError, match=r"train.index.npy: no such file"):
            module(tmp_path / "set", policy=BadDataPolicy("skip"))


def test_stops_and_resumes_of_other_sizes_read_what_one_process_reads(
    web: WebServer, tmp_path: Path, expected: Batches
) -> None:
    """Three starts, on one, two and four ranks, from a cache that holds three shards."""
    ids = torch.cat([batch["input_ids"] for batch in expected[:48]])  # 24 steps of 4 samples
    small = quick(tmp_path, size=100_000)
    found, state = [], None
    for ranks, steps in ((1, 5), (2, 7), (4, 12)):
        parts = []
        for rank in range(ranks):
            data = ShardDataModule(web.url, 64, 4 // ranks, 256, remote=small, prefetch_shards=2)
            data._place = lambda rank=rank, ranks=ranks: (rank, ranks)  # type: ignore[method-assign]
            if state is not None:
                data.load_state_dict(state)
            parts.append([batch["input_ids"] for batch in islice(data.train_dataloader(), steps)])
        found += [part[step] for step in range(steps) for part in parts]
        for _ in range(steps):
            data.advance()
        state = data.state_dict()
    assert torch.equal(torch.cat(found), ids)
