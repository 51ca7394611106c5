"""A folder that ``dualroute export --format hf`` wrote, on its way back.

In: its config.json and weights, as they were written or as transformers saved them again after a fine-tuning
or after a LoRA was merged.  Here: the fields of `ModelConfig` out of the drawer ``dualroute``, and the names
of the weights without what transformers has in front of them.  Next: :mod:`dualroute.model.foreign.hub` fills
the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dualroute.errors import UserError
from dualroute.files import read_json, read_limited
from dualroute.model.checkpoint.folder import LARGEST_TASK, TASK
from dualroute.model.checkpoint.lineage import lineage_of, operation_of, total_tokens
from dualroute.model.config import STANDARD_NAMES, ModelConfig

MODEL_TYPE = "dualroute"
#: The tokenizer of a model that reads no text, under a name that nobody takes for one of texts.
LABELS = "labels.model"

_TOLD = ("folder", "step", "tokens", "data_fingerprint", "teacher")


def wrote(folder: Path) -> bool:
    """Whether a folder's config.json is one of an export with attention of ours."""
    try:
        return bool(read_json(folder / "config.json").get("model_type") == MODEL_TYPE)
    except (OSError, UserError, AttributeError):
        return False


def own_config(values: Mapping[str, Any], place: str) -> ModelConfig:
    """The `ModelConfig` of an exported folder's config.json.

    Raises:
        UserError: The drawer is missing, or holds what this version does not know.
    """
    drawer = values.get(MODEL_TYPE)
    if not isinstance(drawer, dict):
        raise UserError(f"{place} lacks the table '{MODEL_TYPE}', which an export writes: export it again")
    fields = {field.name for field in dataclasses.fields(ModelConfig)}
    unknown = sorted(drawer.keys() - fields)
    if unknown:
        raise UserError(f"{place}: '{MODEL_TYPE}' holds unknown keys {unknown}: written by another version?")
    given = {field: values[name] for name, field in STANDARD_NAMES.items() if values.get(name) is not None}
    try:
        return ModelConfig(**{**drawer, **given})
    except UserError as error:
        raise UserError(f"{place}: {error}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{place} holds a value of another type ({error}): copy it again") from error


def theirs(name: str) -> tuple[str, ...]:
    """Names that a parameter of ours may have in the folder, the usual one first."""
    if name.startswith("task_head.project."):
        kind = name.rpartition(".")[2]
        return f"score.{kind}", f"qa_outputs.{kind}"
    usual = f"model.{name}"
    return ("lm_head.weight", usual) if name == "head.weight" else (usual, name)


def exported_lineage(folder: Path) -> dict[str, Any]:
    """Metadata of weights that were exported and came back, from the export.json that lies there; none where
    it does not, or is damaged: transformers does not copy it."""
    try:
        told = read_json(folder / "export.json").get("checkpoint")
        entry = {name: told[name] for name in _TOLD if told.get(name) is not None}
        lineage = [*lineage_of(told), {"operation": operation_of(told), **entry}]
    except (FileNotFoundError, UserError, AttributeError):
        return {}
    lineage.append({"operation": "elsewhere", "folder": folder.name})
    tokens = total_tokens({"operation": "convert", "lineage": lineage})
    return {"lineage": lineage, "tokens": tokens, "total_tokens": tokens}


def own_task_file(folder: Path) -> dict[str, bytes]:
    """{name: content} of what an export says of the task that its model was trained for; empty where it says
    nothing."""
    path = folder / TASK
    return {TASK: read_limited(path, LARGEST_TASK)} if wrote(folder) and path.is_file() else {}


def refuse_adapter(folder: Path) -> None:
    """Refuse a folder that holds a LoRA alone.

    Raises:
        UserError: With how the adapter is merged.
    """
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} is an adapter without its model: merge it (peft: merge_and_unload, then "
            f"save_pretrained) and give that folder"
        )
