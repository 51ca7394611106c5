"""``dualroute export``: a checkpoint in a form that other software runs.

In: a checkpoint.  Here: what it is worth is measured (or read from its metadata), the writer of the format
    fills a folder, loads what it wrote and compares it with the model.  Out: the folder with ``export.json``,
    which holds all figures; a folder that differs is never seen.

The comparison is part of the export and cannot be turned off.  An export is believed by
people who cannot check it.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from safetensors import SafetensorError, safe_open

from dualroute import __version__
from dualroute.errors import UserError
from dualroute.evaluate.load import Loaded, load
from dualroute.export.config import ExportConfig
from dualroute.export.quality import measure
from dualroute.files import appearing_folder
from dualroute.model.checkpoint.format import WEIGHTS, Checkpoint, find_checkpoint, verify_checkpoint
from dualroute.model.checkpoint.lineage import continued

Writer = Callable[["ExportConfig", Loaded, Path, dict[str, Any]], dict[str, Any]]
#: format → the module whose `write_export` fills the folder and returns its figures; the packages it needs.
#: Imported when asked for: each takes seconds
WRITERS: dict[str, tuple[str, list[str]]] = {
    "hf": ("dualroute.export.model_card", ["transformers"]),
    "gguf": ("dualroute.export.gguf_file", ["gguf"]),
    "onnx": ("dualroute.export.onnx_file", ["onnx", "onnxscript", "onnxruntime"]),
    "torch-export": ("dualroute.export.torch_program", []),
}
FLOATS = {"F32": "float32", "BF16": "bfloat16"}


def export_command(config: ExportConfig) -> None:
    """Export a checkpoint; see :class:`ExportConfig`.

    Raises:
        UserError: The checkpoint or an option cannot be used, a package is missing, or the export differs.
    """
    started = time.monotonic()
    loaded, writer = prepare(config)
    quality = measure(config, loaded)
    with appearing_folder(config.output) as folder:
        figures = {
            "format": config.format,
            "dualroute": __version__,
            "checkpoint": described(loaded.checkpoint),
            "parameters": loaded.model.num_parameters(),
            "quality": quality,
            **writer(config, loaded, folder, quality),
        }
        figures["bytes"] = {
            str(path.relative_to(folder)): path.stat().st_size
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        figures["seconds"] = round(time.monotonic() - started, 1)
        (folder / "export.json").write_text(json.dumps(figures, indent=1), encoding="utf-8")
    Console().print(summary(config, figures), soft_wrap=True, highlight=False)


def prepare(config: ExportConfig) -> tuple[Loaded, Writer]:
    """The loaded checkpoint and the function that writes it.

    Raises:
        UserError: A package is missing, the output exists, or the checkpoint cannot be exported.
    """
    if Path(config.output).exists():  # said now, not after the work
        raise UserError(f"--output {config.output} exists already: choose another folder")
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
    checkpoint = find_checkpoint(config.checkpoint)
    saved = saved_dtype(checkpoint)
    writer = _writer(config.format)
    dtype: str = config.dtype
    if dtype == "auto" or config.format == "gguf":  # a GGUF file is rounded when it is written
        dtype = saved if config.format in ("hf", "gguf") else "float32"
    loaded = load(checkpoint.folder, "cpu", dtype)
    if config.format != "hf":
        loaded.model.config.require_tokens(f"--format {config.format} (unlike hf)")
    return loaded, writer


def _writer(format: str) -> Writer:
    module, needed = WRITERS[format]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        extra = "gguf" if format == "gguf" else "export"
        raise UserError(f"--format {format} needs {', '.join(missing)}: pip install -e '.[{extra}]'")
    writer: Writer = importlib.import_module(module).write_export
    return writer


def saved_dtype(checkpoint: Checkpoint) -> str:
    """Dtype of a checkpoint's weights.

    Raises:
        UserError: They are quantised, of a dtype that is not exported, missing or truncated.
    """
    path = checkpoint.folder / WEIGHTS
    verify_checkpoint(checkpoint, digests=False, only=WEIGHTS)  # to open a pipe would wait for ever
    try:
        with safe_open(path, framework="pt") as weights:
            kinds = {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}): use another checkpoint") from error
    scheme = (checkpoint.metadata.get("quantization") or {}).get("scheme")
    if scheme or not kinds <= FLOATS.keys():
        raise UserError(
            f"{checkpoint.folder} holds quantised weights ({scheme or ', '.join(sorted(kinds))}), which no "
            f"format here can hold: export the float checkpoint it was made from; for an int8 file use "
            f"--format onnx --quantize"
        )
    return FLOATS["F32" if "F32" in kinds else "BF16"]


def described(checkpoint: Checkpoint) -> dict[str, Any]:
    """Where the weights come from, without the path on this machine."""
    metadata = checkpoint.metadata
    kept = (
        "step",
        "tokens",
        "total_tokens",
        "val_loss",
        "data_fingerprint",
        "context",
        "operation",
        "teacher",
        "lineage",
    )
    weights = metadata.get("files", {}).get(WEIGHTS, {})
    found = {name: metadata[name] for name in kept if metadata.get(name) is not None}
    found["folder"] = continued(checkpoint)[-1]["folder"]
    return {**found, **({"sha256": weights["sha256"]} if "sha256" in weights else {})}


def summary(config: ExportConfig, figures: dict[str, Any]) -> str:
    """What is printed."""
    size = sum(figures["bytes"].values()) / 1e6
    return f"{config.output}: {config.format}, {size:,.1f} MB; {json.dumps(figures['parity'])}"
