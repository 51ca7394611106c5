"""Weights & Biases and MLflow, for those who keep their runs there: the figures of ``metrics.jsonl`` again.

In: ``monitor.wandb`` and ``monitor.mlflow``.  Here: Lightning's loggers, opened on rank zero once the run
folder may be written.  Next: :mod:`dualroute.training.monitoring.monitor` hands them every line of figures.

A service that is away costs what it would have shown, and not the run: the first error of one is a warning,
and it is left alone from then on.  A resumed run goes on in the same run of the service.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from dualroute.errors import UserError, one_line
from dualroute.files import write_bytes_atomically
from dualroute.training.monitoring.config import MonitorConfig

log = logging.getLogger(__name__)
_MLFLOW_RUN = "mlflow_run_id"  # in the run folder
_MODULES = {"wandb": "wandb", "mlflow": "mlflow"}  # key of `monitor`, which is its extra too → module


def check_trackers(config: MonitorConfig) -> None:
    """Refuse a service whose package is not installed.

    Raises:
        UserError: Naming the key and the extra.
    """
    for key, module in _MODULES.items():
        if getattr(config, key) is not None and importlib.util.find_spec(module) is None:
            raise UserError(f"monitor.{key} needs a package that is not installed: pip install -e '.[{key}]'")


class Trackers:
    """The services of a run.

    Args:
        config: Which.
        run: The run folder; its name is the run's.
        settings: The resolved configuration, YAML.
    """

    def __init__(self, config: MonitorConfig, run: Path, settings: str) -> None:
        self._loggers: dict[str, Any] = {}
        for key, make in (("wandb", _wandb), ("mlflow", _mlflow)):
            if getattr(config, key) is not None:
                self._try(key, partial(self._open, key, make, config, run, settings))

    def _open(
        self, key: str, make: Callable[[str, Path], Any], config: MonitorConfig, run: Path, settings: str
    ) -> None:
        logger = make(getattr(config, key), run.absolute())
        self._loggers[key] = logger
        table = yaml.safe_load(settings) if settings else {}
        if isinstance(table, dict):
            logger.log_hyperparams(table)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Figures after ``step`` optimizer steps."""
        for key, logger in list(self._loggers.items()):
            self._try(key, partial(logger.log_metrics, dict(values), step))

    def close(self, *, well: bool) -> None:
        """Say how the run has ended."""
        for key, logger in list(self._loggers.items()):
            self._try(key, partial(_finish, logger, well))
        self._loggers.clear()

    def _try(self, key: str, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:  # a service's client raises whatever it likes
            self._loggers.pop(key, None)
            problem = one_line(str(error))[:300] or type(error).__name__
            log.warning("%s", f"monitor.{key} fails ({problem}): the training goes on without it")


def _wandb(project: str, run: Path) -> Any:
    from lightning.pytorch.loggers import WandbLogger

    os.environ.setdefault("WANDB_SILENT", "true")
    identity = f"{run.name[:40]}-{hashlib.sha256(str(run).encode()).hexdigest()[:8]}"
    folder = run / "wandb"
    folder.mkdir(exist_ok=True)  # or it would write to the system's folder of temporary files
    offline = os.environ.get("WANDB_MODE") == "offline"
    logger = WandbLogger(name=run.name, project=project, save_dir=run, id=identity, offline=offline)
    _ = logger.experiment  # asks for a key here, and not in the first step
    return logger


def _mlflow(address: str, run: Path) -> Any:
    from lightning.pytorch.loggers import MLFlowLogger

    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # a training waits for no server
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    if address.startswith("file:"):
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    note = run / _MLFLOW_RUN
    known = note.read_text(encoding="utf-8").strip()[:64] if note.is_file() else None
    logger = MLFlowLogger("dualroute", run_name=run.name, tracking_uri=address, run_id=known)
    if logger.run_id and logger.run_id != known:
        write_bytes_atomically(note, f"{logger.run_id}\n".encode())
    return logger


def _finish(logger: Any, well: bool) -> None:
    logger.finalize("success" if well else "failed")
    if hasattr(logger, "_offline"):  # of Weights & Biases, whose process ends only so
        logger.experiment.finish(exit_code=0 if well else 1)
