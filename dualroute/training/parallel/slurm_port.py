"""The port at which the ranks of a Slurm job meet.

The scripts in ``slurm/`` run on the node where rank 0 will listen, so they choose a port that is free there:

    MASTER_PORT="$(python -m dualroute.training.parallel.slurm_port)"

Ranks that a bare ``srun`` started cannot ask each other before they have met: they take the first port of the
same list (``training/parallel/environment.py``), free or not.  Only the standard library is imported.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator, Mapping

from dualroute.errors import UserError

# Below the ephemeral ports of Linux (32768 and up), so that no outgoing connection sits on ours by chance.
PORTS = range(15000, 30000)
_STRIDE = 1009  # a prime: what a job tries next is not what the next job tries first


def ports_of_job(environ: Mapping[str, str]) -> Iterator[int]:
    """Every port of :data:`PORTS`, in an order that differs between jobs and between the steps of a job."""
    texts = environ.get("SLURM_JOB_ID", ""), environ.get("SLURM_STEP_ID", environ.get("SLURM_STEPID", ""))
    job, step = (int(text) if text.isdigit() else 0 for text in texts)
    for attempt in range(len(PORTS)):
        yield PORTS[(job + _STRIDE * (step + attempt)) % len(PORTS)]


def can_listen(port: int) -> OSError | None:
    """Why this machine cannot listen on ``port`` now; None if it can."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As torch's own store does: a port in TIME_WAIT after the last run is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            return error
    return None


def main() -> int:
    for port in ports_of_job(os.environ):
        if can_listen(port) is None:
            print(port)
            return 0
    raise UserError(f"no port of {PORTS.start} to {PORTS.stop - 1} is free on {socket.gethostname()}")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
