"""The one exception that means "you, the user, can mend this".

Everything in dualroute that refuses an input raises :class:`UserError` with a single line that names the
file, key or value, what is wrong with it and what to do.  The command line prints that line and exits with
status 2; any other exception is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

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
