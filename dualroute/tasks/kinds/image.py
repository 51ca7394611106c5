"""A class for an image: digits, animals, defects.

Row: ``image`` (an array of pixels, or the path of a file), ``label``.  Input: patches in raster order, with
the grid known to the attention; or single pixels as one long line.  Output: the mean over all of them, or at
one (``task.pooling``; auto is the mean).  Prediction: ``prediction``, ``probability``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dualroute.errors import UserError
from dualroute.model.ends_config import FrontendConfig
from dualroute.model.frontends import patches_of
from dualroute.tasks.baselines import nearest_centroid
from dualroute.tasks.data.examples import Example
from dualroute.tasks.data.images import pixels_of
from dualroute.tasks.kind import BadRow, Baseline, Role, Row, register
from dualroute.tasks.kinds.sequence import Steps


@register("image")
class Images(Steps):
    media = ("image",)
    roles = {
        "image": Role("the image: an array of pixels or a file"),
        "label": Role("the class", is_target=True),
    }

    def fit(self, rows: Iterable[Row]) -> None:
        super().fit(self._sized(rows))
        if self.task.image.height is None or self.task.image.width is None:
            raise UserError("no training image can be read: give images (task.columns {image: …})")

    def _sized(self, rows: Iterable[Row]) -> Iterator[Row]:
        """The rows; the size of all images, where none is configured, is that of the first one."""
        config = self.task.image
        for row in rows:
            if config.height is None or config.width is None:
                with suppress(BadRow):
                    config.height, config.width = self.pixels(row, any_size=True).shape[:2]
            yield row

    def state(self) -> dict[str, Any]:
        return {"height": self.task.image.height, "width": self.task.image.width}

    def load_state(self, state: dict[str, Any]) -> None:
        config = self.task.image
        config.height = config.height or state.get("height")
        config.width = config.width or state.get("width")

    def pixels(self, row: Row, *, any_size: bool = False) -> NDArray[np.uint8]:
        """(height, width, channels) of a row.

        Raises:
            BadRow: There is no such image.
        """
        return pixels_of(row, self.medium(row, "image"), self.task.image, any_size=any_size)

    def frontend(self) -> FrontendConfig:
        config = self.task.image
        assert config.height is not None
        assert config.width is not None
        if config.patch == 1:
            return FrontendConfig("values", config.channels)
        grid = [-(-config.height // config.patch), -(-config.width // config.patch)]
        return FrontendConfig(
            "patches",
            config.patch**2 * config.channels,
            grid,
            [config.region_height, config.region_width],
            config.learned_places,
        )

    def encode(self, row: Row, *, with_target: bool = True) -> list[Example]:
        number = self.label_number(row) if with_target else None
        steps = patches_of(self.pixels(row), self.task.image.patch)
        if len(steps) > self.setting.max_length:
            raise UserError(
                f"an image has {len(steps):,} steps, more than the {self.setting.max_length:,} that are "
                f"read: raise data.context (and data.max_length), or task.image.patch"
            )
        return [self.example(steps, number)]

    def baselines(self) -> dict[str, Baseline]:
        def centroids(train: Sequence[Row], rows: Sequence[Row]) -> list[Row]:
            def flat(some: Sequence[Row]) -> list[NDArray[Any]]:
                return [self.pixels(row).ravel() for row in some]

            names = nearest_centroid(flat(train), [self.target(row) for row in train], flat(rows))
            return [{"prediction": name} for name in names]

        return {"nearest mean image": centroids}
