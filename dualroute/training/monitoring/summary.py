"""What a run says of itself at its start and at its end.

In: a run that was found sound.  Out: lines for the terminal, of rank 0 only: what is trained, on what, where,
and when it is done, where the model lies and what can be done with it.  What somebody would want to know
before hours are spent (a text that is read many times over, settings that have no effect here, a learning
rate that jumps) is a warning.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dualroute.attention.backend import describe
from dualroute.data.window_module import WindowDataModule
from dualroute.model import DualRoutingTransformer
from dualroute.model.checkpoint.format import Checkpoint
from dualroute.training.checkpointing.resumed_settings import learning_rate_note
from dualroute.training.config import PretrainConfig
from dualroute.training.monitoring.progress import format_count
from dualroute.training.parallel.environment import World
from dualroute.training.parallel.strategy import settings_without_effect
from dualroute.training.step.token_count import TokenCount

#: Passes over a text up to which it teaches about as much as new text would.
MANY_EPOCHS = 4
log = logging.getLogger(__name__)


def epochs(tokens: int, data: WindowDataModule) -> float:
    """Passes over the training data that ``tokens`` are."""
    return tokens / (data.plan.windows_per_epoch * data.context)


def _of_what(tokens: int, data: WindowDataModule) -> str:
    """Passes over the text, or over each of the sources."""
    if not data.val_sources:
        return f"{epochs(tokens, data):.3g} epochs of {data.data_name}"
    passes = data.epochs_at(tokens // data.context)
    return "epochs of " + ", ".join(f"{name} {count:.3g}" for name, count in passes.items())


def what_is_trained(
    operation: str,
    model: DualRoutingTransformer,
    config: PretrainConfig,
    data: WindowDataModule,
    world: World,
    count: TokenCount,
    device: torch.device,
) -> Iterator[str]:
    """Model and data, then machine and folder: two lines, or three where weights are frozen."""
    steps = count.total_steps(config.train)
    tokens, shape = count.at(steps), model.config
    yield (
        f"{operation}: {format_count(model.num_parameters())} parameters ({shape.attention} attention, "
        f"{shape.num_layers} layers of width {shape.dim}), {tokens:,} tokens in {steps:,} steps of "
        f"{config.train.tokens_per_batch:,} = {_of_what(tokens, data)}"
    )
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    if frozen:
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        yield f"{format_count(trained)} parameters are trained, {format_count(frozen)} stay as they are"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    yield (
        f"on {world.world_size} rank(s), {name}, precision {config.train.precision} (float32 "
        f"products: {torch.get_float32_matmul_precision()}), {describe(device)}; "
        f"output {config.output}"
    )


def warnings_at_start(
    config: PretrainConfig,
    data: WindowDataModule,
    world: World,
    count: TokenCount,
    resumed: Checkpoint | None,
    operation: str = "pretrain",
) -> Iterator[str]:
    """What may not be meant."""
    samples = count.at(count.total_steps(config.train)) // data.context
    yield from data.over_max_epochs(samples)
    for name, passes in data.epochs_at(samples).items():
        if passes <= MANY_EPOCHS or operation == "finetune":  # whose metric and best checkpoint show it
            continue
        read = name if data.val_sources else "the training text"
        yield (
            f"{read} is read {passes:.3g} times: past about {MANY_EPOCHS} times it teaches less and less, "
            f"and a large model learns it by heart (Muennighoff et al. 2023, "
            f"https://arxiv.org/abs/2305.16264); prepare more text, or train on fewer tokens"
        )
    without_effect = settings_without_effect(config.parallel, world)
    if without_effect is not None:
        yield without_effect
    if config.train.precision == "fp8" and not torch.cuda.is_available():
        yield "train.precision fp8 is emulated on a CPU: the numbers of a GPU, slower than bf16-mixed"
    if config.train.recompute_every_layers > 1 and config.train.activation_checkpointing == "none":
        yield (
            f"train.recompute_every_layers {config.train.recompute_every_layers} has no effect, because "
            f"train.activation_checkpointing is none: give full or feed_forward"
        )
    if resumed is not None:
        jump = learning_rate_note(resumed, config, count)
        if jump is not None:
            yield jump


def what_comes_next(output: Path, config: PretrainConfig, operation: str = "pretrain") -> str:
    """Commands for a trained model."""
    run, shards = shlex.quote(str(output)), shlex.quote(str(config.data.path))
    if operation == "finetune":
        return (
            f"next: dualroute evaluate --checkpoint {run}, dualroute predict --checkpoint {run} --input … "
            f"--output …, dualroute report --run {run}"
        )
    if not config.model.causal:
        return f"next: dualroute finetune --init_from {run} …, dualroute report --run {run}"
    return (
        f'next: dualroute generate --checkpoint {run} --prompt "…", dualroute evaluate --checkpoint {run} '
        f"--data {shards}, dualroute report --run {run}"
    )


def what_was_trained(
    output: Path, config: PretrainConfig, checkpoint: Checkpoint, operation: str = "pretrain"
) -> Iterator[str]:
    """Where the model lies, and what can be done with it: two lines."""
    said: dict[str, Any] = checkpoint.metadata
    loss = f", validation loss {checkpoint.val_loss:.4f}" if checkpoint.val_loss is not None else ""
    score = said.get("score")
    if score is not None and score["name"] != "loss":
        best = (output / "checkpoints" / "best").resolve().name
        loss += f", {score['name']} {score['value']:.4f}; best by it: {best}"
    yield f"done: {checkpoint.folder} ({checkpoint.step:,} steps, {said.get('tokens', 0):,} tokens{loss})"
    yield what_comes_next(output, config, operation)


def tell(lines: Iterator[str]) -> None:
    """Show lines of information."""
    for line in lines:
        log.info("%s", line)


def warn(lines: Iterator[str]) -> None:
    """Show warnings."""
    for line in lines:
        log.warning("%s", line)
