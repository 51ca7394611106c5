"""The Trainer of a run: its strategy, its callbacks and where it writes.

In: a configuration that was found sound (:class:`~dualroute.training.prepare.Prepared`).  Here: everything
that Lightning is given besides the module and the data, which need the checkpoint to be chosen first.  Next:
``training/run.py`` lets the ranks meet through its strategy, and calls ``fit``.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import yaml
from lightning.pytorch import Trainer

from dualroute import __version__
from dualroute.attention import backend
from dualroute.errors import one_line
from dualroute.evaluate.suite.config import read_suite
from dualroute.paths import absolute_paths
from dualroute.settings import given_fields
from dualroute.training.checkpointing.publishing.first_write import FirstWrite, LateTensorBoardLogger
from dualroute.training.checkpointing.publishing.publisher import CheckpointPublisher
from dualroute.training.config import PretrainConfig
from dualroute.training.finetuning.early_stopping import early_stopping
from dualroute.training.kernels import device
from dualroute.training.monitoring.evaluation import SuiteDuringTraining
from dualroute.training.monitoring.mixture_record import write_stages
from dualroute.training.monitoring.monitor import Monitor
from dualroute.training.monitoring.progress import Progress
from dualroute.training.parallel.strategy import build_strategy
from dualroute.training.resilience.corruption_check import CorruptionCheck
from dualroute.training.resilience.preemption import Preemption, leave_signals_to_us
from dualroute.training.resilience.watchdog import Watchdog
from dualroute.training.step.module import StepBoundary

if TYPE_CHECKING:
    from dualroute.training.prepare import Prepared


def resolved_yaml(config: PretrainConfig) -> str:
    """Every value of a run as YAML that ``--config`` reads again, from any folder."""
    values = json.loads(json.dumps(dataclasses.asdict(absolute_paths(config))))
    for derived in {field.name for field in dataclasses.fields(config.model)} - {
        field.name for field in given_fields(config.model)
    }:
        del values["model"][derived]
    head = f"# {one_line(backend.describe(device()))}\n# written by dualroute {__version__}\n"
    return head + yaml.safe_dump(values, sort_keys=False)


@dataclass
class Parts:
    """The Trainer of one attempt, and those of its callbacks that the attempt talks to."""

    trainer: Trainer
    first_write: FirstWrite
    publisher: CheckpointPublisher
    preemption: Preemption
    watchdog: Watchdog
    monitor: Monitor

    def describe(self, config: PretrainConfig) -> None:
        """Have ``config`` written down as it is now; nothing was written yet."""
        self.first_write.config = self.monitor.resolved_config = resolved_yaml(config)


def _evaluation(prepared: Prepared, watchdog: Watchdog) -> SuiteDuringTraining | None:
    """What is measured during the training, if anything."""
    config = prepared.config
    if not config.monitor.evaluate_every_steps or config.monitor.evaluate_suite is None:
        return None
    return SuiteDuringTraining(
        read_suite(config.monitor.evaluate_suite),
        config.train.micro_batch,
        prepared.output,
        config.data.context,
        # it may last as long as a validation, and so may each of its cells
        alive=lambda step: watchdog.heart.mark("validation", step),
    )


def build_trainer(prepared: Prepared) -> Parts:
    """The Trainer of a run; it touches nothing yet."""
    config, world, output = prepared.config, prepared.world, prepared.output
    train = config.train
    precision: Any = "32-true" if train.precision == "32" else train.mixed_precision
    accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    strategy = build_strategy(
        config.parallel,
        world,
        micro_batch=train.micro_batch,
        accumulation=prepared.accumulation,
        gradient_clip=config.optim.grad_clip,
        precision=precision,
        accelerator=accelerator,
    )
    publisher = CheckpointPublisher(
        output / "checkpoints",
        config.checkpoint,
        prepared.tokenizer.path,
        train.val_every_steps,
        patience_minutes=config.parallel.timeout_minutes,
        extra={**prepared.tokenizer.settings_file(), **(prepared.extra_files or {})},
    )
    preemption = Preemption(publisher)
    watchdog = Watchdog(config.watchdog, world, output, reduces_in_backward=config.parallel.strategy == "ddp")
    roll_back = prepared.roll_back

    def also() -> None:
        if roll_back is not None:
            roll_back.write(output, config.spike_guard.max_rollbacks)
        write_stages(output, prepared.data.stages_for_people(), prepared.start.checkpoint)

    first_write = FirstWrite(output, resolved_yaml(config), also=also)
    monitor = Monitor(
        config.monitor,
        folder=output,
        resolved_config=resolved_yaml(config),
        evaluation=_evaluation(prepared, watchdog),
    )
    trainer = Trainer(
        accelerator=accelerator,
        strategy=strategy,
        devices=world.local_world_size,
        num_nodes=world.num_nodes,
        precision=precision,
        max_steps=prepared.total_steps,
        max_epochs=-1,
        accumulate_grad_batches=prepared.accumulation,
        gradient_clip_val=config.optim.grad_clip,
        val_check_interval=train.val_every_steps * prepared.accumulation,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=-1,  # the validation loss before the first step
        use_distributed_sampler=False,
        logger=LateTensorBoardLogger(output, name="tensorboard", version=""),
        callbacks=[
            first_write,  # before those that open files
            CorruptionCheck(config.watchdog.sdc_check_every_steps, config.watchdog.sdc_action),
            StepBoundary(),  # before the others, which read what it writes
            monitor,
            Progress(),
            *early_stopping(config.finetune, publisher),  # before what saves its state
            publisher,
            preemption,
            watchdog,  # last: what the others do belongs to the phase that it has marked before
        ],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_autolog_hparams=False,  # asks the logger before the state is loaded, and there are none
    )
    leave_signals_to_us(trainer)
    return Parts(trainer, first_write, publisher, preemption, watchdog, monitor)
