"""The options of ``dualroute runs``.  No torch is imported here."""

from __future__ import annotations

from dataclasses import dataclass

from dualroute.errors import UserError
from dualroute.paths import LocalPath
from dualroute.settings import check_fields


@dataclass
class RunsConfig:
    """Show the runs beneath a folder.

    Args:
        folder: Where to look, at most four folders deep.
        json: Print a list of JSON objects instead of a table.
    """

    folder: LocalPath = "runs"
    json: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "")


@dataclass
class CompareRunsConfig:
    """Set two runs beside each other: their settings, their losses, a plot of both.

    Args:
        first: A run folder.
        second: Another one.
        plot: PNG file to write (extra: compress, which brings matplotlib); null writes none.
    """

    first: LocalPath
    second: LocalPath
    plot: LocalPath | None = None

    def __post_init__(self) -> None:
        check_fields(self, "")
        if self.plot is not None and not self.plot.endswith(".png"):
            raise UserError(f"plot is {self.plot!r}: give a name that ends in .png")


@dataclass
class CleanRunsConfig:
    """Remove what is left of runs that never came to a checkpoint, and half-written files of runs that ended.

    Args:
        folder: Where to look, at most four folders deep.
        yes: Remove without asking.
    """

    folder: LocalPath = "runs"
    yes: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "")
