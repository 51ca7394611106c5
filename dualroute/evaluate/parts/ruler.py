"""The part ``ruler``: texts that ask for something far away, at lengths in the model's own tokens.

In: names of tasks (:mod:`dualroute.evaluate.long_context`) and lengths.  Out: a cell for each task and
length; the score is the share of the answers that stand in what the model writes, as RULER counts.

``positions`` has no answer: the loss of a book by the number of tokens before, in windows of the length.  A
model that uses a long past has a loss that goes on falling.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from dualroute.errors import UserError
from dualroute.evaluate.long_context.sample import Sample, Task, TooShort, check_room, matched, samples
from dualroute.evaluate.long_context.tasks import (
    CONFIGURATIONS,
    NAMES,
    POSITIONS,
    Library,
    Sources,
    data_file,
    missing,
)
from dualroute.evaluate.parts.perplexity import by_position, windows
from dualroute.evaluate.suite.cells import Cell, Measured, mean_score
from dualroute.evaluate.suite.config import RulerSettings
from dualroute.evaluate.suite.model import SuiteModel
from dualroute.files import file_sha256

log = logging.getLogger(__name__)
_VERSION = 1
_SHORTEST = 1024
#: Where the paragraphs are looked for in $DUALROUTE_DATA.
_XQUAD = "squad_style/xquad.en.json.gz"
_DEPTHS = 4  # parts of the text by which hits are counted


def cells(settings: RulerSettings, model: SuiteModel) -> list[Cell]:
    """A cell for each task and length.

    Raises:
        UserError: A length is beyond the model's context or too short for a task that was named; there is no
            such task, or it lacks a file.
    """
    model.require_language_model("long context")
    lengths = settings.lengths or _lengths(model.max_context)
    long = [length for length in lengths if length > model.max_context]
    if long:
        raise UserError(
            f"lengths {', '.join(map(str, long))} do not fit the model's context of {model.max_context} "
            f"tokens: give --lengths up to {model.max_context}"
        )
    sources = Sources(
        settings.haystack, settings.paragraphs or data_file(_XQUAD), settings.hotpot, settings.book
    )
    names = settings.tasks or [name for name in NAMES if not missing(name, sources)]
    if settings.tasks is None:
        for name in (name for name in NAMES if name not in names):
            log.info("%s", f"{settings.name}: {name} is left out, it needs {missing(name, sources)}")
    library = Library(sources)
    made = []
    for name in names:
        for length in lengths:
            try:
                made.append(_cell(settings, library, name, length, model))
            except TooShort as error:
                if settings.tasks is not None:
                    raise UserError(f"{name}: {error}: leave the length or the task out") from error
                log.info("%s", f"{settings.name}: {name} is left out at {length}: {error}")
    return made


def _lengths(limit: int) -> list[int]:
    """Powers of two that the model reads; at least one length."""
    lengths: list[int] = []
    while (length := _SHORTEST << len(lengths)) <= limit:
        lengths.append(length)
    return lengths or [limit]


def _cell(settings: RulerSettings, library: Library, name: str, length: int, model: SuiteModel) -> Cell:
    sources = library.sources
    files = {
        "haystack": sources.haystack if name in CONFIGURATIONS else None,
        "paragraphs": sources.paragraphs if name in ("qa_1", "qa_2") else None,
        "hotpot": sources.hotpot if name == "qa_2" else None,
        "book": sources.book if name.startswith("facts") or name == POSITIONS else None,
    }
    depends: dict[str, Any] = {
        "task": name,
        "length": length,
        "samples": settings.samples,
        "seed": settings.seed,
        "version": _VERSION,
        **{kind: file_sha256(path) for kind, path in files.items() if path is not None},
    }
    if name == POSITIONS:
        if missing(name, sources):
            raise UserError(f"{name} needs {missing(name, sources)}")
        library.book()
        return Cell(
            settings.name, f"{name}/{length}", depends, partial(_positions, library, length, settings, model)
        )
    task = library.task(name, length)
    seed = f"{settings.seed}/{name}/{length}"
    check_room(task, length, seed, lambda text: len(model.encode(text)))  # now, not after other cells
    return Cell(
        settings.name,
        f"{name}/{length}",
        depends,
        partial(_asked, task, length, settings.samples, seed, model),
    )


def _asked(task: Task, length: int, count: int, seed: str, model: SuiteModel) -> Measured:
    texts = samples(task, length, count, seed, lambda text: len(model.encode(text)))
    prompts = [model.encode(sample.text) for sample in texts]
    written = model.write(prompts, task.new_tokens)
    hits = [
        matched(answer, sample.answers, task.match) for answer, sample in zip(written, texts, strict=True)
    ]
    details: dict[str, Any] = {
        "longest": max(map(len, prompts)) + task.new_tokens,
        "example": written[0][:200],
    }
    if all(sample.depth is not None for sample in texts):
        details["by_depth"] = _by_depth(texts, hits)
    return Measured([mean_score("match", hits)], details)


def _by_depth(texts: Sequence[Sample], hits: Sequence[float]) -> list[dict[str, float]]:
    """Hits by the part of the text that the last needed fact stands in."""
    parts: dict[int, list[float]] = {}
    for sample, hit in zip(texts, hits, strict=True):
        parts.setdefault(min(int((sample.depth or 0) * _DEPTHS), _DEPTHS - 1), []).append(hit)
    return [
        {"from": part / _DEPTHS, "match": sum(own) / len(own), "samples": len(own)}
        for part, own in sorted(parts.items())
    ]


def _positions(library: Library, length: int, settings: RulerSettings, model: SuiteModel) -> Measured:
    ids = model.encode(library.book())[: length * settings.samples + 1]
    found = [one for one in windows(ids, length, length) if len(one[0][1]) == length]
    if not found:
        raise UserError(
            f"{settings.book} has fewer than {length} tokens: give a longer book, or a shorter length"
        )
    losses = [-one.tokens.astype(np.float64) for one in model.likelihoods([pair for pair, _ in found])]
    late = [float(one[length // 2 :].mean()) for one in losses]
    early = [float(one[: length // 2].mean()) for one in losses]
    gains = [a - b for a, b in zip(early, late, strict=True)]
    return Measured(
        [
            mean_score("loss_second_half", late, higher_is_better=False, unit="token"),
            mean_score("first_minus_second_half", gains, unit="token"),
        ],
        {"by_position": by_position(losses, [first for _, first in found])},
    )
