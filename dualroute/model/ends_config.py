"""What enters a model instead of token ids, and what leaves it instead of the next token."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from dualroute.attention.core.grid import Grid
from dualroute.errors import UserError
from dualroute.settings import at_least, check_fields


@dataclass
class TaskHeadConfig:
    """What leaves a model instead of the next token.

    Args:
        kind: sequence (one class for a text), number (one number for it), token (a class for each token),
            span (scores of being an answer's first and last token), ctc (a character or none for each
            frame) or item (which one comes next).
        labels: Names of the classes, characters or items, in the order of the outputs; empty for number and
            span.
        pooling: Where a text's one output is read: at its last token, its first, or over the mean of all.
    """

    kind: Literal["sequence", "number", "token", "span", "ctc", "item"] = "sequence"
    labels: list[str] = field(default_factory=list)
    pooling: Literal["last", "first", "mean"] = "last"

    def __post_init__(self) -> None:
        check_fields(self, "model.task_head")
        named = self.kind not in ("number", "span")
        if named != bool(self.labels):
            raise UserError(f"model.task_head of kind {self.kind} has {'no' if named else 'names of'} labels")

    @property
    def outputs(self) -> int:
        """Numbers that leave for each token."""
        return {"number": 1, "span": 2}.get(self.kind, len(self.labels))


@dataclass
class FrontendConfig:
    """What enters a model instead of token ids: a few numbers for each step, (B, n, features).

    Args:
        kind: patches (of an image, whose rows and columns the attention knows), frames (of sound) or values
            (a number or a few for each step, such as one pixel).
        features: Numbers of one step.
        grid: Rows and columns of patches of an image.
        region: Rows and columns of patches in a region, which the global route chooses: a block of the model.
        learned_places: Add a learned vector for each place of the grid, besides the rotary embedding.
    """

    kind: Literal["patches", "frames", "values"] = "values"
    features: int = 1
    grid: list[int] | None = None
    region: list[int] | None = None
    learned_places: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "model.frontend", {"features": at_least(1, 1 << 20)})
        sizes = [size for size in (self.grid, self.region) if size is not None]
        if self.kind != "patches":
            if sizes or self.learned_places:
                raise UserError(
                    f"model.frontend: grid, region and learned_places are of patches, not of {self.kind}"
                )
        elif len(sizes) < 2 or any(len(size) != 2 for size in sizes):
            raise UserError("model.frontend of patches has a grid and a region: give two numbers for each")
        else:
            self.grid_of_patches()

    def grid_of_patches(self) -> Grid | None:
        """What the attention is to know of an image; null where inputs are no patches.

        Raises:
            UserError: The region is larger than the grid.
        """
        if self.grid is None or self.region is None:
            return None
        try:
            return Grid(*self.grid, *self.region)
        except ValueError as error:
            raise UserError(f"model.frontend: {error}") from error
