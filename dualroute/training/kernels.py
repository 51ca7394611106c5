"""What the attention of a run is computed with: train.kernels, and what its auto stands for here.

In: a configuration, later the module that is to be trained.  Here: a name that cannot be had is refused
before anything starts; where it is auto, on a GPU, the kernels are compared on the run's own shapes once the
ranks have met, so that all of them take what rank 0 has found.  Out: :mod:`dualroute.attention.backend`
knows.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
from typing import Any

import torch

from dualroute.attention import backend
from dualroute.attention.verification import Problem, problems_of
from dualroute.errors import UserError
from dualroute.model.kernel_choice import choose_kernels, in_turn
from dualroute.training.config import PretrainConfig
from dualroute.training.parallel.agreement import decided_by_rank_zero
from dualroute.training.step.module import Pretrain

log = logging.getLogger(__name__)


def device() -> torch.device:
    """What this process trains on."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def with_kernels(config: PretrainConfig) -> PretrainConfig:
    """With the attention's back end chosen for this process, and the environment's choice noted.

    Raises:
        UserError: It cannot be had here.
    """
    given = os.environ.get(backend.VARIABLE)
    kernels: Any = given or config.train.kernels
    try:
        backend.set_backend(kernels)
        backend.describe(device())
    except ValueError as error:
        source = backend.VARIABLE if given else "train.kernels"
        raise UserError(f"{source} is {kernels} and cannot be had here ({error}): use auto") from error
    return dataclasses.replace(config, train=dataclasses.replace(config.train, kernels=kernels))


def compare_kernels(config: PretrainConfig, module: Pretrain) -> bool:
    """Let auto stand for the fastest kernels that are right for ``module``, on every rank the same.

    Kernels that never end would hold up a run in which nothing watches yet: after watchdog.start_minutes this
    process ends, with a line that names them.

    Returns:
        Whether something was decided, so that what was written down of the kernels is out of date.
    """
    alarm = threading.Timer(60 * config.watchdog.start_minutes, _give_up, [config.watchdog.start_minutes])
    alarm.daemon = True
    alarm.start()
    try:
        return choose_kernels(problems_of_run(config, module), device(), decided_by_rank_zero) is not None
    finally:
        alarm.cancel()


def _give_up(minutes: float) -> None:
    which = f"the {in_turn[-1]} kernels" if in_turn else "rank 0"
    log.error(
        "%s",
        f"dualroute: the comparison of kernels has not ended after {minutes:g} minutes "
        f"(watchdog.start_minutes), and waits for {which}: choose others, for example "
        f"{backend.VARIABLE}=torch",
    )
    os._exit(2)


def problems_of_run(config: PretrainConfig, module: Pretrain) -> list[Problem]:
    """What the layers of the model, and of a teacher beside it, ask in this run."""
    how: dict[str, Any] = {"packed": True, "sequence_ranks": config.parallel.sequence_parallel}
    problems = problems_of(module.model, arithmetic(config.train.precision), config.data.context, **how)
    teacher = getattr(module, "teacher", None)
    if teacher is not None:
        problems += problems_of(teacher.model, teacher.weight.dtype, config.data.context, **how)
    return problems


def arithmetic(precision: str) -> torch.dtype:
    """The type of the rows that the attention gets under a train.precision."""
    return {"32": torch.float32, "16-mixed": torch.float16}.get(precision, torch.bfloat16)
