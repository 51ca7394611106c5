"""A saved training state, read parameter by parameter, whatever the layout that it was saved in.

In: the ``state.ckpt`` of a checkpoint: one file (one process, DDP), DeepSpeed's file at stage 0, or its
partitions at stages 1 to 3.  Here: :func:`open_state` gives every parameter's master weight and the moments
of AdamW or Muon by name, whole or any elements of it, and the trainer's own state.  Files are mapped, and
those of partitions only where they are asked for, so a rank that needs a hundredth of a state reads a
hundredth. Next: ``reshard.py`` resumes from them, ``writer.py`` writes them in another layout,
``commands.py`` as plain weights.

No code of a checkpoint is run (``training/checkpointing/state/safe_load.py``).
"""

from __future__ import annotations

import math
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dualroute.errors import UserError
from dualroute.model.checkpoint.folder import Checkpoint
from dualroute.model.checkpoint.tree_hash import TRAFFIC
from dualroute.training.checkpointing.state.layout import StateLayout
from dualroute.training.checkpointing.state.safe_load import load_deepspeed_file, load_file

WEIGHT = "fp32"  #: key of the weight that the optimizer steps: float32 under ZeRO, else the parameter itself
_MOMENTS = ("exp_avg", "exp_avg_sq")
KEYS = (WEIGHT, *_MOMENTS)
PARAMETER_NAMES = "parameter_names"  #: in the trainer's state: names in the order of the optimizer's groups

IN_PARTITIONS = "weights_in_partitions"
"""In DeepSpeed's file of model states: the weights that are missing there are those of the partitions."""

# Read pages of a mapped file count as memory of the process until it is unmapped.
_REMAP_BYTES = 256 * 2**20

# Keys that DeepSpeed, or ``publishing/capture.py``, adds to the trainer's state.
_ENGINE_KEYS = frozenset(
    "module buffer_names optimizer param_shapes frozen_param_shapes shared_params frozen_param_fragments "
    "lr_scheduler data_sampler random_ltd skipped_steps global_steps global_samples dp_world_size "
    "mp_world_size checkpoint_parallel_dimensions ds_config ds_version universal_checkpoint_info".split()
) | {IN_PARTITIONS}


class TrainingState(ABC):
    """One saved state.

    Attributes:
        folder: Where it lies, for messages.
        trainer: The Trainer's own state: loops, data position, guard.
        shapes: {name: shape} of every parameter, in the optimizer's order.
        hyperparameters: Settings of the optimizer's groups (learning rate, weight decay, …).
        aliases: {name: name of the parameter that it shares}.
        step: The optimizer's own count of taken steps, 0-dim.
        loss_scaler: DeepSpeed's fp16 loss scaler, where it has one that changes.
    """

    folder: Path
    trainer: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    hyperparameters: list[dict[str, Any]]
    aliases: dict[str, str]
    step: Tensor
    loss_scaler: dict[str, Any]

    def read(self, name: str, key: str) -> Tensor:
        """One of KEYS of one parameter, whole, on the CPU."""
        shape = self.shapes[name]
        return self.read_range(name, key, 0, math.prod(shape)).view(shape)

    @abstractmethod
    def read_range(self, name: str, key: str, start: int, count: int) -> Tensor:
        """``count`` elements of it from ``start`` on, as they lie in memory: (count,)."""

    def places(self) -> dict[str, list[list[int]]] | None:
        """Where parameters lie in the files, if that takes all of the files to know; see
        :func:`open_state`."""
        return None

    @abstractmethod
    def keys_of(self, name: str) -> tuple[str, ...]:
        """Those of KEYS that a parameter has: Muon keeps no squares."""

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """Of the WEIGHT of a parameter."""

    def tensors(self, key: str) -> Iterator[tuple[str, Tensor]]:
        """Every parameter's ``key`` in order, one in memory at a time."""
        for name in self.shapes:
            yield name, self.read(name, key)

    @property
    def counters(self) -> dict[str, int]:
        """DeepSpeed's counters of the step that this state was taken at."""
        skipped = int(self.trainer["global_step"]) - int(self.step)
        return {"global_steps": int(self.trainer["global_step"]), "skipped_steps": max(skipped, 0)}

    @property
    def groups(self) -> list[list[str]]:
        """Names by group of the optimizer.

        Raises:
            UserError: An earlier version wrote the state, and did not note them.
        """
        names = self.trainer.get(PARAMETER_NAMES)
        if names is None:
            raise UserError(
                f"{self.folder} does not say which parameter is which in the optimizer's state: an earlier "
                f"version wrote it; continue it with the layout that it has"
            )
        return names

    def _take_hyperparameters(self, param_groups: list[dict[str, Any]]) -> None:
        self.hyperparameters = [{k: v for k, v in group.items() if k != "params"} for group in param_groups]

    def _check_adam(self, state: dict[Any, dict[str, Any]]) -> None:
        known = ({"step", *_MOMENTS}, {"step", "exp_avg"})
        if other := [entry for entry in state.values() if set(entry) not in known]:
            raise UserError(
                f"{self.folder} holds optimizer state {sorted(map(str, other[0]))}; only that of AdamW "
                f"(step, exp_avg, exp_avg_sq) and Muon (step, exp_avg) can be cut up otherwise: continue it "
                f"with the layout that it has"
            )
        steps = {float(entry["step"]) for entry in state.values()}
        if len(steps) != 1:
            raise UserError(
                f"{self.folder}: the optimizer counts {sorted(steps)} steps for different parameters; such a "
                f"state cannot be cut up otherwise: continue it with the layout that it has"
            )
        self.step = next(iter(state.values()))["step"].clone()


class OneFileState(TrainingState):
    """A state that one file holds whole: plain, or DeepSpeed's at stage 0."""

    def __init__(self, folder: Path, path: Path, weights: str, optimizer: str) -> None:
        self.folder = folder
        content = _load(path)
        self.trainer = {k: v for k, v in content.items() if k not in _ENGINE_KEYS | {weights, optimizer}}
        state = content[optimizer][0] if isinstance(content[optimizer], list) else content[optimizer]
        if not isinstance(state, dict) or {"state", "param_groups"} - state.keys():
            raise UserError(f"{path} holds 16-bit weights of DeepSpeed stage 0, which fit this layout only")
        self._take_hyperparameters(state["param_groups"])
        self._check_adam(state["state"])
        self._adam = state
        self._weights: dict[str, Tensor] = content[weights]
        places: dict[int, str] = {}
        for name, tensor in self._weights.items():
            places.setdefault(tensor.data_ptr(), name)
        names = [name for group in self.trainer.get(PARAMETER_NAMES, [places.values()]) for name in group]
        self.shapes = {name: tuple(self._weights[name].shape) for name in names}
        self.aliases = {
            name: places[tensor.data_ptr()]
            for name, tensor in self._weights.items()
            if name not in self.shapes and tensor.data_ptr() in places
        }
        self.loss_scaler = {}

    def read_range(self, name: str, key: str, start: int, count: int) -> Tensor:
        whole = self._weights[name] if key == WEIGHT else self._moments[name][key]
        TRAFFIC.add(read=count * whole.itemsize)
        return whole.reshape(-1)[start : start + count]

    @cached_property
    def _moments(self) -> dict[str, dict[str, Tensor]]:
        order = [index for group in self._adam["param_groups"] for index in group["params"]]
        names = [name for group in self.groups for name in group]
        return {name: self._adam["state"][index] for name, index in zip(names, order, strict=True)}

    def keys_of(self, name: str) -> tuple[str, ...]:
        return _keys(self._moments[name])

    def dtype(self, name: str) -> torch.dtype:
        return self._weights[name].dtype


class PartitionedState(TrainingState):
    """DeepSpeed's partitions at stages 1 to 3; subclasses know where a parameter's pieces lie."""

    def __init__(self, folder: Path, ranks: int) -> None:
        self.folder = folder
        model_files = sorted(folder.glob("*_model_states.pt"), key=_rank)
        self._files = sorted(folder.glob("*_optim_states.pt"), key=_rank)
        if not model_files or len(self._files) != ranks:
            raise UserError(
                f"{folder} has {len(self._files)} files *_optim_states.pt, but {ranks} rank(s) wrote it: "
                f"some are missing; use another checkpoint"
            )
        model = _load(model_files[0])
        self.trainer = {k: v for k, v in model.items() if k not in _ENGINE_KEYS}
        self.aliases = dict(model["shared_params"] or {})
        self.shapes = {n: tuple(shape) for group in model["param_shapes"] for n, shape in group.items()}
        self._sub_groups: list[dict[str, Any]] = model["param_shapes"]
        self._mapped: dict[int, dict[str, Any]] = {}
        self._bytes_mapped = 0
        first = self._optimizer(0)
        scaler = first.get("loss_scaler")
        changes = bool(first.get("dynamic_loss_scale"))
        self.loss_scaler = {"loss_scaler": scaler, "dynamic_loss_scale": True} if changes else {}
        moments = self._base(first)["state"]
        self._check_adam(moments)
        self._keys_by_group = {group: _keys(entry) for group, entry in moments.items()}
        self._take_hyperparameters(self._base(first)["param_groups"])

    def _optimizer(self, rank: int) -> dict[str, Any]:
        """The optimizer state of one of the ranks that wrote."""
        if rank not in self._mapped:
            self._mapped[rank] = _load(self._files[rank])["optimizer_state_dict"]
        return self._mapped[rank]

    def read_range(self, name: str, key: str, start: int, count: int) -> Tensor:
        if self._bytes_mapped > _REMAP_BYTES:
            self._mapped.clear()
            self._bytes_mapped = 0
        found = torch.empty(count, dtype=torch.float32)
        position = filled = 0  # in the parameter; of what is wanted
        for rank, group, offset, elements in self._pieces(name):
            first, last = max(start, position), min(start + count, position + elements)
            if first < last:
                optimizer = self._optimizer(rank)
                flat = (
                    optimizer[self._WEIGHTS][group]
                    if key == WEIGHT
                    else self._base(optimizer)["state"][group][key]
                )
                found[first - start : last - start] = flat.narrow(0, offset + first - position, last - first)
                filled += last - first
            position += elements
        whole = math.prod(self.shapes[name])
        if filled != count or position != whole:
            raise UserError(f"{self.folder}: {name} has {whole:,} elements and the files hold {position:,}")
        self._bytes_mapped += found.nbytes
        TRAFFIC.add(read=found.nbytes)
        return found

    def keys_of(self, name: str) -> tuple[str, ...]:
        _, group, _, _ = next(iter(self._pieces(name)))
        return self._keys_by_group[group]

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    _WEIGHTS: str

    @abstractmethod
    def _base(self, optimizer: dict[str, Any]) -> dict[str, Any]:
        """torch's own optimizer state of one rank."""

    @abstractmethod
    def _pieces(self, name: str) -> Iterator[tuple[int, int, int, int]]:
        """(rank, flat group, start, elements) of a parameter's pieces, in order."""


class Zero12State(PartitionedState):
    """Stages 1 and 2: groups laid end to end and cut into equal parts; each rank notes what fell to it."""

    _WEIGHTS = "single_partition_of_fp32_groups"
    known_places: dict[str, list[list[int]]] | None = None

    def _base(self, optimizer: dict[str, Any]) -> dict[str, Any]:
        return optimizer["base_optimizer_state"]

    def _pieces(self, name: str) -> Iterator[tuple[int, int, int, int]]:
        return ((rank, group, start, elements) for rank, group, start, elements in self._places.get(name, ()))

    def places(self) -> dict[str, list[list[int]]]:
        return self._places

    @cached_property
    def _places(self) -> dict[str, list[list[int]]]:
        if self.known_places is not None:
            return self.known_places
        found: dict[str, list[list[int]]] = {}
        for rank in range(len(self._files)):
            for group, mapping in enumerate(self._optimizer(rank)["param_slice_mappings"]):
                for name, fragment in mapping.items():
                    found.setdefault(name, []).append([rank, group, fragment.start, fragment.numel])
        return found


class Zero3State(PartitionedState):
    """Stage 3: every parameter cut into equal parts, the last one padded; a group's parts laid end to end."""

    _WEIGHTS = "fp32_flat_groups"

    def _base(self, optimizer: dict[str, Any]) -> dict[str, Any]:
        return optimizer["optimizer_state_dict"]

    @cached_property
    def _places(self) -> dict[str, tuple[int, int, int]]:
        """{name: flat group, start, elements of one part}."""
        found = {}
        for group, shapes in enumerate(self._sub_groups):
            start = 0
            for name in shapes:
                part = -(-math.prod(self.shapes[name]) // len(self._files))
                found[name] = (group, start, part)
                start += part
        return found

    def _pieces(self, name: str) -> Iterator[tuple[int, int, int, int]]:
        group, start, part = self._places[name]
        left = math.prod(self.shapes[name])
        for rank in range(len(self._files)):
            count = max(0, min(part, left))
            left -= count
            yield rank, group, start, count


def open_state(checkpoint: Checkpoint, places: dict[str, list[list[int]]] | None = None) -> TrainingState:
    """The training state of ``checkpoint``.

    Args:
        checkpoint: What is read.
        places: What :meth:`TrainingState.places` has told another rank; else all files are looked into.

    Raises:
        UserError: It has none, it cannot be read, or it is not AdamW's or Muon's.
    """
    layout = StateLayout.read(checkpoint)
    folder = checkpoint.state / "checkpoint"
    if layout.stage is None:
        return OneFileState(checkpoint.state, checkpoint.state, "state_dict", "optimizer_states")
    if layout.stage == 0:
        return OneFileState(folder, folder / "mp_rank_00_model_states.pt", "module", "optimizer")
    if layout.stage == 3:
        return Zero3State(folder, layout.ranks)
    state = Zero12State(folder, layout.ranks)
    state.known_places = places
    return state


def _keys(moments: Collection[str]) -> tuple[str, ...]:
    return (WEIGHT, *(key for key in _MOMENTS if key in moments))


def _rank(path: Path) -> int:
    match = re.search(r"zero_pp_rank_(\d+)_", path.name)
    return int(match[1]) if match else 0


def prepare_deepspeed() -> None:
    """Import DeepSpeed so that it takes the CPU where there is no GPU.

    Raises:
        UserError: It is not installed.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed  # noqa: F401
    except ImportError as error:
        raise UserError("this needs DeepSpeed: pip install -e '.[deepspeed]'") from error


def _load(path: Path) -> dict[str, Any]:
    if path.suffix == ".pt":
        prepare_deepspeed()
        content = load_deepspeed_file(path, mmap=True)
    else:
        content = load_file(path, mmap=True)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no table of values: use another checkpoint")
    return content
