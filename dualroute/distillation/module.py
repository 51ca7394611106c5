"""Distillation: pretraining's LightningModule with a teacher beside it.

In: the batches of pretraining, and where a cache is read, what the teacher said of them.  Here: the teacher's
word replaces the plain loss (:mod:`~dualroute.distillation.losses`); what layers and heads may teach
is added (:mod:`~dualroute.distillation.intermediate`); some batches the student writes itself
(:mod:`~dualroute.distillation.on_policy`).  Out: gradients and figures, as of pretraining.

``loss`` in the metrics is the student's plain cross-entropy, in training and in validation, so that its
curves compare with those of pretraining; ``divergence`` is the distance from the teacher in nats.

Next to nothing is new in a checkpoint.  The teacher is not in it, the projections of the
hidden-state loss are in the training's state but not in the model, and what is drawn on-policy follows from
seed and step.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dualroute.attention.core.layout import LayoutPlan
from dualroute.data.reader import IGNORE_INDEX, Addition
from dualroute.data.window_module import Batch, WindowDataModule
from dualroute.distillation.config import DistillationConfig
from dualroute.distillation.intermediate import (
    Pairs,
    Projections,
    Recorded,
    attention_sum,
    hidden_sum,
    recording,
    route_widths,
)
from dualroute.distillation.liger import liger_distillation
from dualroute.distillation.logit_reader import CacheFaults, told
from dualroute.distillation.losses import (
    DistillationSums,
    Logits,
    Objective,
    TopK,
    chunked_distillation,
    top_k_of,
)
from dualroute.distillation.on_policy import Prompts, is_on_policy, own_continuations
from dualroute.distillation.teacher import Teacher
from dualroute.errors import UserError
from dualroute.training.monitoring.source_losses import SourceLosses
from dualroute.training.step.module import Pretrain


@dataclass(frozen=True)
class LaidOut:
    """An addition to batches: the layout of another model than the student, under ``key``."""

    key: str
    plan: LayoutPlan

    def __call__(self, batch: Batch) -> Batch:
        return {self.key: self.plan.build(batch["segment_ids"])}


@dataclass
class TrainingSums:
    """Sums of one micro-batch; ``total`` is what is differentiated, ``others`` what is reported besides."""

    total: Tensor
    loss_sum: Tensor
    z_sum: Tensor
    count: Tensor
    others: dict[str, Tensor]


class Distill(Pretrain):
    """Training of a student beside its teacher.

    Args:
        config: What is learnt.
        teacher: Who teaches; null where the batches say what the teacher said (`CachedWindows`).
        digest: sha256 of the teacher's weights.
        pairs: Layers that are compared, (student's, teacher's).
        seed: Of projections and on-policy texts.
        arguments: Those of :class:`Pretrain`.
    """

    def __init__(
        self,
        config: DistillationConfig,
        teacher: Teacher | None,
        digest: str,
        pairs: Pairs,
        seed: int,
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
        self.config, self.teacher, self.pairs, self.seed = config, teacher, pairs, seed
        self.digest = digest
        self.projections: Projections | None = None
        if config.hidden_weight and teacher is not None:
            self.projections = Projections(pairs, self.model.config.dim, teacher.width, seed)
        self.widths = route_widths(pairs, self.model.config) if config.attention_weight else []

    @property
    def trained(self) -> nn.Module:
        return nn.ModuleList([self.model, self.projections]) if self.projections is not None else self.model

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if self.teacher is not None:
            self.teacher.to(self.trainer.strategy.root_device)
            self.teacher.shard()
            self.teacher.set_sequence_group(self.model.sequence_group)
        self.layouts, additions = self.prepared_by_loader()
        if isinstance(data := self.trainer.datamodule, WindowDataModule):  # type: ignore[attr-defined]
            data.layout_plan, data.additions = self.layouts["layout"], additions

    def prepared_by_loader(self) -> tuple[dict[str, LayoutPlan], tuple[Addition, ...]]:
        """What loaders work out of each batch, for nothing to be asked of the device: layouts by key, and the
        additions that make all of them but ``layout``, and what else a step needs."""
        plan = self.model.layout_plan()
        if self.teacher is None:
            return {"layout": plan}, (CacheFaults(self.config.loss == "reverse_kl"),)
        layouts = self.teacher.layout_plans(plan)
        additions: list[Addition] = [LaidOut(key, layouts[key]) for key in layouts if key != "layout"]
        if self.config.on_policy_fraction:
            additions.append(Prompts(self.config.on_policy_prefix))
        return layouts, tuple(additions)

    # ------------------------------------------------------------------ loss

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return super().training_step(self._batch_of_step(batch), batch_idx)

    def micro_batch_loss(self, batch: Batch) -> Tensor:
        return super().micro_batch_loss(self._batch_of_step(batch))

    @property
    def on_policy(self) -> bool:
        """Whether the step that comes is trained on the student's own texts."""
        return is_on_policy(self.seed, self.trainer.global_step, self.config.on_policy_fraction)

    def _batch_of_step(self, batch: Batch) -> Batch:
        """The batch, or in an on-policy step what the student makes of it."""
        if not self.on_policy:
            return batch
        # micro-batches are numbered through over the ranks, as the samples in them are
        ranks = self.trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
        number = self._micro_steps * ranks["num_replicas"] + ranks["rank"]
        own = own_continuations(
            self.model,
            batch,
            new_tokens=self.config.on_policy_tokens,
            temperature=self.config.on_policy_temperature,
            eos_id=self.tokenizer.eos_id,
            draw=(self.seed, self.trainer.global_step, number),
            layouts=self.layouts,
        )
        # every micro-batch counts alike: nobody knows yet how long the texts of the others will be
        parts = self.trainer.accumulate_grad_batches * self.trainer.world_size
        shared = parts // max(getattr(self.trainer.strategy, "sequence_ranks", 1), 1)
        return own | {"num_targets": own["num_targets"] * shared}

    def _loss_sums(self, batch: Batch, z_loss: float = 0.0) -> TrainingSums:
        config, layers = self.config, [ours for ours, _ in self.pairs]
        objective = config.objective(z_loss)
        if self.on_policy:  # the labels are the student's: there is nothing to learn from them
            objective = dataclasses.replace(objective, ce_weight=0.0)
        of_teacher, heads = Recorded(), config.attention_weight > 0
        if self.teacher is None:
            teacher: Logits | TopK = self._cached(batch)
        else:
            watched = [theirs for _, theirs in self.pairs]
            with recording(self.teacher.model, watched, heads=heads) as of_teacher:
                teacher = self._asked(self.teacher, batch)
        with recording(self.model, layers, heads=heads) as of_student:
            hidden = self.hidden_states(batch)
        labels = self.model.local_shard(batch["labels"], IGNORE_INDEX).flatten()
        rows = self._label_rows(batch)
        sums = self._distances(hidden, teacher, labels, objective, rows)
        total, others = sums.total, {"divergence": sums.divergence_sum}
        for name, weight, value in self._inside(of_student, of_teacher, labels, rows):
            total = total + weight * value
            others[name] = value.detach()
        return TrainingSums(total, sums.loss_sum, sums.z_sum, sums.count, others)

    def _cached(self, batch: Batch) -> TopK:
        """What the batch says of the teacher, for this rank's tokens."""
        return TopK(*(self.model.local_shard(part).flatten(0, 1) for part in told(batch)))

    def _asked(self, teacher: Teacher, batch: Batch) -> Logits | TopK:
        """What the teacher says now of this rank's tokens."""
        whole = Logits(teacher.hidden_states(batch).flatten(0, 1), teacher.weight)
        if self.config.top_k is None:
            return whole
        return top_k_of(whole, self.config.top_k, self.config.temperature)

    def _distances(
        self,
        hidden: Tensor,
        teacher: Logits | TopK,
        labels: Tensor,
        objective: Objective,
        rows: Tensor | None,
    ) -> DistillationSums:
        """Cross-entropy and divergence of the student's hidden states (B, n, D)."""
        function: Any = liger_distillation if self.config.backend == "liger" else chunked_distillation
        loss = partial(
            function,
            labels=labels,
            teacher=teacher,
            objective=objective,
            ignore_index=IGNORE_INDEX,
            rows=rows,
        )
        sums: DistillationSums = self.model.head(hidden.flatten(0, 1), loss)
        return sums

    def _inside(
        self, student: Recorded, teacher: Recorded, labels: Tensor, rows: Tensor | None
    ) -> list[tuple[str, float, Tensor]]:
        """(name, weight, sum) of the losses between layers."""
        config, found = self.config, []
        if not config.looks_inside:
            return []
        if rows is None:
            rows = (labels != IGNORE_INDEX).nonzero().squeeze(1)
        if self.projections is not None:
            hidden = hidden_sum(student, teacher, self.pairs, self.projections, rows, config.hidden_loss)
            found.append(("hidden_loss", config.hidden_weight, hidden))
        if config.attention_weight:
            attention = attention_sum(student, teacher, self.pairs, rows, self.widths)
            found.append(("attention_loss", config.attention_weight, attention))
        return found

    def figures(self, sums: Any) -> dict[str, Tensor]:
        return super().figures(sums) | sums.others

    # ------------------------------------------------------------------ validation

    def on_validation_epoch_start(self) -> None:
        self._val_sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        self.source_losses = SourceLosses(self)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        if self.teacher is None:  # a cache says nothing of these texts
            alone = super()._loss_sums(batch)
            self._val_sums[:2] += torch.stack([alone.loss_sum.double(), alone.count.double()])
            self.source_losses.add(batch, alone)
            return
        labels = self.model.local_shard(batch["labels"], IGNORE_INDEX).flatten()
        teacher = self._asked(self.teacher, batch)
        sums = self._distances(
            self.hidden_states(batch), teacher, labels, self.config.objective(0.0), self._label_rows(batch)
        )
        self._val_sums += torch.stack([sums.loss_sum, sums.count, sums.divergence_sum]).double()
        self.source_losses.add(batch, sums)

    def on_validation_epoch_end(self) -> None:
        nll, count, distance = self.trainer.strategy.reduce(self._val_sums, reduce_op="sum").tolist()
        loss = nll / max(count, 1)
        figures = self.source_losses.figures()
        self.validation_metrics = {"loss": loss, **self.bits_per_byte(loss, "val"), **figures}
        if self.teacher is not None:
            self.validation_metrics["divergence"] = distance / max(count, 1)

    # ------------------------------------------------------------------ state

    def _described(self) -> dict[str, Any]:
        """What a run must not change half-way."""
        return {"teacher": self.digest, "projections": sorted(self.projections or ())}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["distillation"] = self._described()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        saved, ours = checkpoint.get("distillation"), self._described()
        if saved is None:
            raise UserError(
                "the checkpoint is not of a distillation: begin with its weights (--init_from) in another "
                "--output"
            )
        if saved["teacher"] != ours["teacher"]:
            raise UserError(
                f"the checkpoint was trained with another teacher (weights {saved['teacher'][:12]}… there, "
                f"{ours['teacher'][:12]}… here): resume with the same one, or begin anew with --init_from"
            )
        if saved["projections"] != ours["projections"]:
            raise UserError(
                f"the checkpoint has projections for layers {saved['projections']} and this run for "
                f"{ours['projections']} (distill.hidden_weight, layer_map): resume with the same settings"
            )
