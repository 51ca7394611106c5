"""Trainings and what is made of models, called from Python.

In: options, see :mod:`dualroute.library.options`.  Here: the function of the command is called in this
process, on one rank; several ranks are started by a launcher (docs/training.md).  Out: the folder that was
made.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dualroute import log, threads
from dualroute.cli.table import STAGES
from dualroute.cli.table import load as found
from dualroute.errors import Interrupted
from dualroute.library.model import Model, load
from dualroute.library.options import ConfigLike, configuration
from dualroute.training.resilience import stop_signal


@dataclass(frozen=True)
class Run:
    """A training that has been run.

    Attributes:
        folder: The run folder: checkpoints, ``config.yaml``, ``metrics.jsonl``, ``log.txt``.
        finished: Whether all its steps are done.  A run that was stopped (Ctrl-C, SIGTERM) has a checkpoint;
            the same call goes on from it.
    """

    folder: Path
    finished: bool

    def load(self, device: str = "auto", dtype: str = "auto") -> Model:
        """The model of its newest finished checkpoint (of a task: the best one); see :func:`load`."""
        return load(self.folder, device, dtype)

    def metrics(self) -> list[dict[str, Any]]:
        """What was logged, one table for each line of ``metrics.jsonl``: ``step`` and values by tag.

        Lines that were cut short, as by a full disk, are left out.
        """
        lines: list[dict[str, Any]] = []
        path = self.folder / "metrics.jsonl"
        if not path.exists():
            return lines
        with path.open(encoding="utf-8", errors="replace") as stream:
            for line in stream:
                try:
                    lines.append(json.loads(line))
                except ValueError:
                    continue
        return lines


def prepare(config: ConfigLike | None = None, **options: Any) -> Path:
    """``dualroute prepare``: texts become shards.  Returns the folder of shards.

    Args:
        config: A file, a shipped name (``prepare/books``), a table, or a ``PrepareConfig``.
        **options: Over it: ``corpus``, ``output``, ``vocab_size``, …

    Raises:
        UserError: As the command says it.
    """
    made = configuration("prepare", config, options)
    _call("prepare", made)
    return Path(made.output)


def train(config: ConfigLike | None = None, **options: Any) -> Run:
    """``dualroute pretrain`` in this process: trains, goes on from the newest checkpoint, or finds it done.

    Args:
        config: A shipped name (``pretrain/quickstart``), a YAML file, a table, a list of these, or a
            ``PretrainConfig``.
        **options: Over it, group by group: ``output="runs/x"``, ``data="data/mine"``,
            ``train={"max_steps": 5}``.

    Ctrl-C stops after the step that runs, with a checkpoint, and returns; once more raises KeyboardInterrupt.

    Raises:
        UserError: As the command says it.
        KeyboardInterrupt: Before the first step, or the second Ctrl-C.
    """
    return _train("pretrain", config, options)


def finetune(config: ConfigLike | None = None, **options: Any) -> Run:
    """``dualroute finetune``: rows of data become a model for a task; see :func:`train`.

    Args:
        config: A shipped name (``task/sst2``), a file, a table, or a ``FinetuneConfig``.
        **options: ``data={"path": "reviews.csv"}``, ``task={"kind": "sequence"}``, ``init_from``, …
    """
    return _train("finetune", config, options)


def distill(config: ConfigLike | None = None, **options: Any) -> Run:
    """``dualroute distill``: shards and a teacher → a trained student; see :func:`train`.

    Args:
        config: A shipped name (``distill/books_5m``), a file, a table, or a ``DistillConfig``.
        **options: ``teacher``, ``init_from``, ``data``, ``distill``, ``output``, …
    """
    return _train("distill", config, options)


def prune(config: ConfigLike | None = None, **options: Any) -> Path:
    """``dualroute prune``: a trained model → a smaller one.  Returns its folder, which :func:`load` takes."""
    made = configuration("prune", config, options)
    _call("prune", made)
    return Path(made.output)


def quantize(config: ConfigLike | None = None, **options: Any) -> Path:
    """``dualroute quantize``: weights in int8, int4 or float8.  Returns the folder for :func:`load`."""
    made = configuration("quantize", config, options)
    _call("quantize", made)
    return Path(made.output)


def convert(config: ConfigLike | None = None, **options: Any) -> Path:
    """``dualroute convert``: a model from elsewhere, or dense → dual attention.  Returns the folder."""
    made = configuration("convert", config, options)
    _call("convert", made)
    return Path(made.output)


def _train(stage: str, config: ConfigLike | None, options: dict[str, Any]) -> Run:
    made = configuration(stage, config, options)
    with stop_signal.remembered():
        try:
            status = _call(stage, made)
        except Interrupted as error:
            raise KeyboardInterrupt(f"before the first step of {made.output}") from error
    return Run(Path(made.output), status == 0)


def _call(stage: str, config: Any) -> Any:
    threads.prepare()
    with _lines():
        return found(STAGES[stage].function)(config)


@contextmanager
def _lines() -> Iterator[None]:
    """What a command tells is shown, unless the program decides itself where log lines go."""
    if not any(logging.getLogger(name).handlers for name in ("", *log.ROOTS)):
        log.to_terminal()
    yield
