"""How far the losses of many ranks lie from those of one, by ZeRO stage, accumulation, clip and precision.

    python benchmarks/training/loss_agreement.py

The truth is a loop in plain torch that takes whole batches in one process (that of tests/training, whose tiny
classifier is trained here for 40 steps with AdamW). A figure is the largest difference of a loss in any step.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # where measure.py is
sys.path.insert(0, str(Path(__file__).parents[2]))  # the tests are no package that is installed
from measure import show

from tests.training.parallel.test_strategy import WAYS, launch, plain_torch

COLUMNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation 2": {"accumulation": 2},
    "clip 0.5": {"clip": 0.5},
    "both": {"accumulation": 2, "clip": 0.5},
    "bf16-mixed, both": {"accumulation": 2, "clip": 0.5, "precision": "bf16-mixed"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--output", type=Path, help="folder for the CSV")
    options = parser.parse_args()
    truth = {
        clip: plain_torch(steps=options.steps, clip=clip)["losses"]
        for clip in {column.get("clip") for column in COLUMNS.values()}
    }
    rows = []
    for ranks in options.ranks:
        cases = [
            {**way, **column, "steps": options.steps}
            for way, column in itertools.product(WAYS.values(), COLUMNS.values())
        ]
        with tempfile.TemporaryDirectory() as folder:
            results = launch(ranks, Path(folder), cases)
        found = iter(results)
        for name in WAYS:
            row = {"ranks": str(ranks), "strategy": name}
            for column, settings in COLUMNS.items():
                pairs = zip(next(found)["losses"], truth[settings.get("clip")], strict=True)
                row[column] = f"{max(abs(ours - theirs) for ours, theirs in pairs):.1e}"
            rows.append(row)
    show(f"largest difference of a loss in {options.steps} steps", rows, options.output, "loss_agreement")


if __name__ == "__main__":
    main()
