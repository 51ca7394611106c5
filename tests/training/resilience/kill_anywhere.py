"""Kills a training with SIGKILL again and again, anywhere, and compares it with one that was left alone.

    python -m tests.training.resilience.kill_anywhere --times 50 [--ranks 2 --strategy ddp] [--asynchronous]

Each life of the run is the same command.  It ends by ``kill -9`` of one rank, chosen at random, at one of
three kinds of moments, in turn: some time after the start (loading, the first validation), some steps later,
or while a checkpoint is being written ("next save": one that has another before it).  The other ranks are
left alone: they have to notice by themselves.  At the end every loss that was logged and every weight is
compared with the unbroken run's, for equality.  Exit status 1 if anything differs.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp

import torch
from safetensors.torch import load_file

from dualroute.model.checkpoint.format import WEIGHTS, find_checkpoint, list_checkpoints
from dualroute.training.monitoring.metrics_log import read_metrics
from dualroute.training.resilience.heartbeat import read_beat
from tests import warm
from tests.training.resilience.ranks import finish, start

MOMENTS = ("step", "save", "start")


@dataclass
class Kill:
    """One death: which moment was waited for, what the rank was doing, what the others did."""

    moment: str
    rank: int
    step: int
    phase: str
    half_written: bool
    newest: int
    statuses: list[int]

    def row(self, number: int) -> str:
        return (
            f"{number:>4}  {self.moment:<6} {self.rank:>4} {self.step:>6}  {self.phase:<15} "
            f"{'yes' if self.half_written else 'no':<13} {self.newest:>7}   "
            f"{' '.join(map(str, self.statuses))}"
        )


HEADER = "kill  moment rank   step  phase           half-written  newest   exit statuses"


class Moment:
    """Waits for a moment of a life."""

    def __init__(self, kind: str, run: Path, draw: random.Random, typical_start: float) -> None:
        self.kind, self.run, self.draw = kind, run, draw
        self.typical_start = typical_start

    def wait(self, processes: list[warm.Started]) -> bool:
        """False when the run ended before."""
        began, first, old = time.monotonic(), logged(self.run), writing(self.run)
        steps, delay = self.draw.randint(1, 9), self.draw.uniform(0, 0.05)
        start = self.draw.uniform(0.2, self.typical_start)
        while all(process.poll() is None for process in processes):
            started = logged(self.run) not in range(first - 20, first + 1)  # a warm start is a quick one
            if self.kind == "start" and (started or time.monotonic() - began > start):
                return True
            # lines past the checkpoint are dropped on resume, so a smaller number is news as well
            if self.kind == "step" and logged(self.run) not in range(first - 20, first + steps):
                return True
            if self.kind == "next save" and not newest(self.run):
                old = writing(self.run)
            elif self.kind.endswith("save") and writing(self.run) - old:
                time.sleep(delay)
                stand_still(processes)
                if writing(self.run) - old:
                    return True
                go_on(processes)  # it was published meanwhile: the next one, and sooner
                delay /= 2
            time.sleep(0.002)
        return False


def stand_still(processes: list[warm.Started]) -> None:
    """Stop processes where they are, and wait until they have stopped, so that what is seen next stays so."""
    for process in processes:
        process.send_signal(signal.SIGSTOP)
    for process in processes:
        with contextlib.suppress(FileNotFoundError):  # ended
            while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] not in "TZ":
                time.sleep(0.001)


def go_on(processes: list[warm.Started]) -> None:
    for process in processes:
        process.send_signal(signal.SIGCONT)


def logged(run: Path) -> int:
    path = run / "metrics.jsonl"
    return max((line["step"] for line in read_metrics(path, "train")), default=0) if path.exists() else 0


def writing(run: Path) -> set[tuple[str, int]]:
    """Hidden folders of checkpoints that are not finished, each with the time of its last change."""
    found = set()
    for path in (run / "checkpoints").glob(".writing-*"):
        with contextlib.suppress(FileNotFoundError):  # published this very moment
            found.add((path.name, path.stat().st_ctime_ns))
    return found


def newest(run: Path) -> int:
    folder = run / "checkpoints"
    finished = list_checkpoints(folder) if folder.is_dir() else []
    return finished[-1].step if finished else 0


def kill_once(
    dataset: Path, run: Path, steps: int, moment: Moment, ranks: int, more: tuple[str, ...]
) -> Kill | None:
    """One life and its end; None when the run finished before the moment came.

    Raises:
        RuntimeError: A rank ended by itself before anything was done to it.
    """
    processes = start(dataset, run, steps, *more, ranks=ranks)
    came = moment.wait(processes)
    rank = moment.draw.randrange(ranks)
    if came:
        processes[rank].kill()
        go_on(processes)
    torn = bool(writing(run))
    results = finish(processes, timeout=200)
    statuses = [status for status, _ in results]
    if not came:
        if any(statuses):
            raise RuntimeError(f"the run failed by itself, {statuses}: {results[0][1][-2000:]}")
        return None
    beat = read_beat(run, rank)
    of_this_life = beat is not None and beat.pid == processes[rank].pid
    step, phase = (beat.step, beat.phase) if beat is not None and of_this_life else (0, "before it beat")
    return Kill(moment.kind, rank, step, phase, torn, newest(run), statuses)


def compare(run: Path, unbroken: Path) -> list[str]:
    """What differs between two finished runs; empty when they are the same."""
    problems = []
    for event, tag in (("train", "train/loss"), ("validation", "val/loss")):
        lines = [read_metrics(folder / "metrics.jsonl", event) for folder in (run, unbroken)]
        steps = [[line["step"] for line in of_run] for of_run in lines]
        if steps[0] != steps[1]:
            problems.append(f"{event}: the runs logged different steps")
            continue
        differing = [a["step"] for a, b in zip(*lines, strict=True) if a[tag] != b[tag]]
        if differing:
            problems.append(f"{tag} differs in {len(differing)} steps, first in step {differing[0]}")
    ours, theirs = (load_file(find_checkpoint(folder).folder / WEIGHTS) for folder in (run, unbroken))
    unequal = [name for name in theirs if not torch.equal(ours[name], theirs[name])]
    if unequal:
        problems.append(f"weights differ: {', '.join(unequal[:5])}")
    if writing(run):
        problems.append("a half-written checkpoint was left behind")
    return problems


def campaign(
    dataset: Path,
    folder: Path,
    times: int,
    steps: int,
    *,
    ranks: int = 1,
    strategy: str = "auto",
    seed: int = 0,
    more: tuple[str, ...] = (),
    moments: tuple[str, ...] = MOMENTS,
) -> tuple[list[Kill], list[str]]:
    """Kill a run ``times`` times, let it finish, and compare; also prints a table."""
    draw = random.Random(seed)
    more = ("--parallel.strategy", strategy, *more)
    began = time.monotonic()
    processes = start(dataset, folder / "unbroken", steps, *more, ranks=ranks)
    while logged(folder / "unbroken") == 0 and all(process.poll() is None for process in processes):
        time.sleep(0.01)
    typical_start = min(time.monotonic() - began, 15.0)  # until the first step is done
    (unbroken, _), *_ = finish(processes, timeout=500)
    if unbroken != 0:
        raise RuntimeError("the unbroken run failed")
    kills: list[Kill] = []
    run = folder / "killed"
    print(HEADER, flush=True)
    while len(kills) < times:
        moment = Moment(moments[len(kills) % len(moments)], run, draw, typical_start)
        kill = kill_once(dataset, run, steps, moment, ranks, more)
        if kill is None:
            print(f"the run was finished after {len(kills)} kills: give it more --steps", flush=True)
            break
        kills.append(kill)
        print(kill.row(len(kills)), flush=True)
    results = finish(start(dataset, run, steps, *more, ranks=ranks), timeout=500)
    if any(status for status, _ in results):
        return kills, [f"the last life failed: {results[0][1][-2000:]}"]
    return kills, compare(run, folder / "unbroken")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--steps", type=int, help="of the run; default: 8 for each kill")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--asynchronous", action="store_true", help="write checkpoints in a thread")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="for data and runs; default: a new temporary one")
    given = parser.parse_args()
    folder = Path(given.folder or mkdtemp(prefix="kill-anywhere-"))
    kills, problems = campaign(
        prepared(folder), folder, given.times, given.steps or 8 * given.times,
        ranks=given.ranks, strategy=given.strategy, seed=given.seed,
        more=("--checkpoint.asynchronous", str(given.asynchronous)),
    )  # fmt: skip
    in_saves = sum(kill.half_written for kill in kills)
    print(f"{len(kills)} kills, {in_saves} of them left a half-written checkpoint; runs are in {folder}")
    for problem in problems:
        print(f"DIFFERENT: {problem}")
    if not problems:
        print("every logged loss and every weight is equal to the unbroken run's")
    return 1 if problems or len(kills) < given.times else 0


def prepared(folder: Path) -> Path:
    """A small data set in ``folder``, made where it is missing."""
    from data_prep.prepare import PrepareConfig, prepare
    from tests.conftest import write_corpus

    if not (folder / "shards").exists():
        write_corpus(folder / "corpus")
        prepare(
            PrepareConfig(
                corpus=str(folder / "corpus"), output=str(folder / "shards"), vocab_size=320,
                reserved_tokens=0, val_fraction=0.1, progress=False,
            )
        )  # fmt: skip
    return folder / "shards"


if __name__ == "__main__":
    sys.exit(main())
