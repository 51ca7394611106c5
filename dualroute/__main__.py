"""``python -m dualroute STAGE …``, the ``dualroute`` command.

A training has to survive a signal from its first moment on, and torch reads once how its threads wait: both
come before the imports.
"""

import os
import sys

from dualroute import threads


def main() -> int:
    """Entry point of the process; see :func:`dualroute.cli.main`."""
    if "_ARGCOMPLETE" in os.environ:  # a shell asks how a line may go on
        from dualroute.cli.completion import complete

        complete()
    threads.prepare()
    from dualroute.training.resilience import stop_signal

    command = sys.argv[1] if len(sys.argv) > 1 else ""
    with stop_signal.one_line(command):
        if command in stop_signal.TRAININGS:
            stop_signal.install()
        from dualroute.cli import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
