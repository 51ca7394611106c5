"""Images in a stream: a document is a grid of patches, and a block of the stream is a region of it.

In: the size of the grid and of a region, in patches. Out: a `Grid`, which says in which slot of its document
each patch lies. Patches come in raster order (row by row, as images are stored); the layout puts those of a
region side by side, so that the global route, which chooses blocks, chooses regions, as the bi-level routing
of BiFormer does (Zhu et al., arXiv 2303.08810). The local route reads a square around each patch.

At the right and lower edges a region may stick out of the grid. Its patches take the first slots of its
block, and what is left over holds nothing, as at the end of a text.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dualroute.attention.core.options import check_at_least

if TYPE_CHECKING:  # configurations are read without torch
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """A grid of height x width patches, cut into regions of region_height x region_width, from the top left.

    Raises:
        ValueError: a number is too small, or a region is larger than the grid.
    """

    height: int
    width: int
    region_height: int
    region_width: int

    def __post_init__(self) -> None:
        sizes = {"height": self.height, "width": self.width}
        check_at_least(1, **sizes, region_height=self.region_height, region_width=self.region_width)
        for name, size in sizes.items():
            region = getattr(self, f"region_{name}")
            if region > size:
                raise ValueError(
                    f"region_{name}={region} is above the grid's {name}={size}: use {name} at most"
                )

    @property
    def patches(self) -> int:
        return self.height * self.width

    @property
    def block(self) -> int:
        """Patches of a whole region: the block of the layers."""
        return self.region_height * self.region_width

    @property
    def regions(self) -> tuple[int, int]:
        """Rows and columns of regions."""
        return -(-self.height // self.region_height), -(-self.width // self.region_width)

    @property
    def slots(self) -> int:
        """Slots of a document on the stream."""
        return self.regions[0] * self.regions[1] * self.block

    def row_and_column(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Of the patches at these positions in raster order."""
        return position // self.width, position % self.width

    def region_of_patch(self, device: torch.device | str = "cpu") -> Tensor:
        """(patches,) number of the region of each patch."""
        import torch

        row, column = self.row_and_column(torch.arange(self.patches, device=device))
        return row // self.region_height * self.regions[1] + column // self.region_width

    def slot_of_patch(self, device: torch.device | str = "cpu") -> Tensor:
        """(patches,) slot, inside its document, of each patch."""
        return _slot_of_patch(self).to(device)


@functools.lru_cache(maxsize=16)
def _slot_of_patch(grid: Grid) -> Tensor:
    import torch

    region = grid.region_of_patch()
    order = torch.argsort(region, stable=True)  # by region, in raster order inside of each
    counts = torch.bincount(region)
    first = (counts.cumsum(0) - counts)[region[order]]  # of each patch's region, in this order
    slot = torch.empty_like(region)
    slot[order] = region[order] * grid.block + torch.arange(grid.patches) - first
    return slot


def check_grid(grid: Grid, *, block: int, causal: bool, head_dim: int, scaled: bool) -> None:
    """Whether a layer with these options can read images.

    Raises:
        ValueError: it cannot, with the remedy.
    """
    if causal:
        raise ValueError("causal=True with a grid: an image has no past; use causal=False")
    if block != grid.block:
        raise ValueError(
            f"block={block} is not a region of {grid.region_height} x {grid.region_width} patches: "
            f"use block={grid.block}"
        )
    if head_dim % 4:
        raise ValueError(
            f"head_dim={head_dim} is not a multiple of 4, which the two axes of an image need: "
            f"use head_dim={-(-head_dim // 4) * 4}"
        )
    if scaled:
        raise ValueError(
            "rope_scaling is for texts, the patches of an image have places on a grid: leave it out"
        )
