"""One training at a time in an output folder.

In: the folder.  Here: rank 0 makes it where it is missing and holds a lock on one of its files as long as it
lives, however it dies.  A second command in the same folder is refused, and told who is there.  What else
lies in the folder is looked at after that, so that it stays as it was found.

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
from typing import TextIO

from dualroute.errors import UserError
from dualroute.files import lock_of_process
from dualroute.training.parallel.environment import World

LOCK = ".lock"


@contextlib.contextmanager
def locked(output: Path, world: World) -> Iterator[None]:
    """``output`` for the ranks of ``world`` alone.

    A file system without locks guards nothing, and says nothing.

    Raises:
        UserError: Another training writes there, or the folder cannot be made or written.
    """
    if world.rank != 0:
        yield
        return
    with _open(output) as stream:
        if not lock_of_process(stream.fileno()):
            stream.seek(0)
            who = stream.read(200).strip() or "another process"
            raise UserError(
                f"{output} is being trained in by {who}: wait for it or stop it, or choose another --output"
            )
        _sign(stream, output)
        yield


def _open(output: Path) -> TextIO:
    try:
        if output.is_symlink() and not output.exists():
            target = os.readlink(output)
            raise FileNotFoundError(errno.ENOENT, f"it is a link to {target}, which is not there")
        output.mkdir(parents=True, exist_ok=True)
        if (output / LOCK).exists() and not (output / LOCK).is_file():  # a pipe would be waited for
            raise FileExistsError(errno.EEXIST, f"{LOCK} in it is no file")
        return open(output / LOCK, "a+", encoding="utf-8", errors="replace")
    except OSError as error:
        raise _unusable(output, error) from error


def _sign(stream: TextIO, output: Path) -> None:
    try:
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        stream.flush()
    except OSError as error:
        with contextlib.suppress(OSError):
            stream.close()  # what could not be written is thrown away
        raise _unusable(output, error) from error


def _unusable(output: Path, error: OSError) -> UserError:
    """The line that says why ``output`` cannot be written."""
    reason = error.strerror or str(error)
    if error.errno == errno.EEXIST and not output.is_dir():
        reason = "there is a file of that name"
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    remedy = "make room there, or choose another --output" if full else "choose another --output"
    return UserError(f"output folder {output} cannot be written ({reason}): {remedy}")
