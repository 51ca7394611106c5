"""What a mixture can be told: its sources, the stages of its course, and caps.  No torch is imported here.

In: YAML and flags. Next: `dualroute.data.mixture.schedule` turns the weights into an order of turns,
`dualroute.data.mixture.sources` opens the folders.

A source is ``{path: data/books, weight: 0.7}``, or in one word ``data/books=0.7``; a stage is
``{from_tokens: 2G, weights: {books: 0.5, code: 0.5}}``, or ``2G:books=0.5,code=0.5``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath

from dualroute.errors import UserError
from dualroute.paths import PathOrName
from dualroute.settings import above, at_least, check_fields

#: Each has an index of its own, and a curve of its own.
MAX_SOURCES = 1024
MAX_STAGES = 1024
#: By how much shares may miss a sum of 1: three of 0.333 do.
_TOLERANCE = 0.005
_NAME = re.compile(r"[\w.-]{1,64}")


@dataclass(frozen=True)
class SourceConfig:
    """One part of a mixture.

    Args:
        path: Folder of shards made by ``dualroute prepare``; for ``dualroute finetune`` a file of rows.
        weight: Share of the samples that are drawn from it; 0 for a source that a later stage begins with;
            null, for all sources alike, takes the shares of their tokens.
        name: In stages, logs and curves; null is the name of the folder.
        max_epochs: How often it may be read in the whole run; null is without a limit.
    """

    path: PathOrName
    weight: float | None = None
    name: str | None = None
    max_epochs: float | None = None

    def __post_init__(self) -> None:
        check_fields(self, "data.sources", {"weight": at_least(0, 1), "max_epochs": above(0, 1e6)})
        if self.name is not None and not _NAME.fullmatch(self.name):
            raise UserError(
                f"data.sources name is {self.name!r}: it must be of letters, digits, '.', '_' and '-'"
            )

    @classmethod
    def from_text(cls, text: str) -> dict[str, str]:
        """The fields of ``PATH=WEIGHT``, or of ``PATH``."""
        path, equals, weight = text.rpartition("=")
        if equals and re.fullmatch(r"[0-9.eE+-]+", weight.strip()):
            return {"path": path, "weight": weight}
        return {"path": text}

    @property
    def called(self) -> str:
        """Its name in logs and curves."""
        if self.name is not None:
            return self.name
        last = PurePath(os.path.normpath(self.path)).name
        return re.sub(r"[^\w.-]", "_", last)[:64] or "source"


@dataclass(frozen=True)
class StageConfig:
    """Other weights from a number of tokens on.

    Args:
        from_tokens: Tokens of the run, over all ranks, after which it begins.
        weights: Share of each source, by name; those that are not named are not read.
    """

    from_tokens: int
    weights: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self, "data.stages", {"from_tokens": at_least(1), "weights": at_least(0, 1)})
        if not self.weights:
            raise UserError(f"data.stages from_tokens {self.from_tokens} has no weights: name sources")

    @classmethod
    def from_text(cls, text: str) -> dict[str, str | dict[str, str]]:
        """The fields of ``FROM:NAME=WEIGHT,NAME=WEIGHT``.

        Raises:
            UserError: It is of another form.
        """
        start, colon, rest = text.partition(":")
        pairs = [part.rpartition("=") for part in rest.split(",")]
        if not colon or not all(name and weight for name, _, weight in pairs):
            raise UserError(f"expected FROM_TOKENS:NAME=WEIGHT,NAME=WEIGHT, got {text!r:.80}")
        return {"from_tokens": start, "weights": {name.strip(): weight for name, _, weight in pairs}}


def check_mixture(sources: Sequence[SourceConfig], stages: Sequence[StageConfig]) -> None:
    """Find what contradicts itself in a mixture, before any folder is opened.

    Raises:
        UserError: Naming the source or stage.
    """
    if not sources:
        if stages:
            raise UserError("data.stages change the weights of data.sources, and there are none: give both")
        return
    if len(sources) > MAX_SOURCES or len(stages) > MAX_STAGES:
        raise UserError(f"data.sources and data.stages may have {MAX_SOURCES:,} entries each")
    names: dict[str, str] = {}
    for source in sources:
        other = names.setdefault(source.called, source.path)
        if other is not source.path:
            again = os.path.normpath(other) == os.path.normpath(source.path)
            raise UserError(
                f"data.sources names {source.called!r} twice ({other} and {source.path}): "
                f"{'leave one out' if again else 'give one of them another name (name: …)'}"
            )
    without = [source.called for source in sources if source.weight is None]
    if without and len(without) < len(sources):
        raise UserError(
            f"data.sources has no weight for {', '.join(without)}: give all sources one, or none (which "
            "takes the shares of their tokens)"
        )
    if not without:
        _check_sum({source.called: source.weight or 0.0 for source in sources}, "data.sources")
    before = 0
    for stage in stages:
        if stage.from_tokens <= before:
            raise UserError(
                f"data.stages from_tokens {stage.from_tokens} does not follow {before}: stages stand in the "
                "order in which they begin"
            )
        before = stage.from_tokens
        for name in stage.weights:
            if name not in names:
                raise UserError(
                    f"data.stages from_tokens {stage.from_tokens} names {name!r}, which is no source: there "
                    f"are {', '.join(names)}"
                )
        _check_sum(stage.weights, f"data.stages from_tokens {stage.from_tokens}")


def lines_over_max_epochs(sources: Iterable[SourceConfig], passes: Mapping[str, float]) -> Iterator[str]:
    """A line for each source that is read more often than it may be.

    Args:
        passes: over each source, by name.
    """
    for source in sources:
        most, epochs = source.max_epochs, passes[source.called]
        if most is not None and epochs > most * (1 + 1e-9):
            yield (
                f"the run reads {source.called} {epochs:.3g} times, more than its max_epochs {most:g}: lower "
                "its weight, train on fewer tokens, or prepare more of it"
            )


def _check_sum(weights: Mapping[str, float], where: str) -> None:
    total = sum(weights.values())
    if abs(total - 1) <= _TOLERANCE:
        return
    listed = ", ".join(f"{name} {weight:g}" for name, weight in weights.items())
    if total <= 0:
        raise UserError(f"{where}: the weights ({listed}) are all 0: nothing would be read")
    scaled = ", ".join(f"{name} {weight / total:.4g}" for name, weight in weights.items())
    raise UserError(
        f"{where}: the weights ({listed}) add up to {total:g}, and shares add up to 1: write {scaled}"
    )
