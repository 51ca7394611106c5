"""``dualroute finetune``: rows of a user's data become a model for a task, with the trainer of pretraining.

In: a configuration.  Here: everything that can be wrong with it is found before anything starts, as
:mod:`dualroute.training.prepare` does for pretraining; rows are read, divided and encoded.  Next:
:class:`~dualroute.tasks.module.Finetune` is trained as any model is, with the same run folder, checkpoints,
signals and resuming; each checkpoint holds ``task.json`` besides.
"""

from __future__ import annotations

import dataclasses
from itertools import chain

from dualroute.errors import UserError
from dualroute.model.checkpoint.folder import TASK
from dualroute.tasks.config import FinetuneConfig
from dualroute.tasks.data.encode import Encoded
from dualroute.tasks.data.module import SourceExamples, TaskDataModule
from dualroute.tasks.data.tokenizers import tokenizer_of
from dualroute.tasks.description import describe_task
from dualroute.tasks.kind import Kind, Setting, find_kind
from dualroute.tasks.module import Finetune
from dualroute.tasks.training_rows import encode_part, read_sources, remarks_on, training_examples
from dualroute.training import prepare
from dualroute.training.prepare import Prepared
from dualroute.training.run import run_training
from dualroute.training.step.module import Pretrain

#: What task.json says of where the rows came from, so that an evaluation finds those that were held out.
_TOLD = (
    *("path", "validation", "test", "format", "column_names", "hub_config", "validation_share", "group"),
    "max_rows",
)


def check(config: FinetuneConfig) -> Prepared:
    """Find what is wrong with a training for a task before anything is started.

    Raises:
        UserError: Naming the key, file or column, and the remedy.
    """
    if config.parallel.sequence_parallel > 1:
        raise UserError(
            "parallel.sequence_parallel divides a text among ranks, and a task's outputs are read on one: "
            "use 1"
        )
    make = find_kind(config.task.kind)
    make.check_config(config)
    begun = prepare.begin(config)
    if begun.initial is None:  # of a run that began from scratch, and is resumed
        begun = dataclasses.replace(begun, initial=begun.start.checkpoint)
    asking = make(config.task, Setting(None, 0))  # type: ignore[arg-type]  # asked for columns alone
    trains, validation = read_sources(config.data, asking)
    found_dividing = asking.tally.counts.copy()
    for part in (*trains, validation):
        asking.check_columns(part.first() or {}, source=part.source)
    if not asking.reads_text:
        _refuse_text_keys(config, asking)
    tokenizer = tokenizer_of(
        config.data,
        begun,
        chain.from_iterable(asking.texts(row) for train in trains for _, row in train.rows),
    )
    length = config.data.max_length or config.data.context
    if length > config.data.context:
        raise UserError(
            f"data.max_length {length} is above data.context {config.data.context}: an example has to fit "
            f"into a window; lower the one or raise the other"
        )
    kind = make(config.task, Setting(tokenizer, length, begun.config.model.causal, config.data.too_long))
    kind.tally.counts.update(found_dividing)
    training = training_examples(kind, trains, config)
    validated = encode_part(kind, validation, config.data, keep_rows=True)
    encoded = [Encoded([], training.examples), validated]
    mixed = zip(config.data.sources, training.sources, strict=False)
    data = TaskDataModule(
        ", ".join(train.source for train in trains),
        training.examples,
        validated.examples,
        config.data.context,
        config.train.micro_batch,
        config.train.tokens_per_batch,
        seed=config.seed,
        num_workers=config.data.num_workers,
        val_tokens=config.data.val_tokens,
        fills={"input_ids": max(tokenizer.pad_id, 0), **kind.fills},
        sources=[SourceExamples(source, part.examples) for source, part in mixed],
        temperature=config.data.temperature,
    )

    def make_module(prepared: Prepared) -> Pretrain:
        own = kind.training(encoded, prepared, lambda: prepare.module_arguments(prepared))
        return own or Finetune(kind, validated, **prepare.module_arguments(prepared))

    prepared = prepare.prepare(
        begun, data, tokenizer, make_module, kind.head(), kind.frontend(), kind.num_ids()
    )
    sources = {name: getattr(config.data, name) for name in _TOLD}
    if config.data.sources:
        sources["paths"] = [source.path for source in config.data.sources]
    prepared = dataclasses.replace(
        prepared,
        operation="finetune",
        extra_files={TASK: describe_task(kind, sources)},
        remarks=list(remarks_on(kind, training, validation, validated)),
    )
    prepare.check_course(prepared)
    return prepared


def _refuse_text_keys(config: FinetuneConfig, kind: Kind) -> None:
    keys = {
        "data.tokenizer": config.data.tokenizer,
        "data.vocab_size": config.data.vocab_size,
        "model.vocab_size": config.model.vocab_size,
    }
    for name, value in keys.items():
        if value is not None:
            raise UserError(
                f"{name} has no meaning for a task of kind {kind.name}, which reads no text: leave it out"
            )


def run_finetuning(config: FinetuneConfig) -> int:
    """``dualroute finetune``; for the result and the errors see
    :func:`~dualroute.training.run.run_training`."""
    return run_training(config, check)
