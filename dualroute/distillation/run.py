"""``dualroute distill``: a student learns from a teacher, with the trainer of pretraining.

In: a configuration.  Here: everything that can be wrong with it is found before anything starts, as
:mod:`~dualroute.training.prepare` does for pretraining, and beyond that teacher, cache, layers and heads are
compared with the student and the data.  Next: :class:`~dualroute.distillation.module.Distill` is trained
as any model is, with the same run folder, checkpoints, signals and resuming.

Where the teacher was asked before (``dualroute cache-logits``), it need not be there at
all: what it said comes out of the DataLoader together with the tokens.
"""

from __future__ import annotations

import dataclasses
import os
from functools import partial
from pathlib import Path
from typing import Any

from dualroute.data.module import ShardDataModule
from dualroute.distillation.config import DistillConfig
from dualroute.distillation.intermediate import Pairs, check_heads, layer_pairs
from dualroute.distillation.liger import check_liger
from dualroute.distillation.logit_reader import CachedWindows, LogitCache
from dualroute.distillation.module import Distill
from dualroute.distillation.teacher import Teacher, load_teacher, weights_digest
from dualroute.errors import UserError
from dualroute.model import DualRoutingTransformer
from dualroute.model.checkpoint.format import find_checkpoint
from dualroute.model.checkpoint.lineage import teacher_entry
from dualroute.model.foreign.hub import is_foreign
from dualroute.training import prepare
from dualroute.training.parallel.sequence import check_sequence_parallel
from dualroute.training.prepare import Prepared
from dualroute.training.run import run_training
from dualroute.training.step.module import Pretrain

__all__ = ["Distill", "DistillConfig", "check", "run_distillation"]


def check(config: DistillConfig) -> Prepared:
    """Find what is wrong with a distillation before anything is started.

    Raises:
        UserError: Naming the key, file or folder, and the remedy.
    """
    _check_settings(config)
    prepared = prepare.check(config)
    prepared.config.model.require_causal("distillation")
    if prepared.finished:  # whose teacher may be gone
        return prepared
    pairs: Pairs = []
    teacher = None
    if config.distill.cached_logits is not None:
        digest = _use_cache(config, prepared)
    else:
        teacher, pairs = _teacher(config, prepared)
        digest = teacher.digest

    def make_module(prepared: Prepared) -> Pretrain:
        arguments = prepare.module_arguments(prepared)
        return Distill(config.distill, teacher, digest, pairs, config.seed, **arguments)

    return dataclasses.replace(
        prepared, make_module=make_module, operation="distill", teacher=_described(config.teacher, digest)
    )


def _described(teacher: str | None, digest: str) -> dict[str, Any]:
    """What the student's metadata say of its teacher, as far as it is known."""
    if teacher is None or is_foreign(Path(teacher)):
        folder = None if teacher is None else Path(teacher).name
        return {"folder": folder, "weights_sha256": digest}
    return teacher_entry(find_checkpoint(teacher))


def _check_settings(config: DistillConfig) -> None:
    settings = config.distill
    if config.teacher is None and settings.cached_logits is None:
        raise UserError(
            "teacher is not given: name the checkpoint or run folder to learn from (--teacher), or "
            "distill.cached_logits"
        )
    if settings.backend == "liger":
        truncated = settings.top_k is not None or settings.cached_logits is not None
        check_liger(settings.objective(config.train.z_loss), truncated=truncated)
    own_text = settings.on_policy_prefix + settings.on_policy_tokens
    if settings.on_policy_fraction and own_text > config.data.context:
        raise UserError(
            f"distill.on_policy_prefix and on_policy_tokens make {own_text} tokens, more than data.context "
            f"{config.data.context}: lower them"
        )


def _use_cache(config: DistillConfig, prepared: Prepared) -> str:
    """Compare the cache with the run, and have the data module read it; the digest of its teacher."""
    settings, data = config.distill, prepared.data
    assert settings.cached_logits is not None
    assert isinstance(data, ShardDataModule)
    cache = LogitCache(settings.cached_logits)
    wanted = dataclasses.replace(
        cache.identity,
        fingerprint=data.order_fingerprint,
        seed=config.seed,
        context=config.data.context,
        vocab_size=prepared.tokenizer.vocab_size,
        tokenizer=prepared.tokenizer.sha256,
        temperature=settings.temperature,
        top_k=cache.identity.top_k if settings.top_k is None else settings.top_k,
        teacher=cache.identity.teacher if config.teacher is None else weights_digest(config.teacher),
    )
    cache.check(wanted, prepared.token_count.at(prepared.total_steps) // config.data.context)
    cache.verify(config.data.verify if prepared.world.local_rank == 0 else "size")
    data.extend = partial(CachedWindows, cache=cache, plan=data.plan)
    return cache.identity.teacher


def _teacher(config: DistillConfig, prepared: Prepared) -> tuple[Teacher, Pairs]:
    settings = config.distill
    assert config.teacher is not None
    if not os.path.lexists(config.teacher):
        raise UserError(
            f"teacher {config.teacher} is not there, and a distillation cannot go on without it, however far "
            f"it has come: put it back, give its new place (--teacher), or distill.cached_logits"
        )
    teacher = load_teacher(
        config.teacher,
        prepared.tokenizer,
        config.data.path,
        config.data.context,
        dtype=settings.teacher_dtype,
        offload=settings.teacher_offload,
        sharded=settings.teacher_sharded,
    )
    student = prepared.config.model
    theirs = teacher.model.config if isinstance(teacher.model, DualRoutingTransformer) else None
    if settings.top_k is not None and settings.top_k > teacher.weight.shape[0]:
        raise UserError(
            f"distill.top_k {settings.top_k} is above the vocabulary of {teacher.weight.shape[0]}"
        )
    if config.parallel.sequence_parallel > 1:
        if theirs is None:
            raise UserError(
                f"parallel.sequence_parallel: the teacher {config.teacher} is not a model of dualroute and "
                f"cannot share texts: use 1"
            )
        try:
            check_sequence_parallel(config.parallel.sequence_parallel, prepared.world, theirs)
        except UserError as error:
            raise UserError(f"the teacher {config.teacher} cannot share texts: {error}") from error
    if not settings.looks_inside:
        return teacher, []
    if theirs is None:
        wanted = "hidden_weight" if settings.hidden_weight else "attention_weight"
        raise UserError(
            f"distill.{wanted} cannot be used with the teacher {config.teacher}, which does not show its "
            f"layers and heads as a model of dualroute does: set it to 0"
        )
    pairs = layer_pairs(settings.layer_map, student.num_layers, theirs.num_layers)
    if settings.attention_weight:
        check_heads(pairs, student, theirs)
    return teacher, pairs


def run_distillation(config: DistillConfig) -> int:
    """``dualroute distill``; for the result and the errors see :func:`run_training`."""
    return run_training(config, check)
