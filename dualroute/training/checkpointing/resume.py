"""Which checkpoint a run starts from.

- In: the run folder and what ``--resume`` says.
- Here: :func:`choose_start` looks, and changes nothing; :func:`check_start` compares the chosen checkpoint
  with the configuration and the data, :func:`refuse_damaged` every file with its hashes, divided over the
  ranks.
- Next: :mod:`~dualroute.training.checkpointing.state.reshard` makes the state readable for the ranks of this
  start, and when all of them have loaded it, :mod:`~dualroute.training.checkpointing.publishing.first_write`
  sets newer ones aside.

A run that has trained and whose checkpoints are not to be found is not begun anew: they are more often not
mounted than lost.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dualroute.errors import UserError
from dualroute.model.checkpoint import folder as checkpoint_folder
from dualroute.model.checkpoint.folder import Checkpoint, Scan, scan_checkpoints, step_of
from dualroute.model.config import ModelConfig
from dualroute.training.checkpointing import starting_points
from dualroute.training.checkpointing.divided_check import first_damage
from dualroute.training.checkpointing.publishing.upkeep import ABANDONED, LINKS, PUBLISHED
from dualroute.training.monitoring.metrics_log import read_metrics
from dualroute.training.parallel.agreement import decided_by_rank_zero

_ANEW = "or begin anew with another --output, or remove"


@dataclass(frozen=True)
class Start:
    """Where a training begins.

    Attributes:
        checkpoint: What it goes on from, None from the beginning.
        lineage: The starting points that its own checkpoints descend from.
        note: What the person who started it should know, or "".
    """

    checkpoint: Checkpoint | None = None
    lineage: list[starting_points.StartingPoint] = field(default_factory=list)
    note: str = ""


def choose_start(output: Path, resume: str) -> Start:
    """The checkpoint that a run starts from.  Reads only.

    Args:
        output: The run folder.
        resume: ``auto`` (newest finished one, if any), ``never``, or a path: a starting point until the run
            has gone on from it.

    Raises:
        UserError: ``resume`` names nothing, or the run's checkpoints are missing, unreadable or damaged.
    """
    folder = output / "checkpoints"
    _refuse_what_is_no_folder(folder)
    scan = scan_checkpoints(folder)
    if not scan.finished:
        if resume in ("auto", "never"):
            _refuse_lost(output, folder, scan)
            return Start(None, starting_points.beginning() if resume == "never" else [])
        if not scan.unfinished and not scan.damaged:
            _refuse_missing(output, folder)
    if resume == "never":
        return _never(folder, scan.finished)
    if resume == "auto":
        return _newest(folder, scan)
    if scan.finished and starting_points.gone_on_from(scan.finished[-1], resume, folder):
        start = _newest(folder, scan)
        note = (
            f"the run has gone on from {resume}: continuing from its newest checkpoint (to begin there once "
            f"more, give another --output, or move the newer step-… folders away)"
        )
        return Start(start.checkpoint, start.lineage, "; ".join(filter(None, (note, start.note))))
    checkpoint = checkpoint_folder.find_checkpoint(resume)
    if checkpoint.folder.is_symlink():  # last or best, which will point elsewhere
        checkpoint = checkpoint_folder.read_checkpoint(checkpoint.folder.resolve())
    return Start(checkpoint, starting_points.after(checkpoint, resume, folder))


def _newest(folder: Path, scan: Scan) -> Start:
    newest = scan.finished[-1]
    for path, error in scan.damaged.items():
        if (step_of(path) or 0) > newest.step:
            raise UserError(f"{error}; an earlier one is there: --resume {newest.folder}")
    passed = [path.name for path in scan.unfinished if (step_of(path) or 0) > newest.step]
    note = ""
    if passed:
        note = (
            f"{folder / passed[-1]} has no {checkpoint_folder.METADATA} (copied in part?): it is passed "
            f"over, and set aside"
        )
    return Start(newest, starting_points.lineage_of(newest), note)


def _never(folder: Path, finished: list[Checkpoint]) -> Start:
    newest = finished[-1]
    if starting_points.begun_by_this_job(newest):
        note = "this job began the run, and was requeued: continuing from its newest checkpoint"
        return Start(newest, starting_points.lineage_of(newest), note)
    raise UserError(
        f"{folder} holds {len(finished)} finished checkpoint(s) and --resume never would write over "
        f"them: choose another --output, or remove the folder"
    )


def _refuse_what_is_no_folder(folder: Path) -> None:
    if folder.is_symlink() and not os.path.exists(folder):
        raise UserError(
            f"{folder} is a link to {os.readlink(folder)}, which is not there: mount or make that folder, or "
            f"give another --output"
        )
    try:
        os.listdir(folder)
    except FileNotFoundError:
        return
    except NotADirectoryError as error:
        raise UserError(f"{folder} is no folder: move it away, or give another --output") from error
    except OSError as error:
        raise UserError(
            f"{folder} cannot be read ({error.strerror or error}): mount it or give access to it, or give "
            f"another --output"
        ) from error


def _refuse_lost(output: Path, folder: Path, scan: Scan) -> None:
    """Raise UserError where a beginning from step 0 would bury a training."""
    for error in scan.damaged.values():
        raise UserError(f"{error}; no other is in {folder}: restore one, {_ANEW} {output}")
    if scan.unfinished:
        raise UserError(
            f"{scan.unfinished[-1]} has no {checkpoint_folder.METADATA} (copied in part?), and there is no "
            f"other checkpoint: copy it again, {_ANEW} that folder"
        )
    for copy in (folder / name for name in LINKS):
        with contextlib.suppress(checkpoint_folder.NotFinishedError):
            step = checkpoint_folder.read_checkpoint(copy).step
            raise UserError(
                f"{copy} holds the checkpoint of step {step}, and there is no step-… folder beside it: "
                f"rename it to {checkpoint_folder.step_folder(step)}"
            )
    aside = sorted(folder.glob(f"{ABANDONED}step-*"))
    if aside:
        raise UserError(
            f"{folder} holds only checkpoints that were set aside: give one (--resume {aside[-1]}), {_ANEW} "
            f"{output}"
        )
    _refuse_missing(output, folder)


def _refuse_missing(output: Path, folder: Path) -> None:
    """Raise UserError where the run folder shows that there were checkpoints."""
    if any(folder.glob(f"{ABANDONED}*")):
        return  # the folder is the right one
    sign = _sign_of_checkpoints(output)
    if sign:
        missing = "holds no checkpoint" if folder.is_dir() else "is not there"
        raise UserError(
            f"{folder} {missing}, but this run has written some ({sign} shows it): mount or restore that "
            f"folder, {_ANEW} {output}"
        )


def _sign_of_checkpoints(output: Path) -> str:
    """The file that shows that this run had a checkpoint, or ""."""
    if (output / PUBLISHED).exists():
        return PUBLISHED
    if (output / "rollbacks.json").exists() and (output / "config.yaml").exists():
        return "rollbacks.json"  # a run rolls back to a checkpoint
    with contextlib.suppress(UserError, OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        # runs of versions that did not write PUBLISHED: the steps that were logged span a checkpoint
        config = yaml.safe_load((output / "config.yaml").read_text(encoding="utf-8"))
        every = int(config["checkpoint"]["every_steps"])
        steps = [line["step"] for line in read_metrics(output / "metrics.jsonl", "train")]
        if max(steps) - min(steps) > 2 * every:
            return "metrics.jsonl"
    return ""


def seen_here(output: Path, checkpoint: Checkpoint | None, *, patience: float = 90.0) -> None:
    """Wait until this rank sees the run folder, and in it the checkpoint that rank 0 has chosen.

    A network file system may show a host what was there a minute ago.

    Args:
        output: The run folder.
        checkpoint: What rank 0 has read.
        patience: Seconds.

    Raises:
        UserError: It does not come to see them, or cannot write in the folder.
    """
    deadline = time.monotonic() + patience
    while not _is_here(output, checkpoint):
        if time.monotonic() > deadline:
            missing = output if checkpoint is None else checkpoint.folder
            raise UserError(
                f"{missing}, which rank 0 sees, is not there on host {socket.gethostname()}: --output must "
                f"lie on a file system that all ranks share"
            )
        time.sleep(0.5)
    if not os.access(output, os.W_OK):
        raise UserError(
            f"output folder {output} cannot be written on host {socket.gethostname()}: choose another "
            f"--output"
        )


def _is_here(output: Path, checkpoint: Checkpoint | None) -> bool:
    if checkpoint is None:
        return output.is_dir()
    with contextlib.suppress(UserError):
        here = checkpoint_folder.read_checkpoint(checkpoint.folder).metadata
        return json.dumps(here) == json.dumps(checkpoint.metadata)  # equal also where a loss is not a number
    return False


def check_start(checkpoint: Checkpoint, model: ModelConfig, data: dict[str, Any]) -> None:
    """Compare a checkpoint with what it is to be resumed with.

    Args:
        checkpoint: What was chosen.
        model: The configured model.
        data: Of the run's data: ``fingerprint``, ``seed``, ``context``.  What the metadata know of them is
            compared here; the state itself is when it is loaded.

    Raises:
        UserError: Its model or data are others.
    """
    theirs = ModelConfig.from_file(checkpoint.folder / checkpoint_folder.CONFIG).to_dict()
    ours = model.to_dict()
    differing = [
        f"{key} {theirs.get(key)} → {ours.get(key)}"
        for key in {**ours, **theirs}
        if theirs.get(key) != ours.get(key)
    ]
    if differing:
        raise UserError(
            f"{checkpoint.folder} holds another model than the configuration asks for (model."
            f"{', model.'.join(differing)}): restore these values, or start elsewhere with --output"
        )
    for key, name in (("fingerprint", "data_fingerprint"), ("seed", "seed"), ("context", "context")):
        said = checkpoint.metadata.get(name)
        if said is not None and said != data[key]:
            raise UserError(
                f"{checkpoint.folder} was trained with data {key} {said!r}, and this start has "
                f"{data[key]!r}: resume with the same data, seed and context, or start a new run (--output)"
            )


def refuse_damaged(checkpoint: Checkpoint, *, digests: bool, together: bool) -> None:
    """Compare the files of a checkpoint with its metadata.

    Args:
        checkpoint: What was chosen, on all ranks the same.
        digests: Compare the hashes besides the sizes.
        together: All ranks call it, and share the hashing; else this process does all of it.

    Raises:
        UserError: It is damaged; the newest older one beside it that is whole is named.
    """

    def look(find: Callable[[], Any]) -> Any:
        return decided_by_rank_zero(find) if together else find()

    def damage_of(one: Checkpoint) -> str | None:
        return first_damage(one, digests=digests, together=together)

    damage = damage_of(checkpoint)
    if damage is None and not look(checkpoint.state.exists):
        damage = f"{checkpoint.state} is missing from the checkpoint"
    if damage is None:
        return
    beside = look(lambda: scan_checkpoints(checkpoint.folder.parent).finished)
    for earlier in reversed([c for c in beside if c.step < checkpoint.step]):
        if damage_of(earlier) is None:
            raise UserError(f"{damage}; the newest earlier checkpoint is whole: --resume {earlier.folder}")
    raise UserError(f"{damage}; no earlier checkpoint beside it is whole: start again with another --output")
