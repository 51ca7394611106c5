"""A class for a recording: a spoken command, a digit, a speaker.

Row: ``audio`` (a file, or samples), ``label``.  Input: frames of log-mel energies (``task.audio``).  Output:
the mean over all of them, or at one (``task.pooling``; auto is the mean).  Prediction: ``prediction``,
``probability``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dualroute.model.ends_config import FrontendConfig
from dualroute.tasks.baselines import nearest_centroid
from dualroute.tasks.config import AudioConfig
from dualroute.tasks.data.audio import Samples, frames_of
from dualroute.tasks.data.examples import Example
from dualroute.tasks.kind import Baseline, Kind, Role, Row, register
from dualroute.tasks.kinds.sequence import Steps


@register("speech")
class Recordings(Steps):
    media = ("audio",)
    roles = {
        "audio": Role("the recording: a file or samples"),
        "label": Role("the class", is_target=True),
    }

    def frontend(self) -> FrontendConfig:
        return frontend_of(self.task.audio)

    def encode(self, row: Row, *, with_target: bool = True) -> list[Example]:
        number = self.label_number(row) if with_target else None
        steps = steps_of(self, row)
        return [self.example(steps, number)]

    def baselines(self) -> dict[str, Baseline]:
        def centroids(train: Sequence[Row], rows: Sequence[Row]) -> list[Row]:
            def features(some: Sequence[Row]) -> list[NDArray[Any]]:
                return [_outline(frames_of(row, self.medium(row, "audio"), self.task.audio)) for row in some]

            targets = [self.target(row) for row in train]
            return [{"prediction": n} for n in nearest_centroid(features(train), targets, features(rows))]

        return {"nearest mean spectrum": centroids}


def frontend_of(config: AudioConfig) -> FrontendConfig:
    """What enters a model of recordings."""
    return FrontendConfig("frames", config.stack * config.mels)


def steps_of(kind: Kind, row: Row) -> Samples:
    """The steps of a row's recording, cut where it is longer than the model may read.

    Raises:
        BadRow: There is no such recording, or it is longer and ``too_long`` is drop.
    """
    steps = frames_of(row, kind.medium(row, "audio"), kind.task.audio)
    if len(steps) > kind.setting.max_length:
        kind.too_long(len(steps))
        steps = steps[: kind.setting.max_length]
    return steps.astype(np.float32)


def _outline(steps: Samples) -> NDArray[Any]:
    """Mean energies of the beginning, the middle and the end."""
    return np.concatenate([part.mean(0) for part in np.array_split(steps, min(3, len(steps)))] * 3)[
        : 3 * steps.shape[1]
    ]
