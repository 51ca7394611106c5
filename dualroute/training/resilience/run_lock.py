"""One training at a time in an output folder.

In: the folder.  Here: rank 0 holds a lock on one of its files as long as it lives, however it dies.  A second
command in the same folder is refused, and told who is there.

The lock is of the kind that belongs to a process and not to an open file (POSIX record
locks), since processes that read data are forked, would keep the other kind, and live a moment longer than a
rank that is killed: too long for who starts it again at once.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from dualroute.errors import UserError
from dualroute.training.parallel.environment import World

LOCK = ".lock"


@contextlib.contextmanager
def locked(output: Path, world: World) -> Iterator[None]:
    """``output``, which exists, for the ranks of ``world`` alone.

    A file system without locks guards nothing, and says nothing.

    Raises:
        UserError: Another training writes there.
    """
    if world.rank != 0:
        yield
        return
    with open(output / LOCK, "a+", encoding="utf-8") as stream:
        if not _lock(stream.fileno()):
            stream.seek(0)
            who = stream.read().strip() or "another process"
            raise UserError(
                f"{output} is being trained in by {who}: wait for it or stop it, or choose another --output"
            )
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        stream.flush()
        yield


def _lock(descriptor: int) -> bool:
    """Whether the lock is ours, or there is no such thing here."""
    try:
        import fcntl

        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        return True
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)
    return True
