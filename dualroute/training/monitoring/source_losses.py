"""Validation losses of each source of a mixture, beside that of all of them.

In: validation batches, each of one source (``source`` in the batch, a number on the host). Out: figures under
tags of their own, ``val/loss_by_source/NAME``; nothing where there is one source.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch import LightningModule

from dualroute.data.window_module import Batch, WindowDataModule


class SourceLosses:
    """Sums over one validation.

    Args:
        module: what is validated, with its trainer.
    """

    def __init__(self, module: LightningModule) -> None:
        data = getattr(module.trainer, "datamodule", None)
        self._data = data if isinstance(data, WindowDataModule) else None
        self.names = () if self._data is None else self._data.val_sources
        self._trainer, self._causal = module.trainer, module.model.config.causal  # type: ignore[union-attr]
        self._sums = torch.zeros(len(self.names), 2, dtype=torch.float64, device=module.device)

    def add(self, batch: Batch, sums: Any) -> None:
        """Count a batch: ``loss_sum`` and ``count`` of ``sums``, 0-dim."""
        if self.names:
            self._sums[batch["source"]] += torch.stack([sums.loss_sum.double(), sums.count.double()])

    def figures(self) -> dict[str, float]:
        """{tag: mean loss in nats per target, or bits per byte of text}; collective."""
        if not self.names or self._data is None:
            return {}
        found: dict[str, float] = {}
        sums = self._trainer.strategy.reduce(self._sums, reduce_op="sum").tolist()
        densities = self._data.val_targets_per_byte
        for name, (nll, count), density in zip(self.names, sums, densities, strict=True):
            if not count:  # nothing of it is held out
                continue
            found[f"val/loss_by_source/{name}"] = nll / count
            if self._causal and density is not None:
                found[f"val/bits_per_byte_by_source/{name}"] = nll / count * density / math.log(2)
        return found
