"""What a rank tells the others of itself: one small file in the run folder, written anew every few seconds.

- In: :meth:`Heart.mark`, called by the training wherever it has got a step further.
- Here: ``RUN/heartbeats/rank-00000.json`` says host, process, step, phase, how often the training has moved
  and how often this file was written (:class:`Beat`); :func:`process_is_gone` looks for a local process.
- Next: ``training/resilience/watchdog.py`` reads the files of others and decides.

No two clocks are ever compared.  A reader counts the seconds of its own during which a
number in the file has not changed (:class:`Stillness`), and does not count those in which it was itself
suspended, so neither skewed clocks nor a job that Slurm had stopped for an hour look like a stall.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import psutil

RUNNING, FINISHED, FAILED, CUT_OFF = "running", "finished", "failed", "cut off"
LOOKS = 10  # at a file that cannot be read, before it counts as damaged
MOST_BYTES = 1 << 20  # of a beat; a usual one has under 1,000


@dataclass(frozen=True)
class Beat:
    """One rank, as its file describes it.

    Attributes:
        beats: How often the file was written by this process.
        moves: How often the training has moved (see :meth:`Heart.mark`); the same sequence on every rank.
        phase: What the training does since its last move.
        seconds: How long it has been in it.
        state: running, finished, failed (an error of its own) or cut off (communication broke).
        error: First line of the error of the latter two.
        waits_in: After an alarm: the collective that the main thread waits in, or "".
        where: After an alarm: file, line and function of the main thread, outside libraries if possible.
        collectives: After an alarm: collectives that were started, by torch's flight recorder; -1 unknown.
        flight: After an alarm: where each process group stands, by the same (``flight_record.summary``).
        waits_by_record: ``waits_in`` is the recorder's word; no Python frame shows it.
        answers: The alarm that this answers, or "".
        job_start: See :func:`this_start`.
    """

    rank: int
    host: str
    place: str
    pid: int
    started: float
    beats: int = 0
    moves: int = 0
    step: int = 0
    phase: str = "start"
    seconds: float = 0.0
    state: str = RUNNING
    error: str = ""
    waits_in: str = ""
    where: str = ""
    collectives: int = -1
    flight: dict[str, Any] = field(default_factory=dict)
    waits_by_record: bool = False
    answers: str = ""
    job_start: str = ""
    time: float = 0.0


def beat_path(run: Path, rank: int) -> Path:
    """Where rank ``rank`` of a run writes."""
    return run / "heartbeats" / f"rank-{rank:05d}.json"


def read_beat(run: Path, rank: int) -> Beat | None:
    """The newest beat of a rank; None where there is none.

    A reader may look while the content is being copied, and see a part of the old one and a part of the new.
    That lasts microseconds, so it looks again before it says that there is nothing to be read.
    """
    known = {field.name for field in dataclasses.fields(Beat)}
    for attempt in range(LOOKS):
        try:
            values = json.loads(_content(beat_path(run, rank)))
            return Beat(**{key: value for key, value in values.items() if key in known})
        except OSError:
            return None
        except (ValueError, TypeError, AttributeError):
            time.sleep(0.001 * attempt)
    return None


def _content(path: Path) -> bytes:
    """A small file in one call of the system: what it grows by meanwhile is left out."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.read(descriptor, MOST_BYTES)
    finally:
        os.close(descriptor)


@cache
def this_place() -> str:
    """Where process ids mean the same: one boot of one kernel, one PID namespace (containers: another)."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def this_start(environ: Mapping[str, str]) -> str:
    """What tells the starts of a Slurm job apart, the same on its ranks and in its script; else ""."""
    if "SLURM_JOB_ID" not in environ:
        return ""
    return f"{environ['SLURM_JOB_ID']}.{environ.get('SLURM_RESTART_COUNT', '0')}"


def started_at(pid: int) -> float:
    """What tells a process from a later one with its number: ticks since boot, or seconds where no /proc is.

    Ticks, because a time of day changes for all processes when the clock is set.

    Raises:
        psutil.NoSuchProcess: There is none.
    """
    with contextlib.suppress(OSError):
        return float(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    return float(psutil.Process(pid).create_time())


def process_is_gone(beat: Beat) -> bool:
    """Certain that the process of ``beat`` has ended; False on another host, where it cannot be seen."""
    if beat.place != this_place():
        return False
    try:
        zombie = psutil.Process(beat.pid).status() == psutil.STATUS_ZOMBIE
        return zombie or started_at(beat.pid) != beat.started  # the number is another process's by now
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:
        return False


def _write_over(path: Path, content: bytes) -> None:
    """Replace a small file's content in one call of the system, so that a process killed at any moment leaves
    the old one or the new one: a file that is emptied first may stay empty.

    What a longer content leaves behind is overwritten with spaces, which mean nothing in JSON.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        os.pwrite(descriptor, content.ljust(os.fstat(descriptor).st_size), 0)
    finally:
        os.close(descriptor)


class Heart:
    """This rank's file.  ``mark`` costs an assignment; ``beat`` writes and is for another thread."""

    def __init__(self, run: Path, rank: int) -> None:
        self.run = run
        self.path = beat_path(run, rank)
        self._beat = Beat(
            rank,
            socket.gethostname(),
            this_place(),
            os.getpid(),
            started_at(os.getpid()),
            job_start=this_start(os.environ),
        )
        # one tuple, replaced as a whole: a thread that reads it never sees half of it
        self._position = (0, 0, "start", time.monotonic())
        self._writing = threading.Lock()  # the last words of the main thread must not be lost

    @property
    def moves(self) -> int:
        return self._position[0]

    @property
    def phase(self) -> str:
        return self._position[2]

    @property
    def step(self) -> int:
        return self._position[1]

    def mark(self, phase: str, step: int) -> None:
        """The training has moved: it is now in ``phase`` of optimizer step ``step`` (the first is 1)."""
        self._position = (self._position[0] + 1, step, phase, time.monotonic())

    def beat(self, **changes: Any) -> Beat:
        """Write the file, with ``changes`` to the fields of :class:`Beat`, and return what was written."""
        with self._writing:
            return self._write(changes)

    def _write(self, changes: dict[str, Any]) -> Beat:
        moves, step, phase, since = self._position
        self._beat = dataclasses.replace(
            self._beat,
            beats=self._beat.beats + 1,
            moves=moves,
            step=step,
            phase=phase,
            seconds=round(time.monotonic() - since, 1),
            time=round(time.time(), 1),
            **changes,
        )
        # not flushed, not renamed: whoever opens it after it was closed sees it, on NFS too.  A full disk or
        # a file system that is away is no reason to stop a training
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(exist_ok=True)
            _write_over(self.path, json.dumps(dataclasses.asdict(self._beat)).encode())
        return self._beat


class Stillness:
    """Seconds for which a number has stayed the same while somebody looked.

    Args:
        longest_look: Most seconds that one look may add; more means that the looker itself was stopped.
    """

    def __init__(self, longest_look: float) -> None:
        self.longest_look = longest_look
        self.seconds = 0.0
        self._value: Any = None
        self._looked: float | None = None

    def look(self, value: Any, now: float) -> float:
        """Note ``value`` at ``now`` (monotonic seconds); returns ``seconds``."""
        if value != self._value:
            self._value, self.seconds = value, 0.0
        elif self._looked is not None:
            self.seconds += min(now - self._looked, self.longest_look)
        self._looked = now
        return self.seconds
