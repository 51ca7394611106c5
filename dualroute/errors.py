"""The one exception that means "you, the user, can mend this".

Everything in dualroute that refuses an input raises :class:`UserError` with a single line that names the
file, key or value, what is wrong with it and what to do.  The command line prints that line and exits with
status 2; any other exception is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

#: Exit status of a run that ended early through no fault of its settings (a signal, a stall, the death of a
#: rank): EX_TEMPFAIL of sysexits.h, "run it again".
RUN_AGAIN = 75


class UserError(ValueError):
    """An input that cannot be used; the message is one line for the person who gave it.

    Attributes:
        exit_status: Of the command that ends with it.
    """

    exit_status = 2


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
