"""A `torch.export` program: the model as a file that torch runs without this package.

    model.pt2          torch.export.load("model.pt2").module()(input_ids) → logits
    config.json        the fields of `ModelConfig`, and the ids of the special tokens
    tokenizer.model    sentencepiece's; put the <bos> id in front of a text

In: a loaded checkpoint and a folder that is not published yet.  Here: :mod:`dualroute.export.masked` is
    recorded for any batch and length, saved, loaded again and compared with the model at every length of
    `parity.lengths`.

One length is recorded and all are compared, because a tracer that saw 43 tokens may have
noted something that is true of 43 only.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from dualroute.errors import UserError
from dualroute.evaluate.load import Loaded
from dualroute.export import parity
from dualroute.export.hf.tokenizer_files import is_json
from dualroute.export.masked import MaskedTransformer
from dualroute.model import DualRoutingTransformer

if TYPE_CHECKING:
    from dualroute.export.config import ExportConfig

PROGRAM = "model.pt2"
TOLERANCE = 1e-4
#: Positions that may be beyond it: where two blocks score alike to the last digit, see `parity`
TIES = 0.01


def write_export(
    config: ExportConfig, loaded: Loaded, folder: Path, quality: dict[str, Any]
) -> dict[str, Any]:
    """Write and verify the folder; returns the figures.

    Raises:
        UserError: The program gives other logits; the message holds the figures.
    """
    program = record(loaded.model)
    torch.export.save(program, folder / PROGRAM)
    write_beside(loaded, folder)
    again = torch.export.load(folder / PROGRAM).module()
    figures = compare(loaded.model, lambda ids: again(ids), "program")
    return {"torch": torch.__version__, "parity": figures}


def record(model: DualRoutingTransformer, for_onnx: bool = False) -> ExportedProgram:
    """The masked form of a model as a graph with two free dimensions, batch and length."""
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    # neither a multiple of a block nor a number that stands for anything else in the model
    length = max(3, min(3 * model.config.block + 5, model.config.max_context))
    ids = parity.trial_ids(model.config, length, batch=3)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(
            MaskedTransformer(model, for_onnx).eval(), (ids,), dynamic_shapes=(free,), strict=False
        )


def write_beside(loaded: Loaded, folder: Path) -> None:
    """config.json and the tokenizer's file."""
    tokenizer = loaded.tokenizer
    specials = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
    described = {
        **loaded.model.config.to_dict(),
        **{f"{name}_token_id": number for name, number in specials.items() if number >= 0},
    }
    (folder / "config.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    if not loaded.model.config.reads_text:  # items are numbers; model.task_head.labels names them
        return
    name = "tokenizer.json" if is_json(tokenizer) else "tokenizer.model"
    shutil.copyfile(tokenizer.path, folder / name)


@torch.no_grad()
def compare(model: DualRoutingTransformer, run: Callable[[Tensor], Tensor], what: str) -> dict[str, Any]:
    """Differences between ``run(ids)`` and the model at every length, batches of one and of two.

    Raises:
        UserError: More positions than ties explain are off.
    """
    found: dict[str, Any] = {}
    for ids, places, right in parity.trials(model):
        both = torch.cat([parity.at_places(run(some), places) for some in (ids, ids[:1])])
        difference = parity.Difference.between(both, torch.cat([right, right[:1]]), TOLERANCE)
        found[str(ids.shape[1])] = asdict(difference)
    off = {length: each for length, each in found.items() if not each["beyond"] <= TIES}
    if off:
        raise UserError(f"the {what}'s logits differ from the model's (by length: {off}): not published")
    return {"logits": found, "tolerance": TOLERANCE}
