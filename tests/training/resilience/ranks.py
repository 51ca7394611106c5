"""Ranks of one training started by hand, without a launcher that would end the others when one dies."""

from __future__ import annotations

from pathlib import Path

from tests import warm
from tests.conftest import ROOT
from tests.training.launchers import free_port
from tests.training.step.test_module import SMALL, environment

SCRIPT = str(Path(__file__).with_name("processes") / "faulty_rank.py")
#: seconds: far beyond what a step takes here, far below what a test may last
WATCHED = (
    "--watchdog.limit_minutes 0.15 --watchdog.start_minutes 3 --watchdog.validation_minutes 0.25 "
    "--watchdog.save_minutes 0.15 --watchdog.poll_seconds 0.5 --watchdog.silence_seconds 5 "
    "--monitor.sample_every_steps 0"
).split()


def start(
    dataset: Path,
    output: Path,
    steps: int,
    *more: str,
    fault: tuple[str, int, int] = ("none", 0, 0),
    ranks: int = 2,
) -> list[warm.Started]:
    """``fault`` is (what, which rank, which step) of faulty_rank.py."""
    words = [
        *(*map(str, fault), "pretrain", *SMALL, *WATCHED),
        *("--data.path", str(dataset), "--output", str(output), "--train.max_steps", str(steps), *more),
    ]
    port = free_port()
    started = []
    for rank in range(ranks):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        launched = {name: str(value) for name, value in place.items()} if ranks > 1 else {}
        started.append(warm.Started(SCRIPT, words, cwd=ROOT, env={**environment(), **launched}))
    return started


def finish(processes: list[warm.Started], timeout: float = 280) -> list[tuple[int | None, str]]:
    """Exit status and standard error of each; none is left behind."""
    try:
        errors = [process.communicate(timeout=timeout)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, error) for process, error in zip(processes, errors, strict=True)]
