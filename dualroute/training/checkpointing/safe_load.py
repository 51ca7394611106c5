"""Reading files of a checkpoint without running code in them.

In: a file that ``torch.save`` wrote, here or in DeepSpeed.  Here: it is read with ``weights_only=True``;
besides tensors and plain values DeepSpeed's own few classes are let through (:func:`load_deepspeed_file`).
Next: ``state_reader.py`` and ``state_file.py`` read through it; DeepSpeed, which reads its files with
``weights_only=False`` in half a dozen places, is made to by :func:`deepspeed_loads_safely`.
"""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from dualroute.errors import UserError
from dualroute.model.tree_hash import TRAFFIC

#: What torch.load raises at a file that is truncated, is no such file, holds other classes, or is a folder.
_UNREADABLE = (OSError, RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError, TypeError,
               AttributeError, IndexError)  # fmt: skip


def load_file(path: Path, **options: Any) -> Any:
    """Content of a file of tensors and plain values, on the CPU.

    Raises:
        UserError: It cannot be read, or it holds anything else.
    """
    return _load(torch.load, path, [], map_location="cpu", **options)


def load_deepspeed_file(path: Path, **options: Any) -> Any:
    """:func:`load_file` for the files that DeepSpeed writes."""
    return _load(torch.load, path, _deepspeed_classes(), map_location="cpu", **options)


@contextmanager
def deepspeed_loads_safely(change: Callable[[Any, Any], Any] | None = None) -> Iterator[None]:
    """Inside, every ``torch.load`` of this process is one with ``weights_only=True``.

    Args:
        change: Makes of (content, path) of a file what is given to who asked for it.

    Raises:
        UserError: A file cannot be read, or holds other classes than DeepSpeed writes.
    """
    original = torch.load
    classes = _deepspeed_classes()

    def load(path: Any, *args: Any, **options: Any) -> Any:
        content = _load(original, path, classes, *args, **options)
        return content if change is None else change(content, path)

    torch.load = load  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.load = original


def _load(original: Any, path: Any, classes: list[Any], /, *args: Any, **options: Any) -> Any:
    if isinstance(path, str | os.PathLike):
        if not Path(path).is_file():
            raise UserError(f"{path} cannot be read (it is no file): use another checkpoint")
        if not options.get("mmap"):  # of what is mapped only what is looked at is read
            TRAFFIC.add(read=os.path.getsize(path))
    try:
        with torch.serialization.safe_globals(classes):
            return original(path, *args, **{**options, "weights_only": True})
    except _UNREADABLE as error:
        # what torch raises around it says to try again without weights_only
        inner = (
            error.__context__ if isinstance(error, pickle.UnpicklingError) and error.__context__ else error
        )
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code:
            raise UserError(
                f"{path} cannot be read: it names {code[1]}, which is neither a tensor nor a plain value "
                f"(code in a checkpoint is not run): use another checkpoint"
            ) from error
        said = " ".join(str(inner).split())[:200] or type(inner).__name__
        raise UserError(f"{path} cannot be read ({said}): use another checkpoint") from error


@cache
def _deepspeed_classes() -> list[Any]:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    def stage_named(stages: Any, name: str) -> ZeroStageEnum:
        """For getattr, with which early releases of Python 3.11 pickle members of an enumeration."""
        if stages is not ZeroStageEnum:
            raise pickle.UnpicklingError(f"{stages!r} is no ZeRO stage")
        return ZeroStageEnum[name]

    classes: list[Any] = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
    return [*classes, (stage_named, "builtins.getattr")]
