"""What several folders of tests share: a small prepared data set and the real data, where there is any."""

import os
import random
from pathlib import Path
from typing import Any

import pytest

from dualroute import threads
from dualroute.log import to_terminal

threads.prepare()  # before any test loads torch
ROOT = Path(__file__).resolve().parents[1]
pytest_plugins = ["tests.budget"]
to_terminal()  # as the command line does, for tests that call what it calls
#: Files and folders that share something costly: with several workers, one of them runs all of a group.
GROUPS = {
    "tests/slurm": "slurm",
    "tests/training/checkpointing/state": "elastic",
    "tests/training/checkpointing/test_commands.py": "elastic",
}
WORDS = [
    "the", "old", "red", "small", "river", "stone", "bird", "house", "sees", "finds", "leaves", "under",
    "over", "with", "a", "green", "hill", "and", "then", "sleeps",
]  # fmt: skip


def write_corpus(folder: Path, documents: int = 60, seed: int = 0) -> Path:
    """Sentences of a tiny grammar: learnable within a few steps, of every length."""
    draw = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(documents):
        sentences = [
            " ".join(draw.choices(WORDS, k=draw.randint(4, 12))).capitalize() + "."
            for _ in range(draw.randint(3, 60))
        ]
        (folder / f"text-{number:03d}.txt").write_text("\n".join(sentences) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of `write_corpus`, about 15,000 tokens; read only."""
    from data_prep.prepare import PrepareConfig, prepare

    folder = tmp_path_factory.mktemp("tiny")
    write_corpus(folder / "corpus")
    prepare(
        PrepareConfig(
            corpus=str(folder / "corpus"),
            output=str(folder / "shards"),
            vocab_size=320,
            reserved_tokens=0,
            val_fraction=0.1,
            progress=False,
        )
    )
    return folder / "shards"


def smallest_model(vocab_size: int, max_context: int) -> Any:
    """One untrained layer of width 16, always the same."""
    import torch

    from dualroute.model import DualRoutingTransformer, ModelConfig

    torch.manual_seed(0)
    shape = {"dim": 16, "num_layers": 1, "num_heads": 2, "window": 8, "block": 16}
    return DualRoutingTransformer(ModelConfig(vocab_size=vocab_size, max_context=max_context, **shape)).eval()


@pytest.fixture(params=["cpp", "torch"])
def each_kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The test runs on both kinds of kernels that a CPU has: the C++ ones and plain torch."""
    monkeypatch.setenv("DUALROUTE_KERNELS", request.param)
    return request.param


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets, DUALROUTE_DATA or ../shared/data."""
    folder = Path(os.environ.get("DUALROUTE_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} does not exist (set DUALROUTE_DATA)")
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that no worker ends with a long one alone."""
    slow = {_file(item.nodeid) for item in items if item.get_closest_marker("slow")}

    def when(item: pytest.Item) -> int:
        file = _file(item.nodeid)
        return 0 if file.startswith("tests/slurm") else 1 if file in slow else 2  # for Slurm one mostly waits

    items.sort(key=when)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With several workers (pytest -n 3) a file's tests, and those of :data:`GROUPS`, stay together."""
    from xdist.scheduler import LoadScopeScheduling

    class Together(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = _file(nodeid)
            return next((name for path, name in GROUPS.items() if file.startswith(path)), file)

    config.option.loadscopereorder = False  # by number of tests, which says nothing of their time
    return Together(config, log)


def _file(nodeid: str) -> str:
    return nodeid.partition("::")[0]
