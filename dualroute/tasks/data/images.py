"""Pixels of images, from arrays and files; Pillow reads and converts.

In: a value of a row, and the row.  Out: an array (height, width, channels) of 8 bits.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dualroute.tasks.config import ImageConfig
from dualroute.tasks.data.media_rows import path_in
from dualroute.tasks.kind import BadRow, Row
from dualroute.tasks.metrics import library

#: Pixels of an image; a file may claim any number.
MOST_PIXELS = 1 << 26


def pixels_of(row: Row, value: Any, config: ImageConfig, *, any_size: bool = False) -> NDArray[np.uint8]:
    """The pixels of a row's image, as ``config`` wants them.

    Raises:
        BadRow: It is missing, cannot be read, or is of another size (unless ``any_size``).
    """
    if value is None:
        raise BadRow("no image")
    image = _of_file(row, value) if isinstance(value, str) else _of_array(value)
    mode = "L" if config.channels == 1 else "RGB"
    if image.mode != mode:
        image = (
            image.convert("RGBA").convert("RGB").convert(mode) if image.mode == "P" else image.convert(mode)
        )
    if not any_size and image.size != (config.width, config.height):
        if not config.resize:
            raise BadRow(
                f"an image of another size than {config.height} x {config.width} (task.image.resize)"
            )
        image = image.resize((config.width, config.height))
    return np.asarray(image, dtype=np.uint8).reshape(image.size[1], image.size[0], config.channels)


def _of_file(row: Row, value: str) -> Any:
    pillow = library("PIL.Image")
    path = path_in(row, value)
    assert path is not None or not value
    if path is None or not path.is_file():
        raise BadRow("a file that is not there")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes, which are looked at here
            image = pillow.open(path)
            if image.size[0] * image.size[1] > MOST_PIXELS:
                raise BadRow(f"an image of more than {MOST_PIXELS:,} pixels")
            image.load()
    except BadRow:
        raise
    except Exception as error:  # decoders raise what they like of damaged files
        raise BadRow("a file that is no image, is damaged or cut short") from error
    return image


def _of_array(value: Any) -> Any:
    pillow = library("PIL.Image")
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise BadRow("an image that is no rectangle of pixels") from error
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)) or not array.size:
        raise BadRow("an image that is no (height, width) or (height, width, channels) array of pixels")
    if array.dtype != np.uint8:
        if array.dtype.kind not in "iuf" or not np.isfinite(array).all():
            raise BadRow("an image that is not of numbers")
        if array.min() < 0 or array.max() > 255:
            raise BadRow("an image with pixels outside of 0 to 255")
        array = array.round().astype(np.uint8)
    return pillow.fromarray(array)
