"""The folder that a preparation writes to: for one process at a time, and nobody else's."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from data_prep.notes import STATE_FOLDER
from dualroute.errors import UserError
from dualroute.files import locked

PREPARATION_FILE = "preparation.json"
_LOCK_FILE = ".prepare.lock"


def explain(error: OSError, output: Path) -> UserError:
    """An error of the file system in a preparation, with what to do."""
    where = error.filename2 or error.filename or output  # of a rename, the target
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"{where}: no space left; free some and run again (finished shards are kept)")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return UserError(f"{where}: not writable ({error.strerror}); choose another output folder")
    if error.errno in (errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ELOOP):
        return UserError(
            f"{where}: is in the way ({error.strerror}); remove it, or choose another output folder"
        )
    return UserError(f"{where}: {error.strerror or error}; mend that and run again (it continues)")


@contextlib.contextmanager
def claimed(output: Path) -> Iterator[None]:
    """The output folder, for this process alone; made if need be, and removed again if it stays empty."""
    made = not output.exists()
    if not made and not output.is_dir():
        raise UserError(f"output {output}: exists and is not a folder; choose another")
    output.mkdir(parents=True, exist_ok=True)
    try:
        with locked(output / _LOCK_FILE) as mine:
            if not mine:
                raise UserError(f"output {output}: another preparation is writing there; wait for it")
            yield
    finally:
        if made and not any(output.iterdir()):
            output.rmdir()


def strangers(output: Path) -> list[str]:
    """What a folder without a plan holds besides what a preparation may have left there: cleaned
    documents, and what it was writing when it was killed."""
    names = sorted(path.name for path in output.iterdir() if path.name != _LOCK_FILE)
    return [name for name in names if name != STATE_FOLDER and not name.startswith(f".{PREPARATION_FILE}")]
