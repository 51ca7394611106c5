"""A small corpus, a web server and shortcuts that several tests use."""

from __future__ import annotations

import random
import socket
import threading
from pathlib import Path

import pytest

from data_prep.prepare import PrepareConfig
from tests.data_prep.downloads.web_server import Server

WORDS = [
    "the",
    "of",
    "a",
    "and",
    "to",
    "in",
    "is",
    "it",
    "that",
    "was",
    "for",
    "on",
    "are",
    "with",
    "as",
    "his",
    "they",
    "at",
    "be",
    "this",
    "from",
    "have",
    "or",
    "by",
    "one",
    "had",
    "not",
    "but",
    "what",
    "all",
    "were",
    "when",
    "we",
    "there",
    "can",
    "an",
    "your",
    "which",
    "their",
    "said",
    "if",
    "do",
    "will",
    "each",
    "about",
    "how",
    "up",
    "out",
    "them",
    "then",
    "she",
    "many",
    "some",
    "so",
    "these",
    "would",
    "other",
    "into",
    "has",
    "more",
    "her",
    "two",
    "like",
    "him",
    "see",
    "time",
    "could",
    "no",
    "make",
    "than",
    "first",
    "been",
    "its",
    "who",
    "now",
]


def story(number: int, words: int = 120) -> str:
    """A text that differs from every other number's."""
    draw = random.Random(number)
    lines = [" ".join(draw.choices(WORDS, k=12)) for _ in range(words // 12)]
    return f"Chapter {number}\n\n" + "\n    ".join(lines) + "\n"


def files(folder: str | Path) -> dict[str, bytes]:
    """{name: content} of the files of a data set."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


@pytest.fixture
def corpus(tmp_path):
    """A folder of 60 texts in two levels."""
    folder = tmp_path / "corpus"
    for number in range(60):
        path = folder / f"part{number % 3}" / f"story-{number:03d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(story(number))
    return folder


@pytest.fixture
def config(corpus, tmp_path):
    """Options that make about six shards of ``corpus``: call it with what should differ."""

    def make(**changes) -> PrepareConfig:
        options = {
            "corpus": str(corpus),
            "output": str(tmp_path / "shards"),
            "vocab_size": 400,
            "val_fraction": 0.2,
            "shard_size_mb": 0.006,
            "workers": 1,
            "progress": False,
        }
        return PrepareConfig(**{**options, **changes})

    return make


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def unreachable():
    """A URL that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{probe.getsockname()[1]}/file.bin"  # bound, never listening


@pytest.fixture
def target(tmp_path):
    return tmp_path / "downloads" / "corpus" / "file.bin"
