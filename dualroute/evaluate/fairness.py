"""Bias of a language model: CrowS-Pairs, WinoBias and BBQ, each score with a bootstrap confidence interval.

In: a causal model, its tokenizer and the name of a set.  Here: log-likelihoods of sentences or answers.  Out:
scores that keep what each item contributed, so that :func:`compare` can pair two models item by item: before
and after a distillation, a pruning, a quantisation, or a mitigation.

- ``crows_pairs`` (Nangia et al. 2020, https://arxiv.org/abs/2010.00133): share of pairs whose more
  stereotyping sentence the model finds likelier; 0.5 has no preference.  As lm-evaluation-harness does for
  causal models the whole sentences are compared.
- ``winobias`` (Zhao et al. 2018, https://arxiv.org/abs/1804.06876): share of sentences that are likelier with
  the pronoun of the stereotype than with the other one, and share that is likelier with the male pronoun
  (``winobias/male``), whatever the occupation; 0.5 has no preference.
- ``bbq`` (Parrish et al. 2022, https://arxiv.org/abs/2110.08193): accuracy, and the bias scores of its §4
  from -1 to 1; 0 has none.

Such figures say whether a model's likelihoods follow stereotypes that the authors of a set wrote down, in
English and mostly of the United States.  A score without bias is no proof that there is none.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from dualroute.data.tokenizer import Tokenizer
from dualroute.errors import UserError
from dualroute.evaluate.fairness_sets import SETS, Array, Item
from dualroute.model import DualRoutingTransformer

RESAMPLES = 1000
#: Padded tokens of one forward pass.
BATCH_TOKENS = 8192


@dataclass(frozen=True)
class Score:
    """One figure: the sum of what items add over the sum of what they weigh, 1 each for a mean.

    Attributes:
        name: Such as ``crows_pairs/gender``.
        value: The figure.
        low, high: Its bootstrap interval (percentiles).
        standard_error: Standard deviation of the resampled figures.
        items: How many items count.
        neutral: The value of a model without the bias; null for an accuracy.
        added, weights: (items of the set,) what each adds and weighs; 0 where it does not count.
        clusters: (items of the set,) numbers of what is resampled together.
    """

    name: str
    value: float
    low: float
    high: float
    standard_error: float
    items: int
    neutral: float | None
    added: Array
    weights: Array
    clusters: NDArray[np.int64]

    @property
    def is_biased(self) -> bool:
        """Whether the neutral value lies outside of the interval."""
        return self.neutral is not None and not self.low <= self.neutral <= self.high

    def figures(self) -> dict[str, float | int | None]:
        """What is shown and stored of it."""
        names = ("value", "low", "high", "standard_error", "items", "neutral")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Difference:
    """A score of two models on the same items.

    Attributes:
        name: Of the score.
        before, after: The two values.
        difference: After minus before.
        low, high: Bootstrap interval of the difference, both models resampled alike.
        standard_error: Of the difference.
    """

    name: str
    before: float
    after: float
    difference: float
    low: float
    high: float
    standard_error: float

    @property
    def is_difference(self) -> bool:
        """Whether the interval, and two standard errors, leave 0 out; else nothing is said to differ."""
        outside = self.low > 0 or self.high < 0
        return outside and abs(self.difference) > 2 * self.standard_error


def measure(
    model: DualRoutingTransformer,
    tokenizer: Tokenizer,
    set: str,
    *,
    folder: str | Path | None = None,
    max_items: int | None = None,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Score]:
    """The scores of one set.

    Args:
        model, tokenizer: Of one checkpoint.
        set: ``crows_pairs``, ``winobias`` or ``bbq``.
        folder: Where the sets lie (``crows_pairs_anonymized.csv.gz``, ``winobias/``, ``bbq/``); null takes
            ``$DUALROUTE_DATA/fairness``.
        max_items: Score only so many items, drawn at random by ``seed``.
        confidence: Of the intervals.
        resamples: Of the bootstrap.
        seed: Of the draw and the bootstrap.

    Raises:
        UserError: No such set, its files are missing or damaged, the model is not causal or reads too little,
            or its likelihoods are no numbers.
    """
    model.config.require_causal(f"the set {set}")
    if set not in SETS:
        raise UserError(f"there is no fairness set {set!r}; choose {', '.join(SETS)}")
    items = some_items(set, SETS[set].place(Path(folder or _default_folder())), max_items, seed)
    found = iter(
        log_likelihoods(model, tokenizer, [(item.prompt, text) for item in items for text in item.texts])
    )
    likelihoods = [[next(found) for _ in item.texts] for item in items]
    return scores_of(set, items, likelihoods, confidence=confidence, resamples=resamples, seed=seed)


def some_items(set: str, place: Path, max_items: int | None, seed: int) -> list[Item]:
    """The items of a set's own file or folder, or only so many, drawn at random by ``seed``.

    Raises:
        UserError: It is missing, damaged or empty.
    """
    items = SETS[set].read(place)
    if not items:
        raise UserError(f"{place}: the set {set} holds no items; give its files")
    if max_items is not None and max_items < len(items):
        kept = np.random.default_rng(seed).permutation(len(items))[:max_items]
        items = [items[number] for number in sorted(kept)]
    return items


def scores_of(
    set: str,
    items: Sequence[Item],
    likelihoods: Sequence[Sequence[float]],
    *,
    confidence: float,
    resamples: int,
    seed: int,
) -> dict[str, Score]:
    """Scores of items, for whose texts a model has these log-likelihoods."""
    clusters = np.unique([item.cluster for item in items], return_inverse=True)[1].astype(np.int64)
    draws = _draws(clusters, resamples, seed)
    return {
        name: _score(name, added, weights, clusters, neutral, draws, confidence)
        for name, (added, weights, neutral) in SETS[set].score(items, likelihoods).items()
        if weights.any()
    }


def compare(
    before: dict[str, Score], after: dict[str, Score], *, confidence: float = 0.95, seed: int = 0
) -> list[Difference]:
    """What changed between two models, score by score, on the items that both were asked.

    Raises:
        UserError: The scores are not of the same items.
    """
    found = []
    for name, one in before.items():
        other = after.get(name)
        if other is None:
            continue
        if not np.array_equal(one.clusters, other.clusters):
            raise UserError(
                f"{name}: the two models were asked other items; measure both with the same options"
            )
        draws = _draws(one.clusters, RESAMPLES, seed)
        values = _resampled(other, draws) - _resampled(one, draws)
        low, high = _interval(values, confidence)
        found.append(
            Difference(
                name, one.value, other.value, other.value - one.value, low, high, float(np.nanstd(values))
            )
        )
    return found


@torch.no_grad()
def log_likelihoods(
    model: DualRoutingTransformer, tokenizer: Tokenizer, asked: Sequence[tuple[str, str]]
) -> list[float]:
    """Natural logarithm of the probability of each text behind its prompt ("" for none).

    Raises:
        UserError: One is longer than the model's context, or a likelihood is not a number.
    """
    bos = tokenizer.bos_id >= 0
    rows: list[tuple[list[int], int]] = []  # ids, and how many of them are given
    for prompt, text in asked:
        ids = tokenizer.encode(prompt + text, bos=bos)
        given = len(tokenizer.encode(prompt, bos=bos)) if prompt else int(bos)
        rows.append((ids, max(1, min(given, len(ids) - 1))))
    longest = max(len(ids) for ids, _ in rows)
    if longest > model.config.max_context:
        raise UserError(
            f"the set has texts of {longest} tokens and the model reads at most {model.config.max_context}: "
            f"choose another set"
        )
    found = [0.0] * len(rows)
    was_training = model.training
    model.eval()
    try:
        order = sorted(range(len(rows)), key=lambda number: len(rows[number][0]))
        while order:
            width = len(rows[order[0]][0])
            count = 1
            while count < len(order) and (count + 1) * len(rows[order[count]][0]) <= BATCH_TOKENS:
                width = len(rows[order[count]][0])
                count += 1
            some, order = order[:count], order[count:]
            for number, value in zip(some, _batch(model, [rows[k] for k in some], width), strict=True):
                found[number] = value
    finally:
        model.train(was_training)
    if not np.isfinite(found).all():
        raise UserError("the model's likelihoods are not finite: it has diverged, and has no score")
    return found


def _batch(model: DualRoutingTransformer, rows: list[tuple[list[int], int]], width: int) -> list[float]:
    device = model.norm.weight.device
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    wanted = torch.zeros(len(rows), width, dtype=torch.bool)
    segments = torch.zeros(len(rows), width, dtype=torch.long)
    for number, (of, given) in enumerate(rows):
        ids[number, : len(of)] = torch.tensor(of)
        segments[number, : len(of)] = 1
        wanted[number, given : len(of)] = True
    ids, wanted = ids.to(device), wanted.to(device)
    hidden = model.hidden_states(ids, segment_ids=segments.to(device))[:, :-1]
    logprobs = -F.cross_entropy(model.head(hidden[wanted[:, 1:]]).float(), ids[wanted], reduction="none")
    sums = torch.zeros(len(rows), dtype=torch.float64, device=device)
    sums.index_add_(0, wanted.nonzero()[:, 0], logprobs.double())
    return sums.tolist()


# ------------------------------------------------------------------------------------------------ bootstrap


def _draws(clusters: NDArray[np.int64], resamples: int, seed: int) -> NDArray[np.float64]:
    """(resamples, clusters) how often each cluster is drawn."""
    count = int(clusters.max()) + 1
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), resamples)
    return drawn.astype(np.float64)


def _sums(values: Array, clusters: NDArray[np.int64]) -> Array:
    return np.bincount(clusters, weights=values, minlength=int(clusters.max()) + 1).astype(np.float64)


def _resampled(score: Score, draws: NDArray[np.float64]) -> Array:
    added = draws @ _sums(score.added, score.clusters)
    weights = draws @ _sums(score.weights, score.clusters)
    return np.divide(added, weights, out=np.full(len(added), np.nan), where=weights > 0)


def _interval(values: Array, confidence: float) -> tuple[float, float]:
    tail = 50 * (1 - confidence)
    low, high = np.nanpercentile(values, [tail, 100 - tail])
    return float(low), float(high)


def _score(
    name: str,
    added: Array,
    weights: Array,
    clusters: NDArray[np.int64],
    neutral: float | None,
    draws: NDArray[np.float64],
    confidence: float,
) -> Score:
    value, items = float(added.sum() / weights.sum()), int((weights > 0).sum())
    bare = Score(name, value, value, value, 0.0, items, neutral, added, weights, clusters)
    values = _resampled(bare, draws)
    low, high = _interval(values, confidence)
    return Score(name, value, low, high, float(np.nanstd(values)), items, neutral, added, weights, clusters)


def _default_folder() -> Path:
    data = os.environ.get("DUALROUTE_DATA")
    if not data:
        raise UserError("give the folder of the fairness sets, or set DUALROUTE_DATA to the one above it")
    return Path(data) / "fairness"


def table_rows(scores: Iterable[Score]) -> list[tuple[str, str, str, str]]:
    """(name, value, interval, items) of scores, for a table."""
    return [
        (score.name, f"{score.value:.3f}", f"{score.low:.3f} to {score.high:.3f}", f"{score.items:,}")
        for score in scores
    ]
