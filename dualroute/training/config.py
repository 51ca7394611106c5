"""What a training can be told: the fields of ``dualroute pretrain``, each group checked by itself.

In: YAML and flags, through :mod:`dualroute.cli`.  Next: :mod:`dualroute.training.prepare` checks them against
the data, the folder and the machine.  No torch is imported here, so that ``--help`` answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from dualroute.errors import UserError
from dualroute.model.config import ModelConfig
from dualroute.paths import ConfigFile, LocalPath, ResumePath
from dualroute.settings import SEEDS, above, at_least, check_fields
from dualroute.training.data_config import DataConfig
from dualroute.training.finetuning.config import StrategyConfig
from dualroute.training.monitoring.config import MonitorConfig
from dualroute.training.optim_config import OptimConfig
from dualroute.training.resilience.config import MOST_MINUTES, WatchdogConfig


def as_saved(precision: str) -> str:
    """The ``train.precision`` in which state and gradients are kept: fp8 is in some products alone."""
    return "bf16-mixed" if precision == "fp8" else precision


@dataclass
class TrainConfig:
    """How much is trained, and in what portions.

    Args:
        tokens_per_batch: Tokens of one optimizer step, over all ranks; a multiple of context ×
            micro_batch × ranks.  Accumulation follows from it.
        micro_batch: Windows that one rank reads in one forward pass.
        max_steps: Optimizer steps of the whole run.  Give this or max_tokens.
        max_tokens: Tokens of the whole run, rounded up to whole steps.
        epochs: Passes over the training data instead of either, rounded up to whole steps; it becomes
            max_tokens once the data are known.
        precision: Arithmetic: 32, bf16-mixed (float32 weights), bf16-true, 16-mixed (fp16 with a loss
            scale that adapts; on CUDA, or with DeepSpeed on a processor that has fp16 arithmetic), or fp8:
            bf16-mixed, whose linear layers multiply 8-bit floats (compute capability 8.9 or more; emulated
            on a CPU).
        z_loss: Weight of the squared log-normaliser in the loss; 0 leaves it out.
        activation_checkpointing: What is computed again in the backward pass instead of kept: none, full
            (whole layers), or feed_forward (which keeps most and is quickly done again).
        recompute_every_layers: Do so in every k-th layer only, the first included.
        offload_activations: Keep what is kept in the memory of the host, copied beside the computation
            (CUDA only); the last layer's stays, since the backward pass begins there.
        compile: Compile whole layers with torch.compile; the attention's routes are operators in them and
            stay as they are.  Needs a C++ compiler on a CPU.
        quantization_aware: Train with weights rounded as this scheme of ``dualroute quantize`` will round
            them, so that they are used to it; validation sees them rounded, checkpoints stay float.
        quantization_group_size: Columns that share a scale under int4_weight_only, as for ``quantize``.
        val_every_steps: Optimizer steps between two validations.  The first and last step get one always.
        float32_matmul_precision: How torch multiplies float32 matrices: highest (float32), high (TF32 on a
            GPU that has it), medium (bfloat16).  auto: high on CUDA in a run whose precision is of 16 bits,
            where factors are rounded further anyway; highest else.
        kernels: What the attention runs on: torch (plain, everywhere), cpp (on a CPU), flash or triton (on a
            GPU), or auto: cpp on a CPU that can compile it; on a GPU the fastest of those whose values and
            gradients are right on this run's shapes (compared once, then remembered).  DUALROUTE_KERNELS,
            where set, goes first.
    """

    tokens_per_batch: int = 16384
    micro_batch: int = 8
    max_steps: int | None = None
    max_tokens: int | None = None
    epochs: float | None = None
    precision: Literal["32", "bf16-mixed", "bf16-true", "16-mixed", "fp8"] = "32"
    z_loss: float = 0.0
    activation_checkpointing: Literal["none", "full", "feed_forward"] = "none"
    recompute_every_layers: int = 1
    offload_activations: bool = False
    compile: bool = False
    quantization_aware: Literal["int8_weight_only", "int4_weight_only"] | None = None
    quantization_group_size: int = 32
    val_every_steps: int = 100
    float32_matmul_precision: Literal["auto", "highest", "high", "medium"] = "auto"
    kernels: Literal["auto", "torch", "cpp", "flash", "triton"] = "auto"

    def __post_init__(self) -> None:
        counts = (
            *("tokens_per_batch", "micro_batch", "max_steps", "max_tokens", "val_every_steps"),
            "recompute_every_layers",
        )
        group = {"quantization_group_size": at_least(1, 2**20)}
        group["epochs"] = above(0, 1e6)
        check_fields(self, "train", {**dict.fromkeys(counts, at_least(1)), **group})
        given = [name for name in ("max_steps", "max_tokens", "epochs") if getattr(self, name) is not None]
        if len(given) > 1:
            names = " and ".join(f"train.{name}" for name in given)
            raise UserError(f"{names} are {'both' if len(given) == 2 else 'all'} given: keep one of them")

    @property
    def mixed_precision(self) -> str:
        """``precision`` as the Trainer, DeepSpeed and a saved state know it."""
        return as_saved(self.precision)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        if self.max_steps is not None:
            return self.max_steps
        if self.max_tokens is not None:
            return -(-self.max_tokens // self.tokens_per_batch)
        if self.epochs is not None:
            raise UserError(
                "train.epochs says how long to train only where the data are read: give train.max_steps or "
                "train.max_tokens"
            )
        raise UserError("give train.max_steps, train.max_tokens or train.epochs: how long to train")


@dataclass
class SpikeGuardConfig:
    """When the step of a bad batch is left out.

    Args:
        enabled: Watch the loss at all; without it, only what is not a finite number is skipped.
        window: Recent good steps that define what is usual; no spike is seen before it is full.
        threshold: Robust standard deviations above the running median that make a spike.
        patience: Skipped steps in a row after which the run stops.
        max_rollbacks: How often a run may then go back to a checkpoint and leave out the data of those
            steps; past that, or at 0, it stops.
    """

    enabled: bool = True
    window: int = 128
    threshold: float = 6.0
    patience: int = 20
    max_rollbacks: int = 3

    def __post_init__(self) -> None:
        ranges = {"window": at_least(2, 2**20), "threshold": above(0), "patience": at_least(1)}
        check_fields(self, "spike_guard", ranges)


@dataclass
class CheckpointConfig:
    """When a checkpoint is written and which ones stay.

    Args:
        every_steps: Optimizer steps between two checkpoints.  The last step always gets one.
        keep_last: Newest checkpoints to keep; the best one by validation loss stays besides.
        verify: On resume, compare the sha256 of every file, not only its size.
        asynchronous: Copy the state to the memory of the host and write it while training goes on; every
            rank its own part, also under ZeRO.
    """

    every_steps: int = 100
    keep_last: int = 2
    verify: bool = True
    asynchronous: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "checkpoint", {"every_steps": at_least(1), "keep_last": at_least(1)})


@dataclass
class ParallelConfig:
    """How the training is spread over processes.

    Args:
        strategy: ``auto`` (one process: plain; several: DeepSpeed), ``single``, ``ddp`` or ``deepspeed``.
        zero_stage: what DeepSpeed shards: 0 nothing, 1 optimizer state, 2 and gradients, 3 and parameters.
            None: what ``deepspeed_config`` says, else 2.
        offload_optimizer: keep optimizer state and its arithmetic in the memory of the host (ZeRO 1-3).
        offload_parameters: keep parameters there too (ZeRO 3 only).
        zero_hpz_partition_size: neighbouring ranks, best those of a node, that keep a second partition of the
            parameters among them, so that the backward pass gathers inside the node (ZeRO++ hpZ,
            https://arxiv.org/abs/2306.10209); ZeRO 3 only, a divisor of the number of ranks; 1 for none.
        gradient_reduction: what gradients are summed over ranks in: auto, as they are (bfloat16 where the
            parameters are), or fp32, which costs twice the traffic and loses nothing.
        deepspeed_config: a DeepSpeed configuration, JSON or YAML, merged on top of ours.
        sequence_parallel: ranks that share each text (Ulysses): the context per rank is data.context divided
            by it; the heads of each route must be a multiple of it.
        timeout_minutes: how long a rank waits for the others before it gives up.
    """

    strategy: Literal["auto", "single", "ddp", "deepspeed"] = "auto"
    zero_stage: int | None = None
    offload_optimizer: bool = False
    offload_parameters: bool = False
    zero_hpz_partition_size: int = 1
    gradient_reduction: Literal["auto", "fp32"] = "auto"
    deepspeed_config: ConfigFile | None = None
    sequence_parallel: int = 1
    timeout_minutes: float = 30.0

    def __post_init__(self) -> None:
        ranges = {
            "zero_stage": at_least(0, 3),
            "zero_hpz_partition_size": at_least(1, 2**20),
            "sequence_parallel": at_least(1, 2**20),
            "timeout_minutes": above(0, MOST_MINUTES),
        }
        check_fields(self, "parallel", ranges)


@dataclass
class PretrainConfig:
    """Pretrain a model on prepared shards.

    Args:
        output: Run folder; everything the run writes lies there.
        seed: Seed of the initial weights and of the data's order.
        resume: auto continues from the newest finished checkpoint in the run folder, never starts afresh
            (refused where that would overwrite checkpoints), a path begins at that checkpoint, and once the
            run has gone on from there continues as auto does.
        init_from: Checkpoint or run folder whose weights the run begins with, at step 0 and with a new
            optimizer; model is then its model, but for what is given here (say, another window).  Once the
            run has a checkpoint of its own, it is not read any more.
        model: Shape of the model; also a file: --model configs/model/5m.yaml.
        data: What is read.
        train: How much is trained, and in what portions.
        optim: Optimizer and learning rate.
        finetune: Which weights are trained, how fast by their depth, and when to stop.
        spike_guard: When the step of a bad batch is left out.
        checkpoint: When checkpoints are written and which ones stay.
        monitor: What is logged.
        parallel: How ranks share the work.
        watchdog: When a training that stands still is ended.
    """

    output: LocalPath = "runs/pretrain"
    seed: int = 0
    resume: ResumePath = "auto"
    init_from: LocalPath | None = None
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    finetune: StrategyConfig = field(default_factory=StrategyConfig)
    spike_guard: SpikeGuardConfig = field(default_factory=SpikeGuardConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)

    def __post_init__(self) -> None:
        check_fields(self, "", {"seed": SEEDS})
