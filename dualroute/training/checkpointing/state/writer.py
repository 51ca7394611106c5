"""Writing a training state in another layout than it was saved in.

In: a :class:`~dualroute.training.checkpointing.state.reader.TrainingState`.  Here: four forms of it.
:func:`write_universal` writes DeepSpeed's universal checkpoint, a folder per parameter, which any number of
ranks can load at stages 1 to 3; :func:`write_index` what such a checkpoint holds besides parameters;
:func:`write_one_file` the plain file of one process or DDP; :func:`write_stage_zero` DeepSpeed's file at
stage 0.  Next: ``commands.py`` keeps the first, ``reshard.py`` resumes from the others.

DeepSpeed's own converter writes stage 3 flat and stages 1 and 2 in shape, and the
global state of one or the other, which is why it cannot go from 2 to 3 or back.  Written in shape, with the
global state of both in one file, the same folder serves all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dualroute.training.checkpointing.state.reader import WEIGHT, TrainingState, prepare_deepspeed

TAG = "checkpoint"  # the name that Lightning gives DeepSpeed's folder
Progress = Callable[[int, int], None]


def write_universal(state: TrainingState, folder: Path, progress: Progress) -> None:
    """Write ``state`` as a DeepSpeed universal checkpoint: ``folder``/checkpoint and ``latest_universal``.

    Args:
        state: What to write; one parameter at a time is in memory.
        folder: An empty folder.
        progress: Called with (parameters written, parameters in all).
    """
    write_index(state, folder)
    zero = folder / TAG / "zero"
    for count, (name, shape) in enumerate(state.shapes.items(), 1):
        target = zero / name
        target.mkdir()
        for key in state.keys_of(name):
            tensor = state.read(name, key).to(torch.float32, copy=True).view(shape)
            save({"param": tensor}, target / f"{key}.pt")
        save(state.step, target / "step.pt")
        progress(count, len(state.shapes))


def write_index(state: TrainingState, folder: Path) -> None:
    """Write what a universal checkpoint holds besides parameters: a few small files.

    Args:
        state: What to write.
        folder: An empty folder.
    """
    zero = folder / TAG / "zero"
    zero.mkdir(parents=True)
    save(_global_state(state), zero / "optimizer_state.pt")
    engine = _engine_state(state) | {"module": {}, "optimizer": None}
    # the name that stages 1 and 2 look for, and that of stage 3
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):
        save(engine, folder / TAG / name)
    (folder / "latest_universal").write_text(TAG)


def save(content: Any, path: Path) -> None:
    """torch.save.

    Raises:
        OSError: It cannot be written; torch reports a full disk as a RuntimeError of its zip writer.
    """
    with write_failures():
        torch.save(content, path)


@contextmanager
def write_failures() -> Iterator[None]:
    """Raise as OSError what torch raises where it cannot write."""
    try:
        yield
    except RuntimeError as error:
        if any(sign in str(error) for sign in ("PytorchStreamWriter", "inline_container")):
            raise OSError(" ".join(str(error).split())[:200]) from error
        raise


def _global_state(state: TrainingState) -> dict[str, Any]:
    """``param_groups`` and ``ds_version`` are read at stages 1 and 2, ``optimizer_state_dict`` at stage 3."""
    groups = state.hyperparameters
    return {
        **state.loss_scaler,
        "ds_version": _deepspeed_version(),
        "param_groups": groups,
        "optimizer_state_dict": {"state": {0: {"step": state.step}}, "param_groups": groups},
    }


def _engine_state(state: TrainingState) -> dict[str, Any]:
    own = {"dp_world_size": 1, "mp_world_size": 1, "ds_version": _deepspeed_version()}
    return state.trainer | state.counters | own


def _deepspeed_version() -> str:
    prepare_deepspeed()
    import deepspeed

    return str(deepspeed.__version__)


def write_one_file(state: TrainingState, path: Path, progress: Progress) -> None:
    """Write ``state`` as the plain file that one process and DDP load.  It is whole in memory."""
    content = {"state_dict": _weights(state, progress), "optimizer_states": [_adam(state)]}
    save(state.trainer | content, path)


def write_stage_zero(state: TrainingState, folder: Path, progress: Progress) -> None:
    """Write ``state`` as DeepSpeed's folder at stage 0, for any number of ranks.  It is whole in memory."""
    (folder / TAG).mkdir(parents=True)
    content = _engine_state(state) | {"module": _weights(state, progress), "optimizer": _adam(state)}
    save(content, folder / TAG / "mp_rank_00_model_states.pt")
    (folder / "latest").write_text(TAG)


def _weights(state: TrainingState, progress: Progress) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for name, tensor in state.tensors(WEIGHT):
        weights[name] = tensor
        progress(len(weights), len(state.shapes))
    shared = {name: weights[of] for name, of in state.aliases.items() if of in weights}  # not what is frozen
    return weights | shared


def _adam(state: TrainingState) -> dict[str, Any]:
    """torch's state dict of the optimizer over the same groups."""
    order = {name: index for index, name in enumerate(n for group in state.groups for n in group)}
    return {
        "state": {
            index: {"step": state.step.clone()}
            | {key: state.read(name, key) for key in state.keys_of(name) if key != WEIGHT}
            for name, index in order.items()
        },
        "param_groups": [
            settings | {"params": [order[name] for name in group]}
            for settings, group in zip(state.hyperparameters, state.groups, strict=True)
        ],
    }
