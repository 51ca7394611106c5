"""Tokens of a training, counted rather than multiplied: the batch may change on the way.

In: what a checkpoint says of the steps before it, and the batch of this start.  Here: tokens as a function of
the step, one straight piece for each batch size that the run has had.  Next: the learning rate, the end at
``train.max_tokens``, the figures and the metadata of checkpoints all ask the same object.

Steps that the guard skips count, because their data are read; data that a roll-back leaves out do not.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from dualroute.errors import UserError
from dualroute.model.checkpoint_folder import METADATA, Checkpoint
from dualroute.training.config import TrainConfig


@dataclass(frozen=True)
class TokenCount:
    """Tokens read after each optimizer step, over all ranks.

    Attributes:
        tokens_per_batch: Of the steps after the last change.
        changes: (steps, tokens) where another batch size began; the first is (0, 0).
    """

    tokens_per_batch: int
    changes: list[tuple[int, int]] = field(default_factory=lambda: [(0, 0)])

    @classmethod
    def resumed(cls, checkpoint: Checkpoint | None, tokens_per_batch: int) -> TokenCount:
        """The count of a run that goes on from ``checkpoint`` with ``tokens_per_batch``; null begins anew.

        Raises:
            UserError: The metadata of the checkpoint hold no such numbers.
        """
        if checkpoint is None:
            return cls(tokens_per_batch)
        try:
            tokens = int(checkpoint.metadata["tokens"])
            changes = [(int(a), int(b)) for a, b in checkpoint.metadata.get("token_changes", [(0, 0)])]
            if changes[0] != (0, 0) or changes != sorted(set(changes)) or changes[-1][0] > checkpoint.step:
                raise ValueError("token_changes are in no order")
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise UserError(
                f"{checkpoint.folder / METADATA} does not count tokens ({error}): it is damaged, resume from "
                f"another checkpoint"
            ) from error
        count = cls(tokens_per_batch, changes)
        if count.at(checkpoint.step) != tokens:
            count = cls(tokens_per_batch, [*changes, (checkpoint.step, tokens)])
        return count

    def at(self, step: int) -> int:
        """Tokens read when ``step`` optimizer steps are done; between two changes a straight line."""
        for (first, tokens), (last, tokens_then) in zip(self.changes, self.changes[1:], strict=False):
            if step < last:
                return tokens + (step - first) * (tokens_then - tokens) // (last - first)
        first, tokens = self.changes[-1]
        return tokens + (step - first) * self.tokens_per_batch

    def in_batches(self, step: int) -> float:
        """The same in batches of the present size; equal to ``step`` where the size never changed."""
        return self.at(step) / self.tokens_per_batch

    def total_steps(self, train: TrainConfig) -> int:
        """Optimizer steps of the whole run: ``max_steps``, or the first at which ``max_tokens`` are read.

        Raises:
            UserError: Neither is given.
        """
        if train.max_tokens is None:
            return train.total_steps
        first, tokens = self.changes[-1]
        return first + max(-(-(train.max_tokens - tokens) // self.tokens_per_batch), 0)
