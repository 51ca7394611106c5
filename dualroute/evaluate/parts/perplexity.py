"""The part ``perplexity``: how well text is predicted, by source and by position.

In: text files and a folder of shards.  Here: windows of a document, ``stride`` tokens apart, in each of
which the targets are scored that no earlier window has scored.  Out: a cell for each source with the loss of
a token, bits per byte and per word (see :mod:`~dualroute.evaluate.parts.wikitext` for whose words), and the
loss by the number of tokens that stood before.

The standard error takes pieces of :data:`PIECE` consecutive targets for independent of each other; within
one they are not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dualroute.data.manifest import Manifest, verify_shards
from dualroute.data.reader import ShardReader
from dualroute.errors import UserError
from dualroute.evaluate.parts.wikitext import Document, documents
from dualroute.evaluate.perplexity import read_text, refuse_other_tokenizer
from dualroute.evaluate.suite.cells import Cell, Measured, Score, ratio
from dualroute.evaluate.suite.config import PerplexitySettings
from dualroute.evaluate.suite.model import Ids, Pair, SuiteModel
from dualroute.files import file_sha256

#: Consecutive targets that count as one observation.
PIECE = 256
_VERSION = 1  # of what is measured; a change makes old results be measured again


def cells(settings: PerplexitySettings, model: SuiteModel) -> list[Cell]:
    """A cell for each source.

    Raises:
        UserError: There is no source, a file is missing, or the context does not fit the model.
    """
    model.require_language_model("perplexity")
    if not settings.text and settings.data is None:
        raise UserError("it names no text and no data: give text, a list of files, or --text FILE")
    context = settings.context or model.trained_context
    if context > model.max_context:
        raise UserError(f"context {context} is longer than the model's max_context {model.max_context}")
    stride = settings.stride or context
    if stride > context:
        raise UserError(f"stride {stride} is longer than context {context}: tokens between would be skipped")
    shape = {"context": context, "stride": stride, "max_tokens": settings.max_tokens, "version": _VERSION}
    made: list[Cell] = []
    for path in settings.text:
        read_text(path)  # now, not after hours of other cells
        depends = {**shape, "convention": settings.convention, "sha256": file_sha256(path)}
        measure = partial(_of_text, path, settings, model, context, stride)
        made.append(Cell(settings.name, _called(path, made), depends, measure))
    if settings.data is not None:
        manifest = Manifest.load(settings.data)
        refuse_other_tokenizer(manifest, model.tokenizer, model.folder)
        verify_shards(manifest, settings.split, level="size")
        depends = {**shape, "data": manifest.fingerprint, "split": settings.split}
        measure = partial(_of_shards, manifest, settings, model, context, stride)
        made.append(Cell(settings.name, f"{Path(settings.data).name}:{settings.split}", depends, measure))
    return made


def _called(path: str, made: Sequence[Cell]) -> str:
    """A file's name, or all of its path where another file has that name."""
    name = Path(path).name
    return path if any(cell.name == name for cell in made) else name


def windows(ids: Ids, context: int, stride: int) -> Iterator[tuple[Pair, int]]:
    """A document (T,) as pairs of what a window has before and the targets it is asked for, with the number
    of tokens before the first of them; each of the T − 1 targets once."""
    scored, start = 0, 0  # target t is the token t + 1
    while scored < len(ids) - 1:
        stop = min(start + context, len(ids) - 1)
        yield (ids[start : scored + 1], ids[scored + 1 : stop + 1]), scored + 1 - start
        scored, start = stop, start + stride


def _of_text(
    path: str, settings: PerplexitySettings, model: SuiteModel, context: int, stride: int
) -> Measured:
    found = documents(read_text(path), settings.convention)
    whole = settings.convention == "none"
    eos = model.tokenizer.eos_id
    pairs: list[tuple[Pair, int]] = []
    left = settings.max_tokens
    size = words = 0.0
    for document in found:
        ids = model.encode(document.text) + ([eos] if whole and eos >= 0 else [])
        document, ids = _shortened(document, ids, left, model)
        pairs += windows(ids, context, stride)
        size, words = size + document.bytes, words + document.words
        if left is not None:
            left -= len(ids)
            if left < 2:
                break
    if not pairs or not size:
        raise UserError(f"{path} holds too few tokens to score: give a longer text")
    return _measured(pairs, model, size, words, settings.convention)


def _shortened(
    document: Document, ids: list[int], left: int | None, model: SuiteModel
) -> tuple[Document, list[int]]:
    """The first ``left`` tokens of a document, with the bytes and words of that share of it."""
    if left is None or len(ids) <= left:
        return document, ids
    ids = ids[:left]
    share = len(model.tokenizer.decode(ids)) / max(len(document.text), 1)
    return Document("", round(document.bytes * share), round(document.words * share)), ids


def _of_shards(
    manifest: Manifest, settings: PerplexitySettings, model: SuiteModel, context: int, stride: int
) -> Measured:
    reader, index = ShardReader(manifest, settings.split), manifest.open_index(settings.split)
    left = settings.max_tokens
    pairs: list[tuple[Pair, int]] = []
    for number, tokens in enumerate(index[:, 2].tolist()):
        count = tokens if left is None else min(tokens, left)
        pairs += windows(reader.read(number, 0, count), context, stride)
        if left is not None:
            left -= count
            if left < 2:
                break
    reader.close()
    if not pairs:
        raise UserError(
            f"{settings.data} has no documents in split '{settings.split}': prepare it with a larger "
            "--val_fraction"
        )
    targets = sum(len(after) for (_, after), _ in pairs)
    size = targets / manifest.split(settings.split).targets_per_byte
    return _measured(pairs, model, size, 0.0, "none")


def _measured(
    pairs: Sequence[tuple[Pair, int]], model: SuiteModel, size: float, words: float, convention: str
) -> Measured:
    losses = [-one.tokens.astype(np.float64) for one in model.likelihoods([pair for pair, _ in pairs])]
    sums = [float(piece.sum()) for one in losses for piece in _pieces(one)]
    counts = [float(len(piece)) for one in losses for piece in _pieces(one)]
    loss, error = ratio(sums, counts)
    targets = int(sum(counts))
    pieces = list(zip(sums, counts, strict=True))
    scores = [
        _score("loss", loss, error, 1.0, targets, unit="token", pieces=pieces),
        _score("perplexity", loss, error, 1.0, targets, unit="token", pieces=pieces, exponential=True),
        _score("bits_per_byte", loss, error, targets / size / math.log(2), targets, pieces=pieces),
    ]
    if words:
        bits = targets / words / math.log(2)
        scores.append(_score("bits_per_word", loss, error, bits, targets, pieces=pieces))
        share = targets / words
        scores.append(_score("word_perplexity", loss, error, share, targets, pieces=pieces, exponential=True))
    details = {
        "targets": targets,
        "bytes": round(size),
        **({"words": round(words), "convention": convention} if words else {}),
        "by_position": by_position(losses, [first for _, first in pairs]),
    }
    return Measured(scores, details)


def _pieces(values: NDArray[Any]) -> list[NDArray[Any]]:
    return [values[first : first + PIECE] for first in range(0, len(values), PIECE)]


def _score(
    metric: str,
    loss: float,
    error: float | None,
    times: float,
    n: int,
    *,
    pieces: Sequence[tuple[float, float]],
    unit: str = "",
    exponential: bool = False,
) -> Score:
    """times · loss, or its exponential, whose error and observations are linearised: it differs between two
    models where the loss does."""
    value = math.exp(min(loss * times, 700.0)) if exponential else loss * times
    slope = value * times if exponential else times
    observations = tuple((value * count + slope * (nats - loss * count), count) for nats, count in pieces)
    stderr = None if error is None else slope * error
    return Score(metric, value, stderr, n, False, unit, observations=observations)


def by_position(losses: Sequence[NDArray[Any]], firsts: Sequence[int]) -> list[dict[str, float]]:
    """Mean loss of the targets that have at least ``from`` tokens before them, and less than twice as many.

    Args:
        losses: Of the targets of each window, in nats.
        firsts: Tokens before the first of them, at least 1.
    """
    places = np.concatenate([first + np.arange(len(one)) for one, first in zip(losses, firsts, strict=True)])
    buckets = np.floor(np.log2(places)).astype(int)
    values = np.concatenate(losses)
    return [
        {
            "from": 2**bucket,
            "loss": round(float(values[buckets == bucket].mean()), 6),
            "targets": int((buckets == bucket).sum()),
        }
        for bucket in np.unique(buckets).tolist()
    ]
