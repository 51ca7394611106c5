"""Who am I among the processes of this training, and where do they meet?

- In: the variables that a launcher leaves in the environment.  `deepspeed` and `torchrun` export RANK,
  WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; `srun` exports SLURM_PROCID, SLURM_NTASKS and kin.
- Here: :func:`detect_world` turns them into one :class:`World`, before any Trainer exists (the command line
  derives gradient accumulation from ``world_size``); :class:`DualRouteEnvironment` tells Lightning the same.
- Next: ``training/parallel/strategy.py`` builds the strategy for that world.

Lightning would choose a different environment class for each launcher, and the one it
picks under `deepspeed` reads NODE_RANK, which that launcher never sets.  One class for all of them is right
on several nodes too.  A process that merely sits inside a Slurm allocation (the batch script itself, an
interactive shell) was not started by `srun` and is therefore one process on its own.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch.distributed
from lightning.fabric.plugins.environments import ClusterEnvironment, SLURMEnvironment

from dualroute.errors import UserError
from dualroute.training.parallel.slurm_port import can_listen, ports_of_job

Launcher = Literal["none", "deepspeed", "torchrun", "environment", "slurm"]

_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_RENDEZVOUS_VARIABLES = ("MASTER_ADDR", "MASTER_PORT")
_SLURM_VARIABLES = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_NNODES", "SLURM_NODEID")
# Slurm numbers the steps that no `srun` started from the top of 32 bits: interactive, batch, extern, pending.
_FIRST_RESERVED_SLURM_STEP = 0xFFFFFFFA
_INTERACTIVE_JOBS = ("bash", "interactive")


@dataclass(frozen=True)
class World:
    """The processes of one training, as one of them sees them.

    ``rank`` and ``local_rank`` count from 0; ``main_address``/``main_port`` are where rank 0 listens
    (``main_port`` 0: no launcher chose one, a free port of this machine will do).
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    num_nodes: int = 1
    launcher: Launcher = "none"
    node_rank: int = 0
    main_address: str = "127.0.0.1"
    main_port: int = 0

    @property
    def local_world_size(self) -> int:
        """Processes per node; every node has as many (anything else was refused by detect_world)."""
        return self.world_size // self.num_nodes


def detect_world(environ: Mapping[str, str] | None = None) -> World:
    """Reads the launcher's variables; does not open a connection and needs no Trainer.

    Order: RANK/WORLD_SIZE/LOCAL_RANK (deepspeed, torchrun, set by hand), then a step of `srun`, then one
    process alone.  Raises UserError when variables are half set, are not numbers, or contradict each other.
    """
    environ = os.environ if environ is None else environ
    if any(name in environ for name in _RANK_VARIABLES):
        return _from_rank_variables(environ)
    if _started_by_srun(environ):
        return _from_slurm(environ)
    return World()


def refuse_forgotten_srun(world: World, environ: Mapping[str, str] | None = None) -> None:
    """Refuse to train alone in a job that was given several tasks: `python` where `srun python` was meant.

    An interactive job (``salloc``, ``srun --pty bash``) holds its tasks for what will be tried in it, so
    there one process is one process; Lightning tells them by the same names.

    Raises:
        UserError: Naming the tasks of the job and what starts them.
    """
    environ = os.environ if environ is None else environ
    if world.launcher != "none" or "SLURM_JOB_ID" not in environ:
        return
    if environ.get("SLURM_JOB_NAME", "") in _INTERACTIVE_JOBS:
        return
    tasks = _job_tasks(environ)
    if tasks > 1:
        raise UserError(
            f"this job has {tasks} tasks (SLURM_NTASKS) and this process was not started by srun, so it "
            f"would train alone beside {tasks - 1} idle ones: start it with srun (srun python "
            f"launch/pretrain.py …), or one process on purpose with srun --ntasks=1"
        )


def _job_tasks(environ: Mapping[str, str]) -> int:
    """Tasks of the whole job; 1 where Slurm says nothing that can be read."""

    def number(name: str) -> int:
        text = environ.get(name, "")
        return int(text) if text.isdigit() else 1

    if "SLURM_NTASKS" in environ or "SLURM_NPROCS" in environ:
        return max(number("SLURM_NTASKS"), number("SLURM_NPROCS"))
    return number("SLURM_NTASKS_PER_NODE") * number("SLURM_NNODES")


def strip_local_rank(argv: Sequence[str]) -> list[str]:
    """``argv`` without the ``--local_rank=N`` that the deepspeed launcher appends; LOCAL_RANK says the same.

    Knows ``--local_rank=N``, ``--local-rank=N`` and the two-word form of older torch launchers.
    """
    kept: list[str] = []
    words = iter(argv)
    for word in words:
        if word in ("--local_rank", "--local-rank"):
            next(words, None)
        elif not re.fullmatch(r"--local[_-]rank=\d+", word):
            kept.append(word)
    return kept


class DualRouteEnvironment(ClusterEnvironment):
    """Lightning's view of a :class:`World`; the launcher has started all processes already."""

    def __init__(self, world: World | None = None) -> None:
        super().__init__()
        self.world = detect_world() if world is None else world
        self._main_port = self.world.main_port

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        return self.world.main_address

    @property
    def main_port(self) -> int:
        if self._main_port == 0:
            self._main_port = _free_port()
        return self._main_port

    @staticmethod
    def detect() -> bool:
        return detect_world().launcher != "none"

    def world_size(self) -> int:
        return self.world.world_size

    def set_world_size(self, size: int) -> None:
        """Nothing to set: the launcher decided."""

    def global_rank(self) -> int:
        return self.world.rank

    def set_global_rank(self, rank: int) -> None:
        """Nothing to set: the launcher decided."""

    def local_rank(self) -> int:
        return self.world.local_rank

    def node_rank(self) -> int:
        return self.world.node_rank

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Called by Lightning before the processes meet: the Trainer's numbers, then rank 0's port.

        Raises UserError if ``devices`` x ``num_nodes`` is not the launcher's world, or the port is taken.
        """
        if num_devices != self.world.local_world_size or num_nodes != self.world.num_nodes:
            raise UserError(
                f"the Trainer has devices={num_devices} and num_nodes={num_nodes}, but {self.world.launcher} "
                f"started {self.world.local_world_size} process(es) on each of {self.world.num_nodes} "
                "node(s): make both the same"
            )
        if not torch.distributed.is_initialized():
            check_port(self.world)


def check_port(world: World) -> None:
    """Raises UserError if rank 0 could not listen on ``world.main_port``; the other ranks check nothing.

    torchrun has bound the port itself (its own store serves it), so there it must be in use.
    """
    if world.rank != 0 or world.world_size == 1 or world.launcher == "torchrun" or world.main_port == 0:
        return
    if (error := can_listen(world.main_port)) is not None:
        remedy = {
            "deepspeed": "start with `deepspeed --master_port N`",
            "slurm": "export MASTER_PORT=N before srun",
        }.get(world.launcher, "set MASTER_PORT=N")
        raise UserError(
            f"port {world.main_port} (MASTER_PORT), where rank 0 should listen, cannot be used on this "
            f"machine ({error.strerror}): another training may be running; {remedy} with a free port N"
        )


def _from_rank_variables(environ: Mapping[str, str]) -> World:
    _require_all(environ, _RANK_VARIABLES)
    rank, world_size, local_rank = (_number(environ, name) for name in _RANK_VARIABLES)
    if not 0 <= rank < world_size:
        raise UserError(
            f"RANK={rank} is not below WORLD_SIZE={world_size}: start all ranks with the same WORLD_SIZE"
        )
    if world_size > 1:
        _require_all(environ, _RANK_VARIABLES + _RENDEZVOUS_VARIABLES)
    launcher: Launcher = "environment"
    local_size_name = "LOCAL_WORLD_SIZE"
    node_rank_name = "GROUP_RANK"
    if "TORCHELASTIC_RUN_ID" in environ:
        launcher = "torchrun"
    elif "CROSS_RANK" in environ:
        launcher, local_size_name, node_rank_name = "deepspeed", "LOCAL_SIZE", "CROSS_RANK"
    local_size = _number(environ, local_size_name) if local_size_name in environ else world_size
    num_nodes = _nodes(world_size, local_size, f"{local_size_name}={local_size}")
    node_rank = _number(environ, node_rank_name) if node_rank_name in environ else rank // local_size
    if local_rank >= local_size:
        raise UserError(
            f"LOCAL_RANK={local_rank} is not below {local_size_name}={local_size}, the processes of this "
            "node: the launcher's variables contradict each other"
        )
    return World(
        rank=rank,
        local_rank=local_rank,
        world_size=world_size,
        num_nodes=num_nodes,
        launcher=launcher,
        node_rank=node_rank,
        main_address=environ.get("MASTER_ADDR", "127.0.0.1"),
        main_port=_port(environ) if "MASTER_PORT" in environ else 0,
    )


def _started_by_srun(environ: Mapping[str, str]) -> bool:
    step = environ.get("SLURM_STEP_ID", environ.get("SLURM_STEPID", ""))
    return step.isdigit() and int(step) < _FIRST_RESERVED_SLURM_STEP


def _from_slurm(environ: Mapping[str, str]) -> World:
    # A step may use fewer tasks and nodes than its job; srun writes the step's numbers beside the job's.
    step = dict(environ)
    for name, of_step in (("SLURM_NTASKS", "SLURM_STEP_NUM_TASKS"), ("SLURM_NNODES", "SLURM_STEP_NUM_NODES")):
        if of_step in environ:
            step[name] = environ[of_step]
    _require_all(step, _SLURM_VARIABLES)
    rank, local_rank, world_size, num_nodes, node_rank = (_number(step, name) for name in _SLURM_VARIABLES)
    if world_size % num_nodes:
        raise UserError(
            f"srun started {world_size} tasks on {num_nodes} nodes, not the same number on each: "
            "use --ntasks-per-node instead of --ntasks"
        )
    return World(
        rank=rank,
        local_rank=local_rank,
        world_size=world_size,
        num_nodes=num_nodes,
        launcher="slurm",
        node_rank=node_rank,
        main_address=environ.get("MASTER_ADDR") or _slurm_main_address(environ, num_nodes),
        main_port=_port(environ) if "MASTER_PORT" in environ else next(ports_of_job(step)),
    )


def _slurm_main_address(environ: Mapping[str, str], num_nodes: int) -> str:
    """The first node of the step, where Slurm puts rank 0."""
    if num_nodes == 1:
        return "127.0.0.1"
    names = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or ""
    host = SLURMEnvironment.resolve_root_node_address(names)  # "node[03-07,9]" -> "node03"
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        raise UserError(
            f"the first node of SLURM_JOB_NODELIST={names!r}, {host!r}, has no address here: "
            "export MASTER_ADDR=<address of that node> before srun"
        ) from None
    return host


def _require_all(environ: Mapping[str, str], names: Sequence[str]) -> None:
    missing = [name for name in names if name not in environ]
    if missing:
        present = [f"{name}={environ[name]}" for name in names if name in environ]
        raise UserError(
            f"{', '.join(present)} set but {', '.join(missing)} missing: start with deepspeed, torchrun or "
            f"srun, which set all of them, or unset {', '.join(name.split('=')[0] for name in present)}"
        )


def _number(environ: Mapping[str, str], name: str) -> int:
    value = environ[name].strip()
    if not value.isdigit():
        raise UserError(f"{name}={environ[name]!r} is not a number: the launcher should have set it")
    return int(value)


def _port(environ: Mapping[str, str]) -> int:
    port = _number(environ, "MASTER_PORT")
    if not 0 < port < 65536:
        raise UserError(f"MASTER_PORT={port} is not a port: choose one between 1024 and 65535")
    return port


def _nodes(world_size: int, local_size: int, named: str) -> int:
    if local_size < 1 or world_size % local_size:
        raise UserError(
            f"WORLD_SIZE={world_size} is not a multiple of {named}: "
            "give every node the same number of processes"
        )
    return world_size // local_size


def _free_port() -> int:
    with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
