"""A data set of seven small shards, and servers that have it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dualroute.data.manifest import Manifest
from dualroute.data.remote.config import GIB, RemoteOptions
from tests.data.remote.web_server import WebServer
from tests.data.shards import numbered, write_dataset

LENGTHS = [
    2000,
    700,
    1,
    4100,
    900,
    30,
    2600,
    1700,
    64,
    5000,
    3,
    800,
    1200,
    900,
    2500,
    77,
    640,
    333,
    2100,
    900,
]


@pytest.fixture(scope="session")
def local(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """The set as a folder; read only."""
    folder = tmp_path_factory.mktemp("remote") / "set"
    return write_dataset(folder, numbered(LENGTHS), numbered([900, 700, 1100]), documents_per_shard=3)


@pytest.fixture
def web(local: Manifest) -> Iterator[WebServer]:
    """The set on an HTTP server."""
    server = WebServer(local.folder)
    thread = threading.Thread(target=lambda: server.serve_forever(0.02), daemon=True)
    thread.start()
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def options(tmp_path: Path) -> RemoteOptions:
    """A cache of this test, and a patience of fractions of a second."""
    return quick(tmp_path / "cache")


def quick(folder: Path, size: int = GIB, **others: Any) -> RemoteOptions:
    """Options with ``size`` bytes of cache that give up soon."""
    settings = {"timeout": 5.0, "retries": 3, "retry_seconds": 0.01, **others}
    return RemoteOptions(str(folder), size / GIB, **settings)
