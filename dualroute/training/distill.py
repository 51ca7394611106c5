"""``dualroute distill``: a student learns from a teacher, with the trainer of pretraining.

In: a configuration.  Here: everything that can be wrong with it is found before anything starts, as
:mod:`~dualroute.training.run` does for pretraining, and beyond that teacher, cache, layers and heads are
compared with the student and the data.  Next: :class:`~dualroute.training.distill_module.Distill` is trained
as any model is, with the same run folder, checkpoints, signals and resuming.

The surprising fact: where the teacher was asked before (``dualroute cache-logits``), it need not be there at
all: what it said comes out of the DataLoader together with the tokens.
"""

from __future__ import annotations

import dataclasses
from functools import partial

from dualroute.errors import UserError
from dualroute.model import DualRoutingTransformer
from dualroute.training import run
from dualroute.training.distill_config import DistillationConfig, DistillConfig
from dualroute.training.distill_module import Distill
from dualroute.training.intermediate import Pairs, check_heads, layer_pairs
from dualroute.training.liger import check_liger
from dualroute.training.logit_reader import CachedWindows, LogitCache
from dualroute.training.pretrain import Pretrain
from dualroute.training.run import Prepared, run_training
from dualroute.training.sequence import check_sequence_parallel
from dualroute.training.teacher import Teacher, load_teacher, weights_digest

__all__ = ["Distill", "DistillConfig", "DistillationConfig", "check", "run_distillation"]


def check(config: DistillConfig) -> Prepared:
    """Find what is wrong with a distillation before anything is started.

    Raises:
        UserError: Naming the key, file or folder, and the remedy.
    """
    _check_settings(config)
    prepared = run.check(config)
    pairs: Pairs = []
    teacher = None
    if config.distill.cached_logits is not None:
        _use_cache(config, prepared)
    else:
        teacher, pairs = _teacher(config, prepared)
    module = partial(_distillation_module, settings=config.distill, teacher=teacher, pairs=pairs)
    return dataclasses.replace(prepared, make_module=module)


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


def _use_cache(config: DistillConfig, prepared: Prepared) -> None:
    """Compare the cache with the run, and have the data module read it."""
    settings, data = config.distill, prepared.data
    assert settings.cached_logits is not None
    cache = LogitCache(settings.cached_logits)
    wanted = dataclasses.replace(
        cache.identity,
        fingerprint=data.manifest.fingerprint,
        seed=config.seed,
        context=config.data.context,
        vocab_size=prepared.tokenizer.vocab_size,
        tokenizer=prepared.tokenizer.sha256,
        temperature=settings.temperature,
        top_k=cache.identity.top_k if settings.top_k is None else settings.top_k,
        teacher=cache.identity.teacher if config.teacher is None else weights_digest(config.teacher),
    )
    cache.check(wanted, config.train.total_steps * data.samples_per_batch)
    cache.verify(config.data.verify if prepared.world.local_rank == 0 else "size")
    data.extend = partial(CachedWindows, cache=cache, plan=data.plan)


def _teacher(config: DistillConfig, prepared: Prepared) -> tuple[Teacher, Pairs]:
    settings = config.distill
    assert config.teacher is not None
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
    if not settings.looks_inside:
        return teacher, []
    pairs = layer_pairs(settings.layer_map, student.num_layers, theirs.num_layers)
    if settings.attention_weight:
        check_heads(pairs, student, theirs)
    return teacher, pairs


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
    prepared: Prepared, *, settings: DistillationConfig, teacher: Teacher | None, pairs: Pairs
) -> Pretrain:
    return Distill(settings, teacher, pairs, prepared.config.seed, **run.module_arguments(prepared))


def run_distillation(config: DistillConfig) -> int:
    """``dualroute distill``; for the result and the errors see :func:`run_training`."""
    return run_training(config, check)
