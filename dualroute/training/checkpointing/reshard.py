"""Going on with another number of ranks, another ZeRO stage, or with and without DeepSpeed.

In: the checkpoint to resume and a Trainer whose layout differs from the checkpoint's.  Next: ``run.py``
gives the path that is found here to the Trainer.

- To ZeRO 1 to 3, from any layout, nothing is converted: while DeepSpeed loads, each rank reads from the
  checkpoint's own files the elements that are to be its own, and no others
  (:func:`dualroute.compat.read_partitions_from`).  Rank 0 writes what is left, an index of a few small files.
- To one process, DDP or stage 0, where every rank holds all of the state, rank 0 writes it once more in the
  one file that they load.

Either lies in ``checkpoints/resharded-step-…``, written aside and then renamed; the other ranks wait for that
folder.  It is a cache: it stays until the resumed run has published a checkpoint of its own.

The ranks do not meet to wait.  They look for the folder, so no collective can time out however long a
conversion takes.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from dualroute.errors import UserError
from dualroute.files import file_sha256, fsync_folder, make_durable, read_json
from dualroute.model import checkpoint_folder
from dualroute.training.checkpointing.state_layout import StateLayout
from dualroute.training.checkpointing.state_reader import TrainingState, open_state
from dualroute.training.checkpointing.state_writer import write_index, write_one_file, write_stage_zero
from dualroute.training.config import as_saved
from dualroute.training.parallel.strategy import DualRouteDeepSpeedStrategy

log = logging.getLogger(__name__)

PREFIX = "resharded-"
_NOTE, _PROGRESS = "resharded.json", "progress"
_PLACES = "places.json"
_FORMS = {None: "one file", 0: "DeepSpeed stage 0"}
_INDEX = "index of a state that each rank reads its part of"


def resumable_state(
    checkpoint: checkpoint_folder.Checkpoint,
    trainer: Trainer,
    folder: Path,
    *,
    precision: str,
    timeout_minutes: float,
) -> Path:
    """The state of ``checkpoint`` in the form that ``trainer`` loads: for ``ckpt_path``.

    Every rank calls it, before ``fit``.

    Args:
        checkpoint: What is resumed.
        trainer: Its strategy is told where it has to load a universal checkpoint.
        folder: The run's ``checkpoints`` folder, where a converted state is kept.
        precision: That of the run's state, ``train.mixed_precision``.
        timeout_minutes: How long a rank waits without seeing progress of rank 0.

    Raises:
        UserError: The state cannot be converted without loss, cannot be read, or there is no room for it.
    """
    wrote = StateLayout.read(checkpoint)
    needed = StateLayout.of(trainer)
    if not wrote.serves(needed):
        _refuse_loss(checkpoint, wrote, needed, precision)
    before = saved_precision(checkpoint, precision)
    refuse_other_precision(checkpoint, wrote, needed, before, precision)
    # DeepSpeed's partitions of float32 and of bfloat16 training have different files
    same_form = not needed.stage or before.startswith("bf16") == precision.startswith("bf16")
    if wrote.serves(needed) and same_form:
        return checkpoint.state
    target = folder / f"{PREFIX}{checkpoint.folder.name}"
    note = {
        "source": str(checkpoint.folder),
        "sha256": file_sha256(checkpoint.folder / checkpoint_folder.METADATA),
        "form": _FORMS.get(needed.stage, _INDEX),
    }
    if not _is_there(target, note):
        if trainer.is_global_zero:
            log.info("%s", f"converting {checkpoint.folder} from {wrote} for {needed}")
            _convert(checkpoint, target, note)
        else:
            _wait(target, note, timeout_minutes)
    if isinstance(trainer.strategy, DualRouteDeepSpeedStrategy) and needed.stage:
        trainer.strategy.expect_universal_checkpoint(lambda: open_state(checkpoint, _places(target)))
    return target / checkpoint_folder.STATE


def _places(target: Path) -> dict[str, list[list[int]]] | None:
    places: dict[str, list[list[int]]] | None = read_json(target / _PLACES)
    return places


def converted_states(folder: Path) -> frozenset[Path]:
    """The converted states that lie in a ``checkpoints`` folder."""
    return frozenset(folder.glob(f"{PREFIX}*"))


def remove_resharded(folder: Path, keep: frozenset[Path] = frozenset()) -> None:
    """Remove converted states from a ``checkpoints`` folder: the run has a checkpoint of its own now."""
    for path in (*folder.glob(f"{PREFIX}*"), *folder.glob(f".*{PREFIX}*")):
        if path not in keep:
            shutil.rmtree(path, ignore_errors=True)


def _refuse_loss(
    checkpoint: checkpoint_folder.Checkpoint, wrote: StateLayout, needed: StateLayout, precision: str
) -> None:
    plain = needed.stage in (None, 0)
    reason = ""
    if precision == "bf16-true" and plain:
        reason = (
            f"with train.precision bf16-true {needed} has no float32 weights, so converting would round them"
        )
    if precision == "16-mixed" and plain != (wrote.stage in (None, 0)):
        reason = "the loss scale of train.precision 16-mixed is kept in another way on either side"
    if reason:
        raise UserError(
            f"{checkpoint.folder} holds {wrote}, this run needs {needed}, and {reason}; start it with the "
            f"number of ranks, parallel.strategy and parallel.zero_stage of the run that wrote it"
        )


def saved_precision(checkpoint: checkpoint_folder.Checkpoint, unknown: str) -> str:
    """Precision of the state that ``checkpoint`` holds; ``unknown`` where that was not noted."""
    settings = checkpoint.metadata.get("settings")
    train = settings.get("train") if isinstance(settings, dict) else None
    return as_saved(str(train.get("precision", unknown))) if isinstance(train, dict) else unknown


def refuse_other_precision(
    checkpoint: checkpoint_folder.Checkpoint, wrote: StateLayout, needed: StateLayout, before: str, now: str
) -> None:
    """Changes of the arithmetic that a state of DeepSpeed cannot follow."""
    stages = (wrote.stage, needed.stage)
    fp16 = "16-mixed" in (before, now) and stages != (None, None)
    half_weights = "bf16-true" in (before, now) and 0 in stages
    if before != now and (fp16 or half_weights):
        raise UserError(
            f"{checkpoint.folder} was trained with train.precision {before} and this run asks for {now}, "
            f"which {wrote if wrote.stage is not None else needed} cannot follow: give the old value, or "
            f"begin with the weights in another --output (--init_from {checkpoint.folder})"
        )


def _is_there(target: Path, note: dict[str, Any]) -> bool:
    with suppress(OSError, ValueError):
        return bool(json.loads((target / _NOTE).read_text(encoding="utf-8")) == note)
    return False


def _convert(checkpoint: checkpoint_folder.Checkpoint, target: Path, note: dict[str, Any]) -> None:
    aside = target.with_name(f".writing-{target.name}")
    try:
        for path in (aside, target):
            shutil.rmtree(path, ignore_errors=True)
        aside.mkdir(parents=True)
        state = open_state(checkpoint)
        report = Reporter(aside / _PROGRESS)
        if note["form"] == _INDEX:
            write_index(state, aside / checkpoint_folder.STATE)
            (aside / _PLACES).write_text(json.dumps(state.places()), encoding="utf-8")
        else:
            check_room(state, target.parent)
            write = write_stage_zero if note["form"] == _FORMS[0] else write_one_file
            write(state, aside / checkpoint_folder.STATE, report)
        (aside / _PROGRESS).unlink(missing_ok=True)
        (aside / _NOTE).write_text(json.dumps(note, indent=1), encoding="utf-8")
        make_durable(aside)
        os.rename(aside, target)
        fsync_folder(target.parent)
    except OSError as error:
        raise UserError(
            f"{target} could not be written ({error}): make room, then run the same again"
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def check_room(state: TrainingState, folder: Path) -> None:
    """Raise UserError where ``folder`` has no room for weights and moments in float32."""
    needed = 3 * 4 * sum(math.prod(shape) for shape in state.shapes.values())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"converting needs {needed / 2**20:,.0f} MiB in {folder}, {free / 2**20:,.0f} MiB are free: "
            f"make room, then run the same again"
        )


class Reporter:
    """Prints progress in tenths, and counts in a file that waiting ranks look at."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._written = -math.inf
        self._tenth = 0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self.path is not None and now - self._written > 1:
            self.path.write_text(f"{done} of {total}")
            self._written = now
        tenth = 10 * done // total
        if tenth > self._tenth:
            self._tenth = tenth
            log.info("%s", f"  {done} of {total} parameters converted")


def _wait(target: Path, note: dict[str, Any], timeout_minutes: float) -> None:
    progress = target.with_name(f".writing-{target.name}") / _PROGRESS
    seen, since = "", time.monotonic()
    while not _is_there(target, note):
        with suppress(OSError):
            text = progress.read_text()
            if text != seen:
                seen, since = text, time.monotonic()
        if time.monotonic() - since > 60 * timeout_minutes:
            raise UserError(
                f"rank 0 has converted nothing into {target} for {timeout_minutes:g} minutes "
                f"(parallel.timeout_minutes): see its own message"
            )
        time.sleep(0.2)
