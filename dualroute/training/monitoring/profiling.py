"""A profile of a few steps, of the first rank: ``monitor.profile_at_step``.

In: the beginning and end of optimizer steps.  Here: torch.profiler records them, with the CPU's side and on
CUDA the GPU's.  Next: ``OUTPUT/profile/steps-3-5.json.gz``, which https://ui.perfetto.dev opens, and a table
of the dearest operators as a text in TensorBoard.

What is recorded is slower than it is otherwise.
"""

from __future__ import annotations

import gzip
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from dualroute.files import atomic_path
from dualroute.training.monitoring.config import MonitorConfig

log = logging.getLogger(__name__)
_ROWS = 20


class StepProfile:
    """Records the steps that the configuration names.

    Args:
        config: When, and how many.
        run: The run folder.
    """

    def __init__(self, config: MonitorConfig, run: Path) -> None:
        self._first = config.profile_at_step
        self._count = config.profile_steps
        self._run = run
        self._running: Any = None
        self._began = 0

    def before_step(self, step: int) -> None:
        """Begin, where ``step`` is the first one to be recorded, or where a run was resumed among them."""
        if self._first is None or self._running is not None:
            return
        if self._first <= step < self._first + self._count:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self._running = profile(activities=activities)
            self._running.start()
            self._began = step

    def after_step(self, step: int) -> str | None:
        """The table of what was dear, in Markdown, once ``step`` is the last one to be recorded."""
        assert self._first is not None or self._running is None
        if self._running is None or step < (self._first or 0) + self._count - 1:
            return None
        return self._finish(step)

    def close(self) -> None:
        """End without a result."""
        if self._running is not None:
            self._running.stop()
            self._running = None

    def _finish(self, step: int) -> str | None:
        running, self._running = self._running, None
        running.stop()
        path = self._run / "profile" / f"steps-{self._began}-{step}.json.gz"
        try:
            path.parent.mkdir(exist_ok=True)
            with atomic_path(path) as temporary:
                plain = temporary.with_name(f"{temporary.name}.json")  # by its name, torch would compress it
                try:
                    running.export_chrome_trace(str(plain))
                    with plain.open("rb") as trace, gzip.open(temporary, "wb", compresslevel=1) as packed:
                        shutil.copyfileobj(trace, packed)
                finally:
                    plain.unlink(missing_ok=True)
        except OSError as error:
            log.warning("%s", f"{path} cannot be written ({error.strerror or error}): no profile")
            return None
        log.info(
            "%s", f"profile of steps {self._began} to {step}: {path} (open it in https://ui.perfetto.dev)"
        )
        by = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = running.key_averages().table(sort_by=by, row_limit=_ROWS, max_name_column_width=50)
        return f"`{path}`\n\n```\n{table}\n```"
