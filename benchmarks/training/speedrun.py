"""Held-out bits per byte against tokens and CPU seconds, for named recipes on the same tokens.

    dualroute prepare --config configs/prepare/books.yaml --corpus /path/to/books.tar.xz --vocab_size 2048 \\
        --output data/books_2k
    python benchmarks/training/speedrun.py --data data/books_2k --recipes adamw muon --tokens 1500000

Each recipe is an ordinary `dualroute pretrain` of the configuration in OUTPUT/RECIPE-sSEED, a process of its
own, seed by seed in turns; one that is finished is not run again. Seconds are those that the process computed
in training steps (all its threads, validations left out), so a machine that others use too serves; the clock
on the wall is told beside. Of several seeds the table has medians and the worst. `--more "NAME=options of
dualroute pretrain"` adds a recipe.
"""

from __future__ import annotations

import argparse
import json
import resource
import shlex
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

from dualroute.training.monitoring.metrics_log import read_metrics

sys.path.insert(0, str(Path(__file__).parents[1]))  # where measure.py is
from measure import show

_MUON = "--optim.name muon --optim.muon.lr 0.01"
_COSINE = "--optim.schedule cosine --optim.min_lr_ratio 0.1"
_TO_ZERO = "--optim.schedule wsd --optim.decay_fraction 0.4 --optim.decay_shape linear --optim.min_lr_ratio 0"
RECIPES = {
    "adamw": f"--optim.name adamw {_COSINE}",
    "muon": f"{_MUON} {_COSINE}",
    "adamw, wsd to zero": f"--optim.name adamw {_TO_ZERO}",
    "muon, wsd to zero": f"{_MUON} {_TO_ZERO}",
    "muon, qk_norm": f"{_MUON} {_COSINE} --model.qk_norm true",
    "muon, untied": f"{_MUON} {_COSINE} --model.tie_embeddings false",
    "muon, embedding 3x": f"{_MUON} {_COSINE} --optim.embedding_lr 0.009",
}
CLOCK = "clock.json"


def folder_of(output: Path, recipe: str, seed: int) -> Path:
    """Run folder of a recipe and seed."""
    words = "".join(character if character.isalnum() else " " for character in recipe).split()
    return output / f"{'_'.join(words)}-s{seed}"


def train_one(folder: Path, words: list[str]) -> int:
    """One training in this process; what it took stands in CLOCK of its folder."""
    from dualroute.cli import main as dualroute
    from dualroute.training.step.module import Pretrain

    seconds: dict[int, tuple[float, float]] = {}  # by step: of this process, on the wall
    begun: list[tuple[float, float]] = []
    start, finish = Pretrain.on_train_batch_start, Pretrain.finish_step

    def now() -> tuple[float, float]:
        return time.process_time(), time.perf_counter()

    def on_train_batch_start(self: Pretrain, batch: Any, batch_idx: int) -> int | None:
        if self.at_first_micro_batch:
            begun[:] = [now()]
        return start(self, batch, batch_idx)

    def finish_step(self: Pretrain) -> None:
        before = seconds.get(self.trainer.global_step - 1, (0.0, 0.0))
        seconds[self.trainer.global_step] = tuple(  # type: ignore[assignment]
            done + end - begin for done, end, begin in zip(before, now(), begun[0], strict=True)
        )
        finish(self)

    with (
        mock.patch.object(Pretrain, "on_train_batch_start", on_train_batch_start),
        mock.patch.object(Pretrain, "finish_step", finish_step),
    ):
        status = dualroute(["pretrain", *words])
    if not status:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        (folder / CLOCK).write_text(json.dumps({"seconds": seconds, "peak_mib": peak}))
    return status


def train(options: argparse.Namespace, recipe: str, seed: int) -> None:
    """Run one recipe, unless it is finished."""
    folder = folder_of(options.output, recipe, seed)
    if (folder / CLOCK).exists():
        return
    words = ["--config", str(options.config), "--data.path", str(options.data), "--output", str(folder)]
    words += ["--seed", str(seed), "--train.max_steps", "null", "--train.max_tokens", str(options.tokens)]
    words += [
        "--resume",
        "never",
        "--monitor.sample_every_steps",
        "0",
        *shlex.split(options.recipes_by_name[recipe]),
    ]
    words += ["--train.val_every_steps", str(options.val_every_steps)]
    words += ["--data.val_tokens", str(options.val_tokens), "--monitor.log_every_steps", "10", *options.extra]
    subprocess.run([sys.executable, __file__, "--one", str(folder), *words], check=True)


def curve(folder: Path) -> list[dict[str, float]]:
    """After each validation: step, tokens, seconds of the steps so far, bits per byte."""
    seconds = json.loads((folder / CLOCK).read_text())["seconds"]
    rows = read_metrics(folder / "metrics.jsonl", "validation")
    tokens = {row["step"]: row["train/tokens"] for row in read_metrics(folder / "metrics.jsonl", "train")}
    return [
        {
            "step": row["step"],
            "tokens": tokens.get(row["step"], 0),
            "cpu seconds": seconds[str(row["step"])][0] if row["step"] else 0.0,
            "wall seconds": seconds[str(row["step"])][1] if row["step"] else 0.0,
            "bits per byte": row["val/bits_per_byte"],
        }
        for row in rows
    ]


def reached(points: list[dict[str, float]], value: float, key: str) -> float | None:
    """``key`` where the curve first is at ``value`` bits per byte, also between validations; null: never."""
    for before, after in pairwise(points):
        if after["bits per byte"] <= value:
            fall = before["bits per byte"] - after["bits per byte"]
            share = (before["bits per byte"] - value) / fall if fall > 0 else 1.0
            return before[key] + share * (after[key] - before[key])
    return None


def table(curves: dict[str, list[list[dict[str, float]]]], peaks: dict[str, float]) -> list[dict[str, str]]:
    """A row for each recipe; the first one is what the others are compared with, seed by seed."""
    rows = []
    reference = next(iter(curves.values()))
    for recipe, of_seeds in curves.items():
        final = [points[-1]["bits per byte"] for points in of_seeds]
        row: dict[str, str] = {
            "recipe": recipe,
            "bits per byte": f"{statistics.median(final):.4f}",
            "worst": f"{max(final):.4f}",
            "CPU s": f"{statistics.median(points[-1]['cpu seconds'] for points in of_seeds):.0f}",
            "wall s": f"{statistics.median(points[-1]['wall seconds'] for points in of_seeds):.0f}",
            "peak MiB": f"{peaks[recipe]:.0f}",
        }
        for key, name in (("tokens", "tokens"), ("cpu seconds", "CPU s")):
            shares = [
                None
                if (at := reached(points, theirs[-1]["bits per byte"], key)) is None
                else at / theirs[-1][key]
                for points, theirs in zip(of_seeds, reference, strict=True)
            ]
            known = [share for share in shares if share is not None]
            shown = f"{statistics.median(known):.2f}" if len(known) == len(shares) else "not reached"
            row[f"{name} to the first's end"] = shown
        rows.append(row)
    return rows


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        sys.exit(train_one(Path(sys.argv[2]), sys.argv[3:]))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=Path("configs/pretrain/quickstart.yaml"))
    parser.add_argument("--data", type=Path, default=Path("data/books_2k"))
    parser.add_argument("--output", type=Path, default=Path("runs/speedrun"))
    parser.add_argument("--tokens", type=int, default=1_500_000)
    parser.add_argument("--val_every_steps", type=int, default=50)
    parser.add_argument("--val_tokens", type=int, default=65536, help="held-out tokens of a validation")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--recipes", nargs="+", default=["adamw", "muon"], help=f"of {', '.join(RECIPES)}")
    parser.add_argument("--more", nargs="*", default=[], metavar="NAME=OPTIONS", help="recipes of your own")
    parser.add_argument("--extra", nargs=argparse.REMAINDER, default=[], help="more options for all of them")
    options = parser.parse_args()
    own = dict(recipe.split("=", 1) for recipe in options.more if "=" in recipe)
    if bad := [recipe for recipe in options.more if "=" not in recipe]:
        parser.error(f"--more {bad[0]!r}: give NAME=OPTIONS")
    options.recipes_by_name = {**RECIPES, **own}
    names = [*options.recipes, *own]
    if unknown := [name for name in names if name not in options.recipes_by_name]:
        parser.error(f"--recipes {unknown[0]!r}: there are {', '.join(RECIPES)}")
    for seed in options.seeds:
        for recipe in names:
            train(options, recipe, seed)
    curves = {
        name: [curve(folder_of(options.output, name, seed)) for seed in options.seeds] for name in names
    }
    peaks = {
        name: max(
            json.loads((folder_of(options.output, name, seed) / CLOCK).read_text())["peak_mib"]
            for seed in options.seeds
        )
        for name in names
    }
    points = [
        {
            "recipe": name,
            "seed": str(seed),
            **{key: f"{value:.4f}".rstrip("0").rstrip(".") for key, value in point.items()},
        }
        for name, of_seeds in curves.items()
        for seed, of_seed in zip(options.seeds, of_seeds, strict=True)
        for point in of_seed
    ]
    show("held-out bits per byte by tokens", points, options.output, "speedrun_curves")
    title = f"{options.tokens:,} tokens, {len(options.seeds)} seed(s)"
    show(title, table(curves, peaks), options.output, "speedrun")


if __name__ == "__main__":
    main()
