"""``dualroute finetune`` for launchers that start a file: deepspeed, torchrun, srun, or python itself.

deepspeed --num_accelerators 2 launch/finetune.py --config configs/task/sst2.yaml
torchrun --nproc_per_node 2    launch/finetune.py --config configs/task/sst2.yaml
srun python                    launch/finetune.py --config configs/task/sst2.yaml
"""

import sys

from dualroute import threads
from dualroute.training.resilience import stop_signal

if __name__ == "__main__":
    threads.prepare()
    with stop_signal.one_line("finetune"):
        stop_signal.install()  # before the imports, which take seconds
        from dualroute.cli import main
        from dualroute.training.parallel.environment import strip_local_rank

    sys.exit(main(["finetune", *strip_local_rank(sys.argv[1:])]))
