"""The one exception that means "you, the user, can mend this".

Everything in dualroute that refuses an input raises :class:`UserError` with a single line that names the
file, key or value, what is wrong with it and what to do.  The command line prints that line and exits with
status 2; any other exception is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

import errno
import re
import unicodedata

#: Exit status of a run that ended early through no fault of its settings (a signal, a stall, the death of a
#: rank): EX_TEMPFAIL of sysexits.h, "run it again".
RUN_AGAIN = 75


class UserError(ValueError):
    """An input that cannot be used; the message is one line for the person who gave it.

    Attributes:
        exit_status: Of the command that ends with it.
    """

    exit_status = 2


def other_remedy(error: UserError, remedy: str) -> UserError:
    """The same problem with another way out: what stands behind the line's last semicolon is replaced."""
    return UserError(f"{str(error).rpartition('; ')[0] or error}; {remedy}")


class Interrupted(BaseException):
    """A signal ended the command before it was done.

    Like KeyboardInterrupt no Exception, so that nothing takes it for an error of its own; and not a
    KeyboardInterrupt, which Lightning turns into a status of 1 without a word.

    Attributes:
        number: The signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


_NO_ROOM = {
    errno.ENOSPC: "no space is left",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "a file may not grow further",
}
#: What to lower where a training has no room in memory.
_LOWER = (
    "lower train.micro_batch (the batch stays as it is), set train.activation_checkpointing full, raise "
    "parallel.zero_stage on several ranks, or shorten data.context"
)


def exhaustion(error: BaseException, command: str) -> str | None:
    """One line where ``error`` says that memory or a disk is used up, else None.

    Args:
        error: What ended a command.
        command: Its name; a training is told which keys to lower.
    """
    said = " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        where = f" in {error.filename}" if error.filename else ""
        return f"{_NO_ROOM[error.errno]}{where}: make room there and run the same command again"
    of_torch = type(error).__name__ == "OutOfMemoryError"  # of its GPUs; torch is not imported for this
    of_host = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    of_host |= isinstance(error, RuntimeError) and "can't allocate memory" in said
    killed = (
        isinstance(error, RuntimeError) and "DataLoader worker" in said and "killed by signal: Killed" in said
    )
    if not (of_torch or of_host or killed):
        return None
    if killed:
        what = "a process that reads data was killed, as the system does when memory is used up"
    else:
        what = f"out of memory ({said[:160] or 'of the host'})"
    training = command in ("pretrain", "distill", "finetune", "pipeline")
    remedy = _LOWER if training else "use a smaller batch or a machine with more memory"
    return f"{what}: {remedy}" + ("; data.num_workers counts too" if killed else "")


def printable(text: str) -> str:
    """``text`` without anything that a terminal would obey: control characters, directions of writing and
    bytes of file names that are no text are written as escapes.  Line ends and tabs stay."""
    return "".join(
        character.encode("unicode_escape" if character < "\ud800" else "ascii", "backslashreplace").decode()
        if character not in "\n\t" and unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")
        else character
        for character in text
    )


def one_line(message: str) -> str:
    """A message as the one line that is shown: nothing of it is lost, nothing in it controls the terminal.

    A DataLoader's worker wraps an error in its own traceback; the message is what follows the last name of an
    exception in it.
    """
    if message.startswith("Caught ") and "Original Traceback" in message:
        message = re.split(r"^[\w.]+(?:Error|Exception): ", message, flags=re.MULTILINE)[-1]
    lines = [" ".join(line.split()) for line in printable(message).splitlines()]
    folded = ""
    for line in filter(None, lines):
        if folded:
            folded += " " if folded[-1] in ".,:;-" else "; "
        folded += line
    return folded
