"""How long training stands still for a checkpoint, waiting for its write or going on meanwhile.

    python benchmarks/training/checkpoint.py --data data/stdlib --preset 5m --checkpoints 9

One process trains, publishing a checkpoint after every few steps; what is timed is the callback inside the
training loop, from its start to its return. With checkpoint.asynchronous this holds the copy to the memory of
the host and, where steps are quick, the wait for the write before; that is why the time of the steps
stands beside it. Medians over the checkpoints of a run, the first left out; runs take turns.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch

from dualroute.cli import parse_stage
from dualroute.model.checkpoint.format import find_checkpoint
from dualroute.training.checkpointing.publishing.publisher import CheckpointPublisher
from dualroute.training.run import run_pretraining

sys.path.insert(0, str(Path(__file__).parents[1]))  # where measure.py is
from measure import prepare, show

PRESETS = Path(__file__).parents[2] / "configs" / "model"


def stalls(arguments: list[str], asynchronous: bool) -> tuple[list[float], list[float], int]:
    """Seconds of each checkpoint, seconds between checkpoints, and bytes of the last one."""
    taken: list[float] = []
    begins: list[float] = []
    publish = CheckpointPublisher.publish

    def timed(self, trainer, module):
        new = trainer.global_step != self._published
        begins.append(time.perf_counter())
        publish(self, trainer, module)
        if new:
            taken.append(time.perf_counter() - begins[-1])

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(CheckpointPublisher, "publish", timed):
        more = ["--output", folder, "--checkpoint.asynchronous", str(asynchronous).lower()]
        run_pretraining(parse_stage("pretrain", [*arguments, *more]))
        files = find_checkpoint(folder).metadata["files"].values()
        size = sum(file["size"] for file in files)
    between = [b - a - t for a, b, t in zip(begins, begins[1:], taken, strict=False)]
    return taken[1:], between[1:], size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of shards made by dualroute prepare")
    parser.add_argument("--preset", default="5m", help="a file of configs/model")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--every_steps", type=int, default=2, help="steps between checkpoints")
    parser.add_argument("--checkpoints", type=int, default=9, help="of each run")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each kind")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--output", type=Path, help="folder for the CSV")
    options = parser.parse_args()
    prepare(options.threads, "cuda" if torch.cuda.is_available() else "cpu")
    steps, tokens = options.every_steps * options.checkpoints, 2 * options.context
    arguments = [
        *("--model", str(PRESETS / f"{options.preset}.yaml"), "--data.path", str(options.data)),
        *("--data.context", str(options.context), "--data.val_tokens", str(tokens)),
        *("--train.micro_batch", "2", "--train.tokens_per_batch", str(tokens)),
        *("--train.max_steps", str(steps), "--train.val_every_steps", str(10 * steps)),
        *("--optim.warmup_steps", "1", "--checkpoint.every_steps", str(options.every_steps)),
        *("--monitor.sample_every_steps", str(10 * steps)),
    ]
    found: dict[bool, tuple[list[float], list[float]]] = {False: ([], []), True: ([], [])}
    size = 0
    for _ in range(options.repeats):
        for asynchronous in found:
            taken, between, size = stalls(arguments, asynchronous)
            found[asynchronous][0].extend(taken)
            found[asynchronous][1].extend(between)
    rows = [
        {
            "asynchronous": str(asynchronous).lower(),
            "stall ms": f"{1000 * statistics.median(taken):.1f}",
            "longest ms": f"{1000 * max(taken):.1f}",
            "steps between ms": f"{1000 * statistics.median(between):.1f}",
            "checkpoint MiB": f"{size / 2**20:.1f}",
        }
        for asynchronous, (taken, between) in found.items()
    ]
    title = f"{options.preset}, a checkpoint after every {options.every_steps} steps, one process"
    show(title, rows, options.output, "checkpoint")


if __name__ == "__main__":
    main()
