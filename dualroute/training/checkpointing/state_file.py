"""The training state of one process or DDP, as one file.

In: the Trainer's state at a step boundary, and a path in the folder that is to be published.  Here: it is
written to that path and nowhere else.  Next: ``training/checkpointing/publisher.py`` makes the folder durable
and gives it its name.

Lightning's own writer would put the whole state into memory first, and then into a temporary file of
``$TMPDIR``: a second copy of weights and moments each, on a disk that need not have room for them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO

from dualroute.training.checkpointing.safe_load import load_file


class StateFile(TorchCheckpointIO):
    """Writes a state straight to its file, tensor by tensor, and reads it without running code in it."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        torch.save(checkpoint, path)

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """The state in the file ``path``, on the CPU.

        Raises:
            UserError: It cannot be read, or holds code.
        """
        content: dict[str, Any] = load_file(Path(path))
        return content
