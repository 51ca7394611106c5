"""The launcher that started this rank: whether it still lives, and what its command line was.

- In: the processes above this one.  `torchrun` and `deepspeed` start ranks as children; `deepspeed` on one
  node is two processes, of which the outer one passes no signal on and, when it is killed, leaves the others
  running.
- Here: :func:`watch_launcher` looks at them once a second and asks for a stop, as SIGTERM does, when one is
  gone.  What stands above the launcher (a shell, ``nohup``, a terminal, Slurm) may go as it likes.
- Next: the training saves and ends after its step (``training/resilience/preemption.py``), which also prints
  :func:`command_line`.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from dualroute.training.resilience import stop_signal
from dualroute.training.resilience.heartbeat import started_at

_POLL_SECONDS = 1.0
#: Programs and modules that start ranks, as they stand in the command line of their process.
_PROGRAMS = ("torchrun", "deepspeed", "ds")
_MODULES = (
    "torch.distributed.run",
    "torch.distributed.launch",
    "deepspeed.launcher.launch",
    "deepspeed.launcher.runner",
)


def launchers() -> list[psutil.Process]:
    """From this process's parent up to the outermost launcher; empty where none started it."""
    above: list[psutil.Process] = []
    known = 0
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process().parents():
            above.append(process)
            if _is_launcher(_words(process)):
                known = len(above)
    return above[:known]


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _is_launcher(words: Sequence[str]) -> bool:
    """``torchrun …``, ``python /bin/torchrun …``, ``python -u -m torch.distributed.run …``."""
    if not words:
        return False
    if Path(words[0]).name in _PROGRAMS:
        return True
    if not Path(words[0]).name.startswith("python"):
        return False
    for word, following in zip(words[1:], [*words[2:], ""], strict=True):
        if word == "-m":
            return following in _MODULES
        if not word.startswith("-"):
            return Path(word).name in _PROGRAMS
    return False


@functools.cache
def command_line() -> str:
    """What a person types to run this again: the launcher's command, or this process's own.

    As of the first call, because a launcher that is gone has no command line any more.
    """
    above = launchers()
    words = _words(above[-1]) if above else list(sys.orig_argv)
    if len(words) > 1 and _is_installed(words[1]):
        words = [Path(words[1]).name, *words[2:]]  # python /venv/bin/dualroute
    elif words and _is_installed(words[0]):
        words = [Path(words[0]).name, *words[1:]]
    return shlex.join(words)


def _is_installed(word: str) -> bool:
    """Whether ``word`` is the program that its bare name finds."""
    found = shutil.which(Path(word).name)
    return found is not None and os.path.isabs(word) and os.path.realpath(found) == os.path.realpath(word)


def watch_launcher(poll_seconds: float = _POLL_SECONDS) -> threading.Thread | None:
    """Start a thread that asks for a stop when a launcher above this process is gone.

    Call it early: a launcher that is gone already cannot be found any more.  Returns None where no launcher
    started this process.
    """
    command_line()
    watched: list[tuple[int, float, str]] = []
    for process in launchers():
        with contextlib.suppress(psutil.Error):
            watched.append((process.pid, started_at(process.pid), _name(_words(process))))
    if not watched:
        return None
    thread = threading.Thread(target=_watch, args=(watched, poll_seconds), name="launcher watch", daemon=True)
    thread.start()
    return thread


def _watch(watched: Sequence[tuple[int, float, str]], poll_seconds: float) -> None:
    while True:
        for pid, started, name in watched:
            if _is_gone(pid, started):
                stop_signal.ask(signal.SIGTERM, f"the launcher ({name}, process {pid}) is gone")
                return
        time.sleep(poll_seconds)


def _name(words: Sequence[str]) -> str:
    return next((m for m in _MODULES if m in words), Path(words[1] if len(words) > 1 else "launcher").name)


def _is_gone(pid: int, started: float) -> bool:
    try:
        return started_at(pid) != started or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:
        return False
