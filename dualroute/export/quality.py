"""What an export is measured on: shards, a text file, or nothing but what the checkpoint says of itself.

In: the options of the command and a loaded checkpoint.  Out: loss, perplexity and bits per byte for
    export.json and the model card; real text to compare tokenizers on; real windows to compare an int8 file
    on.

Without data there is still a loss, the one that the training run wrote down.  It is
labelled as such, since nothing here can check it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dualroute.data.manifest import Manifest
from dualroute.data.plan import SequentialPlan, WalkSequence
from dualroute.data.reader import ShardReader, WindowDataset, collate, open_stream
from dualroute.errors import UserError
from dualroute.evaluate.load import Loaded
from dualroute.evaluate.perplexity import Score, evaluate_shards, evaluate_text, read_text, text_windows

if TYPE_CHECKING:
    from dualroute.export.config import ExportConfig

SPLIT = "val"
SAMPLE_CHARS = 20_000  # of --text, on which tokenizers are compared
SAMPLE_TOKENS = 8192  # of --data
WINDOW_TOKENS = 16_384  # on which an int8 file is compared with the float one


def measure(config: ExportConfig, loaded: Loaded) -> dict[str, Any]:
    """Loss (nats per token), perplexity and bits per byte, with what they were measured on; maybe empty.

    Raises:
        UserError: The data cannot be used, or the context is beyond the model's.
    """
    context = _context(config, loaded)
    if config.data is not None:
        score = evaluate_shards(loaded, config.data, SPLIT, context, 4, config.max_tokens)
        return {"measured_on": f"{Path(config.data).name} ({SPLIT})", "context": context, **_figures(score)}
    if config.text is not None:
        score = evaluate_text(loaded, config.text, context, context, 4, config.max_tokens)
        return {"measured_on": Path(config.text).name, "context": context, **_figures(score)}
    if loaded.model.config.task_head is not None:  # its loss is of no text
        said = loaded.checkpoint.metadata.get("score")
        if said is None:
            return {}
        measured_on = "validation data, by the training run"
        return {"measured_on": measured_on, "metric": said["name"], "score": said["value"]}
    loss = loaded.checkpoint.val_loss
    if loss is None:
        return {}
    return {
        "measured_on": "validation data, by the training run",
        "context": context,
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
    }


def _context(config: ExportConfig, loaded: Loaded) -> int:
    limit = loaded.model.config.max_context
    context = config.context or min(int(loaded.checkpoint.metadata.get("context", limit)), limit)
    if context > limit:
        raise UserError(f"context {context} is longer than the model's max_context {limit}")
    return context


def _figures(score: Score) -> dict[str, float]:
    return {
        "loss": score.loss,
        "perplexity": score.perplexity,
        **({"bits_per_byte": score.bits_per_byte} if score.masked is None else {"masked": score.masked}),
        "tokens": score.targets,
    }


def samples(config: ExportConfig, loaded: Loaded) -> list[str]:
    """Real texts to compare tokenizers on."""
    if config.text is not None:
        return [read_text(config.text)[:SAMPLE_CHARS]]
    if config.data is None:
        return []
    batches = _shard_windows(config.data, _context(config, loaded), SAMPLE_TOKENS)
    return [loaded.tokenizer.decode(batch["input_ids"][0].tolist()) for batch in batches]


def windows(config: ExportConfig, loaded: Loaded) -> list[dict[str, Tensor]]:
    """Windows with ``input_ids`` and ``labels`` (1, n), each read as one text; none without data, nor for a
    model that does not continue texts."""
    if loaded.model.config.task_head is not None or not loaded.model.config.causal:
        return []
    context = _context(config, loaded)
    limit = min(config.max_tokens or WINDOW_TOKENS, WINDOW_TOKENS)
    if config.text is not None:
        ids = loaded.tokenizer.encode(read_text(config.text)[: 20 * limit], bos=True)[: limit + 1]
        return list(text_windows(torch.tensor(ids), context, context, 1))
    return [] if config.data is None else _shard_windows(config.data, context, limit)


def _shard_windows(folder: str, context: int, tokens: int) -> list[dict[str, Tensor]]:
    manifest = Manifest.load(folder)
    plan = SequentialPlan(open_stream(manifest, SPLIT), context, tokens)
    dataset = WindowDataset(ShardReader(manifest, SPLIT), plan)
    return [collate([dataset[place] for place in places]) for places in WalkSequence(plan, 0, 1, 1)]
