"""``dualroute pretrain``: from a configuration to a trained model in a run folder.

1. What can be wrong with the configuration is found before anything starts: data, batch arithmetic, heads,
   context (`check`).  It only reads.
2. The ranks meet, and rank 0 claims the run folder.  Only then a checkpoint in it is chosen, the same for all
   ranks, and compared with the configuration and with its own hashes.
3. Model, data module and callbacks are put together, and the state is loaded.  Nothing in the folder has
   changed so far, so a start that is refused leaves it as it was
   (:mod:`dualroute.training.checkpointing.publishing.first_write`).
4. The Trainer runs, to the end or until Slurm wants the nodes back
   (:mod:`dualroute.training.resilience.preemption`).

    OUTPUT/config.yaml      what was run, every value resolved
    OUTPUT/checkpoints/     see dualroute.model.checkpoint.folder
    OUTPUT/tensorboard/     event files
    OUTPUT/metrics.jsonl    the same figures, one JSON object a line
    OUTPUT/log.txt          what was said, with time and rank
    OUTPUT/rollbacks.json   data that were left out because training on them failed
    OUTPUT/heartbeats/      what each rank does at the moment; OUTPUT/stalls/ after a stall
    OUTPUT/published.json   there is a checkpoint, so a start that finds none asks where they are
    OUTPUT/.lock            held while a training runs (:mod:`dualroute.training.resilience.run_lock`)

The same command starts, resumes and finishes a run.  Run again when all is done, it
says so and does nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch

from dualroute.errors import UserError
from dualroute.log import to_file
from dualroute.model.checkpoint.format import (
    Checkpoint,
    find_checkpoint,
)
from dualroute.training.checkpointing.description import describe_run
from dualroute.training.checkpointing.resume import (
    check_start,
    choose_start,
    refuse_damaged,
    seen_here,
)
from dualroute.training.checkpointing.state.reshard import converted_states, remove_resharded, resumable_state
from dualroute.training.config import PretrainConfig
from dualroute.training.kernels import compare_kernels, device
from dualroute.training.monitoring import summary
from dualroute.training.parallel.agreement import all_succeed, decided_by_rank_zero, meet
from dualroute.training.parallel.strategy import shards_weights
from dualroute.training.prepare import Prepared, check, check_course
from dualroute.training.resilience import stop_signal
from dualroute.training.resilience.launcher import watch_launcher
from dualroute.training.resilience.preemption import stop_for_requeue
from dualroute.training.resilience.rollback import Divergence, divergence, leave_out, roll_back
from dualroute.training.resilience.run_lock import locked
from dualroute.training.step.allocator import keep_freed_memory
from dualroute.training.step.matmul import set_matmul_precision
from dualroute.training.step.module import Pretrain
from dualroute.training.step.spike_guard import TrainingDiverged
from dualroute.training.trainer import Parts, build_trainer

log = logging.getLogger(__name__)


def run_pretraining(config: PretrainConfig) -> int:
    """``dualroute pretrain``; for the result and the errors see :func:`run_training`."""
    return run_training(config, check)


def run_training(config: PretrainConfig, check: Callable[[Any], Prepared]) -> int:
    """Train, resume or recognise as finished; see the module's docstring.

    Args:
        config: What to run.
        check: Finds what is wrong with it, and says which module to train.

    Returns:
        The exit status: 0 when all steps are done, `PREEMPTED` when a signal ended the run earlier.

    Raises:
        UserError: Anything that the person who started it can mend.
    """
    watch_launcher()
    stop_signal.check_start()
    _quiet_lightning()
    if not torch.cuda.is_available():
        keep_freed_memory()
    prepared = check(config)
    config, world, output = prepared.config, prepared.world, prepared.output
    if prepared.finished:
        return _nothing_to_do(prepared)
    set_matmul_precision(config.train, on_cuda=torch.cuda.is_available())
    parts = build_trainer(prepared)
    meet(parts.trainer.strategy, world, config.watchdog.start_minutes)
    with contextlib.ExitStack() as claimed:
        decided_by_rank_zero(lambda: claimed.enter_context(locked(output, world)))
        prepared = _with_start(prepared)
        if prepared.finished:  # meanwhile, by another process
            return _nothing_to_do(prepared)
        while True:
            result = _fit(prepared, parts)
            if isinstance(result, int):
                return result
            del parts
            gc.collect()  # the model, the optimizer and the engine of the training that failed
            decided = roll_back(result, output, prepared.data, config.spike_guard.max_rollbacks)
            prepared = dataclasses.replace(prepared, start=decided.start, roll_back=decided)
            parts = build_trainer(prepared)


def _nothing_to_do(prepared: Prepared) -> int:
    checkpoint = prepared.start.checkpoint
    if prepared.world.rank == 0 and checkpoint is not None:
        _compare(checkpoint, prepared)
        refuse_damaged(checkpoint, digests=prepared.config.checkpoint.verify, together=False)
        early = checkpoint.step < prepared.total_steps
        said = "was stopped early" if early else f"has all {prepared.total_steps} steps"
        log.info("%s", f"{checkpoint.folder} {said}: nothing to do")
        log.info("%s", summary.what_comes_next(prepared.output, prepared.config, prepared.operation))
    return 0


def _with_start(prepared: Prepared) -> Prepared:
    """With the checkpoint that rank 0 finds in the folder which is now its own, compared with all there is.

    Raises:
        UserError: On every rank, as :func:`choose_start`, :func:`check_start` and :func:`refuse_damaged` do;
            or one rank does not see the folder that the others see.
    """
    config, output = prepared.config, prepared.output
    start = decided_by_rank_zero(lambda: choose_start(output, config.resume))
    all_succeed(lambda: seen_here(output, start.checkpoint))
    leave_out(prepared.data, output)
    checkpoint = start.checkpoint
    if checkpoint is not None:
        decided_by_rank_zero(lambda: _compare(checkpoint, prepared))
        refuse_damaged(checkpoint, digests=config.checkpoint.verify, together=True)
    if start.note and prepared.world.rank == 0:
        log.info("%s", start.note)
    prepared = dataclasses.replace(prepared, start=start)
    decided_by_rank_zero(lambda: check_course(prepared))
    return prepared


def _compare(checkpoint: Checkpoint, prepared: Prepared) -> None:
    """Raise UserError where ``checkpoint`` is of another model or other data."""
    config, fingerprint = prepared.config, prepared.data.fingerprint
    prepared.data.refuse_other_past(checkpoint.metadata, str(checkpoint.folder))
    data = {"fingerprint": fingerprint, "seed": config.seed, "context": config.data.context}
    check_start(checkpoint, config.model, data)


def _fit(prepared: Prepared, parts: Parts) -> int | Divergence:
    with to_file(prepared.output, prepared.world.rank, ready=lambda: parts.first_write.done):
        return _fit_from_start(prepared, parts)


def _fit_from_start(prepared: Prepared, parts: Parts) -> int | Divergence:
    """Train from ``prepared.start`` on: the exit status, or where the training became unusable."""
    config, world, trainer = prepared.config, prepared.world, parts.trainer
    first_write, checkpoint = parts.first_write, prepared.start.checkpoint
    first_write.resume, parts.publisher.lineage = checkpoint, prepared.start.lineage
    parts.publisher.described = describe_run(
        config, prepared.data, checkpoint, prepared.operation, prepared.teacher
    )
    trainer.fit_loop.epoch_loop.max_steps = prepared.total_steps  # known only now where it ends by tokens
    prepared = dataclasses.replace(prepared, sharded=shards_weights(trainer.strategy))
    module = prepared.make_module(prepared)
    if compare_kernels(config, module):
        parts.describe(config)
    if world.rank == 0:
        tell_start(prepared, module)
    folder, state = prepared.output / "checkpoints", None
    before = converted_states(folder)
    try:
        if checkpoint is not None:
            state = resumable_state(
                checkpoint,
                trainer,
                folder,
                precision=config.train.mixed_precision,
                timeout_minutes=config.parallel.timeout_minutes,
            )
            first_write.converted = state.parent
            if world.rank == 0:
                total = prepared.total_steps
                log.info("%s", f"resuming from {checkpoint.folder} (step {checkpoint.step} of {total})")
        with parts.watchdog:
            trainer.fit(
                module,
                datamodule=prepared.data,
                ckpt_path=state,
                weights_only=True,  # tensors and plain values: a checkpoint's code is not run
            )
    except TrainingDiverged as error:
        return divergence(error, module, prepared.data, trainer.global_step + 1)
    except UserError:
        if world.rank == 0 and not first_write.done:  # refused: what was converted for it goes too
            remove_resharded(folder, keep=before)
        raise
    if parts.preemption.signal:
        return stop_for_requeue(trainer, parts.preemption)
    if world.rank == 0:
        last = find_checkpoint(prepared.output)
        summary.tell(summary.what_was_trained(prepared.output, config, last, prepared.operation))
    return 0


def tell_start(prepared: Prepared, module: Pretrain) -> None:
    """Say what is about to be trained, and what of it may not be meant."""
    config, data, world, count = prepared.config, prepared.data, prepared.world, prepared.token_count
    lines = summary.what_is_trained(prepared.operation, module.model, config, data, world, count, device())
    summary.tell(lines)
    for level, line in prepared.remarks:
        log.log(level, "%s", line)
    resumed = prepared.start.checkpoint
    summary.warn(summary.warnings_at_start(config, data, world, count, resumed, prepared.operation))


def _quiet_lightning() -> None:
    """Keep advertisements and notes on devices off the terminal; warnings stay."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Lightning's own use of a torch API that is to be renamed, and its note on a fixed weights_only default
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # where Slurm is installed, a run beside it is a normal thing
    warnings.filterwarnings("ignore", message=".*`srun` command is available.*")
