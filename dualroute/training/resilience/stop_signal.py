"""The signal that asks a training to stop: it is remembered, and nothing else happens.

- In: SIGUSR1 (``sbatch --signal=USR1@120``, ``scancel --signal=USR1``) or SIGTERM (pre-emption, ``kill``).
- Here: :func:`install` is the first thing that a training process does, before the seconds that imports take,
  and lasts until the process is gone: a signal must neither kill a rank that still has to save nor turn a run
  that finished just now into a failed one.
- Next: ``training/resilience/preemption.py`` asks :func:`received` at step boundaries and acts on it.

A signal that came before this process could handle it is not lost.  The sbatch template
starts Python with both signals blocked; what was sent meanwhile is delivered when :func:`install` unblocks
them.

Only the standard library is imported here, for speed.
"""

from __future__ import annotations

import atexit
import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)

_received = 0


def install() -> None:
    """Remember SIGUSR1 and SIGTERM from now on; at the very end of the process ignore them.

    Call it from the main thread.  Doing so twice does no harm.
    """
    if installed():
        return
    for number in STOP_SIGNALS:
        signal.signal(number, _remember)
        # a file or socket operation of a library goes on instead of failing with EINTR
        signal.siginterrupt(number, False)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    # Python gives its handlers back some time before the process ends; an ignored signal stays ignored
    atexit.register(_ignore)


def installed() -> bool:
    """Whether signals are remembered in this process."""
    return all(signal.getsignal(number) is _remember for number in STOP_SIGNALS)


def received() -> int:
    """Number of the last signal that asked to stop, 0 if none did."""
    return _received


def _remember(number: int, frame: FrameType | None) -> None:
    global _received
    _received = number


def _ignore() -> None:
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
