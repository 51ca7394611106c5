"""Holds a run's lock, as a training does, and has a child that outlives it: lock_holder.py FOLDER SIGN.

SIGN is a file: written when the lock is held; when it is removed, the child ends.
"""

import os
import sys
import time
from pathlib import Path

from dualroute.training.parallel.environment import World
from dualroute.training.resilience.run_lock import locked

folder, sign = map(Path, sys.argv[1:])
with locked(folder, World()):
    sign.touch()
    child = os.fork()  # as processes that read data are
    if child == 0:
        while sign.exists():
            time.sleep(0.05)
        os._exit(0)
    os.waitpid(child, 0)
