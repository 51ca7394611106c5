"""Where weights come from: every training and every operation before them, carried in ``checkpoint.json``.

In: the metadata of the checkpoint that something is made from.  Out: ``operation`` (what made the weights),
``lineage`` (what came before, oldest first) and ``total_tokens`` (of all trainings on the way) for the
checkpoint that is made.  Paths are those of another machine soon, so folders are kept by name, and weights by
their sha256.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dualroute.model.checkpoint.folder import WEIGHTS, Checkpoint

#: Operations whose tokens count.
TRAININGS = ("pretrain", "distill", "finetune")
_INFERRED = {
    "quantization": "quantize",
    "pruned_from": "prune",
    "sparsified_from": "sparsify",
    "conversion": "convert",
}


def operation_of(metadata: Mapping[str, Any]) -> str:
    """What made the weights; told by other words in a checkpoint that is older than this one."""
    said = metadata.get("operation")
    if isinstance(said, str):
        return said
    return next((name for key, name in _INFERRED.items() if key in metadata), "pretrain")


def lineage_of(metadata: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What came before, oldest first; nothing where the metadata hold no list of tables."""
    said = metadata.get("lineage")
    return [dict(entry) for entry in said if isinstance(entry, Mapping)] if isinstance(said, list) else []


def continued(parent: Checkpoint) -> list[dict[str, Any]]:
    """The ``lineage`` of what is made from ``parent``."""
    metadata = parent.metadata
    entry: dict[str, Any] = {
        "operation": operation_of(metadata),
        "folder": _name(parent),
        "step": parent.step,
    }
    files = metadata.get("files")
    described = files.get(WEIGHTS) if isinstance(files, Mapping) else None
    if isinstance(described, Mapping):
        entry["weights_sha256"] = described.get("sha256")
    for name in ("tokens", "data_fingerprint", "teacher", "context", "val_loss"):
        if metadata.get(name) is not None:
            entry[name] = metadata[name]
    return [*lineage_of(metadata), entry]


def derived(parent: Checkpoint, operation: str) -> dict[str, Any]:
    """Metadata of weights that ``operation`` made from those of ``parent`` without training."""
    lineage = continued(parent)
    tokens = total_tokens({"operation": operation, "lineage": lineage})
    return {"operation": operation, "lineage": lineage, "tokens": tokens, "total_tokens": tokens}


def imported(source: str) -> dict[str, Any]:
    """Metadata of weights from elsewhere, whose training nobody here knows."""
    return {"operation": "convert", "lineage": [{"operation": "elsewhere", "folder": source}]}


def total_tokens(metadata: Mapping[str, Any]) -> int:
    """Tokens of all trainings that led to these weights, as far as they are known."""
    lineage = lineage_of(metadata)
    own = _tokens(metadata)
    if not lineage:
        return own
    return (own if operation_of(metadata) in TRAININGS else 0) + sum(
        _tokens(entry)
        for number, entry in enumerate(lineage)
        # the first of an older chain may be a copy that says its parent's tokens and nothing else of it
        if entry.get("operation") in TRAININGS or number == 0
    )


def history(checkpoint: Checkpoint) -> Iterator[str]:
    """One line for each training and operation, oldest first, the last of them this checkpoint's."""
    for entry in continued(checkpoint):
        parts = []
        if entry.get("operation") in TRAININGS:
            parts.append(f"{_tokens(entry):,} tokens in {int(entry.get('step') or 0):,} steps")
            if entry.get("data_fingerprint"):
                parts.append(f"data {str(entry['data_fingerprint'])[:12]}")
            if entry.get("context"):
                parts.append(f"context {entry['context']:,}")
            if isinstance(entry.get("val_loss"), float):
                parts.append(f"validation loss {entry['val_loss']:.4f}")
        teacher = entry.get("teacher")
        if isinstance(teacher, Mapping):
            parts.append(f"teacher {teacher.get('folder')}, {_tokens(teacher):,} tokens")
        told = f" ({'; '.join(parts)})" if parts else ""
        yield f"{entry.get('operation')}: {entry.get('folder')}{told}"


def teacher_entry(teacher: Checkpoint) -> dict[str, Any]:
    """What a distilled model says of its teacher."""
    entry = continued(teacher)[-1]
    return {
        "folder": entry["folder"],
        "tokens": total_tokens(teacher.metadata),
        "weights_sha256": entry.get("weights_sha256"),
    }


def _tokens(metadata: Mapping[str, Any]) -> int:
    tokens = metadata.get("tokens")
    return tokens if isinstance(tokens, int) and not isinstance(tokens, bool) else 0


def _name(checkpoint: Checkpoint) -> str:
    """``run/step-00000400`` of a run's checkpoint, the folder's own name of any other."""
    folder = checkpoint.folder.absolute()
    return f"{folder.parents[1].name}/{folder.name}" if folder.parent.name == "checkpoints" else folder.name
