"""Two results of suites, and which of their differences are more than chance.

A difference counts where it is larger than two of its standard errors.  Where both were asked the same and
the answers to each sample are known, that is the error of the mean difference; else √(se₁² + se₂²), as if
they were independent, which is cautious, since what is hard is hard for both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from dualroute.evaluate.suite.cells import Score, paired_error
from dualroute.evaluate.suite.record import Record, scores_of

#: Standard errors that a difference must exceed.
ERRORS = 2.0


@dataclass(frozen=True)
class Difference:
    """One metric of one cell in both.

    Attributes:
        key: PART/CELL.
        metric: Its name.
        ours: Of the result at hand.
        theirs: Of the other.
        stderr: Of the difference; null where one of them has none.
        verdict: better, worse, different (where neither direction is better), no difference, or why they are
            not compared.
    """

    key: str
    metric: str
    ours: Score
    theirs: Score
    stderr: float | None
    verdict: str

    @property
    def value(self) -> float:
        return self.ours.value - self.theirs.value


def differences(ours: Record, theirs: Record) -> Iterator[Difference]:
    """Every metric that both have."""
    same_tokens = ours["model"].get("tokenizer") == theirs["model"].get("tokenizer")
    for key, cell in ours["cells"].items():
        other = theirs["cells"].get(key)
        if other is None:
            continue
        known = {score.metric: score for score in scores_of(other)}
        for score in scores_of(cell):
            if score.metric not in known:
                continue
            before = known[score.metric]
            error = paired_error(score, before) if same_tokens else None
            if error is None and score.stderr is not None and before.stderr is not None:
                error = math.hypot(score.stderr, before.stderr)
            if cell["setting"] != other["setting"]:
                verdict = "not compared: other data or settings"
            elif score.unit == "token" and not same_tokens:
                verdict = "not compared: per token, and the tokenizers differ"
            else:
                verdict = _verdict(score, before, error)
            yield Difference(key, score.metric, score, before, error, verdict)


def _verdict(ours: Score, theirs: Score, error: float | None) -> str:
    difference = ours.value - theirs.value
    if error is None:
        return "not compared: no standard error"
    if abs(difference) <= ERRORS * error:
        return "no difference"
    if ours.higher_is_better is None:
        return "different"
    return "better" if (difference > 0) == ours.higher_is_better else "worse"
