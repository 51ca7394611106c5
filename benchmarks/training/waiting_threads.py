"""Tokens per second of a training step on several threads, by how long a thread that waits looks for work.

    python benchmarks/training/waiting_threads.py --threads 2
    python benchmarks/training/waiting_threads.py --threads 2 --busy 4

One process for each setting; they take turns, one step each, so that all meet the same machine. `--busy`
starts processes beside them that compute all the time. Medians. `default` is what the OpenMP library of torch
does by itself, a number is GOMP_SPINCOUNT, `passive` is OMP_WAIT_POLICY=PASSIVE; dualroute's own choice is
`dualroute.threads.SPINS`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from dualroute.threads import WAITING

sys.path.insert(0, str(Path(__file__).parents[1]))  # where measure.py and train_step.py are

SETTINGS = ("default", "passive", "300", "1000", "5000", "30000")
# computes until the process that started it is gone, however that ended
BUSY = "import os\nwhile os.getppid() == {parent}:\n    for _ in range(10**6): pass"


def environment(setting: str, threads: int) -> dict[str, str]:
    """The environment of a process that waits as `setting` says."""
    kept = {name: value for name, value in os.environ.items() if name not in WAITING}
    kept["OMP_NUM_THREADS"] = str(threads)
    if setting == "passive":
        return {**kept, "OMP_WAIT_POLICY": "PASSIVE"}
    return kept if setting == "default" else {**kept, "GOMP_SPINCOUNT": setting}


def work(options: argparse.Namespace) -> None:
    """In a process of its own: for each line of the input one step, and its seconds on a line."""
    import time

    import torch
    from train_step import build, step

    ids = torch.randint(2048, (options.batch, options.context + 1))
    model = build(options.preset, 2048, options.context + 1)
    step(model, ids, bf16=False)
    for _ in sys.stdin:
        begin = time.perf_counter()
        step(model, ids, bf16=False)
        print(time.perf_counter() - begin, flush=True)


@contextlib.contextmanager
def others(count: int) -> Iterator[None]:
    """`count` processes that compute all the time."""
    busy = [subprocess.Popen([sys.executable, "-c", BUSY.format(parent=os.getpid())]) for _ in range(count)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Median seconds of a step by setting."""
    command = [sys.executable, __file__, "--worker", "--preset", options.preset]
    command += ["--batch", str(options.batch), "--context", str(options.context)]
    workers = {
        setting: subprocess.Popen(
            command,
            env=environment(setting, options.threads),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for setting in options.settings
    }
    seconds: dict[str, list[float]] = {setting: [] for setting in workers}
    try:
        for repeat in range(-1, options.repeats):
            with others(options.busy if repeat >= 0 else 0):  # the first round waits for imports
                for setting, worker in workers.items():
                    assert worker.stdin is not None
                    assert worker.stdout is not None
                    worker.stdin.write("step\n")
                    worker.stdin.flush()
                    taken = float(worker.stdout.readline())
                    if repeat >= 0:
                        seconds[setting].append(taken)
    finally:
        for worker in workers.values():
            worker.kill()
            worker.wait()
    return {setting: statistics.median(taken) for setting, taken in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--busy", type=int, default=0, help="processes that compute beside it")
    parser.add_argument("--preset", default="tiny", help="a file of configs/model")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", type=Path, help="folder for the table as CSV")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return work(options)
    from measure import show

    load = f", load {os.getloadavg()[0]:.1f} before it" if hasattr(os, "getloadavg") else ""
    title = f"{options.threads} threads beside {options.busy} busy processes{load}"
    rows = [
        {"setting": setting, "tokens/s": f"{options.batch * options.context / taken:.0f}"}
        for setting, taken in measure(options).items()
    ]
    show(title, rows, options.output, "waiting_threads")


if __name__ == "__main__":
    main()
