"""Back to a checkpoint when training has failed for too long, and on without the data it failed on.

- In: :class:`~dualroute.training.step.spike_guard.TrainingDiverged`, raised by all ranks in the same step,
  after ``spike_guard.patience`` skipped steps in a row.
- Here: :func:`roll_back` chooses the newest whole checkpoint before the first of these steps and adds their
  samples to those that the data module leaves out.
- Next: ``training/run.py`` trains on from that checkpoint, with a new Trainer in the same processes.  Once it
  has loaded, :meth:`RollBack.write` keeps in ``RUN/rollbacks.json`` what was done, and why.

The steps between the checkpoint and the bad window are trained again on the same data
and give the same numbers.  Only then the order of the data jumps, so that nothing else of the run changes.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dualroute.data.plan import Span, merge_spans, sample_numbers
from dualroute.data.window_module import WindowDataModule
from dualroute.errors import UserError
from dualroute.files import read_json, write_bytes_atomically
from dualroute.model.checkpoint import folder as checkpoint_folder
from dualroute.training.checkpointing.resume import Start
from dualroute.training.checkpointing.starting_points import lineage_of
from dualroute.training.parallel.agreement import decided_by_rank_zero
from dualroute.training.step.spike_guard import TrainingDiverged

log = logging.getLogger(__name__)

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


def divergence(error: TrainingDiverged, module: Any, data: WindowDataModule, step: int) -> Divergence:
    """What is needed of a training that has failed, before it is taken down."""
    # the step that raised has not advanced the position
    _, stop = sample_numbers(data.samples_consumed, data.samples_per_batch, data.skipped_samples)
    first_step, position = module.skipped_since or (step, data.samples_consumed)
    numbers, _ = sample_numbers(position, 1, data.skipped_samples)
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
        found: list[dict[str, Any]] = read_json(path)
        _ = [span for entry in found for span in merge_spans([entry["left_out_samples"]])]
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = str(error).removesuffix(": restore it")
        raise UserError(
            f"{path} cannot be read ({reason}): restore it, or remove it to leave out no data"
        ) from None
    return found


def leave_out(data: WindowDataModule, output: Path) -> None:
    """Tell the data module of a starting run what earlier roll-backs have left out; every rank the same."""
    rollbacks = decided_by_rank_zero(lambda: read_rollbacks(output))
    spans = [entry["left_out_samples"] for entry in rollbacks]
    data.skipped_samples = merge_spans([*data.skipped_samples, *spans])


@dataclass(frozen=True)
class RollBack:
    """What was decided: where to go on, and the whole content of ``rollbacks.json`` from then on."""

    start: Start
    entries: list[dict[str, Any]]

    def write(self, output: Path, max_rollbacks: int) -> None:
        """Write it down, and say it."""
        write_bytes_atomically(output / FILE, json.dumps(self.entries, indent=1).encode())
        entry = self.entries[-1]
        first, stop = entry["left_out_samples"]
        assert self.start.checkpoint is not None
        log.info(
            "%s",
            f"rolled back from step {entry['failed_in_step']} to {self.start.checkpoint.folder} (roll-back "
            f"{len(self.entries)} of at most {max_rollbacks}): {entry['reason']}; samples {first} to "
            f"{stop - 1} of the run are left out, see {output / FILE}",
        )


def roll_back(found: Divergence, output: Path, data: WindowDataModule, max_rollbacks: int) -> RollBack:
    """Choose the checkpoint to go on from, and leave the bad samples out.

    Every rank calls it; rank 0 looks, and writes nothing yet.

    Raises:
        TrainingDiverged: The run may not be rolled back any more, or has no checkpoint.
    """
    decided = decided_by_rank_zero(lambda: _decide(found, output, data, max_rollbacks))
    data.skipped_samples = merge_spans([*data.skipped_samples, found.samples])
    return decided


def _decide(found: Divergence, output: Path, data: WindowDataModule, max_rollbacks: int) -> RollBack:
    before = read_rollbacks(output)
    if len(before) >= max_rollbacks:
        times = (
            f"after {len(before)} roll-backs (spike_guard.max_rollbacks, see {output / FILE}): "
            if before
            else ""
        )
        raise TrainingDiverged(f"{times}{found.reason}")
    finished = checkpoint_folder.scan_checkpoints(output / "checkpoints").finished
    whole = [c for c in finished if not any(checkpoint_folder.damages(c, digests=False))]
    # skipped steps leave the weights alone, so where retention kept no earlier one, any of them will do
    target = next((c for c in reversed(whole) if c.step < found.first_step), whole[-1] if whole else None)
    if target is None:
        raise TrainingDiverged(f"there is no checkpoint to go back to yet: {found.reason}")
    entry = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "failed_in_step": found.step,
        "first_skipped_step": found.first_step,
        "reason": found.reason,
        "resumed_from_step": target.step,
        "left_out_samples": list(found.samples),
        "left_out_tokens": (found.samples[1] - found.samples[0]) * data.context,
        "data_fingerprint": data.fingerprint,
    }
    return RollBack(Start(target, lineage_of(target)), [*before, entry])
