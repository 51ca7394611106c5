"""A GGUF file: a dense model for llama.cpp and what is built on it.

    model.gguf      weights, configuration and tokenizer in one file

In: a loaded checkpoint and a folder that is not published yet.  Here: weights get the names and the order of
rows that llama.cpp reads, in the type that is asked for, and the ``gguf`` package writes them.  Then its
reader reads the file, rows go back to their places, and every number is compared with the model's, bit by
bit.

Llama.cpp's Llama turns neighbouring channels of a head where this package (and transformers)
turn the halves; its queries' and keys' rows are therefore in another order.  Qwen2 and Qwen3 keep theirs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dualroute.errors import UserError
from dualroute.evaluate.load import Loaded
from dualroute.export.gguf_tokenizer import Vocabulary, vocabulary
from dualroute.export.hf import transformers_layout
from dualroute.export.model_card import write_card
from dualroute.model import ModelConfig

if TYPE_CHECKING:
    from dualroute.export.config import ExportConfig

MODEL = "model.gguf"
Array = NDArray[Any]


def write_export(
    config: ExportConfig, loaded: Loaded, folder: Path, quality: dict[str, Any]
) -> dict[str, Any]:
    """Write and verify the folder; returns the figures.

    Raises:
        UserError: llama.cpp cannot compute the model or read the tokenizer, or the file differs from it.
    """
    check_possible(loaded.model.config)
    kind = "q8_0" if config.quantize else {"auto": saved_type(loaded)}.get(config.dtype, config.dtype)
    write(loaded, folder / MODEL, kind, Path(config.output).name)
    figures = {
        "architecture": architecture(loaded.model.config),
        "type": kind,
        "parity": compare(loaded, folder / MODEL, kind),
    }
    write_card(config, loaded, folder, quality, figures)
    return figures


def check_possible(config: ModelConfig) -> None:
    """Refuse a model that llama.cpp does not compute.

    Raises:
        UserError: With the reason, and what to do.
    """
    reason = transformers_layout.why_not(config)
    if not reason and config.attention == "local":
        reason = "its attention is local, and llama.cpp's Llama has no sliding window"
    if reason:
        raise UserError(
            f"--format gguf holds dense models, and here {reason}: use --format hf, or distil it into a "
            f"model with attention dense"
        )


def saved_type(loaded: Loaded) -> str:
    """float32 or bfloat16, whichever the weights are."""
    return str(loaded.model.embedding.weight.dtype).removeprefix("torch.")


def architecture(config: ModelConfig) -> str:
    """llama, qwen2 or qwen3."""
    return transformers_layout.family(config)[0]


def write(loaded: Loaded, path: Path, kind: str, name: str) -> None:
    """Write the file.

    Args:
        loaded: The model and its tokenizer.
        path: Where to.
        kind: float32, float16, bfloat16 or q8_0: of the matrices; vectors are float32.
        name: What the file says that the model is called.

    Raises:
        UserError: The tokenizer is one that llama.cpp does not have, or a weight is beyond float16.
    """
    import gguf

    config = loaded.model.config.resolved()
    words = vocabulary(loaded.tokenizer)
    writer = gguf.GGUFWriter(path, architecture(config))
    writer.add_name(name)
    _write_shape(writer, config)
    _write_vocabulary(writer, loaded, words)
    writer.add_file_type(
        {
            "float32": gguf.LlamaFileType.ALL_F32,
            "float16": gguf.LlamaFileType.MOSTLY_F16,
            "bfloat16": gguf.LlamaFileType.MOSTLY_BF16,
            "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
        }[kind]
    )
    for tensor, values, quantised in _tensors(loaded, kind):
        writer.add_tensor(tensor, values, raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_shape(writer: Any, config: ModelConfig) -> None:
    import gguf

    assert config.head_dim is not None
    writer.add_context_length(config.max_context)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.ffn_dims[0])
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_vocab_size(config.vocab_size)
    if config.rope_scaling is not None and len(config.rope_scaling) == 1:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_scaling["factor"])


def _write_vocabulary(writer: Any, loaded: Loaded, words: Vocabulary) -> None:
    tokenizer = loaded.tokenizer
    writer.add_tokenizer_model(words.model)
    if words.pre is not None:
        writer.add_tokenizer_pre(words.pre)
    else:
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(words.scores)
        writer.add_add_space_prefix(words.space_in_front)
        writer.add_remove_extra_whitespaces(False)
    writer.add_token_list(words.pieces)
    writer.add_token_types(words.kinds)
    if words.merges:
        writer.add_token_merges(words.merges)
    for add, number in (
        (writer.add_bos_token_id, tokenizer.bos_id),
        (writer.add_unk_token_id, tokenizer.unk_id),
        (writer.add_pad_token_id, tokenizer.pad_id),
    ):
        if number >= 0:
            add(number)
    for add, number in zip(
        (writer.add_eos_token_id, writer.add_eot_token_id), tokenizer.eos_ids, strict=False
    ):
        add(number)
    writer.add_add_bos_token(tokenizer.bos_id >= 0)  # as in the training data
    writer.add_add_eos_token(False)
    if tokenizer.settings.chat_template is not None:
        writer.add_chat_template(tokenizer.settings.chat_template)


def _tensors(loaded: Loaded, kind: str) -> Iterator[tuple[str, Array, Any]]:
    """(name, values, GGUF's type) of every tensor, one at a time."""
    config = loaded.model.config.resolved()
    for name, theirs, weight in _named(loaded):
        yield name, *_stored(_rows(config, theirs, weight.detach()).float().numpy(), kind, name)
    factors = rope_factors(config)
    if factors is not None:
        yield "rope_freqs.weight", *_stored(factors, "float32", "rope_freqs.weight")


def _named(loaded: Loaded) -> Iterator[tuple[str, str, Tensor]]:
    """(name in GGUF, name in transformers, weight) of every parameter."""
    import gguf

    config = loaded.model.config
    arch = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3}
    names = gguf.get_tensor_name_map(arch[architecture(config)], config.num_layers)
    for theirs, weight in transformers_layout.named_weights(loaded.model).items():
        name = names.get_name(theirs, try_suffixes=(".weight", ".bias"))
        assert name is not None, theirs
        yield name, theirs, weight


def _rows(config: ModelConfig, name: str, weight: Tensor, back: bool = False) -> Tensor:
    """A Llama's queries and keys with the two halves of a head interleaved, or parted again."""
    if architecture(config) != "llama" or not any(part in name for part in ("q_proj", "k_proj")):
        return weight
    heads = weight.unflatten(0, (-1, config.head_dim or 0))  # (H, d, D)
    halves = heads.unflatten(1, (-1, 2) if back else (2, -1))
    return halves.transpose(1, 2).flatten(0, 2).contiguous()


def _stored(values: Array, kind: str, name: str) -> tuple[Array, Any]:
    """Values as the file holds them, and GGUF's name of the type."""
    import gguf
    from gguf.quants import quantize

    if values.ndim == 1 or kind == "float32":
        return values.astype(np.float32), gguf.GGMLQuantizationType.F32
    if kind == "q8_0" and values.shape[1] % gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.Q8_0][0]:
        kind = "float16"  # as llama.cpp does where rows are no multiples of a block
    if kind == "float16":
        if np.abs(values).max(initial=0.0) > np.finfo(np.float16).max:
            raise UserError(f"{name} has weights beyond float16: use --dtype float32 or bfloat16")
        return values.astype(np.float16), gguf.GGMLQuantizationType.F16
    if kind == "q8_0":
        quantised = gguf.GGMLQuantizationType.Q8_0
        return quantize(np.ascontiguousarray(values), quantised), quantised
    bits = torch.from_numpy(values).bfloat16().view(torch.uint8).numpy()
    return bits, gguf.GGMLQuantizationType.BF16


def rope_factors(config: ModelConfig) -> Array | None:
    """What llama.cpp divides the frequencies of a Llama 3.1 by, one number per pair of channels."""
    scaling = config.rope_scaling
    if scaling is None or len(scaling) == 1:
        return None
    assert config.head_dim is not None
    factor, low, high = (scaling[key] for key in ("factor", "low_freq_factor", "high_freq_factor"))
    context = scaling["original_max_position_embeddings"]
    channels = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    waves = 2 * math.pi * config.rope_theta**channels
    smooth = np.clip((context / waves - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


def compare(loaded: Loaded, path: Path, kind: str) -> dict[str, Any]:
    """Read the file with gguf's own reader and compare all of it with the model.

    Returns:
        How many tensors are there, and by how much a weight differs at most from the model's: 0, or what
        rounding to ``kind`` takes.

    Raises:
        UserError: A tensor is missing, of another shape, or not what was to be written.
    """
    import gguf
    from gguf.quants import dequantize

    reader = gguf.GGUFReader(path)
    found = {tensor.name: tensor for tensor in reader.tensors}
    config, largest = loaded.model.config.resolved(), 0.0
    for name, theirs, weight in _named(loaded):
        tensor = found.get(name)
        wanted, quantised = _stored(_rows(config, theirs, weight.detach()).float().numpy(), kind, name)
        if tensor is None or tensor.tensor_type != quantised or tensor.data.tobytes() != wanted.tobytes():
            raise UserError(f"the GGUF file's {name} is not what was to be written: not published")
        read = torch.from_numpy(np.array(dequantize(tensor.data, quantised)).reshape(weight.shape))
        difference = _rows(config, theirs, read, back=True) - weight.detach().float()
        largest = max(largest, float(difference.abs().max()))
    if (kind == "float32" or kind == saved_type(loaded)) and largest:
        raise UserError(f"the GGUF file's weights are off by {largest:g}: not published")
    _compare_words(reader.get_field, loaded)
    return {"tensors": len(found), "largest_difference": largest}


def _compare_words(field: Callable[[str], Any], loaded: Loaded) -> None:
    pieces = field("tokenizer.ggml.tokens").contents()
    if pieces != vocabulary(loaded.tokenizer).pieces:
        raise UserError("the GGUF file's vocabulary is not the tokenizer's: not published")
