"""How the threads of a process wait for work, and how many it has: decided before torch is loaded.

- In: the environment, as the user and the launcher left it.
- Here: :func:`prepare`, the first thing that every entry does (the ``dualroute`` command, ``launch/*.py``,
  each rank, the tests), fills in two variables of OpenMP, each only where the user has said nothing about it.
- Next: torch's OpenMP library reads them once, when it is loaded; processes started from here inherit them.

**Waiting.** A thread that has nothing to do until the next parallel loop runs in circles for a while, so that
it need not be woken.  GNU's OpenMP looks 300,000 times, which takes milliseconds.  On a machine that other
processes use, that time is taken from the thread it waits for.  `SPINS` bridges the gaps between two loops of
a training step and is soon over where there is nothing to bridge (docs/training.md has the figures).

**How many.** Without OMP_NUM_THREADS each rank starts as many threads as the host has cores.  Ranks of one
host share its cores, so each takes its part of them.  `torchrun` sets OMP_NUM_THREADS=1 itself, and
``deepspeed --bind_cores_to_rank`` the cores of each rank: both are left as they are.

Only the standard library is imported here.
"""

from __future__ import annotations

import os
import re
from collections.abc import MutableMapping

#: times that a waiting thread looks for work before it sleeps
SPINS = 1000
#: whoever sets one of these has decided how threads wait
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
NUMBER = "OMP_NUM_THREADS"


def prepare(environ: MutableMapping[str, str] = os.environ) -> None:
    """Set what OpenMP reads when torch is loaded; call it before that."""
    spin_briefly(environ)
    share_cores(environ)


def spin_briefly(environ: MutableMapping[str, str] = os.environ) -> None:
    """Let waiting threads sleep soon, unless the user has said how they wait."""
    if not any(environ.get(name) for name in WAITING):
        environ["GOMP_SPINCOUNT"] = str(SPINS)


def share_cores(environ: MutableMapping[str, str] = os.environ) -> None:
    """Give this rank its part of the cores of its host, unless user or launcher has given it a number."""
    cores, ranks = _cores(), _ranks_of_host(environ)
    if environ.get(NUMBER) or ranks < 2:
        return
    of_job = environ.get("SLURM_CPUS_ON_NODE", "")
    if of_job.isdecimal() and cores < int(of_job):  # Slurm has bound each task to cores of its own
        return
    environ[NUMBER] = str(max(1, cores // ranks))


def _ranks_of_host(environ: MutableMapping[str, str]) -> int:
    """Ranks that the launcher says it started on this host; else 1.

    torchrun's name for it, deepspeed's, and that of a step of srun, such as ``4(x2),3`` for three hosts.
    """
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        if environ.get(name, "").isdecimal():
            return int(environ[name])
    tasks = re.findall(r"(\d+)(?:\(x\d+\))?", environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    return max(map(int, tasks), default=1)


def _cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
