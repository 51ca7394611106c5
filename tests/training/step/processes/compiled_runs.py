"""Trainings one after the other in the same ranks, as test_compilation.py asks for them.

torchrun --nproc_per_node N tests/training/step/processes/compiled_runs.py RUNS.json, which holds argument
lists of ``dualroute pretrain``.  Layers are compiled without the code generator, which is not what is asked
about.
"""

from __future__ import annotations

import gc
import json
import sys
from functools import partial
from pathlib import Path

import torch

from dualroute.cli import parse_stage
from dualroute.training import initial_model, run
from dualroute.training.parallel.environment import strip_local_rank
from dualroute.training.step.compilation import compile_layers


def main(argv: list[str]) -> None:
    (runs,) = strip_local_rank(argv)
    initial_model.compile_layers = partial(compile_layers, backend="aot_eager")
    for arguments in json.loads(Path(runs).read_text()):
        torch._dynamo.reset()
        run.run_pretraining(parse_stage("pretrain", arguments))
        gc.collect()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:])
