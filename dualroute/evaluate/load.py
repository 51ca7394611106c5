"""From a path that a person gives to a model that is ready to run, with its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from dualroute.attention.verification import problems_of
from dualroute.data.tokenizer import Tokenizer
from dualroute.errors import UserError
from dualroute.model import DualRoutingTransformer
from dualroute.model.checkpoint.format import (
    TOKENIZER,
    Checkpoint,
    find_checkpoint,
    load_model,
    verify_checkpoint,
)
from dualroute.model.foreign.hub import is_foreign, load_causal_lm
from dualroute.model.kernel_choice import choose_kernels
from dualroute.model.quantization import NATIVE


@dataclass
class Loaded:
    """A checkpoint brought to life."""

    checkpoint: Checkpoint
    model: DualRoutingTransformer  # of `load_any` also a GPT-2, which has no caches
    tokenizer: Tokenizer
    device: torch.device


def choose_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is one; anything else is a torch device name.

    Raises:
        UserError: The device does not exist here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device '{name}' cannot be used here ({reason}); try --device auto") from error
    return device


def load(path: str | Path, device: str = "auto", dtype: str = "auto", *, compiled: bool = False) -> Loaded:
    """Load a checkpoint for evaluation or generation.

    Args:
        path: A checkpoint folder, or a run folder (its newest finished checkpoint).
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1`` …
        dtype: ``float32`` or ``bfloat16``, for the weights and all arithmetic; ``auto`` is float32, but
            bfloat16 for quantised weights where kernels for them know nothing else.
        compiled: The model is going to be compiled.

    Raises:
        UserError: Nothing finished there, a damaged file, or no such device.
    """
    checkpoint = find_checkpoint(path)
    target = choose_device(device)
    if dtype == "auto":
        scheme = checkpoint.metadata.get("quantization", {}).get("scheme")
        dtype = "bfloat16" if scheme in NATIVE or (compiled and scheme) else "float32"
    model = load_model(checkpoint).to(device=target, dtype=getattr(torch, dtype))
    choose_kernels(problems_of(model, getattr(torch, dtype), model.config.max_context, packed=True), target)
    verify_checkpoint(checkpoint, only=TOKENIZER)
    tokenizer = Tokenizer(checkpoint.folder / TOKENIZER)
    if model.config.reads_text and tokenizer.vocab_size != model.config.vocab_size:
        raise UserError(
            f"{checkpoint.folder / TOKENIZER} has {tokenizer.vocab_size} ids and the model "
            f"{model.config.vocab_size}: the tokenizer was replaced; put the original file back"
        )
    return Loaded(checkpoint, model, tokenizer, target)


def load_any(path: str | Path, device: str = "auto", dtype: str = "auto") -> Loaded:
    """:func:`load`, and models from elsewhere: exported folders and Hugging Face ones.

    Raises:
        UserError: Nothing readable is there, or it has no tokenizer beside it.
    """
    if not is_foreign(path):
        return load(path, device, dtype)
    target = choose_device(device)
    kept = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    model, file = load_causal_lm(path, kept)
    if file is None:
        raise UserError(f"{path} has no tokenizer beside it: convert it first (dualroute convert)")
    tokenizer = Tokenizer(file)
    rows = cast(DualRoutingTransformer, model).config.vocab_size or 0
    if tokenizer.vocab_size > rows:
        raise UserError(
            f"tokenizer {file} has {tokenizer.vocab_size} ids and the model of {path} {rows}: put the "
            f"tokenizer there that belongs to it"
        )
    model = model.to(target)
    if isinstance(model, DualRoutingTransformer):
        choose_kernels(problems_of(model, kept, model.config.max_context, packed=True), target)
    return Loaded(Checkpoint(Path(path), 0, {}), cast(DualRoutingTransformer, model), tokenizer, target)
