"""Ends a training that stands still, and says which rank is to blame.

- In: the hooks of the Trainer, which say how far this rank is, and the heartbeats of other ranks.
- Here: a thread per process (:class:`Watchdog`) writes this rank's heartbeat and raises an alarm when the
  rank has not moved for longer than its phase may last, or when the rank before it is gone.
- Next: on an alarm every rank writes its stacks to ``RUN/stalls/rank-00000.txt``, one of them prints a line
  (``training/resilience/stall_report.py``), and all end with :data:`EXIT_STALLED`, on which a job may be
  requeued.

A rank does not watch all others, which would be thousands of file reads a second on a
large job.  It watches one, its neighbour, and looks whether somebody has raised the alarm.

It works while the main thread is stuck in C code, as long as that code has released Python's interpreter
lock, which torch, DeepSpeed, NCCL and gloo do.  Where it has not, the other ranks notice.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TextIO

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from dualroute.errors import RUN_AGAIN
from dualroute.training.config import WatchdogConfig
from dualroute.training.parallel.environment import World
from dualroute.training.resilience import flight_record, stall_report
from dualroute.training.resilience.heartbeat import (
    CUT_OFF,
    FAILED,
    FINISHED,
    RUNNING,
    Beat,
    Heart,
    Stillness,
    process_is_gone,
    read_beat,
    this_place,
)

#: Exit status of every rank after a stall or the death of a rank.
EXIT_STALLED = RUN_AGAIN

_STEP_PHASES = ("reading data", "forward", "backward", "optimizer step")
_SIGNS_OF_A_LOST_PEER = ("gloo", "nccl", "connection", "socket", "broken pipe", "recvvalue", "timed out")


class Watchdog(Callback):
    """Watches this rank and its neighbour from the beginning to the end of a ``with`` block.

    Give it to the Trainer as its last callback too: it marks how far the training is.

    Args:
        config: Limits.
        world: This process's place.
        run: The run folder, the same on every rank.
        reduces_in_backward: Gradients are reduced inside autograd, as DDP does it.

    Attributes:
        tell: Called with the line that says why a training is stopped, on the rank that prints it, before the
            process ends.
    """

    def __init__(
        self, config: WatchdogConfig, world: World, run: Path, *, reduces_in_backward: bool = False
    ) -> None:
        self.config, self.world, self.run = config, world, run
        self.reduces_in_backward = reduces_in_backward
        if config.enabled:
            # read by torch when a process group is made; a few strings per collective.  A host that runs
            # ahead of its GPU has those of a whole step of ZeRO-3 under way
            size = os.environ.get("TORCH_NCCL_TRACE_BUFFER_SIZE", "1024")  # the older name
            os.environ.setdefault("TORCH_FR_BUFFER_SIZE", size)
        self.heart = Heart(run, world.rank)
        self._stalls = run / "stalls"
        self._alarm_file = self._stalls / "alarm.json"
        self._old_alarm = self._alarm_stamp()
        self._first_step_done = self._met = self._ended = False
        self._first_step = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._own = Stillness(3 * config.poll_seconds)
        self._neighbour = Stillness(3 * config.poll_seconds)
        self._stacks: TextIO | None = None
        self.tell: Callable[[str], None] | None = None
        self._ending = threading.Lock()  # whoever holds it ends the process

    # -- beginning and end ---------------------------------------------------------------------------------

    def __enter__(self) -> Watchdog:
        if self.config.enabled:
            self.heart.beat()
            with contextlib.suppress(OSError):
                self._stacks = self.heart.path.with_suffix(".stacks").open("w")
            self._thread.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        if not self.config.enabled:
            return
        if error is not None:
            self._explain(error)
        self._stop.set()
        self._thread.join(timeout=self.config.silence_seconds)
        faulthandler.cancel_dump_traceback_later()
        if self._stacks is not None:
            self._stacks.close()
        if error is None:
            self.heart.beat(state=FINISHED)

    # -- how far the training is ---------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._met = (
            True  # the ranks have found each other: from here on a file that is there is of this start
        )
        self.heart.mark("setup", trainer.global_step + 1)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._first_step = trainer.global_step  # of the checkpoint that a resumed run starts from
        self.heart.mark("reading data", trainer.global_step + 1)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.heart.mark("validation", trainer.global_step)

    def on_validation_batch_start(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        self.heart.mark("validation", trainer.global_step)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.heart.mark("reading data", trainer.global_step + 1)

    def on_train_batch_start(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        self.heart.mark("forward", trainer.global_step + 1)

    def on_before_backward(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        self.heart.mark("backward", trainer.global_step + 1)

    def on_before_optimizer_step(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        self.heart.mark("optimizer step", trainer.global_step + 1)

    def on_train_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        self._first_step_done |= trainer.global_step > self._first_step
        self.heart.mark("reading data", trainer.global_step + 1)

    def on_save_checkpoint(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        self.heart.mark("save", trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.heart.mark("end", trainer.global_step)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self.config.enabled:
            self._explain(exception)

    # -- watching, in a thread -----------------------------------------------------------------------------

    def _watch(self) -> None:
        poll = self.config.poll_seconds
        longest = max(self.config.limit(phase, False) for phase in ("forward", "validation", "save"))
        while not self._stop.wait(poll):
            if self._stacks is not None:
                # a timer in C: it writes the stacks if this thread never gets the interpreter lock again
                faulthandler.dump_traceback_later(longest, file=self._stacks)
            self.heart.beat()
            try:
                problem = self._problem(time.monotonic())
            except OSError:
                continue  # a file system that is away for a moment
            if problem and not self._stop.is_set():
                self._end(problem)

    def _problem(self, now: float) -> str:
        """Why the training must end, or ""."""
        limit = self.config.limit(self.heart.phase, self._first_step_done)
        still = self._own.look(self.heart.moves, now)
        if self._raised_by_another():
            return "another rank raised the alarm"
        if still > limit:
            return f"rank {self.world.rank} has not moved for {still:.0f} s (limit {limit:.0f})"
        if self.world.world_size == 1 or not self._met:
            return ""
        rank = (self.world.rank - 1) % self.world.world_size
        beat = read_beat(self.run, rank)
        silent = self._neighbour.look(beat and (beat.pid, beat.beats), now)
        # at the start, and while a checkpoint is written, C code may hold the interpreter for long
        patience = self.config.silence_seconds if self.heart.phase in _STEP_PHASES else limit
        if beat is None or beat.state != RUNNING:
            # one that failed takes the others with it, or all have failed alike; only if they wait, help them
            lost = beat is not None and beat.state != FINISHED and still > patience
            return f"rank {rank} {beat.state}" if beat is not None and lost else ""
        if process_is_gone(beat):
            again = read_beat(self.run, rank)  # its last words may be younger than what was read
            return f"rank {rank} is gone" if again is None or again.state == RUNNING else ""
        # of this host it is known to live
        if beat.place != this_place() and min(silent, still) > patience:
            return f"rank {rank} has been silent for {silent:.0f} s"
        return ""

    def _alarm_stamp(self) -> tuple[int, int] | None:
        with contextlib.suppress(OSError):
            stat = self._alarm_file.stat()
            return stat.st_ino, stat.st_mtime_ns
        return None

    def _raised_by_another(self) -> bool:
        return self._alarm_stamp() not in (None, self._old_alarm)

    # -- ending --------------------------------------------------------------------------------------------

    def _raise_alarm(self, why: str) -> bool:
        """True for the one rank that raised it."""
        self._stalls.mkdir(parents=True, exist_ok=True)
        if self._alarm_stamp() == self._old_alarm and self._old_alarm is not None:
            with contextlib.suppress(OSError):
                self._alarm_file.unlink()  # of an earlier start
        try:
            descriptor = os.open(self._alarm_file, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return False
        except OSError:
            return True  # no shared folder any more: every rank speaks for itself
        with os.fdopen(descriptor, "w") as stream:
            json.dump({"rank": self.world.rank, "why": why, "time": time.time()}, stream)
        return True

    def _end(self, why: str, error: BaseException | None = None) -> None:
        """Write stacks, tell the others, let one rank print the line, and end this process."""
        self._ending.acquire()  # if the other thread has it, this waits until that one has ended the process
        # whatever happens below (a file system that hangs), this process ends
        last_resort = threading.Timer(6 * self.config.poll_seconds + 30, os._exit, [EXIT_STALLED])
        last_resort.daemon = True
        last_resort.start()
        with contextlib.suppress(OSError):
            stall_report.write_stacks(self._stalls / f"rank-{self.world.rank:05d}.txt", why, error)
        frame = stall_report.main_frame() if error is None else None
        raised = self._raise_alarm(why)
        flight = stall_report.flight_of_this_rank(limit=self.config.poll_seconds)
        waits_in = stall_report.waiting_in(frame, reduces_in_backward=self.reduces_in_backward)
        by_record = "" if waits_in or error is not None else flight_record.waiting_text(flight)
        self.heart.beat(
            answers="alarm",
            waits_in=waits_in or by_record,
            waits_by_record=bool(by_record),
            where=stall_report.place_of(frame),
            collectives=stall_report.started_collectives(flight),
            flight=flight,
            **({} if error is None else {"state": CUT_OFF, "error": _first_line(error)}),
        )
        with contextlib.suppress(OSError):
            stall_report.write_flight_dump(self._stalls / f"nccl_trace_rank_{self.world.rank}")
        if raised:
            self._report(why)
        else:
            self._wait_for_report()
        _exit()

    def _report(self, why: str) -> None:
        beats, silent = self._collect()
        line = stall_report.describe(beats, silent, why)
        print(
            f"dualroute: the training is stopped: {line}; stacks of all threads are in {self._stalls}; "
            f"exit status {EXIT_STALLED}, the same command resumes from the newest checkpoint",
            file=sys.stderr,
            flush=True,
        )
        with contextlib.suppress(OSError):
            (self._stalls / "report.txt").write_text(line + "\n", encoding="utf-8")
        if self.tell is not None:
            with contextlib.suppress(Exception):  # this process ends, whatever becomes of a message
                self.tell(f"the training is stopped: {line}")
        self.heart.beat(answers="reported")

    def _collect(self) -> tuple[dict[int, Beat | None], list[int]]:
        """Every rank's last beat once all have answered the alarm or had time to; and who has not."""
        deadline = time.monotonic() + 3 * self.config.poll_seconds
        beats: dict[int, Beat | None] = dict.fromkeys(range(self.world.world_size))
        while True:
            for rank in beats:
                beats[rank] = read_beat(self.run, rank) or beats[rank]
            silent = [rank for rank, beat in beats.items() if beat is None or not beat.answers]
            gone = [r for r in silent if (b := beats[r]) and (b.state != RUNNING or process_is_gone(b))]
            if len(gone) == len(silent) or time.monotonic() > deadline:
                return beats, silent
            time.sleep(min(0.2, self.config.poll_seconds))

    def _wait_for_report(self) -> None:
        deadline = time.monotonic() + 5 * self.config.poll_seconds
        while time.monotonic() < deadline:
            beat = None
            try:
                beat = read_beat(self.run, int(json.loads(self._alarm_file.read_text())["rank"]))
            except OSError:
                return
            except ValueError:
                pass  # the alarm is there, who raised it is being written
            if beat is not None and (beat.answers == "reported" or process_is_gone(beat)):
                return
            time.sleep(min(0.1, self.config.poll_seconds))

    def _explain(self, error: BaseException) -> None:
        """Tell an error of this rank from one that only says that another rank is gone.

        In the latter case this ends the process; else it returns, and the error goes its way.
        """
        if self._ended:
            return
        self._ended = True
        if self.world.world_size == 1 or not _speaks_of_a_lost_peer(error):
            self.heart.beat(state=FAILED, error=_first_line(error))
            return
        self.heart.beat(state=CUT_OFF, error=_first_line(error))
        if self._somebody_is_gone():
            self._end(f"communication broke: {_first_line(error)}", error)

    def _somebody_is_gone(self) -> bool:
        """Look for the rank that the others have lost, until its silence would be long enough."""
        watched = {r: Stillness(self.config.poll_seconds) for r in range(self.world.world_size)}
        deadline = time.monotonic() + self.config.silence_seconds + 2 * self.config.poll_seconds
        while time.monotonic() < deadline:
            if self._raised_by_another():
                return True
            states = []
            for rank, stillness in watched.items():
                beat = read_beat(self.run, rank)
                if beat is None or rank == self.world.rank:
                    continue
                states.append(beat.state)
                if beat.state == FAILED:
                    return False  # it has an error of its own to show
                silent = stillness.look((beat.pid, beat.beats), time.monotonic())
                mute = beat.place != this_place() and silent > self.config.silence_seconds
                gone = mute or process_is_gone(beat)
                if beat.state == RUNNING and gone:
                    return True
            if states and all(state == CUT_OFF for state in states):
                return False  # nobody is missing: the connection broke
            time.sleep(min(0.2, self.config.poll_seconds))
        return False


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


def _speaks_of_a_lost_peer(error: BaseException) -> bool:
    if isinstance(error, torch.distributed.DistError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError | OSError) and any(sign in text for sign in _SIGNS_OF_A_LOST_PEER)


def _exit() -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    # not sys.exit: the main thread is stuck, and torch's own exit handlers wait for the other ranks
    os._exit(EXIT_STALLED)
