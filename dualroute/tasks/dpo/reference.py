"""What the model that a run began with says of its preference pairs: worked out once, kept in the run folder.

In: the pairs of a run, and the weights that it begins with.  Here: their log-probabilities, each rank a share
of them, before the model that is trained is made; so one model is in memory at a time.  Where weights are
divided among the ranks (ZeRO-3) it is the model that is trained, before its first step.  Out: a field
``reference`` of the examples, and ``OUTPUT/reference.safetensors``, which a start that goes on reads.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from dualroute.data.plan import Request
from dualroute.errors import UserError
from dualroute.files import write_bytes_atomically
from dualroute.model import DualRoutingTransformer
from dualroute.model.checkpoint.format import WEIGHTS, find_checkpoint, load_body
from dualroute.tasks.data.examples import Examples
from dualroute.tasks.data.module import PackedWindows, collate_examples
from dualroute.tasks.data.packing import PackedSequence
from dualroute.tasks.dpo.loss import answer_log_probabilities, document_numbers
from dualroute.training.config import PretrainConfig
from dualroute.training.parallel.agreement import decided_by_rank_zero, place, told_by_all

log = logging.getLogger(__name__)
FILE = "reference.safetensors"
FIELD = "reference"
_AUTOCAST = {"bf16-mixed": torch.bfloat16, "fp8": torch.bfloat16, "16-mixed": torch.float16}
Scores = NDArray[np.float64]  # (examples, 2)


def check_preference(config: PretrainConfig) -> None:
    """Refuse settings that pairs cannot be trained with.

    Raises:
        UserError: Naming the key and the remedy.
    """
    if config.init_from is None:
        raise UserError("a task of kind preference compares a model with how it began: give init_from")
    if config.train.z_loss:
        raise UserError("train.z_loss has no meaning for a task of kind preference: set it to 0")


def add_reference(
    prepared: Any, parts: Sequence[Examples], model: DualRoutingTransformer | None = None
) -> None:
    """Give the examples of a run the field ``reference``.  All ranks, who have the run folder by then.

    Args:
        prepared: The run.
        parts: Its examples, of training and of validation.
        model: The model that is trained, of which no rank has all, before its first step; null reads
            ``init_from`` where it is needed.

    Raises:
        UserError: They are not kept in the run folder, and what they are worked out with is not there any
            more.
    """
    config: PretrainConfig = prepared.config
    prints = [prepared.data.fingerprint, parts[1].fingerprint()]  # of what is in the rows alone
    path = Path(prepared.output) / FILE
    kept = decided_by_rank_zero(lambda: _read(path, prints, _weights(config)))
    if kept is None:
        kept = _worked_out(prepared, parts, model)
        decided_by_rank_zero(lambda: _write(path, prints, _weights(config), kept))
    for examples, scores in zip(parts, kept, strict=True):
        lay_out(examples, scores)


def lay_out(examples: Examples, scores: Scores) -> None:
    """Put the scores of each pair into a field of ``examples``: at the first token of either side."""
    field = np.zeros(len(examples.fields["parts"]))
    first = examples.starts[:-1]
    second = first + np.add.reduceat((examples.fields["parts"] == 0).astype(np.int64), first)
    field[first], field[second] = scores[:, 0], scores[:, 1]
    examples.fields[FIELD] = field


def _weights(config: PretrainConfig) -> str | None:
    """sha256 of the weights that the run began with; null where they are gone."""
    try:
        found: str = find_checkpoint(str(config.init_from)).metadata["files"][WEIGHTS]["sha256"]
    except (UserError, KeyError, TypeError):
        return None
    return found


def _read(path: Path, prints: list[str], weights: str | None) -> list[Scores] | None:
    """What was kept, if it is of these pairs and, as far as they are known, these weights."""
    try:
        with safe_open(path, "numpy") as file:
            said = json.loads((file.metadata() or {})["of"])
            if said["pairs"] != prints or weights not in (None, said["weights"]):
                return None
            return [file.get_tensor(name) for name in ("train", "val")]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None


def _write(path: Path, prints: list[str], weights: str | None, scores: Sequence[Scores]) -> None:
    tensors = dict(zip(("train", "val"), scores, strict=True))
    content = save(tensors, metadata={"of": json.dumps({"pairs": prints, "weights": weights})})
    try:
        write_bytes_atomically(path, content)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror or error}): make room there") from error


def _worked_out(
    prepared: Any, parts: Sequence[Examples], divided: DualRoutingTransformer | None
) -> list[Scores]:
    config: PretrainConfig = prepared.config
    if prepared.world.rank == 0:
        pairs = sum(map(len, parts))
        log.info("%s", f"{pairs:,} pairs are read by the model that the run begins with, once")
    if divided is None:
        model = _undivided(prepared)
    elif prepared.start.checkpoint is not None:
        raise UserError(
            f"the run has no {FILE} of these pairs, and with parallel.zero_stage 3 the model that it began "
            f"with is not there any more: resume once with stage 2, which reads init_from"
        )
    else:
        model = divided.eval()
    dtype, device = _AUTOCAST.get(config.train.precision), model.norm.weight.device
    with torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        found = [
            reference_scores(model, examples, config.data.context, config.train.micro_batch)
            for examples in parts
        ]
    model.train()
    return found


def _undivided(prepared: Any) -> DualRoutingTransformer:
    """The model that the run begins with, whole on this rank."""
    config: PretrainConfig = prepared.config
    try:
        source = find_checkpoint(str(config.init_from))
    except UserError as error:
        raise UserError(
            f"the run has no {FILE} of these pairs, and what it began with is not there: {error}"
        ) from error
    on_cuda = torch.cuda.is_available()
    device = torch.device("cuda", prepared.world.local_rank) if on_cuda else torch.device("cpu")
    model = load_body(source, config.model, config.seed).float().to(device).eval()
    return model.to(torch.bfloat16) if config.train.precision == "bf16-true" else model


@torch.no_grad()
def reference_scores(
    model: DualRoutingTransformer, examples: Examples, context: int, windows_at_once: int
) -> Scores:
    """(examples, 2) log-probabilities of both sides of each pair.  All ranks, each a share of the windows, in
    equally many forward passes."""
    rank, ranks = place()
    plan = PackedSequence(examples.lengths, examples.targets, context)
    windows, device = PackedWindows(examples, plan), model.norm.weight.device
    own: list[tuple[int, list[float]]] = []
    numbers = list(range(rank, plan.windows, ranks))
    for begin in range(0, -(-plan.windows // ranks), windows_at_once):
        some = numbers[begin : begin + windows_at_once]
        batch = collate_examples([windows[Request(k, 1)] for k in some or [0]])  # one more, to no end
        moved = {name: value.to(device) for name, value in batch.items()}
        hidden = model.hidden_states(
            moved["input_ids"], segment_ids=moved["segment_ids"], positions=moved["positions"]
        )
        found = model.head(hidden.flatten(0, 1), partial(_log_probabilities, batch=moved))
        if not some:
            continue
        pairs = found.view(len(moved["labels"]), -1, 2).cpu()
        of_window = (moved["segment_ids"].amax(1) // 2).tolist()
        sides = [pairs[k, pair].tolist() for k, many in enumerate(of_window) for pair in range(many)]
        own += zip(batch["examples"].tolist(), sides, strict=True)
    scores: Scores = np.zeros((len(examples), 2))
    for part in told_by_all(lambda: own):
        for number, sides_of_one in part:
            scores[number] = sides_of_one
    return scores


def _log_probabilities(hidden: Tensor, weight: Tensor, batch: dict[str, Tensor]) -> Tensor:
    labels = batch["labels"].flatten()
    documents, count = document_numbers(batch["segment_ids"])
    rows = (labels >= 0).nonzero().squeeze(1)
    return answer_log_probabilities(hidden, weight, labels, rows, documents, count)
