"""An ONNX file: the model for onnxruntime, in whatever language that is called from.

    model.onnx              input_ids (batch, length) int64 → logits (batch, length, vocabulary) float32, or
                            of a task (batch, length, outputs), (batch, outputs) where a text has one
    model-int8.onnx         the same with int8 weights, by ``--quantize``
    config.json, tokenizer.model    see `torch_program`

In: a loaded checkpoint and a folder that is not published yet.  Here: the graph of `torch_program.record` is
    translated, run by onnxruntime at every length of `parity.lengths`, and compared.  The int8 file is not
    equal and does not have to be: what it costs is measured on the data given, and told.

There is no cache in it.  Each new token is a whole run over the text; for a service that
writes long texts the Hugging Face folder is the better export.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dualroute.data.reader import IGNORE_INDEX
from dualroute.evaluate.load import Loaded
from dualroute.export import parity
from dualroute.export import quality as quality_data
from dualroute.export.torch_program import TOLERANCE, compare, record, write_beside

if TYPE_CHECKING:
    from dualroute.export.config import ExportConfig

MODEL, QUANTIZED = "model.onnx", "model-int8.onnx"
ONE_FILE = 1_800_000_000  # bytes; protobuf ends at 2 GiB, larger weights lie in a file beside the graph


def write_export(
    config: ExportConfig, loaded: Loaded, folder: Path, quality: dict[str, Any]
) -> dict[str, Any]:
    """Write and verify the folder; returns the figures.

    Raises:
        UserError: The file gives other logits; the message holds the figures.
    """
    import onnxruntime

    translate(loaded, folder / MODEL, config.opset)
    write_beside(loaded, folder)
    run = session(folder / MODEL)
    figures = {
        "onnxruntime": onnxruntime.__version__,
        "opset": config.opset,
        "parity": compare(loaded.model, run, "ONNX file"),
    }
    if config.quantize:
        quantize(folder / MODEL, folder / QUANTIZED)
        figures["int8"] = cost(config, loaded, run, session(folder / QUANTIZED))
    return figures


def translate(loaded: Loaded, path: Path, opset: int) -> None:
    """Write the model as ONNX."""
    program = record(loaded.model, for_onnx=True)
    size = sum(parameter.nbytes for parameter in loaded.model.parameters())
    with _quiet():
        found = torch.onnx.export(
            program, dynamo=True, opset_version=opset, input_names=["input_ids"], output_names=["logits"]
        )
        assert found is not None
        _name_dimensions(found.model)
        found.save(path, external_data=size > ONE_FILE)


def _name_dimensions(model: Any) -> None:
    """The free dimensions of input and output are called batch and length, not s72 and s70."""
    names = [str(size) for size in model.graph.inputs[0].shape]
    renamed = dict(zip(names, ("batch", "length"), strict=True))
    for value in [*model.graph.inputs, *model.graph.outputs]:
        for place, size in enumerate(value.shape):
            if str(size) in renamed:
                value.shape[place] = renamed[str(size)]


def session(path: Path) -> Callable[[Tensor], Tensor]:
    """Run an ONNX file: token ids (B, n) → logits (B, n, V)."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    running = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda ids: torch.from_numpy(running.run(None, {"input_ids": ids.numpy()})[0])


def quantize(source: Path, target: Path) -> None:
    """Weights in int8, a scale per channel; what they are multiplied with is rounded as it comes."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    large = source.with_name(f"{source.name}.data").exists()
    with _quiet():
        # seven bits: x86 processors without VNNI add pairs of products in 16 bits, which eight overflow
        quantize_dynamic(
            source,
            target,
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=large,
        )


def cost(
    config: ExportConfig,
    loaded: Loaded,
    run: Callable[[Tensor], Tensor],
    quantized: Callable[[Tensor], Tensor],
) -> dict[str, Any]:
    """What int8 changes: at the trial lengths, and in loss where there is data."""
    found: dict[str, Any] = {
        str(ids.shape[1]): asdict(
            parity.Difference.between(parity.at_places(quantized(ids), places), right, TOLERANCE)
        )
        for ids, places, right in parity.trials(loaded.model)
    }
    batches = quality_data.windows(config, loaded)
    if batches:
        losses = {name: _loss(each, batches) for name, each in (("float32", run), ("int8", quantized))}
        found["loss"] = losses
        found["perplexity_ratio"] = float(torch.tensor(losses["int8"] - losses["float32"]).exp())
        found["tokens"] = sum(int((batch["labels"] != IGNORE_INDEX).sum()) for batch in batches)
    return found


def _loss(run: Callable[[Tensor], Tensor], batches: Iterable[dict[str, Tensor]]) -> float:
    """Nats per target."""
    total, count = 0.0, 0
    for batch in batches:
        labels = batch["labels"].flatten()
        logits = run(batch["input_ids"]).flatten(0, 1)
        total += float(F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum"))
        count += int((labels != IGNORE_INDEX).sum())
    return total / count


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Translators tell their progress and what they could not do for nodes that do not matter."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
