"""``dualroute estimate``: memory per GPU, longest context, times and hours, before a GPU is booked.

- In: the same configuration as ``dualroute pretrain`` reads, and the machines in mind.
- Here: weights, gradients and optimizer states are counted; what a layer keeps for its backward pass is
  measured on one real layer, on the CPU; the longest context is what the rest of the memory has room for.
  Times are sums of assumptions (``estimate/times.py``); none of them was measured on a GPU.
- Next: ``dualroute pretrain`` with that configuration.

Nothing in it grows faster than the context.  Routed attention keeps its inputs, its
output and a few numbers a token, so twice the memory means twice the context.  Left out: fragmentation, the
buckets of DeepSpeed and NCCL, and the tiles in flight; ``headroom`` is kept free for them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from dualroute.attention import Layout
from dualroute.data.manifest import MANIFEST_FILE, Manifest
from dualroute.errors import printable
from dualroute.estimate.config import EstimateConfig
from dualroute.estimate.times import Times, accumulation, times, zero_stage
from dualroute.estimate.trained import counted, trained_model
from dualroute.model import DualRoutingTransformer, ModelConfig
from dualroute.training.finetuning.adapted import adapted_layers
from dualroute.training.finetuning.adapters import add_adapters
from dualroute.training.finetuning.config import StrategyConfig
from dualroute.training.parallel.environment import World
from dualroute.training.parallel.sequence import check_sequence_parallel
from dualroute.training.step.optim.groups import matrices_of

GIB = 2**30
#: Where neither the configuration nor the data say: that of configs/prepare/fineweb_edu.yaml.
USUAL_VOCABULARY = 32_000
SAMPLE_TOKENS = 1024  # of the layer that is measured


@dataclass
class Estimate:
    """Bytes are those of one GPU."""

    parameters: int
    trained: int  # of them; gradients and the optimizer are of these alone
    weights: float
    gradients: float
    optimizer: float
    kept_per_token: float  # by all layers together
    work_per_token: float  # of the layer whose backward pass is running
    longest_context: int  # tokens of one text, micro_batch 1, 0 where not even the model fits
    flops_per_token: float
    times: Times
    checkpoints: int
    hours: float
    mfu: float  # that follows: model FLOPs over what the peak would do in the time of a step
    second_partition: float = 0.0

    @property
    def states(self) -> float:
        """Bytes that do not depend on the context."""
        return self.weights + self.gradients + self.optimizer + self.second_partition


def estimate(config: EstimateConfig) -> Estimate:
    """Count and measure.

    Raises:
        UserError: The data are damaged, or ranks, heads and batch do not divide.
    """
    config = _with_vocabulary(config)
    ranks = config.parallel.sequence_parallel
    check_sequence_parallel(ranks, World(world_size=config.gpus), config.model)
    accumulation(config)
    whole = trained_model(config)
    model = whole.config
    count = counted(whole)
    parameters, trained = count.held, count.trained
    matrices = sum(m.numel for _, m in matrices_of(whole)) if config.optim.name == "muon" else 0
    of_weights, of_gradients, of_optimizer = _state_bytes(config, matrices / max(trained, 1))
    weights, gradients, optimizer = parameters * of_weights, trained * of_gradients, trained * of_optimizer
    kept, work = _activation_bytes(config, model, _a_trained_layer(whole))
    kept *= 1 - count.layers_without_gradients / model.num_layers
    hpz = config.parallel.zero_hpz_partition_size
    second = parameters * (4.0 if config.train.precision == "32" else 2.0) / hpz if hpz > 1 else 0.0
    context = config.data.context
    flops = whole.flops_per_token(context) - 2.0 * count.frozen_matrices  # no gradient of theirs
    took = times(config, model, parameters, flops, trained)
    steps = config.train.total_steps
    checkpoints = -(-steps // config.checkpoint.every_steps)
    hours = (steps * took.step + checkpoints * took.checkpoint) / 3600
    mfu = flops * config.train.tokens_per_batch / (config.gpus * config.peak_tflops * 1e12 * took.step)
    result = Estimate(
        parameters,
        trained,
        weights,
        gradients,
        optimizer,
        kept,
        work,
        0,
        flops,
        took,
        checkpoints,
        hours,
        mfu,
        second,
    )
    room = config.gpu_memory * GIB * (1 - config.headroom) - result.states
    result.longest_context = max(0, math.floor(room / ((kept + work) / ranks)))
    return result


def _with_vocabulary(config: EstimateConfig) -> EstimateConfig:
    """With the vocabulary of the data, or one of the usual size while there are none."""
    if config.model.vocab_size is not None:
        return config
    folder = Path(config.data.path)
    size = USUAL_VOCABULARY
    if (folder / MANIFEST_FILE).is_file():
        size = Manifest.load(folder).tokenizer.vocab_size
    else:
        print(
            printable(
                f"there are no shards in {folder} yet: a vocabulary of {size:,} is assumed "
                f"(--model.vocab_size gives another)"
            )
        )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size))


def _state_bytes(config: EstimateConfig, of_muon: float) -> tuple[float, float, float]:
    """Bytes per parameter of weights, gradients and optimizer on one rank.

    The share ``of_muon`` of the trained parameters has one running mean, the others AdamW's two.
    """
    means = 2.0 - of_muon
    half = config.train.precision != "32"
    stage = zero_stage(config)
    if stage is None:
        size = 2.0 if config.train.precision == "bf16-true" else 4.0
        return size, size, means * size
    shard = config.gpus
    masters = 4.0 if half and stage else 0.0  # fp32 weights that a 16-bit model is stepped through
    weights = (2.0 if masters else 4.0) / (shard if stage == 3 else 1)
    gradients = 4.0 / (shard if stage >= 2 else 1)
    optimizer = (4.0 * means + masters) / (shard if stage >= 1 else 1)
    if config.parallel.offload_optimizer:
        gradients, optimizer = 0.0, 0.0
    if config.parallel.offload_parameters:
        weights = 0.0
    return weights, gradients, optimizer


def _activation_bytes(
    config: EstimateConfig, model: ModelConfig, strategy: StrategyConfig
) -> tuple[float, float]:
    """Bytes per token that all layers keep, and that the layer in work needs on top: what it computes again,
    and gradients of about the size of what they belong to."""
    train = config.train
    dtype = torch.float32 if train.precision == "32" else torch.bfloat16
    layer, feed_forward = _measured_layer(model, dtype, strategy)
    size = torch.empty((), dtype=dtype).element_size()
    recomputed = -(-model.num_layers // train.recompute_every_layers)
    plain = model.num_layers - recomputed
    if train.activation_checkpointing == "full":
        kept, work = recomputed * model.dim * size + plain * layer, 2 * layer
    elif train.activation_checkpointing == "feed_forward":
        kept = recomputed * (layer - feed_forward + model.dim * size) + plain * layer
        work = layer + feed_forward
    else:
        kept, work = model.num_layers * layer, layer
    if train.offload_activations:  # one layer's in use, one's on its way, and the last one's
        kept *= min(1.0, 3 / model.num_layers)
    return kept, work


def _measured_layer(model: ModelConfig, dtype: torch.dtype, strategy: StrategyConfig) -> tuple[float, float]:
    """Bytes per token that one layer keeps for its backward pass, and its feed-forward alone.

    With the adapters of ``strategy``, which names them as those of layer 0."""
    # of interleaved layers the first, a local one; a dense one keeps as much
    number = 0 if model.global_layers is None else model.global_layers[0]
    one = dataclasses.replace(model.of_layer(number), num_layers=1, vocab_size=8, dense_every=1)
    small = DualRoutingTransformer(one)
    if strategy.adapter != "none":
        add_adapters(small, strategy, 0)
    block = small.to(dtype).layers[0]
    tokens = min(SAMPLE_TOKENS, model.max_context)
    layout = Layout.build(1, tokens, model.block)
    rows = torch.randn(1, tokens, model.dim, dtype=dtype, requires_grad=True)
    whole = _kept_bytes(block, lambda: block(rows, layout=layout))
    feed_forward = _kept_bytes(block, lambda: block.ffn(rows))  # type: ignore[operator]
    return whole / tokens, feed_forward / tokens


def _a_trained_layer(whole: DualRoutingTransformer) -> StrategyConfig:
    """The adapters of the layer of ``whole`` that has most of them, as those of layer 0."""
    given: StrategyConfig | None = getattr(whole, "adapter_config", None)
    by_layer: dict[str, list[str]] = {}
    for name in adapted_layers(whole):
        if name.startswith("layers."):
            by_layer.setdefault(name.split(".")[1], []).append(name)
    if given is None or not by_layer:
        return StrategyConfig()
    most = max(by_layer.values(), key=len)
    names = [".".join(["layers", "0", *name.split(".")[2:]]) for name in most]
    return dataclasses.replace(given, targets=names)


def _kept_bytes(module: torch.nn.Module, run: Callable[[], torch.Tensor]) -> int:
    weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, int] = {}
    alive = []

    def pack(saved: torch.Tensor) -> torch.Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(saved)  # or a later tensor could take its place and hide it
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        run()
    return sum(kept.values())


def estimate_command(config: EstimateConfig) -> None:
    """Print the estimate as two tables, of memory and of time."""
    result = estimate(config)
    title = f"{config.gpus:,} GPU(s) of {config.gpu_memory:g} GiB: estimates, not measurements"
    console = Console()
    for head, rows in (("memory per GPU", _memory(config, result)), ("time", _time(config, result))):
        table = Table(head, "", title=title)
        for name, value in rows.items():
            table.add_row(name, value)
        console.print(table)


def _memory(config: EstimateConfig, result: Estimate) -> dict[str, str]:
    context = config.data.context * config.train.micro_batch / config.parallel.sequence_parallel
    activations = (result.kept_per_token + result.work_per_token) * context
    total = result.states + activations
    fits = total <= config.gpu_memory * GIB * (1 - config.headroom)
    second = {"second partition of the weights": result.second_partition} if result.second_partition else {}
    sizes = {
        "weights": result.weights,
        **second,
        "gradients": result.gradients,
        "optimizer": result.optimizer,
        f"activations, {config.train.micro_batch} x {config.data.context:,} tokens": activations,
    }
    frozen = result.trained < result.parameters
    trained = {"of these trained": f"{result.trained / 1e6:,.1f} M"} if frozen else {}
    return {
        "parameters": f"{result.parameters / 1e6:,.1f} M",
        **trained,
        **{name: f"{size / GIB:.2f} GiB" for name, size in sizes.items()},
        "in all": f"{total / GIB:.2f} GiB" + ("" if fits else "  DOES NOT FIT"),
        "longest context, micro_batch 1": f"{result.longest_context:,} tokens",
    }


def _time(config: EstimateConfig, result: Estimate) -> dict[str, str]:
    """Each part of a step, with what is assumed of it."""
    took, parallel = result.times, config.parallel
    of_a_run = 100 * result.checkpoints * took.checkpoint / 3600 / result.hours
    seconds = {
        f"arithmetic, assumed at {config.mfu:.0%} of {config.peak_tflops:g} TFLOP/s": took.arithmetic,
        f"launches, {config.launches_forward} + {config.launches_backward} a layer of "
        f"{config.launch_microseconds:g} us": took.launches,
        f"gradients and weights, {config.network_bandwidth:g} GB/s between nodes, {config.node_bandwidth:g} "
        f"inside": took.gradients_and_weights,
        f"of that not behind {config.overlap:.0%} of the arithmetic": took.waited,
    }
    if parallel.sequence_parallel > 1:
        seconds[f"texts among {parallel.sequence_parallel} ranks"] = took.texts
    return {
        "training FLOPs per token": f"{result.flops_per_token / 1e9:,.2f} G",
        "micro-steps of a step": f"{took.micro_steps:,}",
        **{name: f"{value:.3f} s" for name, value in seconds.items()},
        "one step": f"{took.step:.3f} s",
        "model FLOPs utilisation that follows": f"{result.mfu:.1%}",
        f"one checkpoint, {config.storage_bandwidth:g} GB/s in all, {config.rank_bandwidth:g} a rank": (
            f"{took.checkpoint:.1f} s"
        ),
        f"{config.train.total_steps:,} steps and {result.checkpoints:,} checkpoints ({of_a_run:.0f} %)": (
            f"{result.hours:,.1f} hours"
        ),
    }
