"""How long a step and a checkpoint take, by arithmetic: every assumption is a field of the configuration.

In: the configuration, the size of the model, its FLOPs.  Here: :func:`times` adds up arithmetic, kernel
launches, traffic between GPUs and checkpoints.  Next: ``estimate/command.py`` prints them.

The formulas are those of ring collectives: of N bytes each of R ranks sends (R-1)/R · N in an all-gather or a
reduce-scatter, twice that in an all-reduce, at the bandwidth of the slowest link of the ring.  Latency, which
grows with the number of ranks, and copies to and from the host under offloading are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from dualroute.data.plan import derive_accumulation
from dualroute.estimate.config import EstimateConfig
from dualroute.model.config import ModelConfig
from dualroute.training.memory.parts import zero_stage
from dualroute.training.parallel.deepspeed_config import check_hpz

GB = 1e9


@dataclass(frozen=True)
class Times:
    """Seconds of one optimizer step on one GPU, and of one checkpoint."""

    arithmetic: float
    launches: float
    gradients_and_weights: float  # traffic that can hide behind the arithmetic
    texts: float  # all-to-alls of sequence parallelism, which cannot
    waited: float  # of gradients_and_weights, what does not hide
    checkpoint: float
    micro_steps: int

    @property
    def step(self) -> float:
        """Arithmetic or launches, whichever is longer, and what is waited for."""
        return max(self.arithmetic, self.launches) + self.waited + self.texts


def accumulation(config: EstimateConfig) -> int:
    """Micro-steps of an optimizer step.

    Raises:
        UserError: The batch, or the second partition, does not divide over the GPUs.
    """
    check_hpz(config.parallel.zero_hpz_partition_size, zero_stage(config, config.gpus) or 0, config.gpus)
    groups = config.gpus // config.parallel.sequence_parallel
    train = config.train
    return derive_accumulation(train.tokens_per_batch, config.data.context, train.micro_batch, groups)


def times(
    config: EstimateConfig,
    model: ModelConfig,
    parameters: int,
    flops_per_token: float,
    trained: int | None = None,
) -> Times:
    """Of a run with these settings.

    Args:
        config: With the assumptions.
        model: Resolved.
        parameters: Of the model.
        flops_per_token: Forward and backward, nothing computed twice; a teacher's besides.
        trained: Parameters that have gradients; null means all.

    Raises:
        UserError: As :func:`accumulation`.
    """
    trained = parameters if trained is None else trained
    micro_steps = accumulation(config)
    train, again = config.train, _computed_again(config, model)
    flops = flops_per_token * train.tokens_per_batch / config.gpus * (1 + again / 3)
    arithmetic = flops / (config.peak_tflops * 1e12 * config.mfu)
    per_layer = config.launches_forward * (1 + again) + config.launches_backward
    launches = micro_steps * model.num_layers * per_layer * config.launch_microseconds * 1e-6
    traffic = _gradients_and_weights(config, parameters, trained, micro_steps)
    waited = max(0.0, traffic - config.overlap * arithmetic)
    return Times(
        arithmetic,
        launches,
        traffic,
        _texts(config, model, micro_steps, again),
        waited,
        _checkpoint(config, parameters, trained),
        micro_steps,
    )


def _computed_again(config: EstimateConfig, model: ModelConfig) -> float:
    """Share of the forward pass that is run a second time."""
    what = config.train.activation_checkpointing
    if what == "none":
        return 0.0
    share = -(-model.num_layers // config.train.recompute_every_layers) / model.num_layers
    if what == "full":
        return share
    feed_forward = 3 * model.dim * sum(model.ffn_dims) / model.num_layers
    attention = 2 * model.dim * _width_of_heads(model)
    return share * feed_forward / (feed_forward + attention)


def _width_of_heads(model: ModelConfig) -> int:
    """Of all query heads and all key heads together."""
    assert model.head_dim is not None
    assert model.num_kv_heads is not None
    return model.head_dim * (model.num_heads + model.num_kv_heads)


def _bandwidth(config: EstimateConfig, ranks: int) -> float:
    inside = ranks <= config.gpus_per_node
    return (config.node_bandwidth if inside else config.network_bandwidth) * GB


def _gathered(config: EstimateConfig, size: float, ranks: int) -> float:
    """Seconds of an all-gather or a reduce-scatter of ``size`` bytes in all over ``ranks`` neighbours."""
    return size * (ranks - 1) / ranks / _bandwidth(config, ranks)


def _gradients_and_weights(config: EstimateConfig, parameters: int, trained: int, micro_steps: int) -> float:
    stage, ranks, parallel = zero_stage(config, config.gpus), config.gpus, config.parallel
    half = config.train.precision != "32"
    # without DeepSpeed and at stage 0, 16-bit arithmetic keeps float32 weights, but for bf16-true
    narrow = config.train.precision == "bf16-true" or (half and bool(stage))
    of_weights = 2.0 if narrow else 4.0
    weights = (parameters if stage == 3 else trained) * of_weights  # after a step only what has changed
    gradients = trained * (2.0 if narrow and parallel.gradient_reduction == "auto" else 4.0)
    if not stage:
        return 2 * _gathered(config, gradients, ranks)  # all-reduce, once a step
    if stage == 1:
        return _gathered(config, gradients, ranks) + _gathered(config, weights, ranks)
    if stage == 2:
        return micro_steps * _gathered(config, gradients, ranks) + _gathered(config, weights, ranks)
    hpz = parallel.zero_hpz_partition_size
    forward = _gathered(config, weights, ranks)
    backward = _gathered(config, weights, hpz if hpz > 1 else ranks)
    return micro_steps * (forward + backward + _gathered(config, gradients, ranks))


def _texts(config: EstimateConfig, model: ModelConfig, micro_steps: int, again: float) -> float:
    """All-to-alls of Ulysses: queries, keys, values and outputs, forward and backward."""
    ranks = config.parallel.sequence_parallel
    if ranks == 1:
        return 0.0
    tokens = config.data.context * config.train.micro_batch / ranks
    size = 4 if config.train.precision == "32" else 2
    per_layer = tokens * 2 * _width_of_heads(model) * size
    return micro_steps * model.num_layers * (2 + again) * _gathered(config, per_layer, ranks)


def _checkpoint(config: EstimateConfig, parameters: int, trained: int) -> float:
    """Written and hashed: moments and float32 weights by those who hold them, the weights by one rank."""
    half = config.train.precision != "32"
    writers = config.gpus if zero_stage(config, config.gpus) else 1
    state = 12.0 * trained
    shared = max(state / (config.storage_bandwidth * GB), state / writers / (config.rank_bandwidth * GB))
    return shared + parameters * (2.0 if half else 4.0) / (config.rank_bandwidth * GB)
