"""How a training state is cut up: whole in one file, or partitioned by DeepSpeed over ranks.

In: a running Trainer, or the words that a checkpoint's metadata say.  Here: one comparable value.  Next:
``training/checkpointing/publisher.py`` writes it into the metadata and
``training/checkpointing/reshard.py`` compares both.

At stage 0 DeepSpeed writes one file as well, in a form of its own; it serves any number
of ranks, as the plain one does.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy

from dualroute.errors import UserError
from dualroute.model.checkpoint_folder import Checkpoint

ONE_FILE = "one file"


@dataclass(frozen=True)
class StateLayout:
    """``stage`` is None for the plain file of one process or DDP."""

    stage: int | None = None
    ranks: int = 1

    def __str__(self) -> str:
        if self.stage is None:
            return ONE_FILE
        return f"DeepSpeed ZeRO-{self.stage} partitions of {self.ranks} rank(s)"

    @classmethod
    def read(cls, checkpoint: Checkpoint) -> StateLayout:
        """The layout that the metadata of ``checkpoint`` name.

        Raises:
            UserError: They name none: there is no state to go on from.
        """
        words = checkpoint.metadata.get("state_layout")
        if words == ONE_FILE:
            return cls()
        match = re.fullmatch(r"DeepSpeed ZeRO-(\d) partitions of (\d+) rank\(s\)", words or "")
        if match is None:
            raise UserError(
                f"{checkpoint.folder} holds weights without a training state (state_layout {words!r} in its "
                f"checkpoint.json): use the checkpoint of a run"
            )
        return cls(int(match[1]), int(match[2]))

    @classmethod
    def of(cls, trainer: Trainer) -> StateLayout:
        """The layout that this Trainer saves and loads."""
        if not isinstance(trainer.strategy, DeepSpeedStrategy):
            return cls()
        assert isinstance(trainer.strategy.config, dict)
        return cls(trainer.strategy.config["zero_optimization"]["stage"], trainer.world_size)

    def serves(self, other: StateLayout) -> bool:
        """Whether a run of layout ``other`` can load a state of this one as it is."""
        if self.stage == other.stage and self.stage in (None, 0):
            return True
        return self == other
