"""What somebody should look at: bad steps, a router that has collapsed, waiting for data, a stall.

In: the figures that :mod:`dualroute.training.monitoring.monitor` has anyway.  Here: :class:`Alerts` decides
which of them are worth a word; each kind is raised once, and again only after it was over.  Next: an event in
``metrics.jsonl``, a text in TensorBoard, a line of the log, and :class:`Webhook`, which tells somebody who is
not looking.

A webhook is a courtesy.  What it costs is bounded in time and memory, and nothing that goes wrong with it
reaches the training.
"""

from __future__ import annotations

import json
import logging
import queue
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dualroute import __version__
from dualroute.errors import one_line
from dualroute.training.monitoring.config import MonitorConfig

log = logging.getLogger(__name__)

SPIKE, COLLAPSE, DATA_WAIT = "spike", "router_collapse", "data_wait"
STALL, DIVERGED, FAILED = "stall", "diverged", "failed"
_LEAST_WAIT = 1.0  # seconds in two readings together, below which nobody cares
_MOST_WAITING = 100  # alerts for an address that does not answer
_ENTROPY = "router/router_entropy/"


@dataclass(frozen=True)
class Alert:
    """Of one kind (`SPIKE`, …), after ``step`` optimizer steps, in one line."""

    kind: str
    step: int
    text: str


class Alerts:
    """Judges figures as they come; on rank zero.

    Args:
        config: With the limits.
    """

    def __init__(self, config: MonitorConfig) -> None:
        self.config = config
        self._raised: set[str] = set()
        self._waits: list[tuple[float, float]] = []  # share, seconds: of the last two readings
        self._readings = 0

    def after_step(self, step: int, metrics: Mapping[str, float], reason: str = "") -> list[Alert]:
        """A step that was skipped, with the guard's ``reason``; of neighbouring ones the first."""
        skipped = bool(metrics.get("skipped"))
        text = f"step {step} was skipped: {reason or 'its loss or its gradient is not usable'}"
        return self._judge(SPIKE, skipped, step, text)

    def after_reading(self, step: int, wait_share: float, seconds: float) -> list[Alert]:
        """Two readings in a row of more waiting for data than is allowed.

        Args:
            step: Optimizer steps so far.
            wait_share: Of the time since the reading before.
            seconds: That time.
        """
        self._readings += 1
        if self._readings == 1:  # in it the loader's processes start
            return []
        self._waits = [*self._waits, (wait_share, wait_share * seconds)][-2:]
        limit = self.config.alert_data_wait
        slow = len(self._waits) == 2 and all(share > limit for share, _ in self._waits)
        slow &= limit > 0 and sum(waited for _, waited in self._waits) >= _LEAST_WAIT
        text = (
            f"{wait_share:.0%} of the time is spent waiting for data (monitor.alert_data_wait {limit:g}): "
            f"raise data.num_workers, or look at the disk"
        )
        return self._judge(DATA_WAIT, slow, step, text)

    def after_router(self, step: int, values: Mapping[str, float]) -> list[Alert]:
        """Layers whose router chooses the same blocks for everybody."""
        limit = self.config.alert_router_entropy
        low = [
            f"{tag.removeprefix(_ENTROPY)} ({value:.3f})"
            for tag, value in values.items()
            if tag.startswith(f"{_ENTROPY}layer") and value < limit
        ]
        shown = ", ".join(low[:8]) + (f" and {len(low) - 8} more" if len(low) > 8 else "")
        below = f"its entropy is below monitor.alert_router_entropy {limit:g}"
        text = f"the router has collapsed in {shown}: {below}"
        return self._judge(COLLAPSE, bool(low), step, text)

    def _judge(self, kind: str, bad: bool, step: int, text: str) -> list[Alert]:
        if not bad:
            self._raised.discard(kind)
            return []
        if kind in self._raised:
            return []
        self._raised.add(kind)
        return [Alert(kind, step, text)]


class Webhook:
    """POSTs alerts, one after the other, from a thread of its own.

    Args:
        address: Where to; null for nowhere.
        seconds: How long a request may take.
        run: The run folder, which names the run.
    """

    def __init__(self, address: str | None, seconds: float, run: Path) -> None:
        self._address, self._seconds, self._run = address, seconds, run
        self._queue: queue.Queue[dict[str, Any]] = queue.Queue(_MOST_WAITING)
        self._thread: threading.Thread | None = None
        self._warned = False

    def send(self, alert: Alert) -> None:
        """Have an alert sent; returns at once."""
        if self._address is None:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="webhook", daemon=True)
            self._thread.start()
        try:
            self._queue.put_nowait(self._body(alert))
        except queue.Full:
            self._warn(f"more than {_MOST_WAITING} alerts wait for it")

    def close(self) -> None:
        """Wait for what is under way, for no longer than two requests may take."""
        deadline = time.monotonic() + 2 * self._seconds
        while self._queue.unfinished_tasks and time.monotonic() < deadline:
            time.sleep(0.01)

    def _body(self, alert: Alert) -> dict[str, Any]:
        name = self._run.name
        return {
            "text": f"{name}: {alert.text}",
            "run": name,
            "folder": str(self._run),
            "kind": alert.kind,
            "step": alert.step,
            "host": socket.gethostname(),
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }

    def _work(self) -> None:
        while True:
            body = self._queue.get()
            try:
                self._post(body)
            except Exception as error:  # of whatever kind: a training does not end for it
                self._warn(one_line(str(getattr(error, "reason", error)) or type(error).__name__))
            finally:
                self._queue.task_done()

    def _post(self, body: Mapping[str, Any]) -> None:
        assert self._address is not None
        headers = {"Content-Type": "application/json", "User-Agent": f"dualroute/{__version__}"}
        data = json.dumps(body).encode()
        request = urllib.request.Request(self._address, data, headers, method="POST")
        with _OPENER.open(request, timeout=self._seconds):
            pass  # what it answers is not read

    def _warn(self, problem: str) -> None:
        if not self._warned:
            self._warned = True
            assert self._address is not None
            host = urlsplit(self._address).hostname  # the rest of an address may be a secret
            log.warning("%s", f"monitor.webhook at {host} fails ({problem}): the training goes on without it")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """An address that sends elsewhere is an error, which names the status."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)
