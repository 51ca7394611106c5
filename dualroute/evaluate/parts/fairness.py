"""The part ``fairness``: CrowS-Pairs, WinoBias and BBQ as :mod:`dualroute.evaluate.fairness` reads and scores
them, by the log-likelihoods of whatever model a suite measures.

A preference has no better direction; the scores of single types and categories are details.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from dualroute.configuration.names import unknown
from dualroute.errors import UserError
from dualroute.evaluate import fairness
from dualroute.evaluate.fairness_sets import PLACES
from dualroute.evaluate.long_context.tasks import data_file
from dualroute.evaluate.suite.cells import Cell, Measured, Score
from dualroute.evaluate.suite.config import FairnessSettings
from dualroute.evaluate.suite.model import Pair, SuiteModel
from dualroute.files import file_sha256

_VERSION = 2
#: {score of a set: its name here, whether more is better}, in the order in which they are shown
_SHOWN: dict[str, tuple[str, bool | None]] = {
    "crows_pairs": ("stereotype_preferred", None),
    "winobias": ("stereotype_preferred", None),
    "winobias/male": ("male_preferred", None),
    "bbq/disambig/accuracy": ("accuracy_disambiguated", True),
    "bbq/disambig/bias": ("bias_disambiguated", None),
    "bbq/ambig/accuracy": ("accuracy_ambiguous", True),
    "bbq/ambig/bias": ("bias_ambiguous", None),
}


def cells(settings: FairnessSettings, model: SuiteModel) -> list[Cell]:
    """A cell for each set.

    Raises:
        UserError: There is no such set, or its file is not there.
    """
    model.require_language_model("fairness")
    for name in [*(settings.sets or []), *settings.files]:
        if name not in PLACES:
            raise UserError(unknown("set", name, PLACES))
    places = {
        name: settings.files.get(name) or data_file(place, folders=True) for name, place in PLACES.items()
    }
    names = settings.sets or [name for name in PLACES if places[name] is not None]
    if not names:
        raise UserError("no set was found: set DUALROUTE_DATA, or give files {crows_pairs: FILE}")
    return [_cell(name, places[name], settings, model) for name in names]


def _cell(name: str, place: str | None, settings: FairnessSettings, model: SuiteModel) -> Cell:
    if place is None or not Path(place).exists():
        raise UserError(
            f"{name} reads {place or PLACES[name]}, and it is not there: give files {{{name}: FILE}}"
        )
    path = Path(place)
    depends = {
        "set": name,
        "version": _VERSION,
        **{key: getattr(settings, key) for key in ("samples", "confidence", "resamples", "seed")},
        "data": [file_sha256(one) for one in ([path] if path.is_file() else sorted(path.iterdir()))],
    }
    return Cell(settings.name, name, depends, partial(_measured, name, path, settings, model))


def _measured(name: str, path: Path, settings: FairnessSettings, model: SuiteModel) -> Measured:
    items = fairness.some_items(name, path, settings.samples, settings.seed)
    pairs: list[Pair] = []
    for item in items:
        before = model.encode(item.prompt) if item.prompt else model.begin()
        pairs += [(before, model.encode(item.prompt + text)[len(before) :]) for text in item.texts]
    found = iter(model.likelihoods(pairs))
    likelihoods = [[next(found).total for _ in item.texts] for item in items]
    drawn = {"confidence": settings.confidence, "resamples": settings.resamples, "seed": settings.seed}
    scores = fairness.scores_of(name, items, likelihoods, **drawn)  # type: ignore[arg-type]
    shown = [_score(*_SHOWN[one], scores[one]) for one in _SHOWN if one in scores]
    by_type = {one: score.figures() for one, score in scores.items() if one not in _SHOWN}
    return Measured(shown, {"by_type": by_type})


def _score(metric: str, better: bool | None, of: fairness.Score) -> Score:
    return Score(metric, of.value, of.standard_error, of.items, better, "", (of.low, of.high))
