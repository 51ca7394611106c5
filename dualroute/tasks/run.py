"""``dualroute finetune``: rows of a user's data become a model for a task, with the trainer of pretraining.

In: a configuration.  Here: everything that can be wrong with it is found before anything starts, as
:mod:`dualroute.training.prepare` does for pretraining; rows are read, divided and encoded.  Next:
:class:`~dualroute.tasks.module.Finetune` is trained as any model is, with the same run folder, checkpoints,
signals and resuming; each checkpoint holds ``task.json`` besides.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from dualroute.errors import UserError
from dualroute.log import counted
from dualroute.model.checkpoint.folder import TASK
from dualroute.tasks.config import FinetuneConfig, TaskDataConfig
from dualroute.tasks.data.encode import Encoded, encode_rows
from dualroute.tasks.data.examples import Examples
from dualroute.tasks.data.module import SourceExamples, TaskDataModule
from dualroute.tasks.data.problems import Problems
from dualroute.tasks.data.rows import divided, read_rows
from dualroute.tasks.data.tokenizers import tokenizer_of
from dualroute.tasks.description import describe_task
from dualroute.tasks.kind import Kind, Row, Setting, find_kind
from dualroute.tasks.module import Finetune
from dualroute.training import prepare
from dualroute.training.prepare import Prepared
from dualroute.training.run import run_training
from dualroute.training.step.module import Pretrain

#: What task.json says of where the rows came from, so that an evaluation finds those that were held out.
_TOLD = (
    *("path", "validation", "test", "format", "column_names", "hub_config", "validation_share", "group"),
    "max_rows",
)
PlacedRows = list[tuple[str, Row]]


@dataclass
class Part:
    """Rows of one part of the data, and what was wrong with others."""

    source: str
    rows: PlacedRows
    problems: Problems


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
        asking.check_columns(part.rows[0][1], source=part.source)
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
    kind.fit(row for train in trains for _, row in train.rows)
    of_sources = [encode_part(kind, train, config.data, keep_rows=False) for train in trains]
    encoded = [joined(of_sources), encode_part(kind, validation, config.data, keep_rows=True)]
    mixed = zip(config.data.sources, of_sources, strict=False)
    data = TaskDataModule(
        ", ".join(train.source for train in trains),
        encoded[0].examples,
        encoded[1].examples,
        config.data.context,
        config.train.micro_batch,
        config.train.tokens_per_batch,
        seed=config.seed,
        num_workers=config.data.num_workers,
        val_tokens=config.data.val_tokens,
        fills={"input_ids": max(tokenizer.pad_id, 0), **kind.fills},
        sources=[SourceExamples(source, len(part.examples)) for source, part in mixed],
        temperature=config.data.temperature,
    )

    def make_module(prepared: Prepared) -> Pretrain:
        own = kind.training(encoded, prepared, lambda: prepare.module_arguments(prepared))
        return own or Finetune(kind, encoded[1], **prepare.module_arguments(prepared))

    prepared = prepare.prepare(
        begun, data, tokenizer, make_module, kind.head(), kind.frontend(), kind.num_ids()
    )
    sources = {name: getattr(config.data, name) for name in _TOLD}
    prepared = dataclasses.replace(
        prepared,
        operation="finetune",
        extra_files={TASK: describe_task(kind, sources)},
        remarks=list(remarks_on(kind, [*trains, validation], [*of_sources, encoded[1]])),
    )
    prepare.check_course(prepared)
    return prepared


def read_sources(data: TaskDataConfig, kind: Kind) -> tuple[list[Part], Part]:
    """Training rows of each source, and the validation rows of all of them.

    Raises:
        UserError: See :func:`read_parts`.
    """
    if not data.sources:
        train, validation = read_parts(data, kind)
        return [train], validation
    if kind.divides:
        raise UserError(
            f"data.sources cannot be mixed for a task of kind {kind.name}, which divides its rows by itself: "
            f"give one data.path"
        )
    parts = [
        read_parts(dataclasses.replace(data, sources=[], path=source.path), kind) for source in data.sources
    ]
    trains = [train for train, _ in parts]
    if data.validation is not None:  # the same for all
        return trains, parts[0][1]
    rows = [row for _, validation in parts for row in validation.rows]
    named = ", ".join(validation.source for _, validation in parts)
    return trains, Part(named, rows, Problems(rows=len(rows)))


def joined(parts: Sequence[Encoded]) -> Encoded:
    """The examples of all sources, one after the other."""
    rows = [int(part.examples.rows.max()) + 1 for part in parts]
    return Encoded(
        [row for part in parts for row in part.rows],
        Examples.joined([part.examples for part in parts], rows),
    )


def read_parts(data: TaskDataConfig, kind: Kind) -> tuple[Part, Part]:
    """Training and validation rows.

    Raises:
        UserError: No path is given, a source is not there, or a part has no rows.
    """
    if data.path is None:
        raise UserError(
            "data.path is not given: name a csv, tsv, jsonl, json, parquet or conll file, a folder of "
            "them, or a "
            "data set on the Hugging Face hub"
        )
    problems = Problems()
    rows = read_source(data, data.path, problems)
    if kind.divides:
        own = kind.divide(list(rows))
        problems.refuse_above(data.max_bad_rows, data.path)
        _refuse_other_parts(data, kind)
        train = Part(data.path, own["train"], problems)
        rest = own["validation"]
        validation = Part(f"{data.path} (validation)", rest, Problems(rows=len(rest)))
    elif data.validation is not None:
        train = Part(data.path, list(rows), problems)
        other = Problems()
        validation = Part(data.validation, list(read_source(data, data.validation, other)), other)
    else:
        first, second = divided(rows, data.validation_share, data.group)
        train = Part(data.path, first, problems)
        # counted in one place
        validation = Part(f"{data.path} (validation_share)", second, Problems(rows=len(second)))
        problems.rows -= len(second)
    for part, remedy in (
        (train, "give a file with rows"),
        (validation, kind.few_rows),
    ):
        part.problems.refuse_above(data.max_bad_rows, part.source)
        if not part.rows:
            raise UserError(f"{part.source} has no rows to use: {remedy}")
    return train, validation


def _refuse_other_parts(data: TaskDataConfig, kind: Kind) -> None:
    for name in ("validation", "test", "group"):
        if getattr(data, name) is not None:
            raise UserError(
                f"data.{name} has no meaning for a task of kind {kind.name}, which divides its rows by "
                f"itself: leave it out"
            )


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


def read_source(data: TaskDataConfig, source: str, problems: Problems) -> Any:
    """Rows of one source, as the configuration says they are to be read."""
    return read_rows(
        source,
        problems,
        format=data.format,
        column_names=data.column_names,
        hub_config=data.hub_config,
        limit=data.max_rows,
    )


def encode_part(kind: Kind, part: Part, data: TaskDataConfig, *, keep_rows: bool) -> Encoded:
    """The examples of a part.

    Raises:
        UserError: Too many of its rows cannot be used, or all.
    """
    encoded = encode_rows(kind, part.rows, part.problems, keep_rows=keep_rows)
    part.problems.refuse_above(data.max_bad_rows, part.source)
    if not len(encoded.examples):
        reasons = "; ".join([*part.problems.lines(part.source), *kind.tally.lines()])
        raise UserError(
            f"{part.source} has no row that can be used{f' ({reasons})' if reasons else ''}: give other rows"
        )
    return encoded


def remarks_on(kind: Kind, parts: list[Part], encoded: list[Encoded]) -> Iterator[tuple[int, str]]:
    """(level, line) of what was read, what was left out, and what may not be meant."""
    for part, examples in zip(parts, (e.examples for e in encoded), strict=True):
        yield from ((logging.WARNING, line) for line in part.problems.lines(part.source))
        used = len(set(examples.rows.tolist()))
        yield (
            logging.INFO,
            f"{part.source}: {counted(used, 'row')}, {counted(len(examples), 'example')}, "
            f"{counted(int(examples.lengths.sum()), 'token')}",
        )
    yield from ((logging.WARNING, line) for line in kind.tally.lines())
    yield from ((logging.WARNING, line) for line in kind.warnings([row for _, row in parts[0].rows]))


def run_finetuning(config: FinetuneConfig) -> int:
    """``dualroute finetune``; for the result and the errors see
    :func:`~dualroute.training.run.run_training`."""
    return run_training(config, check)
