"""``dualroute evaluate``: loss, perplexity and bits per byte of a checkpoint.

In: a checkpoint and either a folder of shards or a text file.  Every next-token target is scored exactly
once; of a model that reads both sides (``causal`` false) the tokens that masked training would hide, in the
share that it was trained with, by masks of seed 0.  Out: a table on the terminal, JSON on request.

Perplexity depends on the tokenizer and says nothing across models with different ones;
bits per byte do not.  They are the loss of all targets divided by the bytes of the text they spell.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import lzma
import math
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dualroute.data.manifest import Manifest, verify_shards
from dualroute.data.masking import MaskedSequentialPlan, MaskedWindows, Masking
from dualroute.data.plan import SequentialPlan, WalkSequence
from dualroute.data.reader import IGNORE_INDEX, ShardReader, WindowDataset, collate, open_stream
from dualroute.data.tokenizer import Tokenizer
from dualroute.errors import UserError
from dualroute.evaluate.config import EvaluateConfig
from dualroute.evaluate.load import Loaded, load_any
from dualroute.files import write_bytes_atomically
from dualroute.model import DualRoutingTransformer
from dualroute.model.steering import steer

#: Rows of [tokens, vocab] logits that exist at once.
LOGIT_ROWS = 2048
#: Of the masks by which models that read both sides are compared, whatever a run's own seed was.
MASK_SEED = 0
#: Share of the tokens that is hidden, where a checkpoint does not say with which it was trained.
USUAL_MASK_SHARE = 0.3
#: Of a text that is scored as one document.
MOST_BYTES = 2**30


@dataclass(frozen=True)
class Score:
    """What was measured."""

    loss: float  # nats per target
    targets: int
    bytes: float  # of text that the targets spell
    masked: float | None = None  # share of the tokens that was hidden; null: next tokens

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float:
        """Of next tokens; hidden ones are a part of the text."""
        return self.loss * self.targets / (math.log(2) * self.bytes)


@torch.no_grad()
def score_batches(
    model: DualRoutingTransformer,
    batches: Iterable[dict[str, Tensor]],
    device: torch.device,
    cache_dtype: str | None = None,
) -> tuple[float, int]:
    """Sum of the negative log-likelihood over all labels, in nats, and the number of labels.

    With ``cache_dtype`` each row, which is then one document, is read through the caches of decoding.
    """
    total, count = 0.0, 0
    for batch in batches:
        if cache_dtype is None:
            segments = batch.get("segment_ids")
            positions = batch.get("positions")
            hidden = model.hidden_states(
                batch["input_ids"].to(device),
                segment_ids=None if segments is None else segments.to(device),
                positions=None if positions is None else positions.to(device),
            )
        else:
            hidden = _through_caches(model, batch["input_ids"].to(device), cache_dtype)
        labels = batch["labels"].to(device).flatten()
        wanted = labels != IGNORE_INDEX
        hidden, labels = hidden.flatten(0, 1)[wanted], labels[wanted]
        for rows, targets in zip(hidden.split(LOGIT_ROWS), labels.split(LOGIT_ROWS), strict=True):
            total += float(F.cross_entropy(model.head(rows).float(), targets, reduction="sum"))
        count += labels.numel()
    return total, count


def _through_caches(model: DualRoutingTransformer, ids: Tensor, cache_dtype: str) -> Tensor:
    """Hidden states (B, n, dim) of ids (B, n), a block at a time: as one token at a time reads its caches,
    since only complete blocks of the past are rounded."""
    caches = model.new_caches(*ids.shape, cache_dtype=cache_dtype)
    parts = ids.split(model.config.block, dim=1)
    return torch.cat([model.hidden_states(part, caches=caches) for part in parts], dim=1)


def evaluate_shards(
    loaded: Loaded, folder: str | Path, split: str, context: int, batch_size: int, max_tokens: int | None
) -> Score:
    """Score a split of a shard folder.

    Raises:
        UserError: The model writes no text, or the shards were made with another tokenizer or are damaged.
    """
    share = mask_share(loaded)
    manifest = Manifest.load(folder)
    refuse_other_tokenizer(manifest, loaded.tokenizer, loaded.checkpoint.folder)
    verify_shards(manifest, split, level="size")
    order = (open_stream(manifest, split), context, max_tokens)
    plan = SequentialPlan(*order) if share is None else MaskedSequentialPlan(*order, share)
    if not plan.windows:
        raise UserError(
            f"{folder} has no documents in split '{split}': prepare it with a larger --val_fraction"
        )
    dataset: Dataset[Any] = WindowDataset(ShardReader(manifest, split), plan)
    if share is not None:
        masking = Masking.of(loaded.tokenizer, share, manifest.fingerprint, MASK_SEED)
        dataset = MaskedWindows(dataset, masking)  # type: ignore[arg-type]
    loader = DataLoader(dataset, batch_sampler=WalkSequence(plan, 0, 1, batch_size), collate_fn=collate)
    nll, count = score_batches(loaded.model, loader, loaded.device)
    return Score(nll / count, count, count / manifest.split(split).targets_per_byte, share)


def mask_share(loaded: Loaded) -> float | None:
    """The share of tokens that a model was trained to find; null for one of next tokens.

    Raises:
        UserError: The model has a task's head or reads no text.
    """
    config = loaded.model.config
    config.require_tokens("the perplexity of a text")
    if config.task_head is not None:
        raise UserError(
            f"{loaded.checkpoint.folder} answers a task and finds no tokens: give --data, rows of the task"
        )
    if config.causal:
        return None
    settings = loaded.checkpoint.metadata.get("settings")
    data = settings.get("data") if isinstance(settings, dict) else None
    share = data.get("mask_share") if isinstance(data, dict) else None
    return float(share) if isinstance(share, int | float) and 0 < share <= 1 else USUAL_MASK_SHARE


def evaluate_text(
    loaded: Loaded,
    path: str | Path,
    context: int,
    stride: int,
    batch_size: int,
    max_tokens: int | None,
    cache_dtype: str | None = None,
) -> Score:
    """Score a text file as one document, in windows of ``context`` tokens that start ``stride`` apart,
    through the caches of decoding with ``cache_dtype``.

    Raises:
        UserError: The model writes no text, or the file is missing, not UTF-8, or too short to hold a target.
    """
    share = mask_share(loaded)
    if cache_dtype is not None:
        loaded.model.config.require_causal("cache_dtype")
    text = read_text(path)
    ids = loaded.tokenizer.encode(text, bos=True, eos=True)
    size = len(text.encode())
    if max_tokens is not None and max_tokens < len(ids):
        ids = ids[:max_tokens]
        size = len(loaded.tokenizer.decode(ids).encode())
    if len(ids) < 2 or not size:
        raise UserError(f"{path} holds {len(ids)} tokens: too short to score; give a longer text")
    if share is None:
        batches = text_windows(torch.tensor(ids), context, stride, batch_size)
    elif stride != context:
        raise UserError("stride works with models of next tokens only, which score those that follow a past")
    else:
        name = hashlib.sha256(text.encode()).hexdigest()
        masking = Masking.of(loaded.tokenizer, share, name, MASK_SEED)
        batches = _masked_windows(np.array(ids), context, masking)
    nll, count = score_batches(loaded.model, batches, loaded.device, cache_dtype)
    return Score(nll / count, count, size, share)


def _masked_windows(ids: NDArray[np.int64], context: int, masking: Masking) -> Iterator[dict[str, Tensor]]:
    """Windows (1, n) of ids (T,), one after the other, with tokens hidden."""
    for number, start in enumerate(range(0, len(ids), context)):
        part = ids[start : start + context]
        window = masking.mask({"input_ids": part, "segment_ids": np.ones_like(part)}, "text", number)
        yield {name: torch.from_numpy(value)[None] for name, value in window.items()}


def refuse_other_tokenizer(manifest: Manifest, tokenizer: Tokenizer, checkpoint: Path) -> None:
    """Refuse shards whose ids mean something else to the model.

    Raises:
        UserError: Naming both tokenizers.
    """
    if manifest.tokenizer.sha256 != tokenizer.sha256:
        raise UserError(
            f"{manifest.folder} was made with another tokenizer (sha256 {manifest.tokenizer.sha256[:12]}…) "
            f"than {checkpoint} ({tokenizer.sha256[:12]}…): prepare it again with "
            f"--tokenizer {checkpoint / 'tokenizer.model'}"
        )


def text_windows(ids: Tensor, context: int, stride: int, batch_size: int) -> Iterator[dict[str, Tensor]]:
    """Cut ids (T,) into windows that start ``stride`` apart; each of the T - 1 targets is labelled in the
    first window that holds it, so the overlap serves as past only."""
    if stride > context:
        raise UserError(f"stride {stride} is longer than context {context}: tokens between would be skipped")
    scored = 0  # targets labelled so far; target t is the token t + 1
    rows: list[tuple[Tensor, Tensor]] = []
    start = 0
    while scored < len(ids) - 1:
        stop = min(start + context, len(ids) - 1)
        inputs, labels = ids[start:stop], ids[start + 1 : stop + 1].clone()
        labels[: scored - start] = IGNORE_INDEX
        if (rows and len(inputs) != len(rows[0][0])) or len(rows) == batch_size:
            yield _stacked(rows)
            rows = []
        rows.append((inputs, labels))
        scored, start = stop, start + stride
    if rows:
        yield _stacked(rows)


def _stacked(rows: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    inputs, labels = zip(*rows, strict=True)
    return {"input_ids": torch.stack(inputs), "labels": torch.stack(labels)}


def read_text(path: str | Path) -> str:
    """The text of a file, decompressed by its ending.

    Raises:
        UserError: It is missing, damaged or not UTF-8.
    """
    path = Path(path)
    openers: dict[str, Callable[[Path], IO[bytes]]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}  # type: ignore[dict-item]
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is no regular file: give a text file")
    try:
        with openers.get(path.suffix, lambda name: name.open("rb"))(path) as stream:
            data = stream.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise UserError(f"{path} holds over {MOST_BYTES:,} bytes of text: prepare it and give --data")
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}): convert it first") from error
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({error})") from error


def evaluate(config: EvaluateConfig) -> Score:
    """Measure a checkpoint; see :class:`EvaluateConfig`.

    Raises:
        UserError: Any of the inputs cannot be used.
    """
    _require_text(config)
    loaded = load_any(config.checkpoint, config.device, config.dtype)
    steer(loaded.model, config.scale or "")
    return evaluate_loaded(loaded, config)


def _require_text(config: EvaluateConfig) -> None:
    if config.data is None and config.text is None:
        raise UserError("give --data (a folder of shards) or --text (a file)")


def evaluate_loaded(loaded: Loaded, config: EvaluateConfig) -> Score:
    """:func:`evaluate` of a model that is loaded already; its device, dtype and scale are as they are.

    Raises:
        UserError: Any of the inputs cannot be used.
    """
    _require_text(config)
    context = context_of(loaded, config)
    if config.data is not None:
        return evaluate_shards(
            loaded, config.data, config.split, context, config.batch_size, config.max_tokens
        )
    assert config.text is not None
    stride = config.stride or context
    return evaluate_text(
        loaded, config.text, context, stride, config.batch_size, config.max_tokens, config.cache_dtype
    )


def context_of(loaded: Loaded, config: EvaluateConfig) -> int:
    """Tokens that the model sees at once: those asked for, or those that it was trained with.

    Raises:
        UserError: They are more than it can.
    """
    context = config.context or int(
        loaded.checkpoint.metadata.get("context", loaded.model.config.max_context)
    )
    if context > loaded.model.config.max_context:
        raise UserError(
            f"context {context} is longer than the model's max_context {loaded.model.config.max_context}"
        )
    return context


def evaluate_command(config: EvaluateConfig) -> None:
    """``dualroute evaluate``: print the figures, and write them where asked.

    Raises:
        UserError: Any of the inputs cannot be used, or the output cannot be written.
    """
    if config.output is not None and not Path(config.output).parent.is_dir():  # said now, not after the work
        raise UserError(f"--output {config.output}: there is no folder {Path(config.output).parent}: make it")
    score = evaluate(config)
    if score.masked is None:
        table = Table("loss (nats/token)", "perplexity", "bits per byte", "tokens scored")
        density = [f"{score.bits_per_byte:.4f}"]
    else:
        hidden = f"hidden tokens scored ({score.masked:.0%}, masks of seed {MASK_SEED})"
        table, density = Table("masked loss (nats/token)", "pseudo-perplexity", hidden), []
    table.add_row(f"{score.loss:.4f}", f"{score.perplexity:.2f}", *density, f"{score.targets:,}")
    Console().print(table)
    if config.output is not None:
        figures = {
            **asdict(score),
            "perplexity": score.perplexity,
            **({"bits_per_byte": score.bits_per_byte} if score.masked is None else {"mask_seed": MASK_SEED}),
            "evaluation": config.of_one_measure(),
        }
        try:
            write_bytes_atomically(config.output, json.dumps(figures, indent=1).encode())
        except OSError as error:
            raise UserError(
                f"--output {config.output} cannot be written: {error.strerror or error}"
            ) from error
