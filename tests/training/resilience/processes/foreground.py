"""``dualroute`` as a terminal starts it, also where the tests themselves run in the background.

With PENDING, the name of a signal, that one has been sent already and waits to be unblocked.
"""

import os
import signal
import sys

from dualroute.__main__ import main

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if "PENDING" in os.environ:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGTERM})
        os.kill(os.getpid(), signal.Signals[os.environ["PENDING"]])
    sys.exit(main())
