"""What a model does on real text: the statistics by which pruning decides.

In: a model and windows of its training shards, or rows of its task.  Here: hooks listen while they pass
through, nothing is changed.  Out: :class:`Statistics`, which :mod:`~dualroute.compress.importance` turns
into scores and :mod:`~dualroute.compress.slicing` into corrected weights.

The inputs of a projection are kept as their Gram matrix E[a aᵀ], not as a list of
activations.  It holds the energy of each channel on its diagonal, and beside it all that is needed to let the
channels that stay make up for those that go, in a size that does not grow with the text.
"""

from __future__ import annotations

import random
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
from dualroute.evaluate.perplexity import mask_share, score_batches
from dualroute.model import DualRoutingTransformer
from dualroute.model.checkpoint.format import find_checkpoint, refuse_quantized
from dualroute.model.checkpoint.lineage import derived
from dualroute.tasks.answer import Answerer, window_batches
from dualroute.tasks.data.examples import Example, Examples
from dualroute.tasks.evaluate import training_rows, usable_rows
from dualroute.tasks.kind import Kind
from dualroute.tasks.module import task_outputs

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


#: (model, batches) → mean loss in nats, of what the model was trained for
Loss = Callable[[DualRoutingTransformer, list[Batch]], float]


@dataclass
class Calibrated:
    """A checkpoint, and what it is measured on.

    Attributes:
        loaded: The model.
        batches: Windows to calibrate it on.
        context: Tokens of a window.
        loss: What its training made small.
        answerer: Of a model with a task's head, which can be asked for the task's metric.
        source: The rows that were given to calibrate it on; null for those of its training, and for shards.
    """

    loaded: Loaded
    batches: list[Batch]
    context: int
    loss: Loss
    answerer: Answerer | None = None
    source: str | None = None


class CalibrationOptions(Protocol):
    """What the commands that calibrate have in common."""

    checkpoint: str
    output: str
    calibration_tokens: int
    context: int | None
    batch_size: int
    seed: int
    device: str

    @property
    def data(self) -> str | None:
        """Shards, or rows of a task."""


def calibrate(options: CalibrationOptions) -> Calibrated:
    """The checkpoint, and windows or rows to calibrate it on.

    Raises:
        UserError: The output exists already, the model reads no ids, or checkpoint, data and context do not
            fit together.
    """
    if Path(options.output).exists():
        raise UserError(f"--output {options.output} exists already: choose another folder")
    found = find_checkpoint(options.checkpoint)
    refuse_quantized(found, "only floats are pruned; give the checkpoint it was made from")
    loaded = load(options.checkpoint, options.device)
    loaded.model.config.require_tokens("the statistics that decide what is pruned")
    if loaded.model.config.parts is not None:
        raise UserError(
            f"{options.checkpoint} has parts of an encoder from elsewhere (model.parts), which nothing here "
            f"can cut: quantize it instead"
        )
    if loaded.model.config.task_head is not None:
        return _of_task(options)
    if options.data is None:
        raise UserError("give --data: the folder of shards that the model was trained on")
    limit = loaded.model.config.max_context
    context = options.context or int(loaded.checkpoint.metadata.get("context", limit))
    if context > limit:
        raise UserError(f"context {context} is longer than the model's max_context {limit}")
    batches = calibration_batches(
        loaded, options.data, options.calibration_tokens, context, options.batch_size, options.seed
    )
    return Calibrated(loaded, batches, context, lambda model, some: loss_on(model, some, loaded.device))


def calibration_batches(
    loaded: Loaded, folder: str | Path, tokens: int, context: int, batch_size: int, seed: int
) -> list[Batch]:
    """Windows of the training split, drawn by the same plan as a training with this seed; with tokens hidden
    where the model finds these.

    Raises:
        UserError: There are no such shards, or they were made with another tokenizer.
    """
    windows = -(-tokens // context)
    batch_size = min(batch_size, windows)
    data = ShardDataModule(
        folder, context, batch_size, batch_size * context, seed=seed, mask_share=mask_share(loaded)
    )
    if data.manifest.tokenizer.sha256 != loaded.tokenizer.sha256:
        raise UserError(
            f"{folder} was made with another tokenizer than {loaded.checkpoint.folder}: calibrate on data "
            f"prepared with --tokenizer {loaded.tokenizer.path}"
        )
    data.prepare_data()
    return list(islice(data.train_dataloader(), -(-windows // batch_size)))


def _of_task(options: CalibrationOptions) -> Calibrated:
    """A model with a task's head, and rows of the task: those given, else those that it was trained on."""
    answerer = Answerer(options.checkpoint, options.device, batch_size=options.batch_size)
    loaded, kind, context = answerer.loaded, answerer.kind, answerer.context
    if options.context is not None:
        raise UserError(f"context is that of the task ({context}): leave it out")
    if options.data is None:
        rows, source = training_rows(answerer), None
    else:
        source = str(options.data)
        _, rows, _ = usable_rows(answerer, source)
    random.Random(options.seed).shuffle(rows)
    examples: list[tuple[int, Example]] = []
    tokens = 0
    for number, row in enumerate(rows):
        found = kind.encode(row)
        examples += ((number, example) for example in found)
        tokens += sum(len(example.fields["input_ids"]) for example in found)
        if tokens >= options.calibration_tokens:
            break
    batches = window_batches(loaded, kind, Examples(examples), context, options.batch_size)
    kept = [{name: value for name, value in batch.items() if name != "examples"} for batch in batches]
    return Calibrated(loaded, kept, context, task_loss(kind), answerer, source)


def task_loss(kind: Kind) -> Loss:
    """The loss of a task's training: the mean over its targets."""

    @torch.no_grad()
    def loss(model: DualRoutingTransformer, batches: list[Batch]) -> float:
        total, count = 0.0, 0
        for batch in batches:
            hidden = model.hidden_states(
                batch["input_ids"], segment_ids=batch["segment_ids"], positions=batch["positions"]
            )
            sums = kind.loss(task_outputs(model, batch, hidden), batch)
            total, count = total + float(sums.loss_sum), count + int(sums.count)
        return total / max(count, 1)

    return loss


def described(loaded: Loaded, operation: str, **more: Any) -> dict[str, Any]:
    """What ``checkpoint.json`` says of a checkpoint that ``operation`` made from ``loaded``."""
    kept = {name: value for name, value in loaded.checkpoint.metadata.items() if name in _INHERITED}
    return {**kept, **derived(loaded.checkpoint, operation), "dualroute": __version__, **more}


def loss_on(model: DualRoutingTransformer, batches: list[Batch], device: torch.device) -> float:
    """Mean loss of the labels, nats."""
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
