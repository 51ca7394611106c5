"""What a model does on real text: the statistics by which pruning decides.

In: a model and windows of its training shards.  Here: hooks listen while the windows pass through, nothing is
changed.  Out: :class:`Statistics`, which :mod:`~dualroute.compress.importance` turns into scores and
:mod:`~dualroute.compress.slicing` into corrected weights.

The inputs of a projection are kept as their Gram matrix E[a aᵀ], not as a list of
activations.  It holds the energy of each channel on its diagonal, and beside it all that is needed to let the
channels that stay make up for those that go, in a size that does not grow with the text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualroute import __version__
from dualroute.data.module import ShardDataModule
from dualroute.errors import UserError
from dualroute.evaluate.load import Loaded, load
from dualroute.evaluate.perplexity import score_batches
from dualroute.model import DualRoutingTransformer
from dualroute.model.checkpoint.format import find_checkpoint, refuse_quantized
from dualroute.model.checkpoint.lineage import derived

Batch = dict[str, Tensor]
_INHERITED = ("context", "data_fingerprint")


@dataclass
class LayerStatistics:
    """Means over tokens in one layer.

    Attributes:
        ffn_gram: (ffn_dim, ffn_dim), of the inputs of ``ffn.down``.
        heads_gram: (heads · head_dim, heads · head_dim), of the inputs of ``attention.out_proj``.
        influence: 1 - cos(input, output) of the block, "block influence" (Men et al. 2024,
            https://arxiv.org/abs/2403.03853, eq. 1).
    """

    ffn_gram: Tensor
    heads_gram: Tensor
    influence: float


@dataclass
class Statistics:
    """Means over the tokens of a calibration.

    Attributes:
        layers: Of each layer.
        norm_inputs: By name of the norm, (dim,) E[x²] of what comes in.
        norm_outputs: By name of the norm, (dim,) E[x²] of what goes out.
    """

    layers: list[LayerStatistics]
    norm_inputs: dict[str, Tensor]
    norm_outputs: dict[str, Tensor]


class CalibrationOptions(Protocol):
    """What the commands that calibrate have in common."""

    checkpoint: str
    output: str
    data: str
    calibration_tokens: int
    context: int | None
    batch_size: int
    seed: int
    device: str


def calibrate(options: CalibrationOptions) -> tuple[Loaded, list[Batch], int]:
    """The checkpoint, windows to calibrate it on, and their length in tokens.

    Raises:
        UserError: The output exists already, the model is not causal or has a task's head, or checkpoint,
            data and context do not fit together.
    """
    if Path(options.output).exists():
        raise UserError(f"--output {options.output} exists already: choose another folder")
    refuse_quantized(
        find_checkpoint(options.checkpoint), "only floats are pruned; give the checkpoint it was made from"
    )
    loaded = load(options.checkpoint, options.device)
    loaded.model.config.require_causal("the loss that decides what is pruned")
    if loaded.model.config.task_head is not None:
        raise UserError(
            f"{options.checkpoint} answers a task (finetune), and the loss of the next token decides what is "
            f"pruned: prune the model that the task began with, and finetune the pruned one (--init_from)"
        )
    limit = loaded.model.config.max_context
    context = options.context or int(loaded.checkpoint.metadata.get("context", limit))
    if context > limit:
        raise UserError(f"context {context} is longer than the model's max_context {limit}")
    batches = calibration_batches(
        loaded, options.data, options.calibration_tokens, context, options.batch_size, options.seed
    )
    return loaded, batches, context


def calibration_batches(
    loaded: Loaded, folder: str | Path, tokens: int, context: int, batch_size: int, seed: int
) -> list[Batch]:
    """Windows of the training split, drawn by the same plan as a training with this seed.

    Raises:
        UserError: There are no such shards, or they were made with another tokenizer.
    """
    windows = -(-tokens // context)
    batch_size = min(batch_size, windows)
    data = ShardDataModule(folder, context, batch_size, batch_size * context, seed=seed)
    if data.manifest.tokenizer.sha256 != loaded.tokenizer.sha256:
        raise UserError(
            f"{folder} was made with another tokenizer than {loaded.checkpoint.folder}: calibrate on data "
            f"prepared with --tokenizer {loaded.tokenizer.path}"
        )
    data.prepare_data()
    return list(islice(data.train_dataloader(), -(-windows // batch_size)))


def described(loaded: Loaded, operation: str, **more: Any) -> dict[str, Any]:
    """What ``checkpoint.json`` says of a checkpoint that ``operation`` made from ``loaded``."""
    kept = {name: value for name, value in loaded.checkpoint.metadata.items() if name in _INHERITED}
    return {**kept, **derived(loaded.checkpoint, operation), "dualroute": __version__, **more}


def loss_on(model: DualRoutingTransformer, batches: list[Batch], device: torch.device) -> float:
    """Mean next-token loss, nats."""
    total, count = score_batches(model, batches, device)
    return total / max(count, 1)


@torch.no_grad()
def measure(model: DualRoutingTransformer, batches: list[Batch], device: torch.device) -> Statistics:
    """Statistics of ``model`` on ``batches``; padding does not count."""
    means: dict[str, Tensor] = {}
    tokens = torch.zeros((), dtype=torch.long)
    valid = torch.empty(0)

    def add(name: str, value: Tensor) -> None:
        means[name] = means[name] + value if name in means else value

    def rows(hidden: Tensor) -> Tensor:
        return hidden[valid].float()  # (tokens, width)

    def gram(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            activations = rows(inputs[0])
            add(name, activations.T @ activations)

        return hook

    def energies(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            add(f"{name} in", rows(inputs[0]).square().sum(0))
            add(f"{name} out", rows(output).square().sum(0))

        return hook

    def influence(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            add(name, (1 - F.cosine_similarity(rows(inputs[0]), rows(output), dim=-1)).sum())

        return hook

    norms = [name for name, module in model.named_modules() if name.endswith("norm") and _is_residual(name)]
    with _hooks() as hooks:
        for index, layer in enumerate(model.layers):
            block: Any = layer
            hooks.append(block.ffn.down.register_forward_pre_hook(gram(f"ffn {index}")))
            hooks.append(block.attention.out_proj.register_forward_pre_hook(gram(f"heads {index}")))
            hooks.append(block.register_forward_hook(influence(f"influence {index}")))
        hooks += [model.get_submodule(name).register_forward_hook(energies(name)) for name in norms]
        for batch in batches:
            valid = (batch["segment_ids"] != 0).to(device)
            tokens += int(valid.sum())
            inputs: Any = {key: batch[key].to(device) for key in ("input_ids", "segment_ids", "positions")}
            model.hidden_states(**inputs)
    means = {name: total / tokens.to(total.device) for name, total in means.items()}
    layers = [
        LayerStatistics(means[f"ffn {i}"], means[f"heads {i}"], float(means[f"influence {i}"]))
        for i in range(len(model.layers))
    ]
    return Statistics(
        layers, {name: means[f"{name} in"] for name in norms}, {name: means[f"{name} out"] for name in norms}
    )


def _is_residual(name: str) -> bool:
    """Not the norms of queries and keys, which are as wide as a head."""
    return not name.endswith(("query_norm", "key_norm"))


@contextmanager
def _hooks() -> Iterator[list[Any]]:
    handles: list[Any] = []
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()
