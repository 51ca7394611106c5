"""Rows that could not be used: counted by what is wrong with them, and refused above a share.

In: what :mod:`~dualroute.tasks.data.row_files` finds to be no row, and what a kind cannot encode.  Out: a
line for each reason, with the first places.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from dualroute.errors import UserError

_SHOWN = 3


@dataclass
class Problems:
    """Rows that could not be used, by reason.

    Attributes:
        rows: Rows so far, the unusable ones among them.
        counts: {reason: how many}.
        places: {reason: the first of them}.
    """

    rows: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, place: str) -> None:
        self.counts[reason] += 1
        shown = self.places.setdefault(reason, [])
        if len(shown) < _SHOWN:
            shown.append(place)

    @property
    def bad(self) -> int:
        """Rows that were left out."""
        return sum(self.counts.values())

    def lines(self, source: str) -> Iterator[str]:
        """What was left out, a line for each reason."""
        for reason, count in self.counts.most_common():
            places = ", ".join(self.places[reason])
            more = ", …" if count > len(self.places[reason]) else ""
            yield f"{source}: {count:,} of {self.rows:,} rows are left out: {reason} ({places}{more})"

    def refuse_above(self, share: float, source: str) -> None:
        """Refuse data of which more than ``share`` could not be used.

        Raises:
            UserError: Naming the commonest reason and its first places.
        """
        if self.bad > share * self.rows:
            reason, _ = self.counts.most_common(1)[0]
            raise UserError(
                f"{source}: {self.bad:,} of {self.rows:,} rows cannot be used, first of all: {reason} "
                f"({', '.join(self.places[reason])}); mend them, or raise data.max_bad_rows ({share:g})"
            )
