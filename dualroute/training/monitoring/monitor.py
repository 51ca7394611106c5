"""What a run shows of itself: TensorBoard, ``metrics.jsonl``, samples of its text.

Numbers come from the LightningModule, which leaves them in plain attributes (see :class:`Monitor`), from a
:class:`~dualroute.training.monitoring.throughput.StepClock` and from the attention layers; rank zero writes
them to TensorBoard and, under the same tags, to :mod:`~dualroute.training.monitoring.metrics_log`.

Every rank runs this callback, although only one writes.  Generating a sample under
ZeRO-3 gathers parameters, which needs all ranks; a monitor that lived on rank zero would hang.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn

from dualroute.training.config import MonitorConfig
from dualroute.training.monitoring.evaluation import SuiteDuringTraining
from dualroute.training.monitoring.metrics_log import MetricsLog
from dualroute.training.monitoring.router_statistics import RouterStatistics, draw_map
from dualroute.training.monitoring.throughput import StepClock, memory_statistics, peak_tflops

_TAGS = {"lr": "optim/lr", "grad_norm": "optim/grad_norm"}  # the others go under train/


def perplexity(loss: float) -> float:
    """exp of a mean loss in nats; infinite where that overflows."""
    return math.exp(loss) if not loss > 700 else math.inf


def steps_done(trainer: Trainer, pl_module: LightningModule) -> int:
    """Optimizer steps finished, skipped ones included."""
    return int(getattr(pl_module, "steps_done", trainer.global_step))


class Monitor(Callback):
    """Writes what the LightningModule measures.

    The module provides, as attributes (plain numbers, the same on every rank):

    - ``step_metrics``: of the optimizer step that was just finished, set before this callback's
      ``on_train_batch_end``.  (A module's own hook of that name is too late: Lightning calls it after the
      callbacks'.)  Must hold ``loss`` (mean nats per target), ``tokens`` (since the training began) and
      ``tokens_in_step``, both over all ranks; usual are ``lr``, ``grad_norm``, ``z_loss``, ``bits_per_byte``
      and ``skipped_steps`` (so far).  A key with a slash is a tag of its own, others go under ``train/``.
    - ``steps_done`` (optional): optimizer steps finished, skipped ones included; else Lightning's count.
    - ``validation_metrics``: set by the end of ``on_validation_epoch_end``; must hold ``loss``.
    - ``generate_sample(prompt, max_new_tokens, seed) -> str`` (optional), called on every rank.
    - ``model.flops_per_token(context)`` (optional) for the utilisation.

    Modules with an attribute ``collect_statistics`` are asked for their ``statistics`` now and then.  A whole
    validation before the first step (``num_sanity_val_steps=-1``) is logged as step 0.

    It stands in the list of callbacks before the one that writes checkpoints, so that the time which a
    checkpoint takes is not counted as training.

    Args:
        config: What is written and how often.
        folder: Where ``metrics.jsonl`` goes; null is the folder given to the Trainer's logger.
        resolved_config: The run's whole configuration as text, logged once a start.
        evaluation: (module, step) → {tag: figure} of what is measured besides, on every rank.
    """

    def __init__(
        self,
        config: MonitorConfig | None = None,
        *,
        folder: str | Path | None = None,
        resolved_config: str = "",
        evaluation: SuiteDuringTraining | None = None,
    ) -> None:
        self.config = config or MonitorConfig()
        self.folder = folder
        self.resolved_config = resolved_config
        self.evaluation = evaluation
        self._clock = StepClock()
        self._writer: Any = None  # SummaryWriter, on rank zero of a run with a TensorBoardLogger
        self._log: MetricsLog | None = None  # on rank zero
        self._peak_flops = math.inf
        self._last_step = 0
        self._context = 0
        self._router = RouterStatistics()
        self._first_of_step = True
        self._images_every = self.config.router_images_every

    # -- beginning and end ---------------------------------------------------------------------------------

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._open(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._open(trainer, pl_module)
        if self.evaluation is not None:
            self.evaluation.check(pl_module)
        if self._images_every and importlib.util.find_spec("matplotlib") is None:
            self._images_every = 0
            rank_zero_warn(
                "monitor.router_images_every draws with matplotlib, which is not installed: no images; "
                "pip install -e '.[compress]'"
            )
        self._last_step, self._first_of_step = steps_done(trainer, pl_module), True
        self._clock.start()

    def _open(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._log is not None or not trainer.is_global_zero:
            return
        step = steps_done(trainer, pl_module)
        logged_to = trainer.logger.save_dir if trainer.logger is not None else None
        path = Path(self.folder or logged_to or trainer.default_root_dir) / "metrics.jsonl"
        continues = path.exists()
        self._log = MetricsLog(path, resume_step=step)
        loggers = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        self._writer = loggers[0].experiment if loggers else None
        if continues and self._writer is not None:
            _rewind_tensorboard(self._writer, step)
        if self.resolved_config:
            self._write_text("config", f"```yaml\n{self.resolved_config}\n```", step)
            self._log.write(step, "config", {"config": self.resolved_config})
        peak = self.config.peak_tflops or peak_tflops(pl_module.device)
        self._peak_flops = peak * 1e12 * trainer.world_size

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self._log is not None:
            self._log.close()
        if self._writer is not None:
            self._writer.flush()
        self._log = self._writer = None

    # -- training ------------------------------------------------------------------------------------------

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._clock.batch_started()
        if isinstance(batch, Mapping) and isinstance(batch.get("segment_ids"), torch.Tensor):
            self._context = batch["segment_ids"].shape[-1]
        # of a step's micro-batches the first stands for all
        images = self._images_every > 0 and self._due(self._last_step + 1, self._images_every)
        statistics = self._due(self._last_step + 1, self.config.router_statistics_every)
        if self._first_of_step and (statistics or images):
            self._router.begin(pl_module, images)
        self._first_of_step = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = steps_done(trainer, pl_module)
        router = self._router.end()
        if router and self._due(self._last_step + 1, self.config.router_statistics_every):
            self._write(self._last_step + 1, "router", router)
        self._draw(self._last_step + 1, self._router.maps)
        if step == self._last_step:  # a micro-batch inside a step
            self._clock.batch_ended()
            return
        self._last_step, self._first_of_step = step, True
        metrics = _figures(pl_module, "step_metrics")
        self._clock.step_ended(metrics.pop("tokens_in_step"))
        if step in (1, trainer.max_steps) or self._due(step, self.config.log_every_steps):
            self._log_step(step, pl_module, metrics)
        self._clock.batch_ended()
        if self.config.sample_prompts and self._due(step, self.config.sample_every_steps):
            self._clock.interrupt()
            self._sample(step, pl_module)
        if self.evaluation is not None and self._due(step, self.config.evaluate_every_steps):
            self._clock.interrupt()
            self._write(step, "evaluation", self.evaluation(pl_module, step))

    @staticmethod
    def _due(step: int, every: int) -> bool:
        return every > 0 and step % every == 0

    def _log_step(self, step: int, pl_module: LightningModule, metrics: dict[str, float]) -> None:
        speed = self._clock.read()
        if self._log is None:
            return
        values = {_tag("train", key): value for key, value in metrics.items()}
        values["train/perplexity"] = perplexity(metrics["loss"])
        values["speed/tokens_per_second"] = speed.tokens_per_second
        values["speed/step_time"] = speed.step_time
        values["speed/data_wait_share"] = speed.data_wait_share
        if speed.checkpoint_time:
            values["speed/checkpoint_time"] = speed.checkpoint_time
        flops_per_token = getattr(getattr(pl_module, "model", None), "flops_per_token", None)
        if flops_per_token is not None and self._context:
            flops = flops_per_token(self._context) * speed.tokens_per_second
            values["speed/mfu"] = flops / self._peak_flops
        values |= memory_statistics(pl_module.device)
        self._write(step, "train", values)

    # -- samples and validation ----------------------------------------------------------------------------

    def _sample(self, step: int, pl_module: LightningModule) -> None:
        generate = getattr(pl_module, "generate_sample", None)
        shape = getattr(getattr(pl_module, "model", None), "config", None)
        if generate is None or (shape is not None and not shape.causal):
            return  # what sees both sides of a token continues no text
        samples = []
        for index, prompt in enumerate(self.config.sample_prompts):
            try:
                # the seed does not follow the step: what changes between samples is the model
                text = generate(prompt, self.config.sample_tokens, seed=index)
            except ValueError as error:  # a prompt that the model cannot read must not end the training
                rank_zero_warn(f"no sample for monitor.sample_prompts[{index}]: {error}")
                continue
            samples.append({"prompt": prompt, "text": text})
            self._write_text(f"samples/{index}", f"**{prompt}**\n\n```\n{text}\n```", step)
        if self._log is not None and samples:
            self._log.write(step, "samples", {"samples": samples})

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._clock.interrupt()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # outside of a training there is no log; a sanity check on a few batches says nothing
        if self._log is None or (trainer.sanity_checking and not math.isinf(trainer.num_sanity_val_steps)):
            return
        metrics = _figures(pl_module, "validation_metrics")
        values = {"val/perplexity": perplexity(metrics["loss"])}
        values |= {_tag("val", key): value for key, value in metrics.items()}
        self._write(steps_done(trainer, pl_module), "validation", values)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._clock.checkpoint_started()

    # -- writing -------------------------------------------------------------------------------------------

    def _write(self, step: int, event: str, values: Mapping[str, float]) -> None:
        if self._log is not None:
            self._log.write(step, event, values)
        if self._writer is not None:
            for tag, value in values.items():
                self._writer.add_scalar(tag, value, step)
            self._writer.flush()

    def _draw(self, step: int, maps: Mapping[str, torch.Tensor]) -> None:
        if self._writer is not None and maps:
            for layer, block_map in maps.items():
                self._writer.add_figure(f"router/{layer}", draw_map(block_map, f"{layer}, step {step}"), step)
            self._writer.flush()

    def _write_text(self, tag: str, text: str, step: int) -> None:
        if self._writer is not None:
            self._writer.add_text(tag, text, step)


def _figures(pl_module: LightningModule, attribute: str) -> dict[str, float]:
    figures = getattr(pl_module, attribute).items()
    return {key: value if isinstance(value, int) else float(value) for key, value in figures}


def _tag(stage: str, key: str) -> str:
    return key if "/" in key else _TAGS.get(key, f"{stage}/{key}")


def _rewind_tensorboard(writer: Any, step: int) -> None:
    """Tell TensorBoard that what it holds past ``step`` is of a run that was cut off before it could last."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    restart = Event(session_log=SessionLog(status=SessionLog.START))
    # a TensorBoardLogger of a person's own Trainer has no such method
    add = getattr(writer, "add_event", None) or writer.file_writer.add_event
    add(restart, step + 1 if step else 0)
