"""The part ``lm_eval``: tasks of lm-evaluation-harness (the extra ``eval``).

In: names of its tasks, of those that come with dualroute for local files
(:mod:`dualroute.evaluate.lm_eval_tasks`), or of YAMLs in a folder of the user's.  Here: the harness makes the
requests and the metrics, our model answers.  Out: a cell for each name.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dualroute.configuration.names import unknown
from dualroute.errors import UserError
from dualroute.evaluate.suite.cells import Cell, Measured, Score, ratio
from dualroute.evaluate.suite.config import HarnessSettings
from dualroute.evaluate.suite.model import SuiteModel
from dualroute.evaluate.writing import not_finite
from dualroute.files import file_sha256

_LOCAL = Path(__file__).parents[1] / "lm_eval_tasks"
_RESAMPLES = 1000
#: Metrics that are counted per token nowhere, but per word, byte or document.
_LOWER = ("perplexity", "bits_per")


def cells(settings: HarnessSettings, model: SuiteModel) -> list[Cell]:
    """A cell for each task.

    Raises:
        UserError: The harness is not installed, a task is unknown, or its data cannot be had.
    """
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"lm-evaluation-harness is not installed ({error}): pip install -e '.[eval]'"
        ) from error
    model.require_language_model("lm-evaluation-harness")
    for name in ("lm_eval", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    manager = _manager(settings)
    return [_cell(name, settings, manager, model) for name in settings.tasks]


def _local() -> list[str]:
    return sorted(path.stem for path in _LOCAL.glob("*.yaml"))


def _manager(settings: HarnessSettings) -> Any:
    from lm_eval.tasks import TaskManager

    local = _local()
    for task in settings.files:
        if task not in local:
            raise UserError(f"files: {unknown('local task', task, local)}")
    folders = [_LOCAL, *([Path(settings.include)] if settings.include else [])]
    if settings.include and not Path(settings.include).is_dir():
        raise UserError(f"include {settings.include} is no folder: give a folder of task YAMLs")
    manager = TaskManager(
        include_path=[str(folder) for folder in folders],
        include_defaults=_stock(settings, local),
        metadata={"files": dict(settings.files)},
    )
    known = [*manager.all_tasks, *manager.all_groups]
    for task in settings.tasks:
        if task not in known and not manager.match_tasks([task]):
            raise UserError(
                unknown("task", task, known) if len(task) < 80 else f"there is no task {task[:80]!r}"
            )
    return manager


def _stock(settings: HarnessSettings, local: list[str]) -> bool:
    """Whether any task may be one of the harness's own, of which there are thousands to look through."""
    return not set(settings.tasks) <= set(local)


def _cell(name: str, settings: HarnessSettings, manager: Any, model: SuiteModel) -> Cell:
    try:
        loaded = manager.load([name])  # its data too, before anything is measured
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"task {name}: its data or its YAML cannot be loaded ({' '.join(str(error).split())[:200]}): "
            f"stock tasks take their data from the Hugging Face hub; the tasks {', '.join(_local())} read "
            "files"
        ) from error
    depends: dict[str, Any] = {
        "task": name,
        "num_fewshot": settings.num_fewshot,
        "samples": settings.samples,
        "add_bos": settings.add_bos,
        "seed": settings.seed if settings.num_fewshot else None,
        "lm_eval": version("lm_eval"),
        "data": [*_data(name, settings)],
    }
    return Cell(settings.name, name, depends, partial(_measured, name, loaded, settings, model))


def _data(name: str, settings: HarnessSettings) -> Iterator[str]:
    """Hashes of the files that a local task reads, and of the user's YAMLs."""
    if name in _local():
        from dualroute.evaluate.lm_eval_tasks.local_files import file_of

        path = file_of(name, settings.files)
        yield from (
            file_sha256(file) for file in ([path] if path.is_file() else sorted(path.glob("*.jsonl*")))
        )
    elif settings.include:
        yield from (file_sha256(file) for file in sorted(Path(settings.include).rglob("*.yaml")))


def _measured(name: str, loaded: Any, settings: HarnessSettings, model: SuiteModel) -> Measured:
    from lm_eval.evaluator import evaluate

    from dualroute.evaluate.parts.harness_model import HarnessModel

    for task in loaded["tasks"].values() if "tasks" in loaded else ():
        if settings.num_fewshot is not None:
            task.set_config(key="num_fewshot", value=settings.num_fewshot)
        task.set_fewshot_seed(seed=settings.seed)
    results = evaluate(
        HarnessModel(model, settings.add_bos),
        loaded,
        limit=settings.samples,
        bootstrap_iters=_RESAMPLES,
        log_samples=True,  # for the standard errors of ratios
    )
    found = model.ranks.told(lambda: list(_scores(results or {})))
    if not found:
        raise UserError(f"task {name} has nothing to ask")
    if not all(math.isfinite(score.value) for score in found):
        raise not_finite(str(model.folder))
    return Measured(found)


def _scores(results: dict[str, Any]) -> Iterator[Score]:
    """The harness's figures; those of a group's tasks with the task's name before."""
    several = len(results["results"]) > 1
    for task, figures in results["results"].items():
        count = results.get("n-samples", {}).get(task, {}).get("effective", 0)
        for key, value in figures.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error: Any = figures.get(f"{metric}_stderr,{kind}")
            if not isinstance(error, int | float):
                error = _error_of_ratio(metric, float(value), results.get("samples", {}).get(task, []))
            better = results.get("higher_is_better", {}).get(task, {}).get(metric)
            if better is None and any(word in metric for word in _LOWER):
                better = False
            called = metric if kind == "none" else f"{metric} ({kind})"
            yield Score(
                f"{task}: {called}" if several else called,
                float(value),
                error,
                int(count),
                better,
            )


def _error_of_ratio(metric: str, value: float, samples: list[dict[str, Any]]) -> float | None:
    """Standard error of a log-likelihood by words or bytes, over documents; the harness gives none."""
    pairs = [one[metric] for one in samples if isinstance(one.get(metric), tuple | list)]
    if not pairs or any(len(pair) != 2 for pair in pairs):
        return None
    _, error = ratio([-float(pair[0]) for pair in pairs], [float(pair[1]) for pair in pairs])
    if error is None:
        return None
    return value * error if "perplexity" in metric else error / math.log(2)
