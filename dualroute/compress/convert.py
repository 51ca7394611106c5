"""``dualroute convert``: a model from elsewhere, or a dense one of ours, as a checkpoint with dual attention.

In: whatever :mod:`dualroute.model.foreign.hub` reads.  Here: where heads are divided, the model's own text
(or a folder of shards) shows which of them look no further than the window; the weights are rearranged
(:mod:`dualroute.model.conversion`).  Out: a checkpoint of weights alone, which every command takes; training
goes on with ``dualroute distill`` or ``pretrain --init_from``.

No text is needed.  A language model writes the text that it was trained on, closely
enough to see where its heads look.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dualroute.compress.added_tokens import with_added_tokens
from dualroute.compress.calibration import Batch
from dualroute.compress.config import ConvertConfig
from dualroute.compress.routing_budget import Budgeted, KeySearch
from dualroute.data.llama2c_tokenizer import sentencepiece_model
from dualroute.data.manifest import Manifest, verify_shards
from dualroute.data.plan import SequentialPlan, WalkSequence
from dualroute.data.reader import ShardReader, WindowDataset, collate, open_stream
from dualroute.data.tokenizer import Tokenizer
from dualroute.data.tokenizer_settings import SETTINGS, read_settings
from dualroute.errors import UserError
from dualroute.evaluate.load import choose_device
from dualroute.model import DualRoutingTransformer, ModelConfig
from dualroute.model.checkpoint.format import CONFIG, Checkpoint, find_checkpoint, save_model
from dualroute.model.checkpoint.lineage import derived, imported
from dualroute.model.conversion import (
    check_dense,
    divide_heads,
    double_heads,
    dual_config,
    mass_beyond,
    nearest_groups,
    random_groups,
)
from dualroute.model.decoding.generation import continue_batch
from dualroute.model.foreign.hub import is_foreign, load_dense
from dualroute.model.foreign.own_export import exported_lineage, own_task_file, wrote

_ROWS = 32  # texts that are sampled together


@dataclass(frozen=True)
class Conversion:
    """What was done.

    Attributes:
        checkpoint: The one that was written.
        local_groups: KV groups that became local, by layer; null unless heads were divided.
        mass: (layers, heads) attention beyond the window; null unless it was measured.
        group: Query heads per KV group.
    """

    checkpoint: Checkpoint
    local_groups: list[list[int]] | None
    mass: Tensor | None
    group: int


def convert(config: ConvertConfig) -> Conversion:
    """Convert a model; see :class:`ConvertConfig`.

    Raises:
        UserError: The source, its tokenizer or a value cannot be used.
    """
    if Path(config.output).exists():
        raise UserError(f"--output {config.output} exists already: choose another folder")
    model, beside = load_dense(config.source, getattr(torch, config.dtype))
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = _tokenizer(config, beside, Path(folder))
        model = _with_vocabulary(model, tokenizer, config.source)
        groups = mass = None
        comes_back = wrote(Path(config.source)) and model.config.attention != "dense" and not config.changes
        keeps = comes_back or (model.config.parts is not None and not config.changes)
        attention = model.config.attention if keeps else config.attention
        note: dict[str, Any] = {"source": config.source, "attention": attention}
        converted = model
        if config.attention == "dual" and not keeps:
            check_dense(model.config)
            shape = dual_config(
                model.config, both=config.heads == "both", local_heads=config.local_heads, **config.routing
            )
            note["heads"] = config.heads
            if config.heads == "both":
                converted = double_heads(model, shape)
            else:
                shape, groups, mass = _choose(config, model, tokenizer, shape, note)
                if shape.global_layers is not None:
                    every = list(range(shape.num_kv_heads or 0))
                    groups = [of if i in shape.global_layers else every for i, of in enumerate(groups)]
                note |= {"choose": config.choose, "local_groups": groups}
                if mass is not None:
                    note["mass_beyond_window"] = [[round(x, 6) for x in row] for row in mass.tolist()]
                converted = divide_heads(model, shape, groups)
        metadata = {**_carried(Path(config.source)), "conversion": note}
        source = Path(config.source)
        extra = own_task_file(source) if is_foreign(source) else find_checkpoint(source).task_file()
        extra[SETTINGS] = tokenizer.settings.to_bytes()
        checkpoint = save_model(converted, config.output, tokenizer.path, metadata, extra)
    return Conversion(checkpoint, groups, mass, model.config.heads_per_group)


def _carried(source: Path) -> dict[str, Any]:
    """What stays true of a checkpoint when it is converted."""
    if is_foreign(source):
        return {**imported(source.name), **exported_lineage(source)}
    checkpoint = find_checkpoint(source)
    said = checkpoint.metadata
    kept: dict[str, Any] = {name: said[name] for name in ("context", "data_fingerprint") if name in said}
    return {**kept, **derived(checkpoint, "convert")}


def _tokenizer(config: ConvertConfig, beside: Path | None, folder: Path) -> Tokenizer:
    """The source's tokenizer; into ``folder`` one of llama2.c is rewritten as a sentencepiece model, and a
    sentencepiece model with the tokens that were added beside it."""
    path = beside if config.tokenizer is None else Path(config.tokenizer)
    if path is None:
        raise UserError(f"{config.source} has no tokenizer beside it: give the file with --tokenizer")
    settings = None
    if path.suffix == ".bin":
        data: bytes | None = sentencepiece_model(path)
    else:
        data = with_added_tokens(path) if is_foreign(config.source) and path.suffix == ".model" else None
        settings = read_settings(path)
    if data is not None:
        path = folder / "tokenizer.model"
        path.write_bytes(data)
    return Tokenizer(path, settings)


def _with_vocabulary(
    model: DualRoutingTransformer, tokenizer: Tokenizer, source: str
) -> DualRoutingTransformer:
    """The model without the rows of ids that its tokenizer does not have: padding of the vocabulary.

    Raises:
        UserError: The tokenizer has ids that the model lacks.
    """
    if not model.config.reads_text:
        return model
    rows = model.config.vocab_size or 0
    if tokenizer.vocab_size > rows:
        raise UserError(
            f"tokenizer {tokenizer.path} has {tokenizer.vocab_size} ids and the model of {source} {rows}: "
            f"give the tokenizer that belongs to it"
        )
    if tokenizer.vocab_size < rows:
        tied = model.config.tie_embeddings
        model.embedding.weight = nn.Parameter(model.embedding.weight.detach()[: tokenizer.vocab_size].clone())
        head = model.embedding.weight if tied else model.head.weight.detach()[: tokenizer.vocab_size].clone()
        model.head.weight = head if tied else nn.Parameter(head)
        model.config = dataclasses.replace(model.config, vocab_size=tokenizer.vocab_size)
    return model


def _choose(
    config: ConvertConfig,
    model: DualRoutingTransformer,
    tokenizer: Tokenizer,
    shape: ModelConfig,
    note: dict[str, Any],
) -> tuple[ModelConfig, list[list[int]], Tensor | None]:
    """The shape, the KV groups that become local, and what was measured; ``note`` says more of a budget."""
    group = model.config.heads_per_group
    heads = model.config.num_kv_heads or model.config.num_heads
    device = choose_device(config.device)
    context = min(config.context or 2048, model.config.max_context)
    batches: list[Batch] = []
    if config.choose == "distance" or config.keys is not None:
        model.to(device)
        if config.data is None:
            batches = list(_own_texts(config, model, tokenizer, context))
        else:
            batches = list(_shards(config, config.data, tokenizer, context))
    mass = None
    if config.choose == "distance":
        mass = mass_beyond(model, batches, min(shape.window, context - 1))

    def groups(local_heads: int) -> list[list[int]]:
        if mass is None:
            return random_groups(model.config.num_layers, heads, local_heads // group, config.seed)
        return nearest_groups(mass, group, local_heads // group)

    local = shape.local_heads or 0
    if config.keys is not None:
        start = partial(KeySearch, model, batches=batches, context=context, device=device)
        best = _within_budget(config, shape, group, start, groups)
        shape, local = best.config, best.config.local_heads or 0
        note["keys"] = {"asked": config.keys, "read": best.share, "context": context}
        note["keys"]["divergence"] = best.divergence
    model.to("cpu")
    return shape, groups(local), mass


def _within_budget(
    config: ConvertConfig,
    shape: ModelConfig,
    group: int,
    start: Callable[..., KeySearch],
    groups: Callable[[int], list[list[int]]],
) -> Budgeted:
    """The best shape within ``config.keys``, over numbers of local heads where these are free.

    Raises:
        UserError: None of them reads as little.
    """
    assert config.keys is not None
    counts = [shape.local_heads or 0]  # down to one group of far heads
    while config.local_heads is None and (far := (shape.num_heads - counts[-1]) // group) > 1:
        counts.append(shape.num_heads - far // 2 * group)
    found, problems = [], []
    for count in counts:
        begin = dataclasses.replace(shape, global_heads=shape.num_heads - count, local_heads=count)
        try:
            found.append(start(shape=begin, local_groups=groups(count)).within(config.keys))
        except UserError as error:
            problems.append(error)
    if not found:
        raise problems[-1]
    return min(found, key=lambda budgeted: budgeted.divergence)


def _own_texts(
    config: ConvertConfig, model: DualRoutingTransformer, tokenizer: Tokenizer, context: int
) -> Iterator[dict[str, Tensor]]:
    """Texts that the model writes, a few at a time."""
    if tokenizer.bos_id < 0:
        raise UserError(f"tokenizer {tokenizer.path} has no <bos> to begin a text with: give --data")
    generator = torch.Generator().manual_seed(config.seed)
    texts = -(-config.calibration_tokens // context)
    for first in range(0, texts, _ROWS):
        rows = min(_ROWS, texts - first)
        begin = torch.full((rows, 1), tokenizer.bos_id, device=model.embedding.weight.device)
        yield {"input_ids": continue_batch(model, begin, context - 1, generator)}


def _shards(
    config: ConvertConfig, folder: str, tokenizer: Tokenizer, context: int
) -> Iterator[dict[str, Tensor]]:
    """Windows of the training split.

    Raises:
        UserError: The shards were made with another tokenizer, or are damaged.
    """
    manifest = Manifest.load(folder)
    theirs = manifest.folder / manifest.tokenizer.file
    if manifest.tokenizer.sha256 != tokenizer.sha256 and not tokenizer.same_ids(Tokenizer(theirs)):
        raise UserError(
            f"{folder} was made with another tokenizer than the one of {config.source}: leave --data out, or "
            f"prepare it with that one"
        )
    verify_shards(manifest, "train", level="size")
    plan = SequentialPlan(open_stream(manifest, "train"), context, config.calibration_tokens)
    if not plan.windows:
        raise UserError(f"{folder} holds less than one window of {context} tokens: lower --context")
    dataset = WindowDataset(ShardReader(manifest, "train"), plan)
    yield from DataLoader(dataset, batch_sampler=WalkSequence(plan, 0, 1, 4), collate_fn=collate)


def convert_command(config: ConvertConfig) -> None:
    """``dualroute convert``: convert, and show which heads went where."""
    done = convert(config)
    if done.local_groups is not None and done.mass is not None:
        shape = ModelConfig.from_file(done.checkpoint.folder / CONFIG)
        names = ("layer", "local heads", "their attention beyond the window", "of the global heads")
        table = Table(*names, "window", "top_k")
        of_group = done.mass.unflatten(1, (-1, done.group)).mean(2)
        for number, local in enumerate(done.local_groups):
            others = [g for g in range(of_group.shape[1]) if g not in local]
            heads = [str(g * done.group + i) for g in local for i in range(done.group)]
            layer = shape.of_layer(number)
            table.add_row(
                str(number),
                ", ".join(heads) if others else "all",
                f"{float(of_group[number, local].mean()):.1%}",
                f"{float(of_group[number, others].mean()):.1%}" if others else "–",
                str(layer.window),
                str(layer.top_k) if others and layer.global_mode != "full" else "–",
            )
        Console().print(table)
    keys = done.checkpoint.metadata["conversion"].get("keys")
    if keys is not None:
        print(
            f"a token of {keys['context']:,} reads {keys['read']:.1%} of the keys that it read before; the "
            f"model diverges by {keys['divergence']:.4f} nats a token: heal it with dualroute distill "
            f"--init_from {config.output} and the dense model as --teacher"
        )
    print(f"{done.checkpoint.folder} is written")
