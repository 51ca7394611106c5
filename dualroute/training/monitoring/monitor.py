"""What a run shows of itself: TensorBoard, ``metrics.jsonl``, samples of its text, alerts.

Numbers come from the LightningModule, which leaves them in plain attributes (see :class:`Monitor`), from a
:class:`~dualroute.training.monitoring.throughput.StepClock` and from the attention layers; rank zero writes
them to :mod:`~dualroute.training.monitoring.metrics_log` and, under the same tags, to TensorBoard
(:mod:`~dualroute.training.monitoring.outlets.board`) and to services that a person keeps runs in
(:mod:`~dualroute.training.monitoring.outlets.trackers`).

Every rank runs this callback, although only one writes.  Generating a sample under
ZeRO-3 gathers parameters, which needs all ranks; a monitor that lived on rank zero would hang.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn

from dualroute.errors import one_line
from dualroute.training.monitoring.config import MonitorConfig
from dualroute.training.monitoring.evaluation import SuiteDuringTraining
from dualroute.training.monitoring.metrics_log import MetricsLog
from dualroute.training.monitoring.outlets.alerts import DIVERGED, FAILED, STALL, Alert, Alerts, Webhook
from dualroute.training.monitoring.outlets.board import Board
from dualroute.training.monitoring.outlets.trackers import Trackers
from dualroute.training.monitoring.profiling import StepProfile
from dualroute.training.monitoring.router_statistics import RouterStatistics, draw_map, plain_map
from dualroute.training.monitoring.throughput import StepClock, memory_statistics, peak_tflops
from dualroute.training.step.spike_guard import TrainingDiverged

log = logging.getLogger(__name__)
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
        given: Dotted keys of the configuration that were given rather than left at their defaults.
        evaluation: (module, step) → {tag: figure} of what is measured besides, on every rank.
    """

    def __init__(
        self,
        config: MonitorConfig | None = None,
        *,
        folder: str | Path | None = None,
        resolved_config: str = "",
        given: Iterable[str] = (),
        evaluation: SuiteDuringTraining | None = None,
    ) -> None:
        self.config = config or MonitorConfig()
        self.folder = folder
        self.resolved_config = resolved_config
        self.given = tuple(given)
        self.evaluation = evaluation
        self._clock = StepClock()
        self._board: Board | None = None  # on rank zero of a run with a TensorBoardLogger
        self._log: MetricsLog | None = None  # on rank zero, and so are the three below
        self._trackers: Trackers | None = None
        self._profile: StepProfile | None = None
        self._webhook: Webhook | None = None
        self._alerts = Alerts(self.config)
        self._sampled = False
        self._peak_flops = math.inf
        self._last_step = 0
        self._context = 0
        self._router = RouterStatistics()
        self._first_of_step = True

    # -- beginning and end ---------------------------------------------------------------------------------

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._open(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._open(trainer, pl_module)
        if self.evaluation is not None:
            self.evaluation.check(pl_module)
        self._last_step, self._first_of_step = steps_done(trainer, pl_module), True
        self._clock.start()

    def _open(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._log is not None or not trainer.is_global_zero:
            return
        step = steps_done(trainer, pl_module)
        logged_to = trainer.logger.save_dir if trainer.logger is not None else None
        folder = Path(self.folder or logged_to or trainer.default_root_dir)
        path = folder / "metrics.jsonl"
        continues = path.exists()
        self._log = MetricsLog(path, resume_step=step)
        loggers = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        self._board = Board(loggers[0].experiment) if loggers else None
        if continues and self._board is not None:
            _rewind_tensorboard(self._board.writer, step)
        if self.resolved_config:
            self._write_text("config", f"```yaml\n{self.resolved_config}\n```", step)
            self._log.write(step, "config", {"config": self.resolved_config})
            if self._board is not None:
                self._board.settings(self.resolved_config, self.given)
        self._trackers = Trackers(self.config, folder, self.resolved_config)
        self._profile = StepProfile(self.config, folder)
        self._webhook = Webhook(self.config.webhook, self.config.webhook_seconds, folder)
        peak = self.config.peak_tflops or peak_tflops(pl_module.device)
        self._peak_flops = peak * 1e12 * trainer.world_size

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._close(well=True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, Exception):  # an interruption is meant
            said = one_line(str(exception))[:500]
            kind = DIVERGED if isinstance(exception, TrainingDiverged) else FAILED
            text = f"the training failed: {said or type(exception).__name__}"
            self._raise([Alert(kind, self._last_step, text)])
        self._close(well=False)

    def _close(self, *, well: bool) -> None:
        profile, trackers, webhook = self._profile, self._trackers, self._webhook
        log_, board = self._log, self._board
        self._log = self._board = self._trackers = self._profile = self._webhook = None
        if log_ is not None:
            log_.close()
        if profile is not None:
            profile.close()
        if board is not None:
            board.ended(well=well)
            board.writer.flush()
        if trackers is not None:
            trackers.close(well=well)
        if webhook is not None:
            webhook.close()

    # -- training ------------------------------------------------------------------------------------------

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._clock.batch_started(getattr(trainer.train_dataloader, "waited", None))
        if isinstance(batch, Mapping) and isinstance(batch.get("segment_ids"), torch.Tensor):
            self._context = batch["segment_ids"].shape[-1]
        if self._profile is not None:
            self._profile.before_step(self._last_step + 1)
        # of a step's micro-batches the first stands for all
        images = self._due(self._last_step + 1, self.config.router_images_every)
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
            self._raise(self._alerts.after_router(self._last_step + 1, router))
        self._draw(self._last_step + 1, self._router.maps)
        if step == self._last_step:  # a micro-batch inside a step
            self._clock.batch_ended()
            return
        self._last_step, self._first_of_step = step, True
        metrics = _figures(pl_module, "step_metrics")
        reason = getattr(getattr(pl_module, "spike_guard", None), "reason", "")
        self._raise(self._alerts.after_step(step, metrics, reason))
        self._clock.step_ended(metrics.pop("tokens_in_step"))
        if step in (1, trainer.max_steps) or self._due(step, self.config.log_every_steps):
            self._log_step(step, pl_module, metrics)
        table = None if self._profile is None else self._profile.after_step(step)
        if table is not None:
            self._write_text("profile", table, step)
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
        self._raise(self._alerts.after_reading(step, speed.data_wait_share, speed.step_time * speed.steps))

    # -- samples and validation ----------------------------------------------------------------------------

    def _sample(self, step: int, pl_module: LightningModule) -> None:
        generate = getattr(pl_module, "generate_sample", None)
        shape = getattr(getattr(pl_module, "model", None), "config", None)
        self._sampled = True
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
        # a sanity check on a few batches says nothing
        if trainer.sanity_checking and not math.isinf(trainer.num_sanity_val_steps):
            return
        step = steps_done(trainer, pl_module)
        if trainer.sanity_checking and not step and not self._sampled and self.config.sample_every_steps:
            self._sample(step, pl_module)  # what the model writes before it has learnt anything
        if self._log is None:  # outside of a training, and on other ranks
            return
        metrics = _figures(pl_module, "validation_metrics")
        values = {"val/perplexity": perplexity(metrics["loss"])}
        values |= {_tag("val", key): value for key, value in metrics.items()}
        self._write(step, "validation", values)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._clock.checkpoint_started()

    def note(self, step: int, event: str, values: Mapping[str, float]) -> None:
        """A line of ``metrics.jsonl`` that is measured once, and has no curve."""
        if self._log is not None:
            self._log.write(step, event, values)

    # -- writing -------------------------------------------------------------------------------------------

    def _write(self, step: int, event: str, values: Mapping[str, float]) -> None:
        if self._log is not None:
            self._log.write(step, event, values)
        if self._board is not None:
            self._board.add(step, values)
        if self._trackers is not None:
            self._trackers.log(step, values)

    def _draw(self, step: int, maps: Mapping[str, torch.Tensor]) -> None:
        if self._board is None or not maps:
            return
        writer, axes = self._board.writer, importlib.util.find_spec("matplotlib") is not None
        for layer, block_map in maps.items():
            if axes:
                writer.add_figure(f"router/{layer}", draw_map(block_map, f"{layer}, step {step}"), step)
            else:
                writer.add_image(f"router/{layer}", plain_map(block_map), step, dataformats="HWC")
        writer.flush()

    def _write_text(self, tag: str, text: str, step: int) -> None:
        if self._board is not None:
            self._board.writer.add_text(tag, text, step)
            self._board.writer.flush()

    def _raise(self, alerts: Iterable[Alert]) -> None:
        """Tell everybody who may be listening; on other ranks nobody is."""
        for alert in alerts:
            if self._log is None:
                return
            log.warning("%s", f"alert ({alert.kind}): {alert.text}")
            self._log.write(alert.step, "alert", {"kind": alert.kind, "text": alert.text})
            self._write_text(f"alerts/{alert.kind}", alert.text, alert.step)
            if self._webhook is not None:
                self._webhook.send(alert)

    def stalled(self, folder: Path, text: str) -> None:
        """The run stands still and is about to be ended: called by the rank that says so, from a thread.

        Args:
            folder: Of the run.
            text: Who is to blame.
        """
        alert = Alert(STALL, self._last_step, text)
        webhook = self._webhook or Webhook(self.config.webhook, self.config.webhook_seconds, folder)
        webhook.send(alert)
        line = {"step": alert.step, "event": "alert", "kind": alert.kind, "text": alert.text}
        with (folder / "metrics.jsonl").open("a", encoding="utf-8") as stream:  # the log's owner is stuck
            stream.write(json.dumps(line) + "\n")
        self._write_text(f"alerts/{alert.kind}", alert.text, alert.step)
        webhook.close()


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
