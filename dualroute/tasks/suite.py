"""``dualroute evaluate --suite``: the command, and the part ``task``.

In: a checkpoint of any kind and a suite (:mod:`dualroute.evaluate.suite`).  Here: the processes that a
launcher started meet, the checkpoint is loaded, the parts measure it.  Out: a table, JSON, the differences to
another result.

The metrics of a task are computed on the first rank alone; all other parts share their work.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from dualroute.errors import UserError
from dualroute.evaluate.config import EvaluateConfig
from dualroute.evaluate.load import load_any
from dualroute.evaluate.suite.cells import Cell, Measured, Score
from dualroute.evaluate.suite.config import Suite, TaskSettings, read_suite, with_flags
from dualroute.evaluate.suite.model import SuiteModel, suite_model
from dualroute.evaluate.suite.ranks import Ranks
from dualroute.evaluate.suite.record import Record, read_record
from dualroute.evaluate.suite.run import run_suite, show, show_differences
from dualroute.evaluate.writing import not_finite
from dualroute.model.checkpoint.folder import TASK
from dualroute.model.foreign.hub import is_foreign
from dualroute.tasks.answer import Answerer, task_checkpoint
from dualroute.tasks.data.rows import source_digest
from dualroute.tasks.evaluate import usable_rows
from dualroute.tasks.kind import Row
from dualroute.training.parallel.environment import detect_world, refuse_forgotten_srun

#: Draws of the bootstrap that a metric's standard error comes from: it is no mean over rows (F1, BLEU).
RESAMPLES = 200
#: A rank may wait for the first one through a whole part.
_PATIENCE = datetime.timedelta(days=2)


def suite_command(config: EvaluateConfig) -> None:
    """Measure a suite, show its scores, and compare them.

    Raises:
        UserError: Suite, checkpoint or output cannot be used; or a part cannot be measured.
    """
    assert config.suite is not None
    suite = flagged(read_suite(config.suite), config)
    if config.output is not None and not Path(config.output).parent.is_dir():
        raise UserError(f"--output {config.output}: there is no folder {Path(config.output).parent}: make it")
    other = None if config.compare is None else read_record(config.compare, "--compare")
    with ranks_of_launcher() as (ranks, device):
        record = measure(config, suite, ranks, device or config.device)
        if ranks.first:
            show(record)
            if other is not None:
                show_differences(record, other, Path(str(config.compare)).stem)


def flagged(suite: Suite, config: EvaluateConfig) -> Suite:
    """The suite with the options that were given."""
    names = ("data", "context", "stride", "max_tokens", "lengths", "samples")
    flags = {name: getattr(config, name) for name in names}
    flags["text"] = None if config.text is None else [config.text]
    flags["split"] = config.split if "split" in getattr(config, "given", ()) else None
    return with_flags(suite, flags)


def measure(config: EvaluateConfig, suite: Suite, ranks: Ranks, device: str) -> Record:
    """The record of a suite."""
    path = config.checkpoint
    if not is_foreign(path):
        best = task_checkpoint(path)  # of a task the best one counts, of a language model the newest
        path = str(best.folder) if (best.folder / TASK).exists() else path
    loaded = load_any(path, device, config.dtype)
    model = suite_model(path, device, config.dtype, config.batch_size, ranks, loaded)
    return run_suite(suite, model, output=config.output, builders={"task": task_cells})


@contextlib.contextmanager
def ranks_of_launcher() -> Iterator[tuple[Ranks, str | None]]:
    """The processes that torchrun, deepspeed or srun started, and this one's device where there are GPUs."""
    world = detect_world()
    refuse_forgotten_srun(world)
    if world.world_size == 1:
        yield Ranks(), None
        return
    on_cuda = torch.cuda.is_available()
    dist.init_process_group(
        "gloo",  # objects are exchanged, not gradients
        init_method=f"tcp://{world.main_address}:{world.main_port}" if world.launcher != "torchrun" else None,
        rank=world.rank,
        world_size=world.world_size,
        timeout=_PATIENCE,
    )
    try:
        yield Ranks(world.rank, world.world_size), f"cuda:{world.local_rank}" if on_cuda else None
    finally:
        dist.destroy_process_group()


# -- the part task -------------------------------------------------------------------------------------------


def task_cells(settings: TaskSettings, model: SuiteModel) -> list[Cell]:
    """The one cell of a checkpoint's task.

    Raises:
        UserError: The checkpoint was not trained for one, or there are no rows.
    """
    if is_foreign(model.folder):
        raise UserError(f"{model.folder} has no {TASK}: give a checkpoint of dualroute finetune")
    answerer = Answerer(model.folder, batch_size=model.batch_size, loaded=model.loaded)
    name, rows, _ = model.ranks.told(lambda: usable_rows(answerer, settings.data, settings.samples))
    depends = {"rows": source_digest(name), "samples": settings.samples, "kind": answerer.kind.name}
    answerer.kind.tally.counts.clear()
    return [Cell(settings.name, Path(name).name, depends, partial(_of_task, answerer, rows, model))]


def _of_task(answerer: Answerer, rows: list[Row], model: SuiteModel) -> Measured:
    found: Measured = model.ranks.told(lambda: _metrics(answerer, rows))
    return found


def _metrics(answerer: Answerer, rows: list[Row]) -> Measured:
    kind = answerer.kind
    answers = [(row, answer.prediction) for row, answer in zip(rows, answerer.answers(rows), strict=True)]
    pairs = [(row, found) for row, found in answers if found is not None]
    if not pairs:
        raise UserError("no row has a prediction")

    def score(some: Iterable[int]) -> dict[str, float]:
        chosen = [pairs[number] for number in some]
        return kind.score([kind.target(row) for row, _ in chosen], [found for _, found in chosen])

    metrics, errors = score(range(len(pairs))), bootstrap(len(pairs), score)
    scores = [
        Score(metric, value, errors.get(metric), len(pairs), kind.metrics.get(metric))
        for metric, value in metrics.items()
    ]
    if kind.head() is None:
        loss = answerer.next_token_loss([row for row, _ in pairs])
        scores.append(Score("perplexity", math.exp(min(loss, 700.0)), None, len(pairs), False, "token"))
    if not all(math.isfinite(score.value) for score in scores):
        raise not_finite(str(answerer.loaded.checkpoint.folder))
    return Measured(scores)


def bootstrap(count: int, score: Callable[[Sequence[int]], dict[str, float]]) -> dict[str, float]:
    """Standard errors of metrics: their spread over rows drawn with replacement.

    Args:
        count: Rows.
        score: Metrics of the rows of these numbers.
    """
    if count < 2:
        return {}
    draw = random.Random(0)
    drawn = [score(draw.choices(range(count), k=count)) for _ in range(RESAMPLES)]
    errors = {}
    for metric in drawn[0]:
        values = [one[metric] for one in drawn if metric in one]
        mean = math.fsum(values) / len(values)
        errors[metric] = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))
    return errors
