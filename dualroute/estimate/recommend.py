"""Which settings of a run would fit a machine, or be faster on it.

In: an estimate, and the function that makes another one.  Here: ZeRO stages, offloading, sequence
parallelism, micro-batches and activation checkpointing are tried in all combinations that divide.  Next: one
line, with the options to give.

What moves to the host's memory costs traffic that no estimate counts, so it is taken only where nothing else
fits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

from dualroute.errors import UserError
from dualroute.estimate.config import EstimateConfig
from dualroute.training.memory.parts import GIB, zero_stage

if TYPE_CHECKING:
    from dualroute.estimate.command import Estimate

_FASTER = 0.97  # of the hours: less is no reason to change anything
_MOST_GPUS = 4096


@dataclass(frozen=True)
class Advice:
    """What to do.

    Attributes:
        line: In words.
        flags: Options to give besides; empty where nothing should change, or nothing would help.
        fits: Whether the run, with these flags, fits.
    """

    line: str
    flags: tuple[str, ...]
    fits: bool


def advise(config: EstimateConfig, now: Estimate, tried: Callable[[EstimateConfig], Estimate]) -> Advice:
    """Find the fastest settings that fit.

    Args:
        config: As it is.
        now: Its estimate.
        tried: Makes the estimate of another configuration with the same model.
    """
    best, smallest = _search(config, tried)
    if best is None:
        return _nothing_fits(config, smallest or now, tried)
    flags, found = best
    if now.fits and (not flags or found.hours > _FASTER * now.hours):
        return Advice("it fits, and no other division of the work is faster by these assumptions", (), True)
    words = " ".join(flags)
    hours = f"{found.hours:,.3g} hours, {found.memory.total / GIB:.1f} GiB a GPU"
    if now.fits:
        return Advice(
            f"it fits; faster by these assumptions ({hours} instead of {now.hours:,.3g}): {words}",
            flags,
            True,
        )
    return Advice(f"it does not fit as it is; with this it does ({hours}): {words}", flags, True)


Found = tuple[tuple[str, ...], "Estimate"]


def _search(
    config: EstimateConfig, tried: Callable[[EstimateConfig], Estimate]
) -> tuple[Found | None, Estimate | None]:
    """The fastest that fits, and the smallest of all."""
    best: Found | None = None
    smallest: Estimate | None = None
    rank: tuple[Any, ...] = ()
    for moved, flags, changed in _variants(config):
        try:
            found = tried(changed)
        except UserError:  # ranks, heads or the batch do not divide so
            continue
        if smallest is None or found.memory.total < smallest.memory.total:
            smallest = found
        order = (moved, round(found.hours, 6), len(flags), found.memory.total)
        if found.fits and (best is None or order < rank):
            best, rank = (flags, found), order
    return best, smallest


def _variants(config: EstimateConfig) -> Iterator[tuple[int, tuple[str, ...], EstimateConfig]]:
    """(what moves to the host, flags, configuration)."""
    stage = zero_stage(config, config.gpus)
    stages: list[int | None] = [stage]
    if config.gpus > 1 and config.parallel.strategy in ("auto", "deepspeed"):
        stages = [1, 2, 3] if config.parallel.zero_hpz_partition_size == 1 else [3]
    sequence = [ranks for ranks in (1, 2, 4, 8) if config.gpus % ranks == 0]
    batches = sorted({config.train.micro_batch, 1, 2, 4, 8, 16})
    again = ("none", "feed_forward", "full")
    for of_stage, ranks, batch, activations, moved in product(stages, sequence, batches, again, (0, 1, 2)):
        if config.train.tokens_per_batch % (config.data.context * batch * (config.gpus // ranks)):
            continue
        if moved and (of_stage is None or of_stage == 0 or (moved == 2 and of_stage != 3)):
            continue
        parallel: dict[str, Any] = {
            "zero_stage": config.parallel.zero_stage if of_stage == stage else of_stage,
            "sequence_parallel": ranks,
            "offload_optimizer": moved > 0,
            "offload_parameters": moved > 1,
        }
        train: dict[str, Any] = {"micro_batch": batch, "activation_checkpointing": activations}
        flags = (*_flags("train", config.train, train), *_flags("parallel", config.parallel, parallel))
        if train["activation_checkpointing"] == "none" and config.train.recompute_every_layers > 1:
            train["recompute_every_layers"] = 1
        changed = dataclasses.replace(
            config,
            train=dataclasses.replace(config.train, **train),
            parallel=dataclasses.replace(config.parallel, **parallel),
        )
        yield moved, flags, changed


def _flags(section: str, before: Any, after: dict[str, Any]) -> Iterator[str]:
    for name, value in after.items():
        if getattr(before, name) != value:
            yield f"--{section}.{name} {str(value).lower() if isinstance(value, bool) else value}"


def _nothing_fits(
    config: EstimateConfig, smallest: Estimate, tried: Callable[[EstimateConfig], Estimate]
) -> Advice:
    memory = smallest.memory
    parts = {name: value for name, value in vars(memory).items() if value}
    largest, size = max(parts.items(), key=lambda part: part[1])
    what = (
        f"nothing that was tried fits into {config.gpu_memory:g} GiB: the least is "
        f"{memory.total / GIB:.1f} GiB, of which {size / GIB:.1f} GiB are {largest.replace('_', ' ')}"
    )
    gpus = config.gpus * 2
    while gpus <= _MOST_GPUS:
        more = dataclasses.replace(config, gpus=gpus)
        found, _ = _search(more, tried)
        if found is not None:
            flags = (f"--gpus {gpus}", *found[0])
            return Advice(f"{what}; {gpus} GPUs would do: {' '.join(flags)}", flags, False)
        gpus *= 2
    return Advice(f"{what}; take GPUs with more memory, a smaller model or a shorter data.context", (), False)
