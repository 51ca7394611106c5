"""What a checkpoint costs each rank: bytes by counting, seconds by assumption.

In: the size of a model, the ranks, and what a machine's parts are assumed to do (:class:`Machine`).  Here:
:func:`checkpoint_cost` counts what ``publisher.py``, ``divided_check.py`` and ``reshard.py`` write, hash
and read (``tests/training/checkpointing/publishing/test_shares.py`` compares it with what ranks have
counted).  Next: ``benchmarks/training/checkpoint_scale.py`` prints a table.  Needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

STATE_BYTES = 12  #: a parameter: a float32 weight and two float32 moments


@dataclass(frozen=True)
class Machine:
    """Assumed rates, bytes a second.

    Attributes:
        rank_io: One rank to or from the shared file system.
        total_io: All ranks together.
        hashing: sha256 on one core.
        to_host: One GPU to pinned memory.
        gathering: What one rank receives while whole weights are gathered under ZeRO-3.
    """

    rank_io: float = 1e9
    total_io: float = 100e9
    hashing: float = 1.5e9
    to_host: float = 20e9
    gathering: float = 25e9


@dataclass(frozen=True)
class CheckpointCost:
    """Bytes are those of the rank with most to do; seconds are estimates.

    Attributes:
        total: Bytes of the checkpoint.
        written: Bytes that a rank writes; it hashes the same.
        loaded: Bytes of the state that a rank loads at a resume, whatever the number of ranks that wrote it.
        read: Bytes that a rank reads at a resume: its share to compare the hashes, and what it loads.
        save_seconds: From the step boundary until the checkpoint is published.
        stall_seconds: How long training stands still for that with ``checkpoint.asynchronous``.
        resume_seconds: To compare and to load.
    """

    total: float
    written: float
    loaded: float
    read: float
    save_seconds: float
    stall_seconds: float
    resume_seconds: float


def checkpoint_cost(
    parameters: float,
    ranks: int,
    *,
    zero_stage: int = 3,
    weight_bytes: int = 2,
    machine: Machine | None = None,
) -> CheckpointCost:
    """What one checkpoint of a training costs.

    Args:
        parameters: Of the model.
        ranks: Processes.
        zero_stage: 1 to 3: partitions; 0, which stands for DDP too: a whole state on every rank.
        weight_bytes: A parameter of ``model.safetensors``: 4 with ``train.precision 32``.
        machine: What is assumed.
    """
    machine = machine or Machine()
    state, weights = STATE_BYTES * parameters, weight_bytes * parameters
    total = state + weights
    loaded = state / ranks if zero_stage else state
    written = loaded + weights / ranks
    compared = total / ranks
    gathered = weights / machine.gathering if zero_stage == 3 and ranks > 1 else 0.0
    io = max(written / machine.rank_io, total / machine.total_io)
    read = compared + loaded
    all_read = total + loaded * ranks
    return CheckpointCost(
        total=total,
        written=written,
        loaded=loaded,
        read=read,
        save_seconds=gathered + written / machine.hashing + io,
        stall_seconds=gathered + written / machine.to_host,
        resume_seconds=compared / machine.hashing + max(read / machine.rank_io, all_read / machine.total_io),
    )
