"""A LightningModule that gives Monitor and Progress all they ask for, and a Trainer to run it with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

CONTEXT, TOKENS_PER_STEP, FLOPS_PER_TOKEN = 8, 32, 6e3


class Windows(Dataset[dict[str, Tensor]]):
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"segment_ids": torch.arange(CONTEXT) + index}


class RoutedLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(CONTEXT))
        self.collect_statistics = False
        self.statistics: dict[str, Tensor] = {}
        self.collected = 0  # how often statistics were made

    def forward(self, x: Tensor) -> Tensor:
        if self.collect_statistics:
            self.collected += 1
            self.statistics = {"router_entropy": torch.tensor(0.5), "mass_far": torch.tensor(0.25)}
        return x * self.weight


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(RoutedLayer(), RoutedLayer())

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)

    def flops_per_token(self, context: int) -> float:
        assert context == CONTEXT
        return FLOPS_PER_TOKEN


class Monitored(LightningModule):
    """Shrinks its weights; the loss has noise from torch's global generator in it."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()
        self.step_metrics: dict[str, float] = {}
        self.validation_metrics: dict[str, float] = {}
        self.losses: list[float] = []  # of every optimizer step
        self.samples_asked: list[tuple[str, int, int]] = []
        self._sum = 0.0

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.model(batch["segment_ids"].float() / 100).square().mean() + torch.rand(())
        self._sum += loss.item()
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.losses.append(self._sum / self.trainer.accumulate_grad_batches)
        self._sum = 0.0
        self.step_metrics = {
            "loss": self.losses[-1],
            "lr": 0.1,
            "grad_norm": 2.0,
            "z_loss": 0.01,
            "bits_per_byte": 0.7,
            "tokens": (self.trainer.global_step + 1) * TOKENS_PER_STEP,
            "tokens_in_step": TOKENS_PER_STEP,
            "skipped_steps": 3,
            "distill/kl": 0.125,
        }

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        pass

    def on_validation_epoch_end(self) -> None:
        self.validation_metrics = {"loss": 1.0 + self.trainer.global_step, "bits_per_byte": 0.5}

    def generate_sample(self, prompt: str, max_new_tokens: int, seed: int) -> str:
        self.samples_asked.append((prompt, max_new_tokens, seed))
        if prompt == "too long":
            raise ValueError("the prompt has 99 tokens")
        return prompt + " there was"

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(
    module: Monitored,
    folder: Path,
    callbacks: list[Callback],
    *,
    steps: int,
    accumulate: int = 2,
    val_every: int = 3,
    ckpt_path: Path | None = None,
    first_batch: int = 0,
) -> Trainer:
    """Train ``module`` to ``steps`` optimizer steps on the CPU, logging to TensorBoard in ``folder``."""
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        max_epochs=-1,
        accumulate_grad_batches=accumulate,
        val_check_interval=val_every * accumulate,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=-1,
        logger=TensorBoardLogger(folder, name="tensorboard", version="", default_hp_metric=False),
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loaders = DataLoader(Windows(1000), batch_size=2), DataLoader(Windows(2), batch_size=2)
    torch.manual_seed(first_batch)
    trainer.fit(module, *loaders, ckpt_path=ckpt_path, weights_only=False)
    return trainer
