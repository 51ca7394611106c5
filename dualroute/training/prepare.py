"""What can be wrong with a training, found before anything starts.

In: a configuration.  Here: :func:`begin` looks at folder, machine, model and batch arithmetic, :func:`check`
at the shards of a pretraining besides; other trainings (:mod:`dualroute.distillation.run`,
:mod:`dualroute.tasks.run`) look at theirs instead.  Files are only read.  Out: a :class:`Prepared`, which
:func:`dualroute.training.run.run_training` trains.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dualroute import compat
from dualroute.data.module import ShardDataModule, WindowDataModule
from dualroute.data.plan import derive_accumulation
from dualroute.data.tokenizer import Tokenizer
from dualroute.data.tokenizer_settings import read_settings
from dualroute.errors import UserError
from dualroute.model import ModelConfig
from dualroute.model.checkpoint.format import (
    CONFIG,
    TOKENIZER,
    Checkpoint,
    find_checkpoint,
    refuse_quantized,
)
from dualroute.model.ends_config import FrontendConfig, TaskHeadConfig
from dualroute.training.checkpointing.resume import (
    Start,
    choose_start,
)
from dualroute.training.checkpointing.resumed_settings import refuse_changes
from dualroute.training.config import DataConfig, PretrainConfig
from dualroute.training.finetuning.check import check_strategy
from dualroute.training.finetuning.early_stopping import has_stopped
from dualroute.training.finetuning.patterns import unties_head
from dualroute.training.initial_model import (
    build_model,
    build_sharded_model,
    weights_beneath_adapters,
    with_given,
)
from dualroute.training.kernels import with_kernels
from dualroute.training.monitoring.outlets.trackers import check_trackers
from dualroute.training.parallel.deepspeed_config import asked_stage
from dualroute.training.parallel.environment import World, check_port, detect_world, refuse_forgotten_srun
from dualroute.training.parallel.sequence import check_sequence_parallel
from dualroute.training.resilience.rollback import RollBack
from dualroute.training.step.fp8 import check_fp8
from dualroute.training.step.module import Pretrain
from dualroute.training.step.token_count import TokenCount


@dataclass
class Prepared:
    """A configuration that was found sound, and what was learnt on the way.

    Attributes:
        start: Where the training begins: until the run folder is claimed what a glance has shown, after that
            what was chosen.
        roll_back: The roll-back that this attempt begins with, if any.
        sharded: The strategy divides the weights, so the model is to be built without them.
        extra_files: What every checkpoint holds besides, by name.
        remarks: On the data: (level of the log, line), said at the start.
    """

    config: PretrainConfig
    world: World
    output: Path
    data: WindowDataModule
    tokenizer: Tokenizer
    accumulation: int
    start: Start
    make_module: Callable[[Prepared], Pretrain]
    roll_back: RollBack | None = None
    sharded: bool = False
    operation: str = "pretrain"
    teacher: dict[str, Any] | None = None
    extra_files: dict[str, bytes] | None = None
    remarks: Sequence[tuple[int, str]] = ()

    @property
    def token_count(self) -> TokenCount:
        """Tokens by step, from the checkpoint that is resumed on."""
        return TokenCount.resumed(self.start.checkpoint, self.config.train.tokens_per_batch)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.token_count.total_steps(self.config.train)

    @property
    def finished(self) -> bool:
        """The checkpoint to go on from has all steps."""
        checkpoint = self.start.checkpoint
        if checkpoint is None:
            return False
        patience = self.config.finetune.early_stopping
        return checkpoint.step >= self.total_steps or has_stopped(checkpoint.metadata, patience)


@dataclass
class Begun:
    """What was found sound of a configuration before its data were looked at.

    Attributes:
        config: With the model of ``init_from`` and the kernels of this machine.
        start: What a glance into the run folder has shown.
        initial: The checkpoint whose model and tokenizer the run has, if any.
    """

    config: Any  # PretrainConfig, or one of its kind
    world: World
    output: Path
    start: Start
    initial: Checkpoint | None
    accumulation: int


def begin(config: PretrainConfig) -> Begun:
    """Find what is wrong with folder, machine, model and batch arithmetic, which every kind of training has.

    It only reads.

    Raises:
        UserError: Naming the key, file or folder, and the remedy.
    """
    world = detect_world()
    refuse_forgotten_srun(world)
    check_port(world)
    config = with_kernels(config)
    output = Path(config.output)
    start = choose_start(output, config.resume)
    initial = _initial_checkpoint(config, start)
    config = _with_initial_model(config, initial)
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
    if train.precision == "fp8":
        check_fp8(config)
    if train.offload_activations and not torch.cuda.is_available():
        raise UserError("train.offload_activations moves from a CUDA device to the host: leave it out here")
    if train.epochs is None:
        _ = train.total_steps  # refused where neither steps nor tokens are given
    check_trackers(config.monitor)
    return Begun(config, world, output, start, initial, accumulation)


def check(config: PretrainConfig) -> Prepared:
    """Find what is wrong with a run before anything is started.  Reads only.

    Raises:
        UserError: Naming the key, file or folder, and the remedy.
    """
    begun = begin(config)
    train, data = begun.config.train, begun.config.data
    _check_objective(begun.config)
    module = shard_module(data, begun.config.seed, train.micro_batch, train.tokens_per_batch)
    _ = module.plan, module.val_plan  # unusable data are found here
    tokenizer = _tokenizer(module)
    _ = module.masking  # refused where the tokenizer has no id for a hidden token
    if begun.initial is not None:
        check_same_tokenizer(begun.initial.folder / TOKENIZER, tokenizer, data.path)
    prepared = prepare(begun, module, tokenizer, pretraining_module)
    prepared.remarks = [(logging.INFO, line) for line in module.order_lines()]
    check_course(prepared)
    return prepared


def shard_module(data: DataConfig, seed: int, micro_batch: int, tokens_per_batch: int) -> ShardDataModule:
    """The data module that a configuration asks for; nothing is read yet."""
    return ShardDataModule(
        data.path,
        data.context,
        micro_batch,
        tokens_per_batch,
        seed=seed,
        num_workers=data.num_workers,
        val_tokens=data.val_tokens,
        verify=data.verify,
        mask_share=data.mask_share if data.objective == "masked" else None,
        sources=data.sources,
        stages=data.stages,
        temperature=data.temperature,
        packing=data.packing,
        fim_rate=data.fim_rate,
        fim_spm_rate=data.fim_spm_rate,
        fim_tokens=data.fim_tokens,
        remote=data.remote,
        prefetch_shards=data.prefetch_shards,
        policy=data.bad_data,
        shuffle_tokens=data.shuffle_tokens,
    )


def prepare(
    begun: Begun,
    data: WindowDataModule,
    tokenizer: Tokenizer,
    make_module: Callable[[Prepared], Pretrain],
    task_head: TaskHeadConfig | None = None,
    frontend: FrontendConfig | None = None,
    num_ids: int | None = None,
) -> Prepared:
    """A run of these data, with its vocabulary, what enters and leaves its model, and its length in tokens.

    ``num_ids`` are those of a model whose ids are no text; null means the tokenizer's.

    Raises:
        UserError: The model has another vocabulary.
    """
    config = begun.config
    if begun.initial is not None:
        tokenizer = with_settings_of(tokenizer, begun.initial)
    if num_ids is None:
        model = _with_vocabulary(config.model, tokenizer, config.data.path)
    else:
        model = dataclasses.replace(config.model, vocab_size=num_ids)
    # a run from scratch that is resumed has a checkpoint too, and is compared with it later
    begun_with = config.init_from is not None and begun.initial is not None
    if begun_with and (config.model.frontend, config.model.vocab_size) != (
        frontend,
        model.vocab_size,
    ):
        raise UserError(
            f"init_from {config.init_from} holds a model of other inputs than the task has: take the "
            f"weights of a model that was trained on such inputs, or begin from scratch (leave init_from out)"
        )
    model = dataclasses.replace(model, task_head=task_head, frontend=frontend).resolved()
    if config.finetune.adapter != "none" and unties_head(config.finetune.targets, model):
        model = dataclasses.replace(model, tie_embeddings=False)
    train = config.train
    if train.epochs is not None:
        tokens = data.plan.samples_in(train.epochs) * data.context
        train = dataclasses.replace(train, epochs=None, max_tokens=tokens)
    config = dataclasses.replace(config, model=model, train=train)
    check_strategy(config)
    return Prepared(
        config, begun.world, begun.output, data, tokenizer, begun.accumulation, begun.start, make_module
    )


def check_course(prepared: Prepared) -> None:
    """Find what is wrong with a run's length and with what has changed since the checkpoint it resumes.

    Raises:
        UserError: Naming the keys and both values.
    """
    config, checkpoint = prepared.config, prepared.start.checkpoint
    if checkpoint is not None:
        prepared.data.refuse_other_past(checkpoint.metadata, str(checkpoint.folder))
        refuse_changes(checkpoint, config, prepared.data.fingerprint)
    _check_epochs(prepared)
    if prepared.total_steps <= config.optim.warmup_steps:
        raise UserError(
            f"optim.warmup_steps {config.optim.warmup_steps} is not below the run's {prepared.total_steps} "
            f"steps, so the learning rate would never be reached: lower it, or train longer (train.epochs, "
            f"train.max_steps, or smaller steps by train.tokens_per_batch)"
        )


def _check_epochs(prepared: Prepared) -> None:
    """Refuse a run that reads a source too often, where that is not only to be reported."""
    tokens = prepared.token_count.at(prepared.total_steps)
    over = list(prepared.data.over_max_epochs(tokens // prepared.data.context))
    if over and prepared.config.data.over_max_epochs == "refuse":
        raise UserError(f"{over[0]}; or have it reported: data.over_max_epochs report")


def _initial_checkpoint(config: PretrainConfig, start: Start) -> Checkpoint | None:
    """Whose model and tokenizer a run with ``init_from`` has: its own, once it has a checkpoint.

    The folder that it began with may be gone by then.
    """
    if config.init_from is None:
        return None
    if start.checkpoint is not None:
        return start.checkpoint
    try:
        return find_checkpoint(config.init_from)
    except UserError as error:
        raise UserError(f"init_from: {error}") from error


def _with_initial_model(config: PretrainConfig, source: Checkpoint | None) -> PretrainConfig:
    """With the model of ``source``, but for what was configured otherwise than by default."""
    if source is None:
        return config
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


def with_settings_of(tokenizer: Tokenizer, initial: Checkpoint) -> Tokenizer:
    """The tokenizer of the data, with the chat template and the ends of a text that ``initial`` came with,
    where it has none of its own."""
    return (
        tokenizer
        if tokenizer.settings
        else tokenizer.with_settings(read_settings(initial.folder / TOKENIZER))
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


def _check_objective(config: PretrainConfig) -> None:
    """A model that sees the next token has nothing to predict, and one that does not see it finds no mask."""
    causal, objective = config.model.causal, config.data.objective
    if causal != (objective == "next_token"):
        raise UserError(
            f"data.objective {objective} cannot be trained with model.causal {str(causal).lower()}: give "
            f"{'model.causal false' if causal else 'data.objective masked'}, or "
            f"{'data.objective next_token' if causal else 'model.causal true'}"
        )


def _check_compile(config: PretrainConfig) -> None:
    if asked_stage(config.parallel) == 3:
        raise UserError(
            "train.compile cannot be used with parallel.zero_stage 3, which swaps weights in and out under "
            "the compiled code: use stage 2, or leave it out"
        )
    if not torch.cuda.is_available() and not (shutil.which("g++") or shutil.which("clang++")):
        raise UserError("train.compile needs a C++ compiler on a CPU: install g++, or leave it out")


def _tokenizer(data: ShardDataModule) -> Tokenizer:
    info = data.manifest.tokenizer
    said = [source.manifest.tokenizer.settings for source in data.sources]
    settings = next(filter(None, said), {})  # of one source of a mixture, chats perhaps
    tokenizer = dataclasses.replace(info, settings=settings).opened(data.manifest.folder)
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
    return dataclasses.replace(model, vocab_size=tokenizer.vocab_size)


def module_arguments(prepared: Prepared) -> dict[str, Any]:
    """What every kind of training makes its LightningModule of."""
    config, data = prepared.config, prepared.data
    resumed, weights = prepared.start.checkpoint, None
    if prepared.sharded:
        model, weights = build_sharded_model(config, resumed=resumed)
    else:
        model = build_model(config, resumed=resumed)
    return {
        "model": model,
        "weights": weights,
        "optim": config.optim,
        "train": config.train,
        "tokenizer": prepared.tokenizer,
        "targets_per_byte": {split: data.targets_per_byte(split) for split in ("train", "val")},
        "spike_guard": config.spike_guard,
        "token_count": prepared.token_count,
        "strategy": config.finetune,
        "parent": weights_beneath_adapters(config),
    }


def pretraining_module(prepared: Prepared) -> Pretrain:
    """The module of ``dualroute pretrain``."""
    return Pretrain(**module_arguments(prepared))
