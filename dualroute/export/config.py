"""The options of ``dualroute export``.  No torch is imported here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dualroute.errors import UserError
from dualroute.paths import DataPath, LocalPath
from dualroute.settings import at_least, check_fields


@dataclass
class ExportConfig:
    """Write a checkpoint for transformers, llama.cpp, onnxruntime or torch.export.

    Args:
        checkpoint: A run folder (its newest finished checkpoint) or a checkpoint folder.
        format: hf is a folder that transformers loads and generates with; gguf a file for llama.cpp (dense
            models only); onnx a file for onnxruntime; torch-export a program that torch alone runs.
        output: Folder to make; it appears only when what is in it gives the model's own logits.
        dtype: Of the weights; auto keeps the checkpoint's (hf, gguf) or is float32 (onnx, torch-export);
            float16 with gguf only.
        data: Folder of shards to measure the model on (its split val); the figures go into export.json and
            the model card.  Without data and text they are those of checkpoint.json.
        text: A text file to measure on instead.
        context: Tokens the model sees at once when measured; null takes the context it was trained with.
        max_tokens: Measure on this many tokens at most.
        license: What the model card says of the weights, an SPDX identifier such as apache-2.0; null says
            nothing.
        layout: With hf, whose class the folder names: auto takes one of transformers (Llama, Qwen2, Qwen3,
            Mistral) where it computes the same and ours elsewhere; own takes ours; transformers refuses a
            model that none of its classes computes.
        quantize: With onnx, also write an int8 file (dynamic, per channel) and say what it costs; with gguf,
            write the matrices as q8_0.
        opset: Of the ONNX file.
    """

    checkpoint: LocalPath
    format: Literal["hf", "gguf", "onnx", "torch-export"]
    output: LocalPath
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    data: DataPath | None = None
    text: LocalPath | None = None
    context: int | None = None
    max_tokens: int | None = None
    license: str | None = None
    layout: Literal["auto", "own", "transformers"] = "auto"
    quantize: bool = False
    opset: int = 20

    def __post_init__(self) -> None:
        check_fields(self, "", {"context": at_least(1), "max_tokens": at_least(1), "opset": at_least(18, 23)})
        if self.data is not None and self.text is not None:
            raise UserError("give either --data (a folder of shards) or --text (a file), and not both")
        if self.quantize and self.format not in ("onnx", "gguf"):
            raise UserError(
                f"quantize works with --format onnx only, and with gguf, not {self.format}: leave it away"
            )
        if self.quantize and self.format == "gguf" and self.dtype != "auto":
            raise UserError(
                f"dtype {self.dtype} contradicts quantize: q8_0 is a type of its own; leave one away"
            )
        if self.dtype == "float16" and self.format != "gguf":
            raise UserError(f"dtype float16 works with --format gguf only, not {self.format}")
        if self.layout != "auto" and self.format != "hf":
            raise UserError(f"layout works with --format hf only, not {self.format}: leave it away")
        if self.format not in ("hf", "gguf") and self.dtype == "bfloat16":
            raise UserError(
                f"dtype bfloat16 works with --format hf only, and with gguf: {self.format} files hold float32"
            )
