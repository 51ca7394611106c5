"""``dualroute pretrain``: from a configuration to a trained model in a run folder.

1. Everything that can be wrong is found before anything starts: data, batch arithmetic, heads, context,
   folder, checkpoint (`check`).
2. Model, data module, callbacks and Trainer are put together for this process's place in the world.
3. The Trainer runs, to the end or until Slurm wants the nodes back
   (:mod:`dualroute.training.resilience.preemption`).

    OUTPUT/config.yaml      what was run, every value resolved
    OUTPUT/checkpoints/     see dualroute.model.checkpoint_format
    OUTPUT/tensorboard/     event files
    OUTPUT/metrics.jsonl    the same figures, one JSON object a line
    OUTPUT/rollbacks.json   data that were left out because training on them failed
    OUTPUT/heartbeats/      what each rank does at the moment; OUTPUT/stalls/ after a stall
    OUTPUT/.lock            held while a training runs (:mod:`dualroute.training.resilience.run_lock`)

The same command starts, resumes and finishes a run.  Run again when all is done, it
says so and does nothing.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DeepSpeedStrategy

from dualroute import compat
from dualroute.attention import backend
from dualroute.data.module import ShardDataModule
from dualroute.data.plan import derive_accumulation
from dualroute.data.tokenizer import Tokenizer
from dualroute.errors import UserError, one_line
from dualroute.files import write_bytes_atomically
from dualroute.model import DualRoutingTransformer, ModelConfig
from dualroute.model.checkpoint_format import (
    CONFIG,
    TOKENIZER,
    Checkpoint,
    find_checkpoint,
    load_model,
    refuse_quantized,
)
from dualroute.paths import absolute_paths
from dualroute.training.checkpointing.description import describe_run
from dualroute.training.checkpointing.publisher import CheckpointPublisher
from dualroute.training.checkpointing.reshard import resumable_state
from dualroute.training.checkpointing.resume import choose_resume, set_aside_newer
from dualroute.training.checkpointing.resumed_settings import refuse_changes
from dualroute.training.config import PretrainConfig
from dualroute.training.initial_model import with_given
from dualroute.training.monitoring import summary
from dualroute.training.monitoring.monitor import Monitor
from dualroute.training.monitoring.progress import Progress
from dualroute.training.parallel.environment import World, check_port, detect_world, refuse_forgotten_srun
from dualroute.training.parallel.sequence import check_sequence_parallel
from dualroute.training.parallel.strategy import build_strategy
from dualroute.training.resilience.corruption_check import CorruptionCheck
from dualroute.training.resilience.preemption import Preemption, leave_signals_to_us, stop_for_requeue
from dualroute.training.resilience.rollback import Divergence, divergence, leave_out, roll_back
from dualroute.training.resilience.run_lock import locked
from dualroute.training.resilience.watchdog import Watchdog
from dualroute.training.step.activations import keep_fewer_activations
from dualroute.training.step.allocator import keep_freed_memory
from dualroute.training.step.module import Pretrain, StepBoundary
from dualroute.training.step.quantization_aware import round_weights_in_forward
from dualroute.training.step.spike_guard import TrainingDiverged
from dualroute.training.step.token_count import TokenCount


@dataclass
class Prepared:
    """A configuration that was found sound, and what was learnt on the way."""

    config: PretrainConfig
    world: World
    output: Path
    data: ShardDataModule
    tokenizer: Tokenizer
    accumulation: int
    resume: Checkpoint | None
    make_module: Callable[[Prepared], Pretrain]
    operation: str = "pretrain"
    teacher: dict[str, Any] | None = None

    @property
    def token_count(self) -> TokenCount:
        """Tokens by step, from the checkpoint that is resumed on."""
        return TokenCount.resumed(self.resume, self.config.train.tokens_per_batch)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.token_count.total_steps(self.config.train)


def check(config: PretrainConfig) -> Prepared:
    """Find what is wrong with a run before anything is started.

    Raises:
        UserError: Naming the key, file or folder, and the remedy.
    """
    world = detect_world()
    refuse_forgotten_srun(world)
    check_port(world)
    config = _with_kernels(config)
    config = _with_initial_model(config)
    model, train, data = config.model, config.train, config.data
    if data.context > model.max_context:
        raise UserError(
            f"data.context {data.context} is longer than model.max_context {model.max_context}, the range "
            f"of its RoPE: lower the one or raise the other"
        )
    groups = check_sequence_parallel(config.parallel.sequence_parallel, world, model)
    accumulation = derive_accumulation(train.tokens_per_batch, data.context, train.micro_batch, groups)
    if train.precision == "16-mixed" and not torch.cuda.is_available():
        _check_fp16_on_cpu(config, world)
    if train.compile:
        _check_compile(config)
    if train.offload_activations and not torch.cuda.is_available():
        raise UserError("train.offload_activations moves from a CUDA device to the host: leave it out here")
    _ = train.total_steps  # refused where neither steps nor tokens are given
    module = ShardDataModule(
        data.path,
        data.context,
        train.micro_batch,
        train.tokens_per_batch,
        seed=config.seed,
        num_workers=data.num_workers,
        val_tokens=data.val_tokens,
        verify=data.verify,
    )
    _ = module.plan, module.val_plan  # unusable data are found here
    leave_out(module, Path(config.output))
    tokenizer = _tokenizer(module)
    if config.init_from is not None:
        check_same_tokenizer(find_checkpoint(config.init_from).folder / TOKENIZER, tokenizer, data.path)
    config = dataclasses.replace(config, model=_with_vocabulary(model, tokenizer, data.path))
    output = _writable(Path(config.output))
    resume = choose_resume(
        output / "checkpoints", config.resume, config.model, digests=config.checkpoint.verify
    )
    prepared = Prepared(config, world, output, module, tokenizer, accumulation, resume, pretraining_module)
    check_course(prepared)
    return prepared


def check_course(prepared: Prepared) -> None:
    """Find what is wrong with a run's length and with what has changed since the checkpoint it resumes.

    Raises:
        UserError: Naming the keys and both values.
    """
    config = prepared.config
    if prepared.resume is not None:
        refuse_changes(prepared.resume, config, prepared.data.manifest.fingerprint)
    if prepared.total_steps <= config.optim.warmup_steps:
        raise UserError(
            f"optim.warmup_steps {config.optim.warmup_steps} is not below the run's {prepared.total_steps} "
            f"steps: the learning rate would never be reached"
        )


def _with_kernels(config: PretrainConfig) -> PretrainConfig:
    """With the attention's back end chosen for this process, and the environment's choice noted."""
    given = os.environ.get(backend.VARIABLE)
    kernels: Any = given or config.train.kernels
    try:
        backend.set_backend(kernels)
        backend.describe(device())
    except ValueError as error:
        source = backend.VARIABLE if given else "train.kernels"
        raise UserError(f"{source} is {kernels} and cannot be had here ({error}): use auto") from error
    return dataclasses.replace(config, train=dataclasses.replace(config.train, kernels=kernels))


def device() -> torch.device:
    """What this process trains on."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _with_initial_model(config: PretrainConfig) -> PretrainConfig:
    """With the model of ``init_from``, but for what was given."""
    if config.init_from is None:
        return config
    source = find_checkpoint(config.init_from)
    refuse_quantized(source, "integers cannot be trained; give init_from the checkpoint it was made from")
    initial = ModelConfig.from_file(source.folder / CONFIG)
    model = with_given(initial, config.model, f"init_from {config.init_from}")
    return dataclasses.replace(config, model=model)


def check_same_tokenizer(theirs: Path, tokenizer: Tokenizer, data: str) -> None:
    """Refuse a model whose ids mean other text than those of the data; ``theirs`` is its tokenizer's file.

    Raises:
        UserError: Naming both tokenizers.
    """
    try:
        same = tokenizer.same_ids(Tokenizer(theirs))
    except UserError:  # missing or damaged
        same = False
    if not same:
        raise UserError(
            f"{theirs} is not the tokenizer that {data} was made with ({tokenizer.path}): the ids would mean "
            f"other text; prepare the data with it (dualroute prepare --tokenizer {theirs})"
        )


def _check_fp16_on_cpu(config: PretrainConfig, world: World) -> None:
    """DeepSpeed can, with the processor's help; autocast would take bfloat16 without a word."""
    strategy = config.parallel.strategy
    if strategy not in ("auto", "deepspeed") or (strategy == "auto" and world.world_size == 1):
        raise UserError(
            "train.precision 16-mixed needs a CUDA device, or parallel.strategy deepspeed: use bf16-mixed or "
            "32 here"
        )
    if not compat.fp16_on_cpu():
        raise UserError(
            "train.precision 16-mixed needs a CUDA device, or a processor with fp16 arithmetic "
            "(avx512_fp16): use bf16-mixed or 32 here"
        )


def _check_compile(config: PretrainConfig) -> None:
    if config.parallel.zero_stage == 3:
        raise UserError(
            "train.compile cannot be used with parallel.zero_stage 3, which swaps weights in and out under "
            "the compiled code: use stage 2, or leave it out"
        )
    if config.train.activation_checkpointing == "feed_forward":
        raise UserError("train.compile with activation_checkpointing feed_forward: use none or full")
    if not torch.cuda.is_available() and not (shutil.which("g++") or shutil.which("clang++")):
        raise UserError("train.compile needs a C++ compiler on a CPU: install g++, or leave it out")


def _tokenizer(data: ShardDataModule) -> Tokenizer:
    info = data.manifest.tokenizer
    tokenizer = Tokenizer(data.manifest.folder / info.file)
    if tokenizer.sha256 != info.sha256:
        raise UserError(
            f"{tokenizer.path} is not the tokenizer that the shards were made with (its sha256 differs from "
            f"the manifest's): put the original file back or prepare the data again"
        )
    return tokenizer


def _with_vocabulary(model: ModelConfig, tokenizer: Tokenizer, path: str) -> ModelConfig:
    if model.vocab_size not in (None, tokenizer.vocab_size):
        raise UserError(
            f"model.vocab_size is {model.vocab_size} and the tokenizer of {path} has {tokenizer.vocab_size} "
            f"ids: leave model.vocab_size out"
        )
    return dataclasses.replace(model, vocab_size=tokenizer.vocab_size).resolved()


def _writable(output: Path) -> Path:
    try:
        output.mkdir(parents=True, exist_ok=True)
        probe = output / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"output folder {output} cannot be written ({error.strerror}): choose another --output"
        ) from error
    return output


def build_model(config: PretrainConfig) -> DualRoutingTransformer:
    """The model of a run, with its seeded initial weights, or those of ``init_from``."""
    torch.manual_seed(config.seed)
    if config.init_from is None:
        model = DualRoutingTransformer(config.model)
    else:
        model = load_model(find_checkpoint(config.init_from), config.model).float().train()
    train = config.train
    if train.quantization_aware is not None:
        round_weights_in_forward(model, train.quantization_aware, train.quantization_group_size)
    keep_fewer_activations(
        model,
        train.activation_checkpointing,
        every=train.recompute_every_layers,
        offload=train.offload_activations,
    )
    if train.compile:
        for layer in model.layers:
            layer.ffn.compile()  # type: ignore[union-attr]
    return model


def module_arguments(prepared: Prepared) -> dict[str, Any]:
    """What every kind of training makes its LightningModule of."""
    config, data = prepared.config, prepared.data
    return {
        "model": build_model(config),
        "optim": config.optim,
        "train": config.train,
        "tokenizer": prepared.tokenizer,
        "targets_per_byte": {split: data.targets_per_byte(split) for split in ("train", "val")},
        "spike_guard": config.spike_guard,
        "token_count": prepared.token_count,
    }


def pretraining_module(prepared: Prepared) -> Pretrain:
    """The module of ``dualroute pretrain``."""
    return Pretrain(**module_arguments(prepared))


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
    _quiet_lightning()
    if not torch.cuda.is_available():
        keep_freed_memory()
    prepared = check(config)
    config, world = prepared.config, prepared.world
    total_steps = prepared.total_steps
    if prepared.resume is not None and prepared.resume.step >= total_steps:
        if world.rank == 0:
            print(f"{prepared.resume.folder} has all {total_steps} steps: nothing to do")
            print(summary.what_comes_next(prepared.output, config.data.path))
        return 0
    with locked(prepared.output, world):
        while True:
            result = _fit(prepared)
            if isinstance(result, int):
                return result
            gc.collect()  # the model, the optimizer and the engine of the training that failed
            limit = config.spike_guard.max_rollbacks
            checkpoint = roll_back(result, prepared.output, prepared.data, world, limit)
            prepared = dataclasses.replace(prepared, resume=checkpoint)


def _fit(prepared: Prepared) -> int | Divergence:
    """Train from ``prepared.resume`` on: the exit status, or where the training became unusable."""
    config, world = prepared.config, prepared.world
    watchdog = Watchdog(
        config.watchdog,
        world,
        prepared.output,
        reduces_in_backward=config.parallel.strategy == "ddp",
    )
    trainer, module, preemption = build_trainer(prepared, watchdog)
    if world.rank == 0:
        tell_start(prepared, module)
    state = None
    if prepared.resume is not None:
        state = resumable_state(
            prepared.resume,
            trainer,
            prepared.output / "checkpoints",
            precision=config.train.precision,
            timeout_minutes=config.parallel.timeout_minutes,
        )
        if world.rank == 0:
            set_aside_newer(prepared.output / "checkpoints", prepared.resume.step)
            total = prepared.total_steps
            print(f"resuming from {prepared.resume.folder} (step {prepared.resume.step} of {total})")
    if world.rank == 0:
        write_bytes_atomically(prepared.output / "config.yaml", resolved_yaml(config).encode())
    try:
        with watchdog:
            trainer.fit(
                module,
                datamodule=prepared.data,
                ckpt_path=state,
                # tensors and plain values only: a checkpoint's code is not run.  DeepSpeed's needs pickle
                weights_only=not isinstance(trainer.strategy, DeepSpeedStrategy),
            )
    except TrainingDiverged as error:
        return divergence(error, module, prepared.data, trainer.global_step + 1)
    if preemption.signal:
        return stop_for_requeue(trainer, preemption)
    if world.rank == 0:
        last = find_checkpoint(prepared.output)
        summary.tell(summary.what_was_trained(prepared.output, config.data.path, last))
    return 0


def tell_start(prepared: Prepared, module: Pretrain) -> None:
    """Say what is about to be trained, and what of it may not be meant."""
    config, data, world, count = prepared.config, prepared.data, prepared.world, prepared.token_count
    lines = summary.what_is_trained(prepared.operation, module.model, config, data, world, count, device())
    summary.tell(lines)
    summary.warn(summary.warnings_at_start(config, data, world, count, prepared.resume))


def _quiet_lightning() -> None:
    """Keep advertisements and notes on devices off the terminal; warnings stay."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Lightning's own use of a torch API that is to be renamed, and its note on a fixed weights_only default
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # where Slurm is installed, a run beside it is a normal thing
    warnings.filterwarnings("ignore", message=".*`srun` command is available.*")


def resolved_yaml(config: PretrainConfig) -> str:
    """Every value of a run as YAML that ``--config`` reads again, from any folder."""
    values = json.loads(json.dumps(dataclasses.asdict(absolute_paths(config))))
    return f"# {one_line(backend.describe(device()))}\n{yaml.safe_dump(values, sort_keys=False)}"


def build_trainer(prepared: Prepared, watchdog: Watchdog) -> tuple[Trainer, Pretrain, Preemption]:
    """The Trainer of a run, the module that it trains, and the callback that knows why it ended."""
    config, world, output = prepared.config, prepared.world, prepared.output
    module = prepared.make_module(prepared)
    train = config.train
    precision: Any = "32-true" if train.precision == "32" else train.precision
    accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    strategy = build_strategy(
        config.parallel,
        world,
        micro_batch=train.micro_batch,
        accumulation=prepared.accumulation,
        gradient_clip=config.optim.grad_clip,
        precision=precision,
        accelerator=accelerator,
    )
    publisher = CheckpointPublisher(
        output / "checkpoints",
        config.checkpoint,
        prepared.tokenizer.path,
        train.val_every_steps,
        described=describe_run(config, prepared.data, prepared.resume, prepared.operation, prepared.teacher),
    )
    preemption = Preemption(publisher)
    trainer = Trainer(
        accelerator=accelerator,
        strategy=strategy,
        devices=world.local_world_size,
        num_nodes=world.num_nodes,
        precision=precision,
        max_steps=prepared.total_steps,
        max_epochs=-1,
        accumulate_grad_batches=prepared.accumulation,
        gradient_clip_val=config.optim.grad_clip,
        val_check_interval=train.val_every_steps * prepared.accumulation,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=-1,  # the validation loss before the first step
        use_distributed_sampler=False,
        logger=TensorBoardLogger(output, name="tensorboard", version=""),
        callbacks=[
            CorruptionCheck(config.watchdog.sdc_check_every_steps, config.watchdog.sdc_action),
            StepBoundary(),  # before the others, which read what it writes
            Monitor(config.monitor, folder=output, resolved_config=resolved_yaml(config)),
            Progress(),
            publisher,
            preemption,
            watchdog,  # last: what the others do belongs to the phase that it has marked before
        ],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    leave_signals_to_us(trainer)
    return trainer, module, preemption
