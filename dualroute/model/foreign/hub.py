"""Models from elsewhere: the one entry for teachers, and for the dense models that conversion starts from.

In: a path on this machine.  Here it is recognised and read:

- a checkpoint or run folder of dualroute;
- a Hugging Face directory (config.json with safetensors, whole or sharded) of a Llama, Mistral, Qwen2 or
  Qwen3 model, which becomes a `DualRoutingTransformer` with ``attention: dense``, equal in every logit;
- one of a ModernBERT, which becomes an encoder, equal in every hidden state
  (:mod:`dualroute.model.foreign.modernbert`);
- a Hugging Face directory that ``dualroute export`` wrote, of any attention, also after a training elsewhere
  (:mod:`dualroute.model.foreign.own_export`);
- a Hugging Face directory of a GPT-2, which stays what it is (:mod:`dualroute.model.foreign.gpt2_teacher`);
- a llama2.c checkpoint (:mod:`dualroute.model.foreign.llama2c`).

Out: something with ``hidden_states(input_ids, segment_ids=, positions=)`` and ``head.weight``.

Nothing is ever downloaded, and no code of the directory is run.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from sentencepiece import SentencePieceProcessor
from torch import Tensor, nn

from dualroute.errors import UserError
from dualroute.files import read_limited
from dualroute.model.checkpoint.format import (
    METADATA,
    TOKENIZER,
    find_checkpoint,
    load_model,
    refuse_quantized,
    replace_parameter,
)
from dualroute.model.config import ModelConfig
from dualroute.model.foreign import modernbert, own_export
from dualroute.model.foreign.hf_config import LLAMA_LIKE, llama_like_config
from dualroute.model.foreign.llama2c import read_llama2c
from dualroute.model.transformer import DualRoutingTransformer

#: encoders that people ask for, none of whose layers computes the same as ours
_ENCODERS = ("bert", "roberta", "xlm-roberta", "electra", "distilbert")
_MAX_TOKENIZER_BYTES = 256 << 20
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
#: In a layer of ours → in a layer of theirs; queries, keys and values are joined.
_IN_LAYER = {
    "attention_norm.weight": ("input_layernorm.weight",),
    "attention.out_proj.weight": ("self_attn.o_proj.weight",),
    "ffn_norm.weight": ("post_attention_layernorm.weight",),
    "ffn.gate.weight": ("mlp.gate_proj.weight",),
    "ffn.up.weight": ("mlp.up_proj.weight",),
    "ffn.down.weight": ("mlp.down_proj.weight",),
    "attention.query_norm.weight": ("self_attn.q_norm.weight",),
    "attention.key_norm.weight": ("self_attn.k_norm.weight",),
    **{
        f"attention.{route}_qkv.{kind}": tuple(f"self_attn.{part}_proj.{kind}" for part in "qkv")
        for route in ("global", "local")
        for kind in ("weight", "bias")
    },
}
_OUTSIDE = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}


class CausalLM(Protocol):
    """What distillation asks of a teacher; `DualRoutingTransformer` is one."""

    head: Any  # its `weight` is (V, D)

    def hidden_states(
        self, input_ids: Tensor, *, segment_ids: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """(B, n) → (B, n, D) after the final norm; documents of a row do not see each other."""
        ...


def load_causal_lm(
    source: str | Path, dtype: torch.dtype = torch.float32
) -> tuple[DualRoutingTransformer | nn.Module, Path | None]:
    """Load a language model from a path, on the CPU, in evaluation mode.

    Args:
        source: See the module's docstring.
        dtype: Of the weights.

    Returns:
        The model (a `CausalLM`), and its tokenizer file, null where none is there: tokenizer.model of a
        checkpoint or of a Hugging Face directory, else tokenizer.json of the latter.

    Raises:
        UserError: Nothing readable is there, or the model is of a family that is not supported.
    """
    source = Path(source)
    own_export.refuse_adapter(source)
    if not is_foreign(source):
        checkpoint = find_checkpoint(source)
        refuse_quantized(checkpoint, "floats are needed here; give the checkpoint it was made from")
        return load_model(checkpoint).to(dtype), checkpoint.folder / TOKENIZER
    if source.is_file() and source.suffix == ".bin":
        return filled(*read_llama2c(source), str(source), dtype), None
    if source.is_file():
        raise UserError(
            f"{source} is no model: give a checkpoint, a Hugging Face directory or a llama2.c .bin"
        )
    values = read_json(source / "config.json")
    family = values.get("model_type")
    if family == "gpt2":
        from dualroute.model.foreign.gpt2_teacher import Gpt2Teacher

        return Gpt2Teacher(source, dtype), tokenizer_file(source)
    if family == own_export.MODEL_TYPE:
        config = own_export.own_config(values, str(source / "config.json"))
        return filled(config, read_own_export(source, config), str(source), dtype), tokenizer_file(source)
    if family == modernbert.MODEL_TYPE:
        config = modernbert.modernbert_config(values, str(source / "config.json"))
        return filled(config, read_modernbert(source, config), str(source), dtype), tokenizer_file(source)
    if family in _ENCODERS:
        raise UserError(
            f"{source / 'config.json'}: a {family} cannot be read: its learned positions, LayerNorm with a "
            f"bias after each layer and GELU without a gate have no counterpart here; a modernbert can, and "
            f"masked pretraining (model.causal false) makes an encoder with this one's vocabulary "
            f"(prepare --tokenizer {source / 'tokenizer.json'})"
        )
    if family not in LLAMA_LIKE:
        raise UserError(
            f"{source / 'config.json'}: model_type '{family}' is not supported: llama, mistral, qwen2, "
            f"qwen3, modernbert and exports of dualroute are read, gpt2 as a teacher"
        )
    config = llama_like_config(values, str(source / "config.json"))
    return filled(config, read_llama_like(source, config), str(source), dtype), tokenizer_file(source)


def is_foreign(source: str | Path) -> bool:
    """Whether a path is meant to be a model from elsewhere: a file, or a folder with a config.json."""
    source = Path(source)
    return source.is_file() or ((source / "config.json").is_file() and not (source / METADATA).is_file())


def load_dense(
    source: str | Path, dtype: torch.dtype = torch.float32
) -> tuple[DualRoutingTransformer, Path | None]:
    """As :func:`load_causal_lm`, for initial weights: the model must be one of ours afterwards.

    Raises:
        UserError: As there; or it can only be a teacher.
    """
    model, tokenizer = load_causal_lm(source, dtype)
    if not isinstance(model, DualRoutingTransformer):
        raise UserError(
            f"{source} is a GPT-2, which cannot become initial weights: its learned positions, LayerNorm "
            f"with bias and GELU feed-forward have no counterpart in RoPE, RMSNorm and SwiGLU; use it as a "
            f"teacher of a new model"
        )
    return model, tokenizer


def tokenizer_file(folder: Path) -> Path | None:
    """The tokenizer of a Hugging Face directory: a sentencepiece model where there is one, unless tokens were
    added to tokenizer.json afterwards."""
    pieces, fast = folder / TOKENIZER, folder / "tokenizer.json"
    if pieces.is_file() and fast.is_file() and _ids_in(fast) > _ids_of(pieces):
        return fast
    return next((path for path in (pieces, fast, folder / own_export.LABELS) if path.is_file()), None)


def _ids_of(model: Path) -> int:
    """Ids of a sentencepiece model; more than any where it is something else, which its reader will say."""
    processor = SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(read_limited(model, _MAX_TOKENIZER_BYTES))
        return int(processor.get_piece_size())
    except RuntimeError:
        return sys.maxsize


def _ids_in(fast: Path) -> int:
    """Ids of a tokenizer.json; none where it is something else."""
    values = read_json(fast)
    model, added = values.get("model"), values.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    ids = [token.get("id") for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    own = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary or []))
    return 1 + max((number for number in (*own, *ids) if isinstance(number, int)), default=-1)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        UserError: The file cannot be read, is too large, or holds something else.
    """
    data = read_limited(path, _MAX_TOKENIZER_BYTES)
    try:
        values = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}): copy it again") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no JSON object: copy it again")
    return values


def filled(
    config: ModelConfig, weights: dict[str, Tensor], source: str, dtype: torch.dtype
) -> DualRoutingTransformer:
    """A model of ``config`` with these weights in ``dtype``; each is taken out of ``weights``.

    Raises:
        UserError: A weight is of another shape.
    """
    with torch.device("meta"):
        model = DualRoutingTransformer(config)
    for name, parameter in model.named_parameters():
        theirs = tuple(weights[name].shape)
        if theirs != tuple(parameter.shape):
            raise UserError(
                f"{source}: {name} has shape {theirs} and the configuration there says "
                f"{tuple(parameter.shape)}: weights and configuration do not belong together"
            )
    for name in [name for name, _ in model.named_parameters()]:
        replace_parameter(model, name, nn.Parameter(weights.pop(name).to(dtype)))
    return model.eval()


def read_llama_like(folder: Path, config: ModelConfig) -> dict[str, Tensor]:
    """The weights of a Hugging Face directory under our names.

    Raises:
        UserError: A file or tensor is missing, or there is a tensor that our model has no place for.
    """
    files = _Weights(folder)
    with torch.device("meta"):
        wanted = [name for name, _ in DualRoutingTransformer(config).named_parameters()]
    weights = {name: files.take(llama_names(name)) for name in wanted}
    unknown = sorted(files.untouched())
    if config.tie_embeddings:
        unknown = [name for name in unknown if name != _OUTSIDE["head.weight"]]  # a copy
    if unknown:
        raise UserError(
            f"{folder} holds {len(unknown)} tensor(s) that a {'local' if config.local_heads else 'dense'} "
            f"model here has no place for, {unknown[0]} for one"
        )
    return weights


def read_own_export(folder: Path, config: ModelConfig) -> dict[str, Tensor]:
    """The weights of a folder that an export wrote, under our names.

    Raises:
        UserError: A file or tensor is missing, or there is a tensor that the model has no place for.
    """
    files = _Weights(folder)
    with torch.device("meta"):
        wanted = [name for name, _ in DualRoutingTransformer(config).named_parameters()]
    weights = {}
    for name in wanted:
        names = own_export.theirs(name)
        found = next((place for place in names if place in files.file_of), names[0])
        weights[name] = files.take((found,))
    unknown = sorted(files.untouched())
    if config.tie_embeddings:
        unknown = [name for name in unknown if name not in own_export.theirs("head.weight")]  # a copy
    if unknown:
        raise UserError(
            f"{folder} holds {len(unknown)} tensor(s) that a language model here has no place for, "
            f"{unknown[0]} for one: merge adapters and save the language model itself"
        )
    return weights


def read_modernbert(folder: Path, config: ModelConfig) -> dict[str, Tensor]:
    """The weights of a ModernBERT's directory under our names; those of its heads stay behind.

    Raises:
        UserError: A file or tensor is missing, or there is a tensor that our model has no place for.
    """
    files = _Weights(folder)
    with torch.device("meta"):
        wanted = [name for name, _ in DualRoutingTransformer(config).named_parameters()]
    prefix = "model." if any(name.startswith("model.") for name in files.file_of) else ""
    weights = modernbert.modernbert_weights(wanted, config, prefix, lambda name: files.take((name,)))
    unknown = sorted(name for name in files.untouched() if not name.startswith(modernbert.HEADS))
    if unknown:
        raise UserError(
            f"{folder} holds {len(unknown)} tensor(s) that an encoder here has no place for, {unknown[0]} "
            f"for one"
        )
    return weights


def llama_names(name: str) -> tuple[str, ...]:
    """What a parameter of ours is called in a Llama; several names where we join what it parts."""
    if name in _OUTSIDE:
        return (_OUTSIDE[name],)
    _, layer, rest = name.split(".", 2)
    return tuple(f"model.layers.{layer}.{part}" for part in _IN_LAYER[rest])


class _Weights:
    """The tensors of a directory, read one at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if (folder / _INDEX).is_file():
            self.file_of: dict[str, str] = read_json(folder / _INDEX).get("weight_map", {})
        elif (folder / _SINGLE).is_file():
            self.file_of = dict.fromkeys(self._names(folder / _SINGLE), _SINGLE)
        else:
            raise UserError(
                f"{folder} has neither {_SINGLE} nor {_INDEX}: save the model as safetensors (pickled "
                f"weights are not read)"
            )
        self._taken: set[str] = set()

    def _names(self, path: Path) -> list[str]:
        try:
            with safe_open(path, "pt") as stream:
                return list(stream.keys())
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read ({error}): copy it again") from error

    def take(self, names: tuple[str, ...]) -> Tensor:
        """The tensors of these names, one below the other."""
        tensors = list(self._read(names))
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)

    def _read(self, names: tuple[str, ...]) -> Iterator[Tensor]:
        for name in names:
            if name not in self.file_of:
                raise UserError(f"{self.folder} lacks the tensor {name}, which its config.json asks for")
            path = self.folder / self.file_of[name]
            try:
                with safe_open(path, "pt") as stream:
                    yield stream.get_tensor(name)
            except (OSError, SafetensorError) as error:
                raise UserError(f"{path} cannot be read ({error}): copy it again") from error
            self._taken.add(name)

    def untouched(self) -> set[str]:
        """Tensors that nobody asked for, tables of rotary frequencies aside."""
        return {name for name in self.file_of.keys() - self._taken if not name.endswith(".inv_freq")}
