"""Runs that several files of tests look at."""

from pathlib import Path
from typing import NamedTuple

import pytest

from tests.training.checkpointing.elastic_runs import LANES, RANKS, launch, leg


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
