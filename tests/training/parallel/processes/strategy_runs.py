"""Trains a tiny model in one process or in the ranks of a launcher, as test_strategy.py asks, and reports.

Called by a launcher as ``strategy_runs.py CASES.json RESULTS.json``; CASES holds arguments of :func:`run`.
All cases run in the same processes, one Trainer after the other; rank 0 writes the results.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from dualroute.training.config import ParallelConfig
from dualroute.training.parallel.environment import World, detect_world, strip_local_rank
from dualroute.training.parallel.strategy import build_strategy
from dualroute.training.step.step_guard import StepGuard

GLOBAL_BATCH = 8
FEATURES, CLASSES = 12, 5


class Slices(IterableDataset):
    """Endless: micro-step j on rank r takes samples (j*world + r)*micro and on of a step's global batch.

    Like our plan it starts at its own position (``first_step``): Lightning does not fast-forward a loader.
    """

    def __init__(self, world: World, accumulation: int, first_step: int = 0) -> None:
        self.micro = GLOBAL_BATCH // world.world_size // accumulation
        self.world, self.accumulation, self.first_step = world, accumulation, first_step

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for step in itertools.count(self.first_step):
            draw = torch.Generator().manual_seed(step)
            x = torch.randn(GLOBAL_BATCH, FEATURES, generator=draw)
            y = torch.randint(CLASSES, (GLOBAL_BATCH,), generator=draw)
            for j in range(self.accumulation):
                start = (j * self.world.world_size + self.world.rank) * self.micro
                yield x[start : start + self.micro], y[start : start + self.micro]


class Module(LightningModule):
    """A two-layer classifier that can spoil a step: its loss, only its gradient, or neither (a verdict)."""

    def __init__(
        self, poison: dict[str, list[int]], skip: list[int], optimizer: str, first_step: int
    ) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(7)
            self.net = torch.nn.Sequential(
                torch.nn.Linear(FEATURES, 16),
                torch.nn.Tanh(),
                torch.nn.LayerNorm(16),
                torch.nn.Linear(16, CLASSES),
            )
        self.step_guard = StepGuard()
        self.poison, self.skip, self.kind = poison, skip, optimizer
        self.step = first_step
        self.outcomes: list[tuple[float, float, bool]] = []
        self.rates: list[float] = []
        self.scales: list[float] = []  # by which the gradients of each step were multiplied

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        logits = self.net(x.to(next(self.net.parameters()).dtype))
        loss = torch.nn.functional.cross_entropy(logits.float(), y)
        last = (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0
        if (
            last and self.trainer.global_rank == self.trainer.world_size - 1
        ):  # one rank, one micro-batch is enough
            if self.step in self.poison.get("loss", []):
                loss = loss * math.nan
            if self.step in self.poison.get("gradient", []):
                logits.register_hook(lambda gradient: gradient * math.nan)
        self.step_guard.record(loss)
        return loss

    def should_skip_step(self, loss: float, grad_norm: float) -> bool:
        return self.step in self.skip

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        outcome = self.step_guard.check(self.trainer, self.should_skip_step)
        if outcome is not None:
            self.outcomes.append(tuple(outcome))
            self.rates.append(self.lr_schedulers().get_last_lr()[0])
            engine = getattr(self.trainer.strategy, "deepspeed_engine", None)
            self.scales.append(float(getattr(getattr(engine, "optimizer", None), "loss_scale", 1.0)))
            self.step += 1

    def configure_optimizers(self) -> Any:
        decay = [p for p in self.net.parameters() if p.ndim > 1]
        rest = [p for p in self.net.parameters() if p.ndim <= 1]
        groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
        made = torch.optim.AdamW(groups, lr=1e-2) if self.kind == "adamw" else torch.optim.SGD(groups, lr=0.3)
        schedule = torch.optim.lr_scheduler.LambdaLR(made, lambda step: 1 / (1 + step / 20))
        return {"optimizer": made, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def run(
    strategy: str = "auto",
    zero_stage: int | None = None,
    steps: int = 20,
    accumulation: int = 1,
    clip: float | None = None,
    poison: dict[str, list[int]] | None = None,
    skip: list[int] | None = None,
    optimizer: str = "adamw",
    precision: str = "32-true",
    offload: bool = False,
    deepspeed_config: str | None = None,
    save: str | None = None,
    load: str | None = None,
    first_step: int = 0,
    hpz: int = 1,
    gradient_reduction: Any = "auto",
) -> dict[str, Any]:
    """One training; what every rank saw (lists over steps) and how Lightning and DeepSpeed counted."""
    world = detect_world()
    data = Slices(world, accumulation, first_step)
    config = ParallelConfig(
        strategy,
        zero_stage,
        offload_optimizer=offload,
        deepspeed_config=deepspeed_config,
        zero_hpz_partition_size=hpz,
        gradient_reduction=gradient_reduction,
    )
    trainer = Trainer(
        strategy=build_strategy(
            config,
            world,
            micro_batch=data.micro,
            accumulation=accumulation,
            gradient_clip=clip,
            precision=precision,
            accelerator="cpu",
        ),
        accelerator="cpu",
        devices=world.local_world_size,
        num_nodes=world.num_nodes,
        precision=precision,
        accumulate_grad_batches=accumulation,
        gradient_clip_val=clip,
        max_steps=steps,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Module(poison or {}, skip or [], optimizer, first_step)
    trainer.fit(
        module, DataLoader(data, batch_size=None), ckpt_path=load, weights_only=False if load else None
    )
    if save:
        trainer.save_checkpoint(save)
    losses, norms, skipped = (list(column) for column in zip(*module.outcomes, strict=True))
    engine = getattr(trainer.strategy, "deepspeed_engine", None) if strategy == "deepspeed" else None
    return {
        "losses": losses,
        "norms": norms,
        "skipped": skipped,
        "rates": module.rates,
        "scales": module.scales,
        "global_step": trainer.global_step,
        "world_size": trainer.world_size,
        "engine_steps": None if engine is None else engine.global_steps,
        "reduced_in": None if engine is None else str(engine.communication_data_type),
    }


def main(argv: list[str]) -> None:
    cases, results = (Path(name) for name in strip_local_rank(argv))
    answers = []
    for case in json.loads(cases.read_text()):
        try:
            answers.append(run(**case))
        except Exception:
            print(f"case {case} failed", file=sys.stderr)
            raise
    if detect_world().rank == 0:
        results.write_text(json.dumps(answers))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    main(sys.argv[1:])
