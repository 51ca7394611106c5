"""Peak memory as `dualroute estimate` predicts it, of whole trainings."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from data_prep.prepare import PrepareConfig, prepare
from tests.benchmarks.scripts import load
from tests.conftest import write_corpus

#: On processors without its arithmetic a step of bfloat16 takes minutes; adapters take more than is counted.
RUNS = [
    *(
        "5m",
        "5m, 8 texts",
        "5m, routed, long",
        "5m, full",
        "5m, full, every second layer",
        "5m, feed_forward",
    ),
    *("5m, dense", "5m, gate and qk_norm", "5m, lower half frozen", "5m, accumulation 2"),
    "wide, few tokens",
]


@pytest.fixture(scope="module")
def memory() -> ModuleType:
    return load("training/memory.py")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A validation side of more than 4,096 tokens."""
    folder = tmp_path_factory.mktemp("memory")
    write_corpus(folder / "corpus", documents=300)
    config = {"corpus": str(folder / "corpus"), "output": str(folder / "shards"), "progress": False}
    prepare(PrepareConfig(**config, vocab_size=320, reserved_tokens=0, val_fraction=0.2))
    return folder / "shards"


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize("name", RUNS)
def test_the_peak_is_predicted_within_a_tenth(
    name: str, memory: ModuleType, shards: Path, tmp_path: Path
) -> None:
    found = memory.run(name, shards, tmp_path)
    assert found["predicted/peak_gib"] == pytest.approx(found["measured/peak_gib"], rel=0.1)
