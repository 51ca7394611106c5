"""What an exported model of images is given: pixels as in its training.

In: images of Pillow, arrays, paths or tensors.  Out: ``pixel_values`` (B, channels, height, width) from -1
to 1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_utils import load_image

from dualroute.data.media.pixels import image_of_array, pixels_of_image

_MIDDLE = np.float32(127.5)


class DualRoutingImageProcessor(BaseImageProcessor):
    """Converts, brings to size and normalises images.

    Args:
        size: {"height": …, "width": …} of the images that the model reads.
        num_channels: 1 (grey) or 3 (red, green, blue).
        do_resize: Bring images of other sizes to this one; false refuses them, as the training left them out.
        kwargs: As for `BaseImageProcessor`.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012

    def __init__(
        self,
        size: dict[str, int] | None = None,
        num_channels: int = 1,
        do_resize: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.size, self.num_channels, self.do_resize = size, num_channels, do_resize

    def __call__(self, images: Any, *args: Any, **kwargs: Any) -> BatchFeature:
        return self.preprocess(images, *args, **kwargs)

    def preprocess(
        self, images: Any, return_tensors: str | None = None, do_resize: bool | None = None, **kwargs: Any
    ) -> BatchFeature:
        """``pixel_values`` of an image or a list of them.

        Args:
            images: Images of Pillow, paths, arrays or tensors (height, width), (height, width, channels) or
                (channels, height, width) of pixels from 0 to 255.
            return_tensors: "pt" or "np".
            do_resize: Instead of the processor's own.
            kwargs: Not used.

        Raises:
            ValueError: No such image, or one of another size that is not to be changed.
        """
        size = None if self.size is None else (int(self.size["height"]), int(self.size["width"]))
        resize = self.do_resize if do_resize is None else do_resize
        found = []
        for given in _each(images):
            image = load_image(given) if isinstance(given, str) else given
            if not hasattr(image, "mode"):
                image = image_of_array(_channels_last(np.asarray(image)))
            if size is not None and image.size != size[::-1] and not resize:
                raise ValueError(
                    f"an image of {image.size[1]} x {image.size[0]} pixels, and the model reads {size[0]} x "
                    f"{size[1]}: give such, or do_resize=True"
                )
            pixels = pixels_of_image(image, self.num_channels, size).astype(np.float32)
            found.append((pixels / _MIDDLE - 1).transpose(2, 0, 1))
        return BatchFeature({"pixel_values": found}, tensor_type=return_tensors)


def _each(images: Any) -> list[Any]:
    """The images that were given: one, or several in a list or in an array of four dimensions."""
    if isinstance(images, list | tuple):
        return [one for some in images for one in _each(some)]
    return list(images) if getattr(images, "ndim", 0) == 4 else [images]


def _channels_last(array: Any) -> Any:
    if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[2] not in (1, 3, 4):
        return array.transpose(1, 2, 0)
    return array
