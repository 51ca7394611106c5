"""``dualroute doctor`` for launchers that start a file, to examine all ranks together.

torchrun --nproc_per_node 2 launch/doctor.py --output runs
srun python                 launch/doctor.py --output /shared/runs
"""

import sys

from dualroute import threads
from dualroute.training.resilience import stop_signal

if __name__ == "__main__":
    stop_signal.interrupt()
    threads.prepare()
    with stop_signal.one_line("doctor"):
        from dualroute.cli import main
        from dualroute.training.parallel.environment import strip_local_rank

    sys.exit(main(["doctor", *strip_local_rank(sys.argv[1:])]))
