"""What enters a model instead of token ids: patches of images, frames of sound, or single values.

In: numbers for each step, (B, n, features), of any type; integers of 8 bits (pixels) are taken as -1 to 1.
Here: one linear map onto the residual stream, and, if wanted, a learned vector for each place of an image.
Next: the layers of :class:`~dualroute.model.transformer.DualRoutingTransformer`.  Where a patch lies is told
to the attention by its layout (:mod:`dualroute.attention.core.grid`).

:func:`patches_of` cuts an image into the patches that a model reads.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dualroute.model.ends_config import FrontendConfig

_MIDDLE = 127.5  # of a pixel


class Frontend(nn.Linear):
    """Linear map of each step's numbers; it stands where other models have the embedding of their tokens.

    Args:
        config: What enters.
        dim: Width of the hidden states.
    """

    def __init__(self, config: FrontendConfig, dim: int) -> None:
        super().__init__(config.features, dim)
        grid = config.grid_of_patches()
        self.places = nn.Embedding(grid.patches, dim) if grid is not None and config.learned_places else None

    def init_weights(self, std: float) -> None:
        """Normal(0, ``std``); the bias too, or the first norm would leave of a single value its sign."""
        nn.init.normal_(self.weight, std=std)
        nn.init.normal_(self.bias, std=std)
        if self.places is not None:
            nn.init.normal_(self.places.weight, std=std)

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, n, features) → (B, n, dim)."""
        if inputs.dtype == torch.uint8:
            inputs = inputs.to(self.weight.dtype) / _MIDDLE - 1
        return super().forward(inputs.to(self.weight.dtype))

    def at_places(self, hidden_states: Tensor, positions: Tensor) -> Tensor:
        """Hidden states (B, n, dim) with the vectors of their places; ``positions`` (B, n) in raster
        order."""
        if self.places is None:
            return hidden_states
        places: Tensor = self.places(positions)
        return hidden_states + places


def patches_of(image: NDArray[Any], patch: int) -> NDArray[Any]:
    """Patches of ``patch`` x ``patch`` pixels of an image (height, width, channels), in raster order.

    Returns:
        (patches, patch * patch * channels); at the right and lower edges filled up with 0, as the image is
        where its size is no multiple.
    """
    height, width, channels = image.shape
    down, across = -(-height // patch), -(-width // patch)
    padded = np.zeros((down * patch, across * patch, channels), dtype=image.dtype)
    padded[:height, :width] = image
    cut = padded.reshape(down, patch, across, patch, channels).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(cut.reshape(down * across, -1))
