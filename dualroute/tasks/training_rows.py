"""The rows that a training learns from and those it is measured on, and the examples that they become.

In: the data's configuration and a kind.  Here: rows are read and divided; they are encoded in memory, or,
with ``data.encoded``, into files that all processes of the machine read and that the next start finds there
(:mod:`~dualroute.tasks.data.kept`).  Next: :mod:`~dualroute.tasks.run` makes a run of them.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dualroute
from dualroute.errors import UserError
from dualroute.log import counted
from dualroute.tasks.config import FinetuneConfig, TaskDataConfig
from dualroute.tasks.data import kept
from dualroute.tasks.data.encode import Encoded, encode_rows, encoded_rows
from dualroute.tasks.data.examples import Examples
from dualroute.tasks.data.problems import Problems
from dualroute.tasks.data.rows import divided, holds_its_media, is_held_out, kept_digest, read_rows
from dualroute.tasks.kind import Kind, PlacedRow, Row


@dataclass
class Part:
    """Rows of one part of the data.

    Attributes:
        source: What it is called in messages.
        read: Reads the rows, and counts into what it is given those that are none.  They may be held.
        problems: What was wrong with rows; of rows that are not held, once they have been encoded.
    """

    source: str
    read: Callable[[Problems], Iterable[PlacedRow]]
    problems: Problems

    @classmethod
    def held(cls, source: str, rows: list[PlacedRow], problems: Problems | None = None) -> Part:
        """Of rows that are in memory; without problems there were none."""
        return cls(source, lambda problems: rows, problems or Problems(rows=len(rows)))

    @property
    def rows(self) -> Iterable[PlacedRow]:
        """The rows with their places, without counting."""
        return self.read(Problems())

    def first(self) -> Row | None:
        """The first row, null where there is none."""
        return next((row for _, row in self.rows), None)


@dataclass(frozen=True)
class Counts:
    """How many rows of a part are used, and the examples and tokens that they became."""

    rows: int
    examples: int
    tokens: int

    @classmethod
    def of(cls, examples: Examples) -> Counts:
        """Of encoded rows."""
        return cls(len(set(examples.rows.tolist())), len(examples), int(examples.lengths.sum()))


@dataclass(frozen=True)
class TrainingExamples:
    """What the training rows have become.

    Attributes:
        examples: Of all sources, one after the other.
        sources: How much is of each.
        said: Lines about what was left out and read, with their levels.
        warnings: What of the rows may not be meant.
    """

    examples: Examples
    sources: list[Counts]
    said: list[tuple[int, str]]
    warnings: list[str]


# ---------------------------------------------------------------------- rows


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
    return trains, Part.held(", ".join(validation.source for _, validation in parts), rows)


def read_parts(data: TaskDataConfig, kind: Kind) -> tuple[Part, Part]:
    """Training and validation rows; the former are held unless ``data.encoded`` keeps their examples.

    Raises:
        UserError: No path is given, a source is not there, or a part has no rows.
    """
    if data.path is None:
        raise UserError(
            "data.path is not given: name a csv, tsv, jsonl, json, parquet or conll file, a folder of "
            "them, or a "
            "data set on the Hugging Face hub"
        )
    path, problems = data.path, Problems()
    if kind.divides:
        own = kind.divide(list(_read(data, path, problems)))
        problems.refuse_above(data.max_bad_rows, path)
        _refuse_other_parts(data, kind)
        train = Part.held(path, own["train"], problems)
        validation = Part.held(f"{path} (validation)", own["validation"])
    elif data.validation is not None:
        other = Problems()
        validation = Part.held(data.validation, list(_read(data, data.validation, other)), other)
        if data.encoded is None:
            train = Part.held(path, list(_read(data, path, problems)), problems)
        else:
            train = Part(path, lambda counting: _read(data, path, counting), problems)
    else:
        share, group, name = data.validation_share, data.group, f"{path} (validation_share)"
        if data.encoded is None:
            first, second = divided(_read(data, path, problems), share, group)
            train, validation = Part.held(path, first, problems), Part.held(name, second)
            problems.rows -= len(second)  # counted in one place
        else:
            found = Problems()
            placed = _read(data, path, found)
            validation = Part.held(name, [one for one in placed if is_held_out(*one, share, group)])
            found.refuse_above(data.max_bad_rows, path)
            train = Part(path, lambda counting: _learnt(data, path, counting), problems)
    for part, remedy in (
        (train, "give a file with rows"),
        (validation, kind.few_rows),
    ):
        part.problems.refuse_above(data.max_bad_rows, part.source)
        found = Problems()
        if next(iter(part.read(found)), None) is None:
            found.refuse_above(data.max_bad_rows, part.source)
            raise UserError(f"{part.source} has no rows to use: {remedy}")
    return train, validation


def _learnt(data: TaskDataConfig, path: str, problems: Problems) -> Iterator[PlacedRow]:
    """Rows of a source that are not held out."""
    for place, row in _read(data, path, problems):
        if is_held_out(place, row, data.validation_share, data.group):
            problems.rows -= 1  # counted with the validation
        else:
            yield place, row


def _refuse_other_parts(data: TaskDataConfig, kind: Kind) -> None:
    for name in ("validation", "test", "group", "encoded"):
        if getattr(data, name) is not None:
            raise UserError(
                f"data.{name} has no meaning for a task of kind {kind.name}, which divides its rows by "
                f"itself: leave it out"
            )


def _read(data: TaskDataConfig, source: str, problems: Problems) -> Iterator[PlacedRow]:
    """Rows of one source, as the configuration says they are to be read."""
    return read_rows(
        source,
        problems,
        format=data.format,
        column_names=data.column_names,
        hub_config=data.hub_config,
        limit=data.max_rows,
    )


# ---------------------------------------------------------------------- examples


def encode_part(kind: Kind, part: Part, data: TaskDataConfig, *, keep_rows: bool) -> Encoded:
    """The examples of a part.

    Raises:
        UserError: Too many of its rows cannot be used, or all.
    """
    encoded = encode_rows(kind, part.read(part.problems), part.problems, keep_rows=keep_rows)
    _refuse_unusable(kind, part, data, len(encoded.examples))
    return encoded


def _refuse_unusable(kind: Kind, part: Part, data: TaskDataConfig, examples: int) -> None:
    part.problems.refuse_above(data.max_bad_rows, part.source)
    if not examples:
        reasons = "; ".join([*part.problems.lines(part.source), *kind.tally.lines()])
        raise UserError(
            f"{part.source} has no row that can be used{f' ({reasons})' if reasons else ''}: give other rows"
        )


def training_examples(kind: Kind, trains: Sequence[Part], config: FinetuneConfig) -> TrainingExamples:
    """Fit a kind to the training rows, and encode them; both only once where the examples are kept.

    Raises:
        UserError: See :func:`encode_part`; or examples cannot be kept.
    """
    data = config.data
    if data.encoded is None:
        kind.fit(row for part in trains for _, row in part.rows)
        parts = [encode_part(kind, part, data, keep_rows=False).examples for part in trains]
        examples = Examples.joined(parts, [int(part.rows.max()) + 1 for part in parts])
        sources = [Counts.of(part) for part in parts]
        return TrainingExamples(examples, sources, _said(trains, sources), _warnings(kind, trains))
    key = kept.key_of(_deciding(kind, config))
    examples, told, made = kept.kept_examples(
        data.encoded, key, lambda writer: _written(kind, trains, data, writer)
    )
    for part, problems in zip(trains, told["problems"], strict=True):
        part.problems = Problems(problems["rows"], Counter(problems["counts"]), problems["places"])
        part.problems.refuse_above(data.max_bad_rows, part.source)  # which may be another share now
    kind.labels, kind.class_weights = told["labels"], told["class_weights"]
    kind.load_state(told["state"])
    kind.tally.counts = Counter(told["tally"])
    said = [(int(level), str(line)) for level, line in told["said"]]
    said.append((logging.INFO, f"{'kept' if made else 'read'} in {Path(data.encoded) / key}"))
    return TrainingExamples(examples, [Counts(*counts) for counts in told["sources"]], said, told["warnings"])


def _written(
    kind: Kind, trains: Sequence[Part], data: TaskDataConfig, writer: kept.ExamplesWriter
) -> dict[str, Any]:
    """Encode the training rows into files; what the next start has to be told besides."""
    kind.fit(row for part in trains for _, row in part.rows)
    sources, first = [], 0
    for part in trains:
        examples, tokens, rows = writer.examples, writer.tokens, 0
        placed = _reading(part.source, part.read(part.problems))
        for number, _, encoded in encoded_rows(kind, placed, part.problems):
            for example in encoded:
                writer.add(first + number, example)
            rows += bool(encoded)
            last = number
        _refuse_unusable(kind, part, data, writer.examples - examples)
        sources.append(Counts(rows, writer.examples - examples, writer.tokens - tokens))
        first += last + 1
    return {
        "labels": kind.labels,
        "class_weights": kind.class_weights,
        "state": kind.state(),
        "tally": kind.tally.counts,
        "problems": [vars(part.problems) for part in trains],
        "said": _said(trains, sources),
        "warnings": _warnings(kind, trains),
        "sources": [dataclasses.astuple(counts) for counts in sources],
    }


def _reading(source: str, rows: Iterable[PlacedRow]) -> Iterator[PlacedRow]:
    """The rows; an error of their file is told from one of the file that is written meanwhile."""
    try:
        yield from rows
    except OSError as error:
        raise UserError(f"{source} cannot be read ({error}): mend that, or give another") from error


@functools.cache
def _code() -> str:
    """sha256 of the code that makes examples of rows."""
    package = Path(dualroute.__file__).parent
    files = [*(package / "tasks").rglob("*.py"), *(package / "data").glob("*token*.py")]
    files += (package / "data" / "chat").rglob("*.py")
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"{path.relative_to(package)} ".encode() + path.read_bytes())
    return digest.hexdigest()


def _deciding(kind: Kind, config: FinetuneConfig) -> dict[str, Any]:
    """All that decides which examples the training rows become, as JSON.

    Raises:
        UserError: Some of it cannot be seen from here.
    """
    data, tokenizer = config.data, kind.setting.tokenizer
    sources = [source.path for source in data.sources] or [str(data.path)]
    if kind.media and not all(map(holds_its_media, sources)):
        raise UserError(
            "data.encoded keeps images and recordings of folders and .npz files: files that rows name may "
            "change unseen; leave it out"
        )
    of_data = ("format", "column_names", "hub_config", "validation_share", "group", "max_rows")
    task = dataclasses.asdict(config.task)
    for name in ("metric", "metric_rows", "label_smoothing", "beta"):
        del task[name]
    own = Path(config.task.kind)
    return {
        "code": _code(),
        "task": task,
        "kind": hashlib.sha256(own.read_bytes()).hexdigest() if own.suffix == ".py" else "",
        "tokenizer": [tokenizer.sha256, tokenizer.settings.to_bytes().decode()],
        "setting": [kind.setting.max_length, kind.setting.causal, kind.setting.too_long],
        "data": {name: getattr(data, name) for name in of_data},
        "divided": data.validation is None,
        "sources": [[source, kept_digest(source, data.hub_config)] for source in sources],
    }


def _warnings(kind: Kind, trains: Sequence[Part]) -> list[str]:
    return list(kind.warnings(row for _, row in trains[0].rows))


def _said(parts: Sequence[Part], counts: Sequence[Counts]) -> list[tuple[int, str]]:
    """(level, line) of what was read and what was left out."""
    lines = []
    for part, some in zip(parts, counts, strict=True):
        lines += [(logging.WARNING, line) for line in part.problems.lines(part.source)]
        line = f"{counted(some.rows, 'row')}, {counted(some.examples, 'example')}"
        lines.append((logging.INFO, f"{part.source}: {line}, {counted(some.tokens, 'token')}"))
    return lines


def remarks_on(
    kind: Kind, training: TrainingExamples, validation: Part, validated: Encoded
) -> Iterator[tuple[int, str]]:
    """(level, line) of what was read, what was left out, and what may not be meant."""
    yield from training.said
    yield from _said([validation], [Counts.of(validated.examples)])
    yield from ((logging.WARNING, line) for line in kind.tally.lines())
    yield from ((logging.WARNING, line) for line in training.warnings)
