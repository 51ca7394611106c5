"""What a training can be told: the fields of ``dualroute pretrain``, each group checked by itself.

In: YAML and flags, through :mod:`dualroute.cli`.  Next: :mod:`dualroute.training.prepare` checks them against
the data, the folder and the machine.  No torch is imported here, so that ``--help`` answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from os.path import abspath
from typing import ClassVar, Literal

from dualroute.data.mixture.config import SourceConfig, StageConfig, check_mixture
from dualroute.data.remote.config import (
    DEFAULT_CACHE_GIB,
    BadDataPolicy,
    RemoteOptions,
    default_cache_folder,
)
from dualroute.errors import UserError
from dualroute.model.config import ModelConfig
from dualroute.paths import ConfigFile, DataPath, LocalPath, ResumePath
from dualroute.settings import SEEDS, Range, above, at_least, check_fields
from dualroute.training.finetuning.config import StrategyConfig
from dualroute.training.monitoring.config import MonitorConfig
from dualroute.training.resilience.config import MOST_MINUTES, WatchdogConfig


@dataclass
class DataConfig:
    """What is read.

    Args:
        path: Folder of shards made by ``dualroute prepare``, or the address of such a set elsewhere:
            s3://bucket/set, https://host/set, any other URL of fsspec, or a command that writes the file {}
            to its standard output (pipe:aws s3 cp s3://bucket/set/{} -); with sources the first of them.
        sources: Several such folders that are mixed, each with its share of the samples: {path, weight, name,
            max_epochs}, or PATH=WEIGHT.
        stages: Other weights from a number of tokens on: {from_tokens, weights}, or
            FROM_TOKENS:NAME=WEIGHT,NAME=WEIGHT.
        temperature: Weights are taken to the power of 1 / temperature; above 1 makes them more alike.
        over_max_epochs: What happens where the run would read a source more often than its max_epochs:
            refuse to start, or report it.
        packing: How documents fill the windows of training: concatenate (end to end, cut where a window
            ends), best_fit (whole where they fit, padded), or one_per_row.
        fim_rate: Share of the documents that are told as prefix, suffix and middle, so that the model learns
            to fill in the middle.
        fim_spm_rate: Share of these with the suffix first.
        fim_tokens: The tokens that mark prefix, suffix and middle; null looks for the usual names.
        context: Tokens of one window: the longest distance that training sees.
        num_workers: Processes that read ahead; 0 reads in the training process.
        val_tokens: Validate on the first so many tokens of the validation split; null means all.
        verify: Check shards before the start by size, or by sha256 (remembered, so paid once).
        objective: What is to be found: next_token, by a causal model, or masked tokens, by one with
            model.causal false.
        mask_share: With objective masked, the share of the tokens that are hidden, whole words of them.
        cache_dir: Folder for copies of what lies elsewhere, shared by the processes of a node and best on a
            disk of its own; null takes $DUALROUTE_CACHE, or dualroute/shards in the user's cache.
        cache_gib: GiB that the copies may take up, over all sets.
        prefetch_shards: Shards that lie elsewhere and are brought before they are needed; 0 brings none.
        fetch_timeout: Seconds without an answer, or with less than 1 KiB/s, after which a transfer has
            failed.
        fetch_retries: Further attempts, each after twice the time, up to 30 s; the file goes on where it
            broke.
        retry_seconds: Time before the first of them.
        on_bad_data: A window whose shard is damaged or cannot be had ends the run (fail), or is padding
            without labels (skip), with a warning.
        max_bad_windows: So many may be skipped on a rank between two starts.
    """

    path: DataPath = "data/stdlib"
    context: int = 512
    num_workers: int = 0
    val_tokens: int | None = None
    verify: Literal["size", "sha256"] = "sha256"
    objective: Literal["next_token", "masked"] = "next_token"
    mask_share: float = 0.3
    sources: list[SourceConfig] = field(default_factory=list)
    stages: list[StageConfig] = field(default_factory=list)
    temperature: float = 1.0
    over_max_epochs: Literal["refuse", "report"] = "refuse"
    packing: Literal["concatenate", "best_fit", "one_per_row"] = "concatenate"
    fim_rate: float = 0.0
    fim_spm_rate: float = 0.5
    fim_tokens: list[str] | None = None
    cache_dir: LocalPath | None = None
    cache_gib: float = DEFAULT_CACHE_GIB
    prefetch_shards: int = 4
    fetch_timeout: float = 60.0
    fetch_retries: int = 8
    retry_seconds: float = 1.0
    on_bad_data: Literal["fail", "skip"] = "fail"
    max_bad_windows: int = 100

    #: of the keys about reading
    READ_RANGES: ClassVar[dict[str, Range]] = {
        "cache_gib": above(0, 1e9),
        "prefetch_shards": at_least(0, 1024),
        "fetch_timeout": above(0, 1e5),
        "fetch_retries": at_least(0, 1000),
        "retry_seconds": at_least(0, 3600),
    }

    def __post_init__(self) -> None:
        ranges = {"context": at_least(1), "val_tokens": at_least(1), "num_workers": at_least(0, 1024)}
        ranges |= {"mask_share": above(0, 1), "fim_rate": at_least(0, 1), "fim_spm_rate": at_least(0, 1)}
        check_fields(self, "data", {**ranges, **self.READ_RANGES, "temperature": above(0, 100)})
        self._check_order()

    def _check_order(self) -> None:
        """Find what contradicts itself in the keys that say which tokens come when."""
        check_mixture(self.sources, self.stages)
        if self.sources:
            first = self.sources[0].path
            if self.path not in (None, "data/stdlib") and abspath(self.path) != abspath(first):
                raise UserError(
                    f"data.path {self.path} and data.sources are both given: name it among the sources"
                )
            self.path = first
        if self.fim_tokens is not None and len(self.fim_tokens) != 3:
            raise UserError(f"data.fim_tokens are {len(self.fim_tokens)}: give three, prefix, suffix, middle")
        if self.objective == "masked":
            for name in ("packing", "fim_rate"):
                if getattr(self, name) not in ("concatenate", 0):
                    raise UserError(
                        f"data.{name} {getattr(self, name)} works with data.objective next_token only: leave "
                        "it out"
                    )

    @property
    def remote(self) -> RemoteOptions:
        """How a set that lies elsewhere is read."""
        folder = self.cache_dir or default_cache_folder()
        return RemoteOptions(
            folder, self.cache_gib, self.fetch_timeout, self.fetch_retries, self.retry_seconds
        )

    @property
    def bad_data(self) -> BadDataPolicy:
        """What becomes of windows that cannot be read."""
        return BadDataPolicy(self.on_bad_data, self.max_bad_windows)


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
class MuonConfig:
    """The step of the layers' matrices with optim.name muon.

    Args:
        lr: Peak learning rate of the matrices; null is optim.lr.
        momentum: Decay of the running mean of the gradient.
        nesterov: Step along the mean with the newest gradient counted once more.
        weight_decay: Of the matrices; null is optim.weight_decay.
        steps: Newton-Schulz iterations that orthogonalise the mean.
        scale: How the rate goes with a matrix's shape: match_rms_adamw (0.2 times the root of its longer
            side: steps as long as AdamW's, so that rates of AdamW serve) or original (the root of rows /
            columns, at least 1).
        precision: Arithmetic of those iterations; auto: bfloat16 on CUDA, float32 elsewhere.
    """

    lr: float | None = None
    momentum: float = 0.95
    nesterov: bool = True
    weight_decay: float | None = None
    steps: int = 5
    scale: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"

    def __post_init__(self) -> None:
        ranges = {
            "lr": above(0, 1e3),
            "momentum": Range(0, 1, without_most=True),
            "weight_decay": at_least(0, 1e3),
            "steps": at_least(1, 99),
        }
        check_fields(self, "optim.muon", ranges)


@dataclass
class OptimConfig:
    """The optimizer and its learning rate.

    AdamW is Loshchilov & Hutter 2019 (https://arxiv.org/abs/1711.05101), Muon Jordan et al. 2024
    (https://kellerjordan.github.io/posts/muon/).

    Args:
        name: adamw steps all parameters; muon steps the matrices of the layers, queries, keys and values of
            each route for themselves, and leaves embedding, head, norms, biases and gates to AdamW.
        lr: Peak learning rate.
        embedding_lr: Peak learning rate of the token embedding, and with it of a tied output weight; null is
            lr.
        head_lr: That of an output weight of its own; null is lr.
        muon: With name muon, how the matrices are stepped.
        betas: Decay of the running means of the gradient and of its square.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled decay of matrices, times the learning rate.
        decay_embeddings: Decay the token embedding too (and with it a tied output weight).
        warmup_steps: Optimizer steps of linear warm-up to ``lr``.
        schedule: cosine falls to the minimum over the whole run; wsd (warm-up, stable, decay) stays at
            ``lr`` until the last ``decay_fraction`` of the steps; constant stays.
        min_lr_ratio: Learning rate at the end of the schedule, as a share of ``lr``.
        decay_fraction: Share of all steps that wsd spends falling.
        decay_shape: How wsd falls: sqrt (by 1 minus the root of the progress) or linear.
        grad_clip: Largest norm of the whole gradient; null never clips.
        fused: Step all parameters in one kernel; null: on CUDA.  On a CPU its sums are rounded otherwise in
            the last bit.
    """

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = 3e-4
    embedding_lr: float | None = None
    head_lr: float | None = None
    muon: MuonConfig = field(default_factory=MuonConfig)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay_embeddings: bool = False
    warmup_steps: int = 100
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    min_lr_ratio: float = 0.1
    decay_fraction: float = 0.2
    decay_shape: Literal["sqrt", "linear"] = "sqrt"
    grad_clip: float | None = 1.0
    fused: bool | None = None

    def __post_init__(self) -> None:
        if isinstance(self.muon, dict):  # of a checkpoint's settings
            self.muon = MuonConfig(**self.muon)
        ranges = {
            **dict.fromkeys(("lr", "embedding_lr", "head_lr"), above(0, 1e3)),
            "betas": Range(0, 1, without_most=True),
            "eps": at_least(0, 1),
            "weight_decay": at_least(0, 1e3),
            "min_lr_ratio": at_least(0, 1),
            "decay_fraction": above(0, 1),
            "grad_clip": above(0),
        }
        check_fields(self, "optim", ranges)


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
