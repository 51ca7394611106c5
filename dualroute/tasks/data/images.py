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
    library("PIL.Image")  # names the extra, where it is not installed
    from dualroute.data.media.pixels import image_of_array, pixels_of_image

    size = (
        None if any_size or config.height is None or config.width is None else (config.height, config.width)
    )
    try:
        image = _of_file(row, value) if isinstance(value, str) else image_of_array(value)
        if size is not None and image.size != size[::-1] and not config.resize:
            raise BadRow(f"an image of another size than {size[0]} x {size[1]} (task.image.resize)")
        return pixels_of_image(image, config.channels, size)
    except BadRow:
        raise
    except ValueError as error:
        raise BadRow(str(error)) from error


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
