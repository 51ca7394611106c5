"""The memory of a training at its peak, by part: what one process, or one GPU, holds.

In: the configuration of a run and the number of ranks.  Here: bytes, counted from shapes.  Next:
``dualroute estimate`` prints them before a run, and :mod:`dualroute.training.memory.check` compares them with
what a run has used.  No torch is imported here.

The peak lies at the end of a forward pass, or in the backward pass where layers are computed again:
everything that the layers keep for the backward pass is there, and the loss with a chunk of its logits;
from the second step on the optimizer's state and the gradients of the step before as well. What a layer
keeps is a sum over the tensors that autograd saves, which
``tests/training/memory`` compares with what it does save.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from dualroute.model.config import ModelConfig
from dualroute.model.cost.flops import routed
from dualroute.model.cost.shapes import heads_of
from dualroute.training.config import PretrainConfig
from dualroute.training.memory.trained import Count, counted
from dualroute.training.parallel.deepspeed_config import DEFAULT_ZERO_STAGE

GIB, MIB = 2**30, 2**20
#: Bytes of logits at once (``training/step/losses.py``).
CHUNK_BYTES = {"cpu": 32 * MIB, "cuda": 256 * MIB}
_LANES = 16  # heads are filled up to a multiple of it

# What cannot be counted.  On a CPU: code that is loaded during the first step, threads, files in the cache of
# their readers; on a GPU: CUDA's context, buffers of NCCL.
BUFFERS = {"cpu": 48 * MIB, "cuda": 600 * MIB}
_OF_NCCL = 400 * MIB
_BUCKET = {"cpu": 2**24, "cuda": 200_000_000}  # numbers in a bucket of DeepSpeed; two of them exist
#: Holes between what lives, as a share of what comes and goes.
FRAGMENTATION = {"cpu": 0.03, "cuda": 0.05}
#: Those of the C library's heap where layers are computed again, in activations of a layer: measured.
_HOLES_OF_RECOMPUTATION = 1.2


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at the peak of a step.

    Attributes:
        weights: In the precision in which they are kept, and their copies in that of the arithmetic.
        second_partition: Of the weights, under ``parallel.zero_hpz_partition_size``.
        gradients: Those of the step before, or those that are being summed.
        optimizer: Its moments, and float32 weights beside 16-bit ones.
        activations: What the layers keep for the backward pass, and what the layer in work needs besides.
        logits: A chunk of them, and the gradients that the loss makes in its forward pass.
        teacher: Of a distillation: its weights and one of its layers.
        buffers: Of the libraries.
        fragmentation: Holes.
    """

    weights: float
    second_partition: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    teacher: float
    buffers: float
    fragmentation: float

    @property
    def total(self) -> float:
        """All of it."""
        return sum(getattr(self, field.name) for field in fields(self))

    @property
    def states(self) -> float:
        """What does not depend on the tokens."""
        return self.weights + self.second_partition + self.gradients + self.optimizer


@dataclass(frozen=True)
class Sizes:
    """Bytes of a number: in the residual stream and its norms, and in products and attention."""

    stream: int
    products: int
    casts: bool  # autocast copies what enters each product, and the weights


def zero_stage(config: PretrainConfig, ranks: int) -> int | None:
    """What is sharded; null without DeepSpeed."""
    strategy = config.parallel.strategy
    if strategy in ("ddp", "single") or (strategy == "auto" and ranks == 1):
        return None
    stage = config.parallel.zero_stage
    return DEFAULT_ZERO_STAGE if stage is None else stage


def sizes_of(precision: str, stage: int | None) -> Sizes:
    """Of a run's precision under a ZeRO stage."""
    if precision == "32":
        return Sizes(4, 4, False)
    if precision == "bf16-true" or stage:  # the model itself is of 16 bits
        return Sizes(2, 2, False)
    return Sizes(4, 2, True)


def memory_of(
    config: PretrainConfig,
    ranks: int = 1,
    device: str = "cuda",
    teacher: float = 0.0,
    count: Count | None = None,
) -> Memory:
    """The peak of one rank.

    Args:
        config: Of the run; the vocabulary is known.
        ranks: Processes, one GPU each.
        device: cpu or cuda.
        teacher: Bytes of a teacher.
        count: :func:`~dualroute.training.memory.trained.counted` of ``config``, where it is known.

    Raises:
        UserError: As :func:`~dualroute.training.memory.trained.counted`.
    """
    count = counted(config) if count is None else count
    stage, model, train = zero_stage(config, ranks), count.model, config.train
    sizes = sizes_of(train.precision, stage)
    of_weights, of_gradients, of_optimizer = state_bytes(config, ranks, count)
    hpz = config.parallel.zero_hpz_partition_size
    second = count.held * (4.0 if train.precision == "32" else 2.0) / hpz if hpz > 1 else 0.0
    copies = 2.0 * count.matrices if sizes.casts else 0.0
    tokens = config.data.context * train.micro_batch / config.parallel.sequence_parallel
    kept, work = activation_bytes(config, count, ranks)
    activations = tokens * (kept + work)
    logits = _logits(config, sizes, tokens, device)
    holes = 0.0
    if device == "cpu" and train.activation_checkpointing != "none":
        holes = _HOLES_OF_RECOMPUTATION * tokens * max(map(sum, _by_layer(config, count, sizes)))
    buffers = float(BUFFERS[device])
    if stage is not None:
        buffers += 2 * _reduced_in(config) * min(_BUCKET[device], count.trained)
    if stage == 3:  # a layer's weights are gathered
        buffers += sizes.products * count.matrices / model.num_layers
    if ranks > 1 and device == "cuda":
        buffers += _OF_NCCL
    return Memory(
        weights=count.held * of_weights + copies,
        second_partition=second,
        gradients=count.trained * of_gradients,
        optimizer=count.trained * of_optimizer,
        activations=activations,
        logits=logits,
        teacher=teacher,
        buffers=buffers,
        fragmentation=FRAGMENTATION[device] * (activations + logits) + holes,
    )


def _reduced_in(config: PretrainConfig) -> int:
    return 4 if config.train.precision == "32" else 2


def state_bytes(config: PretrainConfig, ranks: int, count: Count) -> tuple[float, float, float]:
    """Bytes per parameter of weights, gradients and optimizer on one rank.

    Matrices that Muon steps have one running mean, all else AdamW's two.
    """
    of_muon = count.trained_matrices / count.trained if config.optim.name == "muon" else 0.0
    means = 2.0 - of_muon
    half, stage = config.train.precision != "32", zero_stage(config, ranks)
    if stage is None:
        size = 2.0 if config.train.precision == "bf16-true" else 4.0
        return size, size, means * size
    masters = 4.0 if half and stage else 0.0  # fp32 weights that a 16-bit model is stepped through
    weights = (2.0 if masters else 4.0) / (ranks if stage == 3 else 1)
    gradients = 4.0 / (ranks if stage >= 2 else 1)
    optimizer = (4.0 * means + masters) / (ranks if stage >= 1 else 1)
    if config.parallel.offload_optimizer:
        gradients, optimizer = 0.0, 0.0
    if config.parallel.offload_parameters:
        weights = 0.0
    return weights, gradients, optimizer


def activation_bytes(config: PretrainConfig, count: Count, ranks: int = 1) -> tuple[float, float]:
    """Bytes per token that all layers keep, and that the layer in work needs on top at the worst moment."""
    model, train = count.model, config.train
    sizes = sizes_of(train.precision, zero_stage(config, ranks))
    layers = _by_layer(config, count, sizes)
    extra = count.adapter_width * sizes.products
    whole = [attention + feed_forward + extra for attention, feed_forward in layers]
    most = max(whole)  # gradients are of about the size of what they belong to
    kept = peak = 0.0
    for index, (attention, feed_forward) in enumerate(layers):
        if index < count.layers_without_gradients:
            continue
        again = index % train.recompute_every_layers == 0
        if again and train.activation_checkpointing == "full":
            kept += model.dim * sizes.stream
            computed_again = whole[index]
        elif again and train.activation_checkpointing == "feed_forward":
            kept += attention + extra + (model.dim * sizes.stream if sizes.casts else 0)
            computed_again = feed_forward
        else:
            kept += whole[index]
            computed_again = 0.0
        peak = max(peak, kept + computed_again + most)  # by then the layers above have given theirs back
    work = peak - kept if kept else most
    if train.offload_activations:  # one layer's in use, one's on its way, and the last one's
        kept *= min(1.0, 3 / model.num_layers)
    # of the whole model: the last norm, and the rotary tables, which layers share
    assert model.head_dim is not None
    kept += 2 * model.dim * sizes.stream + model.head_dim * 4
    return kept, work


def _by_layer(config: PretrainConfig, count: Count, sizes: Sizes) -> list[tuple[float, float]]:
    """`layer_bytes` of each."""
    kinds: dict[tuple[object, ...], tuple[float, float]] = {}
    layers = []
    for layer in count.layers:
        # in nothing else do they differ
        kind = (heads_of(layer), layer.top_k, layer.ffn_dim, layer.attention)
        if kind not in kinds:
            kinds[kind] = layer_bytes(layer, sizes, config.data.context)
        layers.append(kinds[kind])
    return layers


def layer_bytes(layer: ModelConfig, sizes: Sizes, context: int) -> tuple[float, float]:
    """Bytes per token that autograd keeps of a layer: attention and feed-forward, each with its norm.

    A norm keeps its input and what it has normalised, in float32 also where the model is of 16 bits, and one
    number a token; a product what enters it; a route its queries, keys, values, outputs and a number for each
    row.
    """
    assert layer.head_dim is not None
    assert layer.ffn_dim is not None
    size, dim, head_dim = sizes.products, layer.dim, layer.head_dim
    padded = -(-head_dim // _LANES) * _LANES
    norm = 2 * dim * 4 + 4.0
    entering = dim * size
    routes = [heads for heads in heads_of(layer) if heads]
    attention = norm + entering * (len(routes) if sizes.casts else 1)
    for heads in routes:
        kv_heads = heads // layer.heads_per_group
        attention += ((heads + 2 * kv_heads) * head_dim + heads * padded) * size + 4 * heads
        if layer.qk_norm:
            read = heads + (kv_heads if size == 2 else 2 * kv_heads)  # in float32 all that was projected
            attention += 4 * head_dim * (read + heads + kv_heads) + 4 * (heads + kv_heads)
    if routed(layer, context):
        kv_heads = heads_of(layer)[0] // layer.heads_per_group
        of_far = {"second_order": 3, "first_order": 2, "none": 0}[layer.far_summary]
        attention += kv_heads * (4 * (1 + layer.top_k) + 4 * of_far * head_dim / layer.block)
    heads = sum(routes)
    attention += heads * head_dim * size  # what enters the output projection
    if layer.gate:
        attention += heads * head_dim * size + 2 * heads * size + (entering if sizes.casts else 0)
    feed_forward = norm + entering * (2 if sizes.casts else 1) + 4 * layer.ffn_dim * size
    return attention, feed_forward


def _logits(config: PretrainConfig, sizes: Sizes, tokens: float, device: str) -> float:
    """Of the loss at the end of the forward pass: a chunk of logits, the gradient of the states that enter
    it, and that of the vocabulary's matrix, in float32."""
    model = config.model
    states = tokens * model.dim * sizes.stream
    if model.task_head is not None:
        return states + 2 * tokens * model.task_head.outputs * 4
    vocabulary = model.vocab_size or 0
    rows = min(tokens, max(1.0, CHUNK_BYTES[device] // (vocabulary * 4)))
    rows = tokens / max(1, -(-tokens // rows))  # in equal chunks
    chunk = rows * vocabulary * (4 + (2 if sizes.products == 2 else 0)) + rows * model.dim * sizes.products
    narrow = 2.0 * vocabulary * model.dim if sizes.casts else 0.0  # the matrix in the arithmetic's precision
    return states + chunk + 4.0 * vocabulary * model.dim + narrow
