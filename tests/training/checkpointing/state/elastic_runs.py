"""Trainings that go on with other ranks and layouts, as the fixture ``elastic`` asks for them.

:func:`launch` starts N ranks (one: a plain process); they run this file, which trains one leg
of every lane after the other, in the same processes.  A leg is the argument list of ``dualroute pretrain``.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import torch

from dualroute.cli import parse_stage
from dualroute.log import to_terminal
from dualroute.training.parallel.environment import detect_world, strip_local_rank
from tests import warm
from tests.conftest import ROOT
from tests.training.step.test_module import environment

STEPS_PER_LEG = 3
RANKS = (2, 1, 4, 2)
ZERO = {
    stage: ["--parallel.strategy", "deepspeed", "--parallel.zero_stage", str(stage)] for stage in range(4)
}
#: {lane: its arguments, leg by leg, on so many ranks as RANKS says}
LANES = {
    "stage1": [ZERO[1]] * 4,
    "stage2": [ZERO[2]] * 4,
    "stage3": [ZERO[3]] * 4,
    "mixed": [ZERO[3], [], ZERO[2], ["--parallel.strategy", "ddp"]],
}
SMALL = (
    "--model.dim 32 --model.num_layers 1 --model.num_heads 4 --model.window 8 --model.block 16 "
    "--model.top_k 1 --model.global_mode routed --data.context 64 --data.val_tokens 256 "
    "--train.micro_batch 2 --train.tokens_per_batch 512 --train.val_every_steps 50 --optim.lr 0.003 "
    "--optim.warmup_steps 2 --optim.schedule constant --checkpoint.every_steps 50 --checkpoint.keep_last 9 "
    "--monitor.log_every_steps 1 --monitor.sample_every_steps 50 --monitor.peak_tflops 0.1"
).split()


def leg(dataset: Path, output: Path, number: int, arguments: list[str]) -> list[str]:
    steps = str(STEPS_PER_LEG * (number + 1))
    return [
        *SMALL, "--data.path", str(dataset), "--output", str(output), "--train.max_steps", steps, *arguments,
    ]  # fmt: skip


def launch(folder: Path, ranks: int, legs: list[list[str]]) -> str:
    """Train ``legs`` on ``ranks`` ranks; what they printed."""
    cases = folder / "legs.json"
    cases.write_text(json.dumps(legs))
    env = {**environment(), "PYTHONPATH": str(ROOT)}
    return warm.ranks(ranks, __file__, [str(cases)], cwd=ROOT, env=env)


def main(argv: list[str]) -> None:
    from dualroute.training.run import run_pretraining

    to_terminal()
    (cases,) = strip_local_rank(argv)
    for arguments in json.loads(Path(cases).read_text()):
        run_pretraining(parse_stage("pretrain", arguments))
        gc.collect()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    print(f"rank {detect_world().rank} is done")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:])
