"""``task.json``: what a checkpoint says of the task that its model was trained for.

In: a kind that has seen its training rows.  Out: the file in every checkpoint, and back from there the same
kind, so that a prediction needs only the checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from dualroute.data.tokenizer import Tokenizer
from dualroute.errors import UserError
from dualroute.files import read_json
from dualroute.model.checkpoint.folder import LARGEST_TASK, TASK, Checkpoint
from dualroute.tasks.config import TaskConfig
from dualroute.tasks.kind import Kind, Setting, find_kind

VERSION = 1


def describe_task(kind: Kind, sources: dict[str, Any]) -> bytes:
    """The content of ``task.json``.

    Args:
        kind: Fitted.
        sources: Where its rows came from (``data.path`` and so on), for who evaluates it.
    """
    said = {
        "format": "dualroute-task",
        "version": VERSION,
        "task": dataclasses.asdict(kind.task),
        "labels": kind.labels,
        "state": kind.state(),
        "max_length": kind.setting.max_length,
        "too_long": kind.setting.too_long,
        "data": sources,
    }
    return json.dumps(said, indent=1, ensure_ascii=False).encode()


def read_task(checkpoint: Checkpoint) -> dict[str, Any]:
    """What ``task.json`` says.

    Raises:
        UserError: The checkpoint has none (it is of a language model), or it is damaged.
    """
    path = checkpoint.folder / TASK
    if not path.exists():
        raise UserError(
            f"{checkpoint.folder} was not trained for a task (it has no {TASK}): use dualroute generate, or "
            f"train it with dualroute finetune"
        )
    said = read_json(path, limit=LARGEST_TASK)
    if not isinstance(said, dict) or said.get("format") != "dualroute-task":
        raise UserError(f"{path} is not what dualroute wrote: use another checkpoint")
    if said.get("version") != VERSION:
        raise UserError(f"{path} is of version {said.get('version')!r}: use the dualroute that wrote it")
    return said


def task_of(checkpoint: Checkpoint, tokenizer: Tokenizer, causal: bool) -> tuple[Kind, dict[str, Any]]:
    """The kind that a checkpoint was trained for, and all that ``task.json`` says.

    Raises:
        UserError: See :func:`read_task`; or the kind is in a file that is not there.
    """
    said = read_task(checkpoint)
    try:
        names = {field.name for field in dataclasses.fields(TaskConfig)}
        task = TaskConfig(**{name: value for name, value in said["task"].items() if name in names})
        labels = [str(name) for name in said["labels"]]
        setting = Setting(tokenizer, int(said["max_length"]), causal, str(said["too_long"]))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{checkpoint.folder / TASK} is damaged ({error}): use another checkpoint") from error
    kind = find_kind(task.kind)(task, setting)
    kind.labels = labels
    kind.load_state(said.get("state") or {})
    return kind, said
