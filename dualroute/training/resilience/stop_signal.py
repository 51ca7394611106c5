"""Signals that ask a command to stop.

- In: SIGUSR1 (``sbatch --signal=USR1@120``, ``scancel --signal=USR1``), SIGTERM (pre-emption, ``kill``),
  SIGINT (Ctrl-C) and SIGHUP (the terminal is gone).
- Here, for a training: :func:`install` is the first thing that its process does, before the seconds that
  imports take, and lasts until the process is gone: a signal must neither kill a rank that still has to save
  nor turn a run that finished just now into a failed one.  Signals are remembered.  Only before the first
  step, where there is nothing to save, Ctrl-C and SIGHUP end the start with
  :class:`~dualroute.errors.Interrupted`.  A second Ctrl-C ends the process at once, also where its main
  thread waits in C code.
- Here, for any other command: :func:`interrupt` lets the signals that end a process unwind it first, so that
  nothing half-written stays.
- Next: ``training/resilience/preemption.py`` asks :func:`received` at step boundaries and acts on it; the
  command line prints :func:`interruption` for the rest.

A signal that came before this process could handle it is not lost.  The sbatch template starts Python with
SIGUSR1 and SIGTERM blocked; what was sent meanwhile is delivered when :func:`install` unblocks them.

Only the standard library is imported here, for speed.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

from dualroute.errors import Interrupted

#: Always remembered: they come from a scheduler, which waits for the checkpoint and may run the job again.
SCHEDULER_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
#: From a person or a terminal.
TERMINAL_SIGNALS = (signal.SIGINT, signal.SIGHUP)

#: Commands whose signals end the training with a checkpoint.
TRAININGS = ("pretrain", "distill", "finetune")
_BEFORE_A_STEP = (
    "no step was taken in this start, checkpoints are as they were; the same command starts it again"
)
#: What an interrupted command leaves, where that is more than "nothing was written".
KEPT = {
    "prepare": "finished parts are kept and the same command goes on from them",
    "cache-logits": "finished shards are kept and the same command goes on from them",
    "pipeline": "finished stages are kept and the same command goes on from them",
    "predict": "rows that were answered are kept and the same command goes on from them",
    **dict.fromkeys(TRAININGS, _BEFORE_A_STEP),
    "generate": "", "evaluate": "", "report": "", "doctor": "", "estimate": "", "submit": "",
}  # fmt: skip

_received = 0
_reason = ""
_installed_in = 0  # process id
_interrupted = 0  # the signal that told the start to end
_training = False  # the first step can be saved: signals only leave their mark
_last_interrupt: float | None = None
_in_library = False  # of a program of the user's, which goes on after the training


# -- a training ----------------------------------------------------------------------------------------------


def install() -> None:
    """Remember signals from now on; at the very end of the process ignore them.

    Call it from the main thread.  Doing so twice does no harm.  A signal that whoever started the process has
    set aside stays so: ``nohup`` ignores SIGHUP, a shell without job control SIGINT in the background.
    """
    global _installed_in
    if installed():
        return
    _installed_in = os.getpid()
    numbers = [*SCHEDULER_SIGNALS, *(n for n in TERMINAL_SIGNALS if signal.getsignal(n) != signal.SIG_IGN)]
    for number in numbers:
        signal.signal(number, _remember)
        # a file or socket operation of a library goes on instead of failing with EINTR
        signal.siginterrupt(number, False)
    if signal.SIGINT in numbers:
        _watch_for_the_second_interrupt()
    _outlast_readers()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SCHEDULER_SIGNALS)
    # Python gives its handlers back some time before the process ends; an ignored signal stays ignored
    atexit.register(_ignore)


@contextlib.contextmanager
def remembered() -> Iterator[None]:
    """Signals are remembered as after :func:`install`, for a training inside a program that goes on after it.

    A second Ctrl-C raises KeyboardInterrupt.  The program's own handlers are back at the end.  Where they are
    not the caller's to change (another thread than the main one, the command itself) nothing is done.
    """
    global _installed_in, _received, _reason, _interrupted, _training, _in_library
    if installed() or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (*SCHEDULER_SIGNALS, *TERMINAL_SIGNALS)}
    kept = {number: handler for number, handler in before.items() if handler is not None}
    pid, _installed_in, _in_library = _installed_in, os.getpid(), True
    try:
        for number in kept:
            signal.signal(number, _remember)
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
        _installed_in, _in_library = pid, False
        _received, _reason, _interrupted, _training = 0, "", 0, False


def installed() -> bool:
    """Whether signals are remembered in this process."""
    return all(signal.getsignal(number) is _remember for number in SCHEDULER_SIGNALS)


def received() -> int:
    """Number of the first signal that asked to stop, 0 if none did."""
    return _received


def reason() -> str:
    """What asked to stop, in words: the name of the signal, or what :func:`ask` was told."""
    return _reason or (signal.Signals(_received).name if _received else "")


def ask(number: int, why: str) -> None:
    """Have the training stop as at signal ``number``, for the reason ``why``; from any thread."""
    global _received, _reason
    if not _received:
        _received, _reason = number, why


def check_start() -> None:
    """Raise Interrupted once more where the start was told to end, and a library has taken the exception."""
    if _interrupted and not _training:
        raise Interrupted(_interrupted)


def training_begins() -> None:
    """From now on, and to the end of the process, there is something to save: Ctrl-C is remembered too."""
    global _training
    check_start()
    _training = True


def _remember(number: int, frame: FrameType | None) -> None:
    global _received, _interrupted
    if os.getpid() != _installed_in:
        return  # a forked process that reads data: the training asks it for batches as long as it needs them
    if _in_library and _received and number == signal.SIGINT:
        raise KeyboardInterrupt
    _received = _received or number
    if number in TERMINAL_SIGNALS and not _training and not _interrupted:
        _interrupted = number
        raise Interrupted(number)


def _ignore() -> None:
    for number in (*SCHEDULER_SIGNALS, *TERMINAL_SIGNALS):
        signal.signal(number, signal.SIG_IGN)


# -- the second Ctrl-C ---------------------------------------------------------------------------------------


def _watch_for_the_second_interrupt() -> None:
    """A thread that hears of signals when they come, whatever the main thread waits for."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    # a forked process would write into the same pipe: its Ctrl-C is the one that this process gets too
    os.register_at_fork(after_in_child=_forget_wakeup)
    threading.Thread(target=_listen, args=(reader,), name="stop signal", daemon=True).start()


def _forget_wakeup() -> None:
    with contextlib.suppress(ValueError):  # forked by another thread
        signal.set_wakeup_fd(-1)


def _listen(reader: int) -> None:
    while True:
        for number in os.read(reader, 512):
            if number == signal.SIGINT:
                _interrupted_at(time.monotonic())


def _interrupted_at(now: float) -> None:
    """One Ctrl-C.  Launchers pass on what their ranks got from the terminal too: that is the same one."""
    global _last_interrupt
    same = 3.0 if "RANK" in os.environ else 0.5
    if _last_interrupt is None:
        _last_interrupt = now
        if _training:
            _say(
                "SIGINT: stops after the step that runs, with a checkpoint "
                "(Ctrl-C once more: at once, without one)"
            )
    elif now - _last_interrupt >= same:
        _say(
            "SIGINT again: stopped at once; the checkpoints before are kept, and the same command continues "
            "from the newest"
            if _training
            else "SIGINT again: stopped at once"
        )
        os._exit(128 + signal.SIGINT)


def _say(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):
            os.write(2, f"\ndualroute: {line}\n".encode())


# -- output that nobody reads any more -----------------------------------------------------------------------


class _Lasting(io.FileIO):
    """A standard stream whose reader may go: a training does not end because its terminal did.

    Ctrl-C also ends the ``tee`` behind a pipe, and after SIGHUP the terminal takes nothing any more.
    """

    def write(self, data: object) -> int:
        try:
            return super().write(data)  # type: ignore[arg-type]
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            return memoryview(data).nbytes  # type: ignore[arg-type]


def _outlast_readers() -> None:
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        try:
            descriptor = stream.fileno()
        except (AttributeError, OSError, ValueError):
            continue  # none, or not a file
        stream.flush()
        raw = _Lasting(descriptor, "w", closefd=False)
        lasting = io.TextIOWrapper(
            io.BufferedWriter(raw),
            encoding=stream.encoding,
            errors=stream.errors,
            line_buffering=name == "stderr" or stream.isatty(),
        )
        setattr(sys, name, lasting)


# -- any other command ---------------------------------------------------------------------------------------


def interrupt() -> None:
    """From now on SIGTERM and SIGHUP unwind this process as Ctrl-C does, instead of ending it where it is."""
    global _installed_in
    _installed_in = os.getpid()
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, _unwind)


def _unwind(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)  # the second one ends it
    if os.getpid() != _installed_in:
        os.kill(os.getpid(), number)  # a forked process has nothing to tidy up
        return
    raise Interrupted(number)


def interruption(command: str, error: BaseException) -> tuple[str, int]:
    """The line and the exit status of a ``command`` that a signal has ended."""
    number = error.number if isinstance(error, Interrupted) else int(signal.SIGINT)
    kept = KEPT.get(command, "nothing was written")
    line = f"dualroute {command}: interrupted by {signal.Signals(number).name}"
    return line + (f": {kept}" if kept else ""), 128 + number


@contextlib.contextmanager
def one_line(command: str) -> Iterator[None]:
    """Around the imports of a process: a signal among them ends it with one line, too.

    Raises:
        SystemExit: With the status of :func:`interruption`.
    """
    try:
        yield
    except (KeyboardInterrupt, Interrupted) as error:
        line, status = interruption(command, error)
        print(line, file=sys.stderr)
        sys.exit(status)
