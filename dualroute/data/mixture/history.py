"""What has been read cannot change; what is to come may: two courses of a mixture, compared.

In: the course that a checkpoint was written with (``mixture`` in its ``checkpoint.json``), and that of this
start. Here: they may differ only from the sample on that the run has come to (`refuse_other_past`). Out: an
error that says what to write instead, and lines for people (`described`).

A course is a list of stages: the first sample of each, and the turns of its sources by their fingerprints
(`dualroute.data.mixture.schedule`). Two neighbouring stages with the same turns are one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from dualroute.errors import UserError

Stage = tuple[int, dict[str, int]]


def merged(stages: Iterable[tuple[int, Mapping[str, int]]]) -> list[Stage]:
    """The same course, without turns of 0 and without stages that change nothing."""
    course: list[Stage] = []
    for first, turns in stages:
        present = {key: count for key, count in turns.items() if count}
        if not course or course[-1][1] != present:
            course.append((first, present))
    return course


def first_difference(one: Sequence[Stage], other: Sequence[Stage]) -> int | None:
    """The first sample whose turn may not be the same; None where there is none."""
    for mine, theirs in zip_longest(one, other):
        if mine != theirs:
            return min(stage[0] for stage in (mine, theirs) if stage is not None)
    return None


def shares(turns: Mapping[str, int], names: Mapping[str, str]) -> dict[str, float]:
    """Turns as shares by name; a source without a name goes by the beginning of its fingerprint."""
    total = sum(turns.values())
    return {names.get(key, f"{key[:12]}…"): count / total for key, count in turns.items()}


def described(turns: Mapping[str, int], names: Mapping[str, str]) -> str:
    """``books 0.7, chinese 0.3``."""
    by_name = sorted(shares(turns, names).items(), key=lambda one: -one[1])
    return ", ".join(f"{name} {share:.5g}" for name, share in by_name)


@dataclass(frozen=True)
class Course:
    """The course of a run's data, as it is written down.

    Attributes:
        stages: see the module's docstring.
        names: of the sources, by fingerprint.
        context: tokens of a sample.
    """

    stages: list[Stage]
    names: dict[str, str]
    context: int

    def to_json(self) -> dict[str, Any]:
        """As it stands in ``checkpoint.json``."""
        return {
            "stages": [
                {"from_sample": first, "from_tokens": first * self.context, "turns": turns}
                for first, turns in self.stages
            ],
            "names": self.names,
        }

    @classmethod
    def from_json(cls, content: Any, context: int) -> Course:
        """The course that `to_json` wrote.

        Raises:
            UserError: It is none.
        """
        try:
            stages = [
                (int(stage["from_sample"]), {str(k): int(v) for k, v in stage["turns"].items()})
                for stage in content["stages"]
            ]
            if not stages or stages[0][0] != 0 or [s for s, _ in stages] != sorted({s for s, _ in stages}):
                raise ValueError("its stages are in no order")
            return cls(stages, {str(k): str(v) for k, v in content["names"].items()}, context)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"the mixture that the checkpoint tells of cannot be read ({type(error).__name__}: {error}): "
                "it is damaged, resume from another checkpoint"
            ) from error

    def at(self, sample: int) -> dict[str, int]:
        """Turns of the stage that a sample is in."""
        return next(turns for first, turns in reversed(self.stages) if first <= sample)

    def lines(self) -> list[dict[str, Any]]:
        """One table a stage, for people."""
        return [
            {
                "from_sample": first,
                "from_tokens": first * self.context,
                "weights": {name: round(share, 6) for name, share in shares(turns, self.names).items()},
            }
            for first, turns in self.stages
        ]


def refuse_other_past(theirs: Course, ours: Course, consumed: int, where: str) -> None:
    """Raise UserError where a course differs from another before sample ``consumed``.

    Args:
        theirs: the checkpoint's.
        ours: this start's.
        consumed: samples of the run that have been read.
        where: what is resumed, for the message.
    """
    differing = first_difference(theirs.stages, ours.stages)
    if differing is None or differing >= consumed:
        return
    names = {**theirs.names, **ours.names}
    was, now = theirs.at(differing), ours.at(differing)
    wanted = ours.at(consumed)
    tokens = consumed * ours.context
    there = "from the beginning" if not differing else f"from token {differing * ours.context} on"
    gone = [theirs.names.get(key, key[:12]) for key in theirs.at(consumed) if key not in ours.names]
    message = (
        f"{where} was trained {there} on {described(was, names)}, and this start has "
        f"{described(now, names)}: what has been read cannot change"
    )
    if gone:
        raise UserError(f"{message}; keep {', '.join(gone)} in data.sources and data.stages, unchanged")
    weights = ", ".join(f"{name}: {share:.5g}" for name, share in shares(wanted, names).items())
    kept = "data.sources and data.stages" if len(theirs.stages) > 1 else "the weights of data.sources"
    new = [ours.names[key] for key in wanted if key not in theirs.names]
    raise UserError(
        f"{message}; to go on with other weights leave {kept} as they were"
        f"{f', but for {chr(44).join(new)} with weight 0' if new else ''}, and add a stage from there on: "
        f"data.stages: [{{from_tokens: {tokens}, weights: {{{weights}}}}}]"
    )
