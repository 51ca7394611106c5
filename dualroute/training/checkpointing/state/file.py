"""The training state of one process or DDP, read from its one file.

In: the path of a checkpoint's ``state.ckpt``.  Here: it is read without running code in it
(``training/checkpointing/state/safe_load.py``).  Next: Lightning hands it to model, optimizer and callbacks.
``training/checkpointing/publishing/own_part.py`` has written it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io import TorchCheckpointIO

from dualroute.training.checkpointing.state.safe_load import load_file


class StateFile(TorchCheckpointIO):
    """Reads a state without running code in it."""

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """The state in the file ``path``, on the CPU.

        Raises:
            UserError: It cannot be read, or holds code.
        """
        content: dict[str, Any] = load_file(Path(path))
        return content
