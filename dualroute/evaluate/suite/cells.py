"""What is measured and kept: cells with scores.

A part of a suite is divided into cells (a task at a length, a text file), each of which is measured as a
whole, kept with the hash of all that it depends on, and not measured again while that stays the same.

Every score has its standard error: of a mean :func:`mean_score`, of a ratio of sums :func:`ratio_score`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Score:
    """One figure.

    Attributes:
        metric: Its name.
        value: It.
        stderr: Standard error; null where the source gives none.
        n: Of how many samples.
        higher_is_better: Null where neither direction is better.
        unit: What it is counted in where that makes two results incomparable: "token" for figures that
            depend on the tokenizer.
        interval: A confidence interval, where one was drawn.
        observations: What it is the mean of, or the ratio of whose sums, where that is known; one for each
            sample, in their order, so that two models can be compared sample by sample.
    """

    metric: str
    value: float
    stderr: float | None
    n: int
    higher_is_better: bool | None = True
    unit: str = ""
    interval: tuple[float, float] | None = None
    observations: tuple[tuple[float, float], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As it is written: without what is not said."""
        said = dict(self.__dict__)
        if not self.unit:
            del said["unit"]
        if self.interval is None:
            del said["interval"]
        del said["observations"]
        if self.observations:  # a text: as a list each would be a line of the file
            said["observations"] = " ".join(f"{a:.8g}/{b:.8g}" for a, b in self.observations)
        return said


@dataclass(frozen=True)
class Measured:
    """What a cell gave.

    Attributes:
        scores: The first is the one to look at.
        details: Further figures (by position, say), as JSON.
    """

    scores: list[Score]
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """One thing to measure.

    Attributes:
        part: Name of the part.
        name: Of the cell within it.
        depends: All that the result depends on besides the model, as JSON.
        measure: Does it; every rank calls it.
    """

    part: str
    name: str
    depends: dict[str, Any]
    measure: Callable[[], Measured]

    @property
    def key(self) -> str:
        """Unique in a suite."""
        return f"{self.part}/{self.name}"

    def digest(self, model: dict[str, Any]) -> str:
        """Hash of all that the result depends on."""
        text = json.dumps({"model": model, "depends": self.depends}, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()


def mean_score(metric: str, values: Sequence[float], **more: Any) -> Score:
    """Mean of independent values, with s / √n; of a single value the error is not known.

    Hits that all agree would have none at all: with two more hits and two more misses they have one (Agresti
    & Coull 1998), so that four hits of four are not taken for certainty.
    """
    n = len(values)
    mean = math.fsum(values) / n
    stderr = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n) if n > 1 else None
    if stderr == 0 and mean in (0, 1):
        share = (mean * n + 2) / (n + 4)
        stderr = math.sqrt(share * (1 - share) / (n + 4))
    return Score(metric, mean, stderr, n, observations=tuple((value, 1.0) for value in values), **more)


def paired_error(ours: Score, theirs: Score) -> float | None:
    """Standard error of the difference of two scores of the same samples; null where those are not known.

    What is hard for both then counts for neither.
    """
    n = len(ours.observations)
    if n < 2 or n != len(theirs.observations):
        return None
    parts = []
    for score in (ours, theirs):
        below = math.fsum(b for _, b in score.observations)
        parts.append([(a - score.value * b) / below for a, b in score.observations])
    return math.sqrt(math.fsum((a - b) ** 2 for a, b in zip(*parts, strict=True)) * n / (n - 1))


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> tuple[float, float | None]:
    """Σ numerators / Σ denominators and its standard error over independent clusters.

    Source: the linearised variance of a ratio (Cochran, Sampling Techniques, 3rd ed., eq. 6.13).
    """
    n, below = len(numerators), math.fsum(denominators)
    value = math.fsum(numerators) / below
    if n < 2:
        return value, None
    residuals = math.fsum((a - value * b) ** 2 for a, b in zip(numerators, denominators, strict=True))
    return value, math.sqrt(residuals * n / (n - 1)) / below
