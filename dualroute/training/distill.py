"""``dualroute distill``: a student learns from a teacher, with the trainer of pretraining.

In: the batches of pretraining.  Here: :class:`Distill` replaces the loss by the teacher's
(:mod:`~dualroute.training.distillation_losses`), adds what layers and heads may teach
(:mod:`~dualroute.training.intermediate`) and lets the student write some batches itself
(:mod:`~dualroute.training.on_policy`).  Out: gradients, checkpoints and a run folder as
:mod:`~dualroute.training.run` describes; everything of it works alike, resuming included.

``loss`` in the metrics is the student's plain cross-entropy, in training and in validation, so that its
curves compare with those of pretraining; ``divergence`` is the distance from the teacher in nats.

The surprising fact: next to nothing is new in a checkpoint.  The teacher is not in it, the projections of the
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

from dualroute.data.reader import IGNORE_INDEX
from dualroute.errors import UserError
from dualroute.model import DualRoutingTransformer
from dualroute.training import run
from dualroute.training.distill_config import DistillationConfig, DistillConfig
from dualroute.training.distillation_losses import (
    DistillationSums,
    Logits,
    Objective,
    TopK,
    chunked_distillation,
    top_k_of,
)
from dualroute.training.intermediate import (
    Pairs,
    Projections,
    Recorded,
    attention_sum,
    check_heads,
    hidden_sum,
    layer_pairs,
    recording,
    route_widths,
)
from dualroute.training.liger import check_liger, liger_distillation
from dualroute.training.on_policy import is_on_policy, own_continuations
from dualroute.training.pretrain import Pretrain
from dualroute.training.run import Prepared, run_training
from dualroute.training.sequence import check_sequence_parallel
from dualroute.training.teacher import Teacher, load_teacher


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
        teacher: Who teaches.
        pairs: Layers that are compared, (student's, teacher's).
        seed: Of projections and on-policy texts.
        arguments: Those of :class:`Pretrain`.
    """

    def __init__(
        self, config: DistillationConfig, teacher: Teacher, pairs: Pairs, seed: int, **arguments: Any
    ) -> None:
        super().__init__(**arguments)
        self.config, self.teacher, self.pairs, self.seed = config, teacher, pairs, seed
        self.projections: Projections | None = None
        if config.hidden_weight:
            self.projections = Projections(pairs, self.model.config.dim, teacher.model.config.dim, seed)
        self.widths = route_widths(pairs, self.model.config) if config.attention_weight else []

    @property
    def trained(self) -> nn.Module:
        return nn.ModuleList([self.model, self.projections]) if self.projections is not None else self.model

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.teacher.to(self.trainer.strategy.root_device)
        self.teacher.share_sequences(self.model.sequence_group)

    # ------------------------------------------------------------------ loss

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return super().training_step(self._batch_of_step(batch), batch_idx)

    def micro_batch_loss(self, batch: dict[str, Tensor]) -> Tensor:
        return super().micro_batch_loss(self._batch_of_step(batch))

    @property
    def on_policy(self) -> bool:
        """Whether the step that comes is trained on the student's own texts."""
        return is_on_policy(self.seed, self.trainer.global_step, self.config.on_policy_fraction)

    def _batch_of_step(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch, or in an on-policy step what the student makes of it."""
        if not self.on_policy:
            return batch
        place = (self.trainer.distributed_sampler_kwargs or {}).get("rank", 0)
        own = own_continuations(
            self.model,
            batch,
            prefix=self.config.on_policy_prefix,
            new_tokens=self.config.on_policy_tokens,
            temperature=self.config.on_policy_temperature,
            eos_id=self.tokenizer.eos_id,
            draw=(self.seed, self.trainer.global_step, self._micro_steps, place),
        )
        # every micro-batch counts alike: nobody knows yet how long the texts of the others will be
        parts = self.trainer.accumulate_grad_batches * self.trainer.world_size
        shared = parts // max(getattr(self.trainer.strategy, "sequence_ranks", 1), 1)
        return own | {"num_targets": own["num_targets"] * shared}

    def _loss_sums(self, batch: dict[str, Tensor], z_loss: float = 0.0) -> TrainingSums:
        config, layers = self.config, [ours for ours, _ in self.pairs]
        objective = config.objective(z_loss)
        if self.on_policy:  # the labels are the student's: there is nothing to learn from them
            objective = dataclasses.replace(objective, ce_weight=0.0)
        heads = config.attention_weight > 0
        with recording(self.teacher.model, [theirs for _, theirs in self.pairs], heads=heads) as of_teacher:
            theirs = self.teacher.hidden_states(batch)
        with recording(self.model, layers, heads=heads) as of_student:
            hidden = self._student(batch)
        labels = self.model.own_tokens(batch["labels"], IGNORE_INDEX).flatten()
        sums = self._distances(hidden, theirs, labels, objective)
        total, others = sums.total, {"divergence": sums.divergence_sum}
        for name, weight, value in self._inside(of_student, of_teacher, labels):
            total = total + weight * value
            others[name] = value.detach()
        return TrainingSums(total, sums.loss_sum, sums.z_sum, sums.count, others)

    def _student(self, batch: dict[str, Tensor]) -> Tensor:
        return self.model.hidden_states(
            batch["input_ids"], segment_ids=batch["segment_ids"], positions=batch["positions"]
        )

    def _distances(
        self, hidden: Tensor, theirs: Tensor, labels: Tensor, objective: Objective
    ) -> DistillationSums:
        """Cross-entropy and divergence of (B, n, D) student's and (B, n, D_t) teacher's hidden states."""
        whole = Logits(theirs.flatten(0, 1), self.teacher.weight)
        told: Logits | TopK = whole
        if self.config.top_k is not None:
            told = top_k_of(whole, self.config.top_k, objective.temperature)
        function: Any = liger_distillation if self.config.backend == "liger" else chunked_distillation
        loss = partial(function, labels=labels, teacher=told, objective=objective, ignore_index=IGNORE_INDEX)
        sums: DistillationSums = self.model.head(hidden.flatten(0, 1), loss)
        return sums

    def _inside(
        self, student: Recorded, teacher: Recorded, labels: Tensor
    ) -> list[tuple[str, float, Tensor]]:
        """(name, weight, sum) of the losses between layers."""
        config, found = self.config, []
        if not config.looks_inside:
            return []
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

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        labels = self.model.own_tokens(batch["labels"], IGNORE_INDEX).flatten()
        theirs = self.teacher.hidden_states(batch)
        sums = self._distances(self._student(batch), theirs, labels, self.config.objective(0.0))
        self._val_sums += torch.stack([sums.loss_sum, sums.count, sums.divergence_sum]).double()

    def on_validation_epoch_end(self) -> None:
        nll, count, distance = self.trainer.strategy.reduce(self._val_sums, reduce_op="sum").tolist()
        loss = nll / max(count, 1)
        self.validation_metrics = {
            "loss": loss,
            "bits_per_byte": self.bits_per_byte(loss, "val"),
            "divergence": distance / max(count, 1),
        }


def check(config: DistillConfig) -> Prepared:
    """Find what is wrong with a distillation before anything is started.

    Raises:
        UserError: Naming the key, file or folder, and the remedy.
    """
    settings = config.distill
    if config.teacher is None:
        raise UserError("teacher is not given: name the checkpoint or run folder to learn from (--teacher)")
    if settings.backend == "liger":
        check_liger(settings.objective(config.train.z_loss), truncated=settings.top_k is not None)
    own_text = settings.on_policy_prefix + settings.on_policy_tokens
    if settings.on_policy_fraction and own_text > config.data.context:
        raise UserError(
            f"distill.on_policy_prefix and on_policy_tokens make {own_text} tokens, more than data.context "
            f"{config.data.context}: lower them"
        )
    prepared = run.check(config)
    teacher = load_teacher(
        config.teacher,
        prepared.tokenizer,
        config.data.path,
        config.data.context,
        dtype=settings.teacher_dtype,
        offload=settings.teacher_offload,
    )
    student, theirs = prepared.config.model, teacher.model.config
    if not isinstance(teacher.model, DualRoutingTransformer):
        _check_outside_view(config)
    if settings.top_k is not None and settings.top_k > teacher.weight.shape[0]:
        raise UserError(
            f"distill.top_k {settings.top_k} is above the vocabulary of {teacher.weight.shape[0]}"
        )
    if config.parallel.sequence_parallel > 1:
        try:
            check_sequence_parallel(config.parallel.sequence_parallel, prepared.world, theirs)
        except UserError as error:
            raise UserError(f"the teacher {config.teacher} cannot share texts: {error}") from error
    pairs: Pairs = []
    if settings.looks_inside:
        pairs = layer_pairs(settings.layer_map, student.num_layers, theirs.num_layers)
        if settings.attention_weight:
            check_heads(pairs, student, theirs)
    module = partial(_distillation_module, settings=settings, teacher=teacher, pairs=pairs)
    return dataclasses.replace(prepared, make_module=module)


def _check_outside_view(config: DistillConfig) -> None:
    """Refuse what needs a teacher of our own kind."""
    for name, wanted in (
        ("distill.hidden_weight", config.distill.hidden_weight > 0),
        ("distill.attention_weight", config.distill.attention_weight > 0),
        ("parallel.sequence_parallel", config.parallel.sequence_parallel > 1),
    ):
        if wanted:
            raise UserError(
                f"{name} cannot be used with the teacher {config.teacher}, which is run by another library: "
                f"use kl_weight and ce_weight"
            )


def _distillation_module(
    prepared: Prepared, *, settings: DistillationConfig, teacher: Teacher, pairs: Pairs
) -> Pretrain:
    return Distill(settings, teacher, pairs, prepared.config.seed, **run.module_arguments(prepared))


def run_distillation(config: DistillConfig) -> int:
    """``dualroute distill``; for the result and the errors see :func:`run_training`."""
    return run_training(config, check)
