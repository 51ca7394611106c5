"""Back to a checkpoint when training has failed for too long, and on without the data it failed on.

- In: :class:`~dualroute.training.step.optim.TrainingDiverged`, raised by all ranks in the same step, after
  ``spike_guard.patience`` skipped steps in a row.
- Here: :func:`roll_back` chooses the newest checkpoint before the first of these steps and adds their samples
  to those that the data module leaves out; ``RUN/rollbacks.json`` keeps what was done, and why.
- Next: ``training/run.py`` trains on from that checkpoint, with a new Trainer in the same processes.

The steps between the checkpoint and the bad window are trained again on the same data
and give the same numbers.  Only then the order of the data jumps, so that nothing else of the run changes.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dualroute.data.module import ShardDataModule
from dualroute.data.plan import Span, merge_spans, sample_numbers
from dualroute.errors import UserError
from dualroute.files import write_bytes_atomically
from dualroute.model import checkpoint_format
from dualroute.training.checkpointing.resume import set_aside_newer
from dualroute.training.parallel.environment import World
from dualroute.training.step.spike_guard import TrainingDiverged

FILE = "rollbacks.json"


@dataclass(frozen=True)
class Divergence:
    """Where a training failed.

    Attributes:
        first_step: The first of the skipped steps in a row.
        step: The optimizer step in which it was given up.
        samples: Samples of the run [first, last) that the skipped steps were to be trained on.
        reason: The guard's words.
    """

    first_step: int
    step: int
    samples: Span
    reason: str


def divergence(error: TrainingDiverged, module: Any, data: ShardDataModule, step: int) -> Divergence:
    """What is needed of a training that has failed, before it is taken down."""
    # the step that raised has not advanced the position
    _, stop = sample_numbers(data.samples_consumed, data.samples_per_batch, data.left_out)
    first_step, position = module.skipped_since or (step, data.samples_consumed)
    numbers, _ = sample_numbers(position, 1, data.left_out)
    return Divergence(first_step, step, (int(numbers[0]), stop), str(error))


def read_rollbacks(output: Path) -> list[dict[str, Any]]:
    """What ``RUN/rollbacks.json`` says, oldest first.

    Raises:
        UserError: The file is not what was written.
    """
    path = output / FILE
    if not path.exists():
        return []
    try:
        found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        _ = [span for entry in found for span in merge_spans([entry["left_out_samples"]])]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path} cannot be read ({error}): restore it, or remove it to leave out no data"
        ) from None
    return found


def leave_out(data: ShardDataModule, output: Path) -> None:
    """Tell the data module of a starting run what earlier roll-backs have left out."""
    spans = [entry["left_out_samples"] for entry in read_rollbacks(output)]
    data.left_out = merge_spans([*data.left_out, *spans])


def roll_back(
    found: Divergence, output: Path, data: ShardDataModule, world: World, max_rollbacks: int
) -> checkpoint_format.Checkpoint:
    """Choose the checkpoint to go on from, leave the bad samples out, and write both down.

    Every rank calls it and decides alike; rank 0 writes.

    Raises:
        TrainingDiverged: The run may not be rolled back any more, or has no checkpoint.
    """
    before = read_rollbacks(output)
    if len(before) >= max_rollbacks:
        times = (
            f"after {len(before)} roll-backs (spike_guard.max_rollbacks, see {output / FILE}): "
            if before
            else ""
        )
        raise TrainingDiverged(f"{times}{found.reason}")
    folder = output / "checkpoints"
    finished = checkpoint_format.list_checkpoints(folder) if folder.is_dir() else []
    # skipped steps leave the weights alone, so where retention kept no earlier one, any of them will do
    target = next(
        (c for c in reversed(finished) if c.step < found.first_step), finished[-1] if finished else None
    )
    if target is None:
        raise TrainingDiverged(f"there is no checkpoint to go back to yet: {found.reason}")
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()  # all ranks have looked before anything changes
    if world.rank == 0:
        set_aside_newer(folder, target.step)
        entry = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "failed_in_step": found.step,
            "first_skipped_step": found.first_step,
            "reason": found.reason,
            "resumed_from_step": target.step,
            "left_out_samples": list(found.samples),
            "left_out_tokens": (found.samples[1] - found.samples[0]) * data.context,
            "data_fingerprint": data.manifest.fingerprint,
        }
        write_bytes_atomically(output / FILE, json.dumps([*before, entry], indent=1).encode())
        print(
            f"rolled back from step {found.step} to {target.folder} (roll-back {len(before) + 1} of at most "
            f"{max_rollbacks}): {found.reason}; samples {found.samples[0]} to {found.samples[1] - 1} of "
            f"the run are left out, see {output / FILE}",
            flush=True,
        )
    data.left_out = merge_spans([*data.left_out, found.samples])
    return target
