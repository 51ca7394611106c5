"""From the stacks of a training that stands still to one line that says who is to blame.

- In: the Python stack of the main thread, torch's flight recorder, the last heartbeat of every rank.
- Here: :func:`waiting_in` names the collective in which a thread waits; :func:`write_stacks` keeps the stacks
  of all threads; :func:`describe` tells those who wait from those who are waited for.
- Next: ``training/resilience/watchdog.py`` prints the line and ends the process.

The rank that complains is hardly ever the one that is ill.  Every rank but one stands
in a collective, and the one that does not is the cause; where all of them do, they stand in different ones.
On NCCL no stack shows it, and the flight recorders of all ranks decide
(``training/resilience/flight_record.py``).
"""

from __future__ import annotations

import contextlib
import faulthandler
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from dualroute import compat
from dualroute.training.resilience import flight_record
from dualroute.training.resilience.flight_record import MOST_NAMED, ranks
from dualroute.training.resilience.heartbeat import (
    CUT_OFF,
    FAILED,
    FINISHED,
    Beat,
    process_is_gone,
    this_place,
)

#: functions of torch.distributed and deepspeed.comm in which a rank waits for others
COLLECTIVES = frozenset(
    "all_reduce all_reduce_coalesced all_gather all_gather_into_tensor all_gather_object "
    "all_gather_coalesced "
    "all_to_all all_to_all_single barrier monitored_barrier broadcast broadcast_object_list gather "
    "gather_object reduce reduce_scatter reduce_scatter_tensor scatter scatter_object_list send recv "
    "init_process_group new_group inference_all_reduce allgather_fn reduce_scatter_fn "
    "all_gather_into_tensor_coalesced destroy_process_group wait".split()
)
_COMMUNICATION = ("torch/distributed/", "deepspeed/comm/")
_BACKWARD = "torch/autograd/graph.py"


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def main_frame() -> FrameType | None:
    """The innermost Python frame of the main thread."""
    return sys._current_frames().get(threading.main_thread().ident or 0)


def waiting_in(frame: FrameType | None, *, reduces_in_backward: bool = False) -> str:
    """Name of the collective that a thread waits in, innermost frame ``frame``; "" where it does not.

    Args:
        reduces_in_backward: Gradients are reduced inside autograd (DDP), which Python cannot look into: a
            thread whose innermost frame is the autograd engine's is taken to wait there.
    """
    name = ""
    for depth, inner in enumerate(_frames(frame)):
        file, function = inner.f_code.co_filename.replace("\\", "/"), inner.f_code.co_name
        if depth == 0 and file.endswith(_BACKWARD) and reduces_in_backward:
            return "the all_reduce of gradients inside backward"
        package = next((part for part in _COMMUNICATION if part in file), None)
        if package and function in COLLECTIVES:
            name = f"{package.strip('/').replace('/', '.')}.{function}"
        elif name and package is None:
            break  # left the library: the outermost name of the innermost call is what was called
    return name


def place_of(frame: FrameType | None) -> str:
    """``file.py:12 in function`` of the innermost frame that is no installed library's."""
    innermost = None
    for inner in _frames(frame):
        innermost = innermost or inner
        file = inner.f_code.co_filename
        if not ("site-packages" in file or "/lib/python" in file or file.startswith("<")):
            return f"{file}:{inner.f_lineno} in {inner.f_code.co_name}"
    if innermost is None:
        return ""
    return f"{innermost.f_code.co_filename}:{innermost.f_lineno} in {innermost.f_code.co_name}"


def flight_of_this_rank(limit: float = 5.0) -> dict[str, Any]:
    """Where this rank stands, by torch's flight recorder (:func:`flight_record.summary`); {} where unknown.

    Args:
        limit: Seconds after which a recorder that does not answer is left alone.
    """
    found: dict[str, Any] = {}

    def read() -> None:
        with contextlib.suppress(Exception):  # a debugging aid of torch; it must never be what fails
            found.update(flight_record.summary(compat.flight_records()))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(limit)
    return dict(found)


def write_flight_dump(path: Path) -> None:
    """The recorder's whole dump, for ``torchfrtrace``; nothing where it cannot be had."""
    try:
        dump = compat.flight_dump()
    except Exception:
        return
    path.write_bytes(dump)


def started_collectives(flight: Mapping[str, Any]) -> int:
    """Collectives started by this rank on its busiest group; -1 where unknown."""
    return max((group[0] for group in flight.get("groups", {}).values()), default=-1)


def write_stacks(path: Path, headline: str, error: BaseException | None = None) -> None:
    """All threads' Python stacks in ``path``, below ``headline``, and the traceback of ``error``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as stream:
        stream.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {headline}\n\n")
        if error is not None:
            stream.write("".join(traceback.format_exception(error)) + "\n")
        stream.flush()
        faulthandler.dump_traceback(stream, all_threads=True)


def describe(beats: Mapping[int, Beat | None], silent: Sequence[int], why: str) -> str:
    """What is wrong, in one line.

    Args:
        beats: The last beat of every rank, None of one that never wrote.
        silent: Ranks that did not answer the alarm.
        why: What raised the alarm, for the case that nothing better can be said.
    """
    never = [rank for rank, beat in beats.items() if beat is None]
    known = {rank: beat for rank, beat in beats.items() if beat is not None}
    failed = [beat for beat in known.values() if beat.state == FAILED]
    dead = [beat for rank, beat in known.items() if rank in silent and process_is_gone(beat)]
    dead = [beat for beat in dead if beat.state not in (FAILED, CUT_OFF, FINISHED)]
    mute = [known[rank] for rank in silent if rank in known and known[rank] not in [*failed, *dead]]
    mute = [beat for beat in mute if beat.state not in (FINISHED, CUT_OFF)]
    answered = [beat for rank, beat in known.items() if rank not in silent]
    working = [beat for beat in answered if not beat.waits_in]
    parts: list[str] = []
    parts += _named(dead, lambda beat: f"is dead: its process is gone, last seen {_when(beat)}")
    parts += _named(failed, lambda beat: f"failed {_when(beat)}: {beat.error}")
    parts += _named(mute, lambda beat: f"{_mute(beat)}, last seen {_when(beat)}")
    if never:
        parts.append(f"{ranks(never)} never started")
    if not parts and working:
        parts += _named(working, lambda beat: f"is slow or stuck {_lasting(beat)}, at {beat.where}")
    elif not parts and answered:
        return _by_flight_record(answered) or _disagreement(answered)
    waiting = _waiting([beat for beat in answered if beat.waits_in])
    return "; ".join([*(parts or [why]), *waiting])


def _named(beats: Sequence[Beat], what: Callable[[Beat], str]) -> list[str]:
    """``what`` of each, the first few by name."""
    named = [f"{_who(beat)} {what(beat)}" for beat in beats[:MOST_NAMED]]
    rest = [beat.rank for beat in beats[MOST_NAMED:]]
    return [*named, f"the same of {len(rest)} more: {ranks(rest)}"] if rest else named


def _by_flight_record(answered: Sequence[Beat]) -> str:
    """Why all ranks wait, where at least one waits in what no stack shows; "" where it is not known."""
    if not any(beat.waits_by_record for beat in answered):
        return ""
    found = flight_record.verdict({beat.rank: beat.flight for beat in answered if beat.flight})
    if not found:
        return ""
    return f"{found} (all ranks {_lasting(answered[0])}, by torch's flight recorder)"


def _who(beat: Beat) -> str:
    return f"rank {beat.rank} (host {beat.host}, pid {beat.pid})"


def _when(beat: Beat) -> str:
    return f"in {beat.phase} of step {beat.step}"


def _lasting(beat: Beat) -> str:
    return f"{_when(beat)} for {beat.seconds:.0f} s"


def _mute(beat: Beat) -> str:
    if beat.place == this_place():
        return "lives but does not answer (stopped, or in C code that holds the interpreter lock)"
    return "no longer writes its heartbeat (dead, or its host or file system is away)"


def _waiting(waiting: Sequence[Beat]) -> list[str]:
    groups: dict[str, list[int]] = {}
    for beat in waiting:
        groups.setdefault(f"in {beat.waits_in} ({_when(beat)})", []).append(beat.rank)
    lines = [f"{ranks(who)} {'wait' if len(who) > 1 else 'waits'} {what}" for what, who in groups.items()]
    rest = sum(len(who) for who in list(groups.values())[MOST_NAMED:])
    return [*lines[:MOST_NAMED], f"{rest} more ranks wait elsewhere"] if rest else lines


def _disagreement(answered: Sequence[Beat]) -> str:
    """All ranks wait for each other: which of them did another number of collectives?"""
    text = "all ranks wait, but not in the same collective: " + "; ".join(
        f"rank {beat.rank} waits in {beat.waits_in} ({_when(beat)}, at {beat.where}"
        + (f", {beat.collectives} collectives started)" if beat.collectives >= 0 else ")")
        for beat in answered[:MOST_NAMED]
    )
    counts = {beat.rank: beat.collectives for beat in answered if beat.collectives >= 0}
    if len(set(counts.values())) > 1:
        fewest = [rank for rank, count in counts.items() if count == min(counts.values())]
        text += (
            f"; {ranks(fewest)} started the fewest: a collective was left out there, or is too many elsewhere"
        )
    elif len({(beat.waits_in, beat.step, beat.phase) for beat in answered}) == 1:
        text = (
            f"all ranks wait in {answered[0].waits_in} ({_lasting(answered[0])}): the connection between "
            f"them does not carry it through"
        )
    return text
