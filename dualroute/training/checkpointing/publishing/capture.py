"""The files of a training state, taken from the framework instead of being written by it.

In: a Trainer that is asked to save.  Here: inside :func:`captured` Lightning (one process, DDP) and DeepSpeed
hand each file's content to an :class:`~dualroute.training.checkpointing.publishing.own_part.OwnPart`, which
writes it when it is time to.  Next: ``training/checkpointing/publishing/publisher.py``.

Lightning's own writer would put the whole state into memory first, and then into a temporary file of
``$TMPDIR``: a second copy of weights and moments each, on a disk that need not have room for them.

At stages 1 and 2 DeepSpeed's rank 0 would write, and every rank read, all weights once more, rounded, beside
the partitions of their float32 originals.  They are left out (:func:`without_partitioned_weights`), and a
resume has them from the partitions (:class:`WeightsOfPartitions`), by the very rounding that each step
does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy

from dualroute.errors import UserError
from dualroute.training.checkpointing.publishing.own_part import OwnPart
from dualroute.training.checkpointing.state.reader import IN_PARTITIONS
from dualroute.training.finetuning.freezing import with_frozen


@contextmanager
def captured(trainer: Trainer, part: OwnPart) -> Iterator[None]:
    """Let what ``trainer.save_checkpoint`` would write go to ``part``."""
    strategy = trainer.strategy
    if isinstance(strategy, DeepSpeedStrategy):
        engine = strategy.deepspeed_engine
        files = engine.checkpoint_engine
        engine.checkpoint_engine = _OfDeepSpeed(engine, files, part)
        try:
            yield
        finally:
            engine.checkpoint_engine = files
        return
    own, strategy.checkpoint_io = strategy.checkpoint_io, _OfLightning(part)
    try:
        yield
    finally:
        strategy.checkpoint_io = own


class _OfLightning(TorchCheckpointIO):
    """Asked on rank 0 alone, which has all of the state."""

    def __init__(self, part: OwnPart) -> None:
        self.part = part

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.part.take_state(checkpoint, Path(path))


class _OfDeepSpeed:
    """DeepSpeed's engine of checkpoint files, but for the writing."""

    def __init__(self, engine: Any, files: Any, part: OwnPart) -> None:
        self._engine, self._files, self._part = engine, files, part

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        if "module" in state_dict:
            state_dict = without_partitioned_weights(self._engine, state_dict)
        self._part.take_state(state_dict, Path(path))

    def is_decoupled(self) -> bool:
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._files, name)


def without_partitioned_weights(engine: Any, state: dict[str, Any]) -> dict[str, Any]:
    """DeepSpeed's model states of stage 1 or 2 without the weights that the partitions hold in float32."""
    if engine.zero_optimization_stage() not in (1, 2) or not engine.zero_load_from_fp32_weights():
        return state
    held = {name for group in state["param_shapes"] for name in group} | set(state["shared_params"] or {})
    others = {name: tensor for name, tensor in state["module"].items() if name not in held}
    return {**state, "module": others, IN_PARTITIONS: True}


class WeightsOfPartitions:
    """Loads what :func:`without_partitioned_weights` has left out.  All ranks.

    Args:
        engine: DeepSpeed's, which is about to load.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._missing = False

    def __call__(self, content: Any, path: Any) -> Any:
        """What DeepSpeed is to load of a file: the weights that it has stay, until they are restored.

        What is frozen is in no state, and stays.

        Raises:
            UserError: The run's own DeepSpeed configuration loads no float32 weights.
        """
        if not isinstance(content, dict):
            return content
        if not content.pop(IN_PARTITIONS, False):
            if content.get("module"):
                content["module"] = with_frozen(self._engine.module, content["module"])
            return content
        if not self._engine.zero_load_from_fp32_weights():
            raise UserError(
                f"{path} holds its weights in float32 only, and zero_optimization.load_from_fp32_weights is "
                f"false: leave that key out of parallel.deepspeed_config"
            )
        self._missing = True
        return content | {"module": {**self._engine.module_state_dict(), **content["module"]}}

    def restore(self) -> None:
        """Give the model the weights of the partitions that were loaded, rounded as a step rounds them."""
        if self._missing:
            self._engine.optimizer.update_lp_params()
