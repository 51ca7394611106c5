"""Runs that several files of tests look at."""

import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.training.checkpointing.elastic_runs import LANES, RANKS, launch, leg
from tests.training.checkpointing.runs import KEPT, pretrain


class Elastic(NamedTuple):
    """``folder``/LANE is the run of a lane, ``folder``/unbroken one process without a stop."""

    folder: Path
    printed: list[str]


@pytest.fixture(scope="session")
def elastic(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Elastic:
    """Every lane trained over four legs, on 2, 1, 4 and 2 ranks."""
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("elastic")
    printed = []
    for number, ranks in enumerate(RANKS):
        legs = [leg(tiny_dataset, folder / lane, number, way[number]) for lane, way in LANES.items()]
        if ranks == 1:
            legs.append(leg(tiny_dataset, folder / "unbroken", len(RANKS) - 1, []))
        printed.append(launch(folder, ranks, legs))
    return Elastic(folder, printed)


@pytest.fixture(scope="session")
def trained(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps with checkpoints of steps 4, 8 and 12; the best is that of step 12."""
    output = tmp_path_factory.mktemp("trained") / "run"
    assert pretrain(tiny_dataset, output, 12, *KEPT) == 0
    return output


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of it that may be damaged."""
    return shutil.copytree(trained, tmp_path / "run", symlinks=True)
