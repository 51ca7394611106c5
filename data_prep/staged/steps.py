"""A preparation in tasks: our stages as `PipelineStep`s of datatrove, for its executors on one machine or
on Slurm.

Comes in: the same configuration as for one process. Goes out: the same bytes.

    CleanStep      tasks share the lots: read, clean, sign                  (only with options of cleaning)
    CompareStep    tasks share the columns: digests and bands               (only with near_duplicates)
    LearnStep      one task: survey and tokenizer
    TokeniseStep   tasks share the shards
    FinishStep     one task: index files, report, manifest

Every step keeps what is finished as `prepare` does, and `FinishStep` is `prepare`: what a task left undone,
it does. A task that failed is run again by the executor, and goes on from its last part or shard. Each task
of `TokeniseStep` reads all documents and tokenises its own: reading is some fifty times as fast as
tokenising.

datatrove marks finished tasks in its folder of logs; the name of that folder holds the SHA-256 of options
and inputs.
"""

from __future__ import annotations

import os
import sys
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_prep.cleaning.stage import Cleaner
from data_prep.config import PrepareConfig
from data_prep.output_folder import claimed
from data_prep.prepare import Preparation, prepare
from data_prep.staged.pool import Pool
from dualroute.data.manifest import Manifest
from dualroute.errors import UserError

try:
    from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor
    from datatrove.pipeline.base import PipelineStep
except ImportError as missing:
    raise UserError(f"executor needs {missing.name}: pip install -e '.[prepare]'") from missing


class _Step(PipelineStep):
    """One of our stages; it reads and writes the output folder, and hands nothing on.

    Args:
        config: of the whole preparation; in tasks it never starts anew.
    """

    type = "dualroute"

    def __init__(self, config: PrepareConfig) -> None:
        super().__init__()
        self.config = replace(config, executor="none", force=False, progress=False)

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        self.work(rank, world_size)
        yield from data or ()

    @abstractmethod
    def work(self, rank: int, world_size: int) -> None:
        """This task's share."""


class CleanStep(_Step):
    """Every ``world_size``-th lot."""

    name = "clean"

    def work(self, rank: int, world_size: int) -> None:
        staged = Preparation(self.config).staged
        assert staged is not None
        for staging in (*staged.seen, staged):
            lots = staging.lots[rank::world_size]
            if not lots:
                continue
            with Pool(Cleaner(staging.cleaning), 1) as pool:
                for lot in lots:
                    staging.clean_lot(lot, pool)
                    self.stat_update("lots")


class CompareStep(_Step):
    """Every ``world_size``-th column."""

    name = "compare"

    def work(self, rank: int, world_size: int) -> None:
        staged = Preparation(self.config).staged
        assert staged is not None
        for column in range(rank, staged.columns, world_size):
            staged.find_column(column)
            self.stat_update("columns")


class LearnStep(_Step):
    """Survey and tokenizer; one task."""

    name = "learn"

    def work(self, rank: int, world_size: int) -> None:
        if rank == 0:
            with claimed(Path(self.config.output).expanduser()):
                Preparation(self.config).learn()


class TokeniseStep(_Step):
    """Every ``world_size``-th shard of each split."""

    name = "tokenise"

    def work(self, rank: int, world_size: int) -> None:
        preparation = Preparation(replace(self.config, workers=self.config.workers or 1))
        survey = preparation.learn()  # an earlier step's
        shards = preparation.write_shards(
            survey, preparation.tokenizer(), lambda split, number: number % world_size == rank
        )
        self.stat_update("shards", value=sum(map(len, shards.values())))


class FinishStep(_Step):
    """What is left; one task."""

    name = "finish"

    def work(self, rank: int, world_size: int) -> None:
        if rank == 0:
            prepare(self.config)


def steps(config: PrepareConfig) -> list[tuple[_Step, int]]:
    """The steps of a preparation, each with the number of its tasks, in the order in which they depend on
    one another."""
    found: list[tuple[_Step, int]] = []
    if config.is_cleaned:
        found.append((CleanStep(config), config.tasks))
    if config.near_duplicates:
        found.append((CompareStep(config), config.tasks))
    return [*found, (LearnStep(config), 1), (TokeniseStep(config), config.tasks), (FinishStep(config), 1)]


def prepare_in_tasks(config: PrepareConfig) -> Manifest | None:
    """Run all steps on this machine, or submit them to Slurm, each to begin when the one before it has
    succeeded.

    Returns:
        The manifest; None of what has been submitted.
    """
    output = Path(config.output).expanduser().resolve()
    config = replace(
        config, output=str(output), tokenizer=config.tokenizer and str(Path(config.tokenizer).resolve())
    )
    with claimed(output):
        preparation = Preparation(config)
        done = preparation.begin()
    if done is not None:
        return done
    logs = (
        Path(config.task_logs).expanduser() if config.task_logs else output.with_name(f"{output.name}.tasks")
    )
    logs = logs / preparation.plan_sha256[:12]
    executors: list[Any] = []
    for number, (step, tasks) in enumerate(steps(config)):
        folder = str(logs / f"{number}-{step.name}")
        if config.executor == "local":
            workers = min(tasks, config.workers or os.cpu_count() or 1)
            LocalPipelineExecutor([step], tasks, workers, folder).run()
        else:
            executors.append(_on_slurm(config, step, tasks, folder, executors[-1] if executors else None))
    if config.executor == "local":
        return Manifest.load(output)
    executors[-1].run()
    preparation.report.note(f"submitted to partition {config.partition}; logs are in {logs}")
    return None


def _on_slurm(config: PrepareConfig, step: _Step, tasks: int, folder: str, after: Any) -> Any:
    return SlurmPipelineExecutor(
        pipeline=[step],
        tasks=tasks,
        time=config.time,
        partition=config.partition or "",
        mem_per_cpu_gb=config.mem_gb,
        job_name=f"prepare-{step.name}",
        qos="",
        venv_path=f"{sys.prefix}/bin/activate",
        logging_dir=folder,
        depends=after,
        max_array_size=1000,
    )
