"""Distillations one after the other in the same ranks, as test_teacher.py asks for them.

torchrun --nproc_per_node N tests/distillation/distil_runs.py RUNS.json, which holds argument lists of
``dualroute distill``.  Each rank prints how many bytes of its teacher's layers it holds, before and after
they are divided.
"""

from __future__ import annotations

import gc
import json
import sys
from functools import partialmethod
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from dualroute.cli import parse_stage
from dualroute.distillation.run import run_distillation
from dualroute.distillation.teacher import Teacher
from dualroute.training.parallel.environment import detect_world, strip_local_rank


def held(teacher: Teacher) -> int:
    parts = (p.to_local() if isinstance(p, DTensor) else p for p in teacher.model.layers.parameters())
    return sum(part.untyped_storage().nbytes() for part in parts if not part.is_meta)


divide = Teacher.shard


def divide_and_tell(teacher: Teacher, run: int) -> None:
    before = held(teacher)
    divide(teacher)
    print(f"rank {detect_world().rank} of run {run}: {before} -> {held(teacher)} bytes", flush=True)


def main(argv: list[str]) -> None:
    (runs,) = strip_local_rank(argv)
    for number, arguments in enumerate(json.loads(Path(runs).read_text())):
        Teacher.shard = partialmethod(divide_and_tell, number)
        run_distillation(parse_stage("distill", arguments))
        gc.collect()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:])
