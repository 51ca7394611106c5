"""Pictures of any mode as arrays of pixels; Pillow converts.

In: arrays, or images of Pillow.  Out: (height, width, channels) of 8 bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def image_of_array(value: Any) -> Image.Image:
    """An array (height, width) or (height, width, 1, 3 or 4) of pixels from 0 to 255 as an image.

    Raises:
        ValueError: It is none.
    """
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ValueError("an image that is no rectangle of pixels") from error
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)) or not array.size:
        raise ValueError("an image that is no (height, width) or (height, width, channels) array of pixels")
    if array.dtype != np.uint8:
        if array.dtype.kind not in "iuf" or not np.isfinite(array).all():
            raise ValueError("an image that is not of numbers")
        if array.min() < 0 or array.max() > 255:
            raise ValueError("an image with pixels outside of 0 to 255")
        array = array.round().astype(np.uint8)
    return Image.fromarray(array)


def pixels_of_image(
    image: Image.Image, channels: int, size: tuple[int, int] | None = None
) -> NDArray[np.uint8]:
    """(height, width, channels) of an image, brought to ``size`` (height, width) where it is given; 1 channel
    is grey, 3 are red, green and blue.

    Raises:
        ValueError: Its pixels are wider than 16 bits, so that nobody knows which of them is white.
    """
    if image.mode.startswith("I;16"):  # Pillow itself makes all above 255 white
        image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError("an image with pixels of 32 bits")
    mode = "L" if channels == 1 else "RGB"
    if image.mode != mode:
        image = (
            image.convert("RGBA").convert("RGB").convert(mode) if image.mode == "P" else image.convert(mode)
        )
    if size is not None and image.size != size[::-1]:
        image = image.resize(size[::-1])
    return np.asarray(image, dtype=np.uint8).reshape(image.size[1], image.size[0], channels)
