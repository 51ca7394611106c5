"""When a training that stands still is ended: the keys of ``watchdog``.  No torch is imported here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dualroute.errors import UserError
from dualroute.settings import above, check_fields

MOST_MINUTES = 1e6  # about two years; more does not fit into the clocks of the libraries


@dataclass
class WatchdogConfig:
    """When a training counts as stalled.

    Args:
        enabled: Watch at all.
        limit_minutes: Longest time in one phase of a step: reading a batch, forward, backward, the optimizer.
        start_minutes: The same until the first step is done: rendezvous, loading, compiling.
        validation_minutes: The same for one batch of a validation, and for what follows the last one.
        save_minutes: The same while a checkpoint is written.
        silence_seconds: A rank of another host that has not written its heartbeat for so long, while this
            rank does not move either, is dead.  One of the same host is seen to be gone at once.
        poll_seconds: Between two heartbeats.
        sdc_check_every_steps: Optimizer steps between two checks for silent data corruption, each of which
            runs a micro-batch twice; 0 never.
        sdc_action: What a rank that computed two results does: stop the run, or warn.
    """

    enabled: bool = True
    limit_minutes: float = 10.0
    start_minutes: float = 30.0
    validation_minutes: float = 30.0
    save_minutes: float = 30.0
    silence_seconds: float = 45.0
    poll_seconds: float = 5.0
    sdc_check_every_steps: int = 0
    sdc_action: Literal["stop", "warn"] = "stop"

    def __post_init__(self) -> None:
        minutes = ("limit_minutes", "start_minutes", "validation_minutes", "save_minutes")
        seconds = ("silence_seconds", "poll_seconds")
        check_fields(self, "watchdog", dict.fromkeys((*minutes, *seconds), above(0, MOST_MINUTES)))
        if self.silence_seconds < 3 * self.poll_seconds:
            raise UserError(
                f"watchdog.silence_seconds {self.silence_seconds:g} is less than three times "
                f"watchdog.poll_seconds {self.poll_seconds:g}: a heartbeat that is late once would be a "
                "death"
            )

    def limit(self, phase: str, first_step_done: bool) -> float:
        """Seconds that ``phase`` may last."""
        minutes = {"validation": self.validation_minutes, "save": self.save_minutes}.get(
            phase, self.limit_minutes
        )
        return 60 * (minutes if first_step_done else max(minutes, self.start_minutes))
