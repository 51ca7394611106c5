"""Pretraining: one LightningModule from a batch of windows to a step of the optimizer.

In: batches of :mod:`dualroute.data.module`.  Here: the model's hidden states go through the chunked loss,
divided by the number of targets of the *whole* global batch, so that the gradient is the same however the
batch was divided over ranks and micro-batches.  Out: gradients for the strategy to step with, and
``step_metrics`` / ``validation_metrics`` for :mod:`dualroute.training.monitoring.monitor`.

The learning rate has no scheduler object.  It is a pure function of the step, written into the optimizer
before each one, so there is no state to save and nothing to drift on resume.  Weight decay, betas, eps and
momentum are written with it, because a restored optimizer brings those of the run before.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from dualroute.data.reader import IGNORE_INDEX
from dualroute.data.tokenizer import Tokenizer
from dualroute.data.window_module import Batch, WindowDataModule
from dualroute.errors import UserError
from dualroute.model import DualRoutingTransformer, SamplingConfig, generate
from dualroute.training.config import SpikeGuardConfig, TrainConfig
from dualroute.training.finetuning.config import StrategyConfig
from dualroute.training.finetuning.depth import DepthCourse, course_of
from dualroute.training.finetuning.draws import draw_seed
from dualroute.training.finetuning.freezing import with_frozen, without_frozen
from dualroute.training.monitoring.source_losses import SourceLosses
from dualroute.training.optim_config import OptimConfig
from dualroute.training.parallel.sequence import new_sequence_group
from dualroute.training.parallel.sharded_weights import InitialWeights
from dualroute.training.step.losses import chunked_cross_entropy
from dualroute.training.step.optim import HyperParameters, build_optimizer, groups_of, learning_rate
from dualroute.training.step.spike_guard import SpikeGuard
from dualroute.training.step.step_guard import StepGuard, StepOutcome
from dualroute.training.step.token_count import TokenCount


class Pretrain(LightningModule):
    """Training of a :class:`DualRoutingTransformer` on the labels of its batches: next tokens or masked ones.

    Args:
        model: The model to train.
        optim: Optimizer and learning-rate schedule.
        train: Batch arithmetic and loss.
        tokenizer: For samples during training.
        targets_per_byte: Targets per byte of text, by split; turns nats into bits per byte.  Null where
            targets are not text.
        spike_guard: When a step is skipped.
        token_count: Tokens by step; null is that of a run that begins.
        weights: Those of a ``model`` that was built without any, to be divided among the ranks (ZeRO-3).
        strategy: Which weights are trained, and how fast by their depth; ``model`` has its adapters already.
        parent: sha256 of the weights that adapters are added to.

    Attributes:
        step_metrics: Figures of the step that was just finished, equal on all ranks.
        validation_metrics: Figures of the last validation, equal on all ranks.
    """

    #: Which of the validation's figures makes a checkpoint the best, and whether more of it is better; null
    #: for the loss.
    best_by: tuple[str, bool] | None = None

    def __init__(
        self,
        model: DualRoutingTransformer,
        optim: OptimConfig,
        train: TrainConfig,
        tokenizer: Tokenizer,
        targets_per_byte: dict[str, float | None],
        spike_guard: SpikeGuardConfig | None = None,
        token_count: TokenCount | None = None,
        weights: InitialWeights | None = None,
        strategy: StrategyConfig | None = None,
        parent: str | None = None,
    ) -> None:
        super().__init__()
        self.strategy, self.parent = strategy or StrategyConfig(), parent
        self.model = model
        self.weights = weights
        self.optim_config = optim
        self.train_config = train
        self.tokenizer = tokenizer
        self.targets_per_byte = targets_per_byte
        self.token_count = token_count or TokenCount(train.tokens_per_batch)
        self.spike_guard = SpikeGuard(spike_guard)
        self.step_metrics: dict[str, float] = {}
        self.validation_metrics: dict[str, float] = {}
        self.step_guard = StepGuard()
        self._start_step()

    # ------------------------------------------------------------------ training

    @property
    def steps_done(self) -> int:
        """Optimizer steps so far, skipped ones included."""
        return self.trainer.global_step

    @property
    def tokens_seen(self) -> int:
        """Tokens trained on so far, over all ranks."""
        return self.token_count.at(self.steps_done)

    label_smoothing = 0.0  #: in the loss that is trained; see :func:`chunked_cross_entropy`

    #: (number, position in the data) of the first step of those that were skipped without a good one since
    skipped_since: tuple[int, int] | None = None

    def _start_step(self) -> None:
        self._micro_steps = 0
        self._figures: dict[str, Tensor] = {}  # of this rank in this step
        self._outcome: StepOutcome | None = None

    def setup(self, stage: str) -> None:
        self.model.set_sequence_group(new_sequence_group(getattr(self.trainer.strategy, "sequence_ranks", 1)))
        if isinstance(data := self.trainer.datamodule, WindowDataModule):  # type: ignore[attr-defined]
            data.layout_plan = self.model.layout_plan()
            if (group := self.model.sequence_group) is not None:
                data.text_part = group.rank(), group.size()

    def configure_model(self) -> None:
        if self.weights is not None:
            weights, self.weights = self.weights, None
            self.trainer.strategy.shard(self, weights, "model.")  # type: ignore[attr-defined]

    @property
    def trained(self) -> nn.Module:
        """All that the optimizer steps; of it only ``model`` is published."""
        return self.model

    def configure_optimizers(self) -> torch.optim.Optimizer:
        course = self.course
        optimizer = build_optimizer(
            self.trained, self.optim_config, unit_of=None if course is None else course.unit
        )
        if course is not None:
            course.hold_back(self.trained, lambda: self.trainer.global_step)
        self._hyper_parameters = HyperParameters(optimizer, self.optim_config)
        return optimizer

    @property
    def course(self) -> DepthCourse | None:
        """How layers are stepped by their depth; null: all alike."""
        steps = self.token_count.total_steps(self.train_config)
        return course_of(self.strategy, self.model.config, steps)

    def learning_rate(self, step: int) -> float:
        """Learning rate of the optimizer step number ``step`` (the first is 0)."""
        return learning_rate(step, self.train_config, self.optim_config, self.token_count)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> int | None:
        if self.trainer.should_stop:
            return -1  # Lightning's sign to leave the loop before this batch
        if self._micro_steps == 0:
            step, course = self.trainer.global_step, self.course
            lr = self.learning_rate(step)
            self._hyper_parameters.write(self.trainer.optimizers[0], lr, course, step)
            if course is not None and self.trainer.is_global_zero:
                course.tell_unfrozen(step, self._hyper_parameters.units)
        return None

    def hidden_states(self, batch: Batch) -> Tensor:
        """(B, n, dim) after the last norm; of this rank's tokens where ranks share texts."""
        if self.training and self.strategy.draws:
            self._seed_draws()
        return self.model.hidden_states(
            batch["inputs"] if "inputs" in batch else batch["input_ids"],
            segment_ids=batch["segment_ids"],
            positions=batch["positions"],
            layout=batch.get("layout"),
        )

    def _seed_draws(self) -> None:
        """Make what adapters drop a function of the seed and of which micro-batch this is of the run."""
        ranks = self.trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
        number = self._micro_steps * ranks["num_replicas"] + ranks["rank"]
        seed = self.trainer.datamodule.seed  # type: ignore[attr-defined]
        torch.manual_seed(draw_seed(seed, self.trainer.global_step, number))

    def _loss_sums(self, batch: Batch, z_loss: float = 0.0) -> Any:
        hidden = self.hidden_states(batch)
        labels = self.model.local_shard(batch["labels"], IGNORE_INDEX)
        loss = partial(
            chunked_cross_entropy,
            labels=labels.flatten(),
            z_loss=z_loss,
            rows=self._label_rows(batch),
            label_smoothing=self.label_smoothing,
        )
        return self.model.head(hidden.flatten(0, 1), loss)

    def _label_rows(self, batch: Batch) -> Tensor | None:
        """What the loader found, of this rank's part of the texts; null: they are looked for."""
        return batch.get("label_rows")

    @property
    def at_first_micro_batch(self) -> bool:
        """No micro-batch of the step that comes has been run yet."""
        return self._micro_steps == 0

    def micro_batch_loss(self, batch: Batch) -> Tensor:
        """Summed loss of one micro-batch; leaves no trace in what is recorded of the step."""
        total: Tensor = self._loss_sums(batch, self.train_config.z_loss).total
        return total

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        sums = self._loss_sums(batch, self.train_config.z_loss)
        # trainer and strategy average over micro-batches and ranks; what is wanted is the sum over all of
        # them divided by the targets of the whole global batch
        parts = self.trainer.accumulate_grad_batches * self.trainer.world_size
        scale = parts / max(int(batch["num_targets"]), 1)
        self.step_guard.record(sums.loss_sum * scale)
        for name, value in self.figures(sums).items():
            value = value * scale / self.trainer.accumulate_grad_batches
            self._figures[name] = self._figures[name] + value if name in self._figures else value
        self._micro_steps += 1
        return sums.total * scale

    def figures(self, sums: Any) -> dict[str, Tensor]:
        """Sums over tokens whose means are reported beside the loss, by name."""
        return {"z_loss": sums.z_sum} if self.train_config.z_loss else {}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        outcome = self.step_guard.check(self.trainer, self.spike_guard.should_skip)
        if outcome is None:
            return
        self._outcome = outcome
        if not outcome.skipped:
            self.skipped_since = None
        elif self.skipped_since is None:
            position = self.trainer.datamodule.samples_consumed  # type: ignore[attr-defined]
            self.skipped_since = self.trainer.global_step + 1, position
        if outcome.skipped:
            rank_zero_warn(f"step {self.trainer.global_step + 1} is skipped: {self.spike_guard.reason}")

    def finish_step(self) -> None:
        """Account for the optimizer step that was just taken (or skipped)."""
        assert self._outcome is not None
        self.trainer.datamodule.advance()  # type: ignore[attr-defined]
        self.step_metrics = {
            "loss": self._outcome.loss,
            "grad_norm": self._outcome.grad_norm,
            "lr": self.learning_rate(self.trainer.global_step - 1),
            **self.bits_per_byte(self._outcome.loss, "train"),
            "tokens": self.tokens_seen,
            "epoch": self.trainer.datamodule.epoch,  # type: ignore[attr-defined]
            "tokens_in_step": self.train_config.tokens_per_batch,
            "skipped_steps": self.spike_guard.skipped,
            "skipped": float(self._outcome.skipped),
            **self.trainer.datamodule.source_figures(),  # type: ignore[attr-defined]
        }
        if (course := self.course) is not None:
            self.step_metrics |= course.figures(self.trainer.global_step - 1, self.step_metrics["lr"])
        for name, value in self._figures.items():
            self.step_metrics[name] = float(self.trainer.strategy.reduce(value, reduce_op="mean"))
        self._start_step()

    def bits_per_byte(self, loss: float, split: str) -> dict[str, float]:
        """Nats per target → {"bits_per_byte": …} of that split; empty where targets are no text, or masked
        tokens, which spell a part of it."""
        density = self.targets_per_byte[split]
        if density is None or not self.model.config.causal:
            return {}
        return {"bits_per_byte": loss * density / math.log(2)}

    # ------------------------------------------------------------------ validation

    def on_validation_epoch_start(self) -> None:
        self._val_sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        self.source_losses = SourceLosses(self)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        sums = self._loss_sums(batch)
        self._val_sums += torch.stack([sums.loss_sum.double(), sums.count.double()])
        self.source_losses.add(batch, sums)

    def on_validation_epoch_end(self) -> None:
        nll, count = self.trainer.strategy.reduce(self._val_sums, reduce_op="sum").tolist()
        loss = nll / max(count, 1)
        figures = self.source_losses.figures()
        self.validation_metrics = {"loss": loss, **self.bits_per_byte(loss, "val"), **figures}

    def generate_sample(self, prompt: str, max_new_tokens: int, seed: int) -> str:
        """A continuation of ``prompt`` by the model as it stands."""
        ids = self.tokenizer.encode(prompt, bos=True)
        room = self.model.config.max_context - len(ids)
        sampling = SamplingConfig(max_new_tokens=max(1, min(max_new_tokens, room)), seed=seed)
        new = list(generate(self.model, ids, sampling, self.tokenizer.eos_ids))
        return self.tokenizer.decode(ids + [token for token in new if token not in self.tokenizer.eos_ids])

    # ------------------------------------------------------------------ state

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["spike_guard"] = self.spike_guard.state_dict()
        # by these names a state can be cut up otherwise (see training/checkpointing/state/reader.py)
        checkpoint["parameter_names"] = self._names_by_group()
        checkpoint["parent"] = self.parent
        checkpoint["frozen"] = sorted(n for n, p in self.named_parameters() if not p.requires_grad)
        if "state_dict" in checkpoint:
            checkpoint["state_dict"] = without_frozen(self, checkpoint["state_dict"])

    def _names_by_group(self, config: OptimConfig | None = None) -> list[list[str]]:
        """Names of the parameters in each group of the optimizer, or of one by another ``config``."""
        course = self.course
        unit = None if course is None else course.unit
        groups = groups_of(self.trained, config or self.optim_config, unit)
        names = {id(parameter): name for name, parameter in self.named_parameters()}
        return [[names[id(p)] for p in group["params"]] for group in groups]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        data = type(self.trainer.datamodule).__qualname__  # type: ignore[attr-defined]
        missing = {"spike_guard", data} - checkpoint.keys()
        if missing:  # Lightning would go on without, from the first sample
            raise UserError(f"the checkpoint has no state of {sorted(missing)}: dualroute did not write it")
        if checkpoint.get("parent") != self.parent:
            raise UserError(
                f"the checkpoint's adapters were trained beside other weights "
                f"({_digest(checkpoint.get('parent'))} there, {_digest(self.parent)} here): "
                f"give the init_from that the run began with"
            )
        self._refuse_other_groups(checkpoint.get("parameter_names"))
        if "state_dict" in checkpoint:
            checkpoint["state_dict"] = with_frozen(self, checkpoint["state_dict"])
        self.spike_guard.load_state_dict(checkpoint["spike_guard"])
        self._count_micro_batches(checkpoint)

    def _refuse_other_groups(self, saved: list[list[str]] | None) -> None:
        """The same parameters in other groups: an optimizer's state cannot follow them."""
        ours = self._names_by_group()
        if saved is None or saved == ours or sorted(chain(*saved)) != sorted(chain(*ours)):
            return
        config = self.optim_config
        others: dict[str, Any] = {
            "decay_embeddings": not config.decay_embeddings,
            "name": "adamw" if config.name == "muon" else "muon",
            "embedding_lr": config.lr if config.embedding_lr is None else None,
            "head_lr": config.lr if config.head_lr is None else None,
            "base_dim": 1 if config.base_dim is None else None,
        }
        for key, other in others.items():
            if self._names_by_group(replace(config, **{key: other})) == saved:
                was, now = (_shown(key, value) for value in (other, getattr(config, key)))
                break
        else:
            key, was, now = "name", "another, or other groups of parameters,", config.name
        raise UserError(
            f"the checkpoint was trained with optim.{key} {was} and this run asks for {now}: give the old "
            f"value, or begin anew with --init_from"
        )

    def _count_micro_batches(self, checkpoint: dict[str, Any]) -> None:
        """Put Lightning's count of micro-batches right; by it Lightning finds the end of a step.

        With other ranks, or another micro-batch, the steps so far would have had another number of them.
        """
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        ready = checkpoint["global_step"] * self.trainer.accumulate_grad_batches
        for counts in (progress["total"], progress["current"]):
            unfinished = (
                counts["ready"] - counts["completed"]
            )  # 1 where it was saved inside a batch's last hook
            counts.update(ready=ready, started=ready, processed=ready, completed=ready - unfinished)


def _shown(key: str, value: Any) -> str:
    if key.endswith("_lr") or key == "base_dim":
        return "null" if value is None else "a number"
    return str(value).lower()


def _digest(of_weights: str | None) -> str:
    return "none" if of_weights is None else f"sha256 {of_weights[:12]}…"


class StepBoundary(Callback):
    """Finishes a step before any other callback looks at it; must stand first in the Trainer's list."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, Pretrain)
        if pl_module._micro_steps == trainer.accumulate_grad_batches:
            pl_module.finish_step()
            if trainer.global_step >= trainer.max_steps:
                trainer.should_stop = (
                    True  # makes Lightning validate after the last step, whatever its number
                )
