"""Sets in a real S3 server (moto) read through s3fs: credentials, buckets, broken transfers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from dualroute.data.manifest import Manifest
from dualroute.data.reader import ShardReader
from dualroute.data.remote.config import RemoteOptions
from dualroute.data.remote.mirror import UnusableData
from dualroute.errors import UserError
from tests.data.remote.conftest import quick
from tests.data.remote.test_http import batches, module, same

moto = pytest.importorskip("moto.server", reason="moto is not installed: pip install -e '.[dev]'")
pytest.importorskip("s3fs", reason="s3fs is not installed: pip install -e '.[remote]'")


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(endpoint: str, local: Manifest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of the set."""
    import boto3
    import fsspec

    for key, value in {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(key, value)
    client = boto3.client("s3", endpoint_url=endpoint)
    client.create_bucket(Bucket="books")
    for path in local.folder.iterdir():
        client.upload_file(str(path), "books", f"sets/mine/{path.name}")
    fsspec.get_filesystem_class("s3").clear_instance_cache()  # which remembers credentials
    return "s3://books/sets/mine"


def test_the_batches_are_those_of_the_folder(s3: str, local: Manifest, options: RemoteOptions) -> None:
    expected = batches(local.folder)
    assert same(batches(s3, options, num_workers=2), expected)
    assert same(batches(s3, options), expected)


def test_a_broken_range_is_asked_for_again(
    s3: str, local: Manifest, options: RemoteOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    asked: list[tuple[int, int]] = []
    real = s3fs.S3FileSystem.cat_file

    def breaks(self: Any, path: str, start: int, end: int) -> Any:
        if path.endswith(".tar"):
            asked.append((start, end))
            if len(asked) == 2:
                raise ConnectionResetError("reset by peer")
            if len(asked) == 3:
                return real(self, path, start=start, end=end)[:-1]  # less than was asked for
        return real(self, path, start=start, end=end)

    monkeypatch.setattr(s3fs.S3FileSystem, "cat_file", breaks)
    monkeypatch.setattr("dualroute.data.remote.stores._RANGE_BYTES", 8192)
    assert ShardReader(Manifest.load(s3, options), "train").read(0, 0, 10).tolist() == list(range(10))
    assert [start for start, _ in asked] == [0, 8192, 8192, 8192, 16384]


def test_a_file_that_is_replaced_in_mid_transfer_is_begun_anew(
    s3: str, endpoint: str, local: Manifest, options: RemoteOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    import boto3
    import s3fs

    real, begun = s3fs.S3FileSystem.cat_file, []

    def replaced(self: Any, path: str, start: int, end: int) -> Any:
        if path.endswith(".tar"):
            begun.append(start)
            if len(begun) == 1:
                data = real(self, path, start=start, end=end)
                other = (local.folder / "train-00001.tar").read_bytes()[: end - start]
                assert data != other
                return other  # the first part of another version
            if len(begun) == 2:
                client = boto3.client("s3", endpoint_url=endpoint)
                body = (local.folder / "train-00000.tar").read_bytes()
                client.put_object(Bucket="books", Key="sets/mine/train-00000.tar", Body=body + b"\0")
                client.put_object(Bucket="books", Key="sets/mine/train-00000.tar", Body=body)
                raise ConnectionResetError
        return real(self, path, start=start, end=end)

    monkeypatch.setattr(s3fs.S3FileSystem, "cat_file", replaced)
    monkeypatch.setattr("dualroute.data.remote.stores._RANGE_BYTES", 8192)
    assert ShardReader(Manifest.load(s3, options), "train").read(0, 0, 10).tolist() == list(range(10))
    assert begun.count(0) == 2  # what was joined of two versions was found by its sha256


@pytest.mark.parametrize(
    ("address", "line"),
    [
        ("s3://nobody/sets/mine", r"no such file, bucket or folder"),
        ("s3://books/sets/other", r"sets/other/manifest.json: there is no such file"),
        ("s3://x/y", r"manifest.json: "),
        ("s3x://books/sets", r"Protocol not known: s3x"),
        ("pipe:cat file", r"the command must hold \{\}"),
    ],
)
def test_addresses_that_are_wrong(s3: str, options: RemoteOptions, address: str, line: str) -> None:
    with pytest.raises(UserError, match=line) as error:
        Manifest.load(address, options)
    assert "\n" not in str(error.value)


def test_wrong_and_missing_credentials(
    s3: str, endpoint: str, options: RemoteOptions, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import fsspec
    import requests

    def refused(match: str) -> None:
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        with pytest.raises(UserError, match=match) as error:
            Manifest.load(s3, options)
        assert "check the store's credentials" in str(error.value)

    requests.post(f"{endpoint}/moto-api/reset-auth", data="0", timeout=10)  # from now on it looks at them
    try:
        refused("access is refused")
        for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(key)
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        refused("access is refused")
    finally:
        requests.post(f"{endpoint}/moto-api/reset-auth", data="inf", timeout=10)


def test_a_shard_that_vanishes_in_mid_run(s3: str, endpoint: str, tmp_path: Path) -> None:
    import boto3

    data = module(s3, quick(tmp_path), prefetch_shards=0)
    loader = iter(data.train_dataloader())
    next(loader)
    client = boto3.client("s3", endpoint_url=endpoint)
    for number in range(7):
        client.delete_object(Bucket="books", Key=f"sets/mine/train-{number:05d}.tar")
    with pytest.raises(UnusableData, match=r"s3://books/sets/mine/train-0000\d.tar: there is no such file"):
        list(islice(loader, 60))


@pytest.mark.parametrize(
    "command", ["cat {folder}/{{}}", "cat {folder}/{{}} && true", "dd if={folder}/{{}} bs=1000"]
)
def test_a_command(local: Manifest, options: RemoteOptions, command: str) -> None:
    address = "pipe:" + command.format(folder=local.folder)
    assert same(batches(address, options, 20), batches(local.folder, count=20))


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("echo {} >&2; exit 3", r"the command ends with status 3; check the connection"),
        ("sleep 30; echo {}", r"no answer within 0.3 s"),
        ("head -c 100000000 /dev/zero; echo {}", r"writes more than the 67,108,864 bytes allowed"),
        ("no-such-program {}", r"the command ends with status 127"),
    ],
)
def test_a_command_that_fails(tmp_path: Path, command: str, line: str) -> None:
    options = quick(tmp_path, timeout=0.3 if "sleep" in command else 20.0, retries=1)
    with pytest.raises(UserError, match=line):
        Manifest.load(f"pipe:{command}", options)


def test_a_url_of_fsspec(local: Manifest, options: RemoteOptions) -> None:
    address = f"file://{local.folder}"
    assert same(batches(address, options, 20), batches(local.folder, count=20))
    assert os.listdir(options.cache_dir)
