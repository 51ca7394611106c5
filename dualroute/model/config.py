"""What a model is: the numbers that decide its shape, checked before anything is built.

`ModelConfig` is written by people (``configs/model/*.yaml``), travels inside every checkpoint as
``model.json`` and is all that :class:`~dualroute.model.transformer.DualRoutingTransformer` needs.
``attention: dense`` is not another model.  It is the same code with every head on
the full global route, so that a comparison with the dense baseline differs in nothing else.  Nor is an
encoder: with ``causal: false`` both routes read what follows a token as they read what precedes it.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from dualroute.attention.core.grid import Grid, check_grid
from dualroute.attention.core.options import (
    AUTO_BREAK_EVEN,
    Heads,
    check_rotary,
    check_routes,
    resolve_heads,
)
from dualroute.errors import UserError
from dualroute.files import read_json
from dualroute.model.ends_config import FrontendConfig, TaskHeadConfig
from dualroute.settings import DERIVED, above, at_least, check_fields

C = TypeVar("C")

_MOST = 2**31 - 1  # of a size; kernels count in 32 bits
#: Fields that a file leaves out at these values, so that it stays what it was before there were such fields.
_LEFT_OUT: dict[str, Any] = {
    "causal": True,
    "cluster_span": 0,
    "embedding_std": None,
    "global_layers": None,
    "layer_ffn_dims": None,
    "share_choice": 1,
    "global_rotary_factor": 1.0,
    "local_rotary_factor": 1.0,
    "task_head": None,
    "frontend": None,
    "parts": None,
}
_RANGES = {
    **dict.fromkeys(
        ("dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "ffn_dim"), at_least(1, _MOST)
    ),
    **dict.fromkeys(("max_context", "window", "layer_windows", "layer_ffn_dims"), at_least(1, _MOST)),
    **dict.fromkeys(("dense_every", "block", "sub_block", "share_choice"), at_least(1, _MOST)),
    **dict.fromkeys(
        ("global_heads", "local_heads", "global_layers", "top_k", "layer_top_k", "cluster_span"),
        at_least(0, _MOST),
    ),
    "vocab_size": at_least(2, _MOST),
    "rope_theta": above(0, 1e12),
    "rope_scaling": above(0),
    "embedding_std": above(0, 1e3),
    **dict.fromkeys(("global_rotary_factor", "local_rotary_factor"), at_least(0, 1)),
    "norm_eps": at_least(0, 1),
}


#: name of transformers → field of ModelConfig; in an exported config.json the former leads
STANDARD_NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "intermediate_size": "ffn_dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "max_position_embeddings": "max_context",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
}


def _noting_what_is_given(cls: type[C]) -> type[C]:
    """Let each instance know which of its fields were given, the default's own value included."""
    initialise: Any = cls.__init__

    @functools.wraps(initialise)
    def note_and_initialise(self: Any, *values: Any, **named: Any) -> None:
        names = [field.name for field in dataclasses.fields(self)]
        self.given = frozenset(names[: len(values)]) | named.keys()
        initialise(self, *values, **named)

    cls.__init__ = note_and_initialise  # type: ignore[method-assign]
    return cls


@dataclass
class PartsConfig:
    """Parts that an encoder from elsewhere has otherwise; ``dualroute convert`` sets them.

    Args:
        norm: rms, or layer: LayerNorm without a bias.
        activation: Of the feed-forward's gate: silu or gelu.
        first_norm: Whether the first layer's attention has a norm in front of it.
        dense_layers: With attention interleaved, numbers of the layers, from 0, that read every token; null
            goes by dense_every.
        local_rope_theta: Base of the rotary frequencies in the other layers; null is the same.
    """

    norm: Literal["rms", "layer"] = "rms"
    activation: Literal["silu", "gelu"] = "silu"
    first_norm: bool = True
    dense_layers: list[int] | None = None
    local_rope_theta: float | None = None

    def __post_init__(self) -> None:
        ranges = {"dense_layers": at_least(0, _MOST), "local_rope_theta": above(0, 1e12)}
        check_fields(self, "model.parts", ranges)


@_noting_what_is_given
@dataclass
class ModelConfig:
    """Shape of a Transformer with DualRouting attention: a decoder, or with causal false an encoder.

    Args:
        vocab_size: Number of token ids; null takes it from the data set's tokenizer.
        dim: Width of the residual stream.
        num_layers: Number of Transformer blocks.
        num_heads: Query heads in all, over both routes.
        num_kv_heads: Key/value heads in all (grouped-query attention); null means one per query head.
        head_dim: Width of one head; null means dim / num_heads.
        ffn_dim: Inner width of the SwiGLU feed-forward; null means 8/3 of dim rounded up to 64.
        layer_ffn_dims: The inner width of each layer, where they differ (``dualroute prune --ffn_by_layer``);
            null means ffn_dim for all.
        max_context: Longest sequence, in tokens, that the model is meant to read (its RoPE range).
        attention: dual sums a global and a local route; dense is the plain Transformer with the same
            parameters; local is sliding-window only; interleaved is local with a dense layer now and then.
        causal: Each token sees itself and what precedes it, and the model predicts the next token.  false:
            each token sees both sides of its document on both routes, and the model is trained to find
            masked tokens (data.objective masked); it cannot continue a text.
        dense_every: With attention interleaved, every n-th layer is dense (6: five local ones, then a
            dense one, as in Gemma 3, https://arxiv.org/abs/2503.19786).
        global_heads: Query heads of the global route; null means those of half of the key/value heads,
            rounded down.
        local_heads: Query heads of the local route; null means the others.
        global_layers: Numbers of the layers, from 0, that have a global route; the others are local, with all
            num_heads. null means every layer.
        window: Keys that the local route sees, the token itself included; with causal false so many to each
            side, the token itself counted in both: 2 * window - 1 in all.
        layer_windows: The window of each layer, where they differ; null means window for all.
        global_mode: full reads every key; routed reads top_k blocks chosen per token; auto is full in
            documents of up to auto_break_even tokens and routed in longer ones.
        auto_break_even: Tokens up to which global_mode auto reads a document in full.
        block: Keys per routed block.
        top_k: Blocks that each token reads exactly, besides its own and the document's first.
        layer_top_k: The top_k of each layer, where they differ; null means top_k for all.
        share_choice: Consecutive layers with a global route that read the same blocks, which the first of
            them chooses; 1: each layer chooses.
        router: How blocks are scored: minmax (bounds on sub-blocks), moment or mean.
        sub_block: Keys per bound of the minmax router; divides block.
        far_summary: What stands in the softmax for blocks that are not read: second_order, first_order
            or none.
        cluster_span: Tokens of the longest past span whose blocks are made of similar keys, so that far
            blocks are found at any length: block times 1, 2, 4, ...; 0 leaves blocks as they stand.
        rope_theta: Base of the rotary position frequencies.
        rope_scaling: How frequencies are lowered to read further than a source was pretrained to: factor
            alone (linear), or factor, low_freq_factor, high_freq_factor and
            original_max_position_embeddings (as Llama 3.1); null leaves them.
        global_rotary_factor: Share of a head's channels that RoPE turns in the global route, and in dense
            attention: 1 all, 0 none (transformers: partial_rotary_factor).
        local_rotary_factor: The same share in the local route.
        qkv_bias: Add a bias to queries, keys and values, as Qwen2 does.
        qk_norm: Normalise queries and keys per head before RoPE.
        gate: A learned gate per head, 1 at the start.
        tie_embeddings: Use the input embedding as the output projection.
        embedding_std: Standard deviation of the token embedding before training, and with it of a tied output
            projection; null means 0.02, that of all other weights.
        norm_eps: Epsilon of every RMSNorm.
        frontend: What enters instead of token ids; ``dualroute finetune`` sets it from the task.
        task_head: What leaves instead of the next token; ``dualroute finetune`` sets it from task and data.
        parts: What an encoder from elsewhere has otherwise; ``dualroute convert`` sets it.
    """

    vocab_size: int | None = None
    dim: int = 256
    num_layers: int = 4
    num_heads: int = 8
    num_kv_heads: int | None = None
    head_dim: int | None = None
    ffn_dim: int | None = None
    layer_ffn_dims: list[int] | None = None
    max_context: int = 2048
    attention: Literal["dual", "dense", "local", "interleaved"] = "dual"
    causal: bool = True
    dense_every: int = 6
    global_heads: int | None = None
    local_heads: int | None = None
    global_layers: list[int] | None = None
    window: int = 128
    layer_windows: list[int] | None = None
    global_mode: Literal["auto", "full", "routed"] = "auto"
    auto_break_even: int = AUTO_BREAK_EVEN
    block: int = 64
    top_k: int = 8
    layer_top_k: list[int] | None = None
    share_choice: int = 1
    router: Literal["minmax", "moment", "mean"] = "minmax"
    sub_block: int = 16
    far_summary: Literal["second_order", "first_order", "none"] = "second_order"
    cluster_span: int = 0
    rope_theta: float = 10000.0
    rope_scaling: dict[str, float] | None = None
    global_rotary_factor: float = 1.0
    local_rotary_factor: float = 1.0
    qkv_bias: bool = False
    qk_norm: bool = False
    gate: bool = False
    tie_embeddings: bool = True
    embedding_std: float | None = None
    norm_eps: float = 1e-5
    task_head: TaskHeadConfig | None = field(default=None, metadata=DERIVED)
    frontend: FrontendConfig | None = field(default=None, metadata=DERIVED)
    parts: PartsConfig | None = field(default=None, metadata=DERIVED)

    def __post_init__(self) -> None:
        if isinstance(self.frontend, dict):  # of a model.json
            self.frontend = FrontendConfig(**self.frontend)
        if isinstance(self.task_head, dict):  # of a model.json
            self.task_head = TaskHeadConfig(**self.task_head)
        if isinstance(self.parts, dict):  # of a model.json
            self.parts = PartsConfig(**self.parts)
        self._derived()  # raises where the numbers contradict each other

    #: fields that were given, by position, by name or (see ``dualroute.cli``) in files and flags
    given: ClassVar[frozenset[str]]

    @property
    def grid(self) -> Grid | None:
        """The patches of an image, where the model reads images."""
        return None if self.frontend is None else self.frontend.grid_of_patches()

    @property
    def reads_text(self) -> bool:
        """Whether what enters are the ids of a tokenizer."""
        return self.frontend is None and (self.task_head is None or self.task_head.kind != "item")

    @property
    def ffn_dims(self) -> list[int]:
        """Inner width of the feed-forward of each layer, of a resolved configuration."""
        assert self.ffn_dim is not None
        return self.layer_ffn_dims or [self.ffn_dim] * self.num_layers

    @property
    def head_is_tied(self) -> bool:
        """Whether the output projection is the input embedding: also of a model with a task's head or with a
        frontend, which writes no text and does not use it."""
        return self.tie_embeddings or self.task_head is not None or self.frontend is not None

    @property
    def heads_per_group(self) -> int:
        """Query heads that share a key/value head."""
        return self.num_heads // (self.num_kv_heads or self.num_heads)

    def resolved(self) -> ModelConfig:
        """The same model with every null but the vocabulary's replaced by the number it stands for."""
        derived: dict[str, Any] = dict(self._derived())
        return dataclasses.replace(self, **derived)

    def of_layer(self, index: int) -> ModelConfig:
        """The configuration of layer number ``index``, from 0.

        Interleaved layers are dense or local ones, dual ones outside of global_layers local, and a layer may
        have a window, a top_k and a feed-forward width of its own."""
        kind, parts, theta = self.attention, self.parts, self.rope_theta
        listed = None if parts is None else parts.dense_layers
        if self.global_layers is not None and index not in self.global_layers:
            kind = "local"
        if kind == "interleaved":
            dense = (index + 1) % self.dense_every == 0 if listed is None else index in listed
            kind = "dense" if dense else "local"
        if parts is not None:
            parts = dataclasses.replace(parts, first_norm=parts.first_norm or index > 0, dense_layers=None)
            if kind == "local" and parts.local_rope_theta is not None:
                theta = parts.local_rope_theta
        return dataclasses.replace(
            self,
            attention=kind,
            parts=parts,
            rope_theta=theta,
            global_layers=None,
            ffn_dim=self.ffn_dim if self.layer_ffn_dims is None else self.layer_ffn_dims[index],
            layer_ffn_dims=None,
            window=self.window if self.layer_windows is None else self.layer_windows[index],
            top_k=self.top_k if self.layer_top_k is None else self.layer_top_k[index],
            layer_windows=None,
            layer_top_k=None,
            share_choice=1,
        ).resolved()

    def _derived(self) -> dict[str, int]:
        check_fields(self, "model", _RANGES)
        if self.attention == "interleaved" and self.dense_every > self.num_layers:
            raise UserError(
                f"model.dense_every {self.dense_every} is above model.num_layers {self.num_layers}: no layer "
                f"would be dense; lower it, or use attention local instead of interleaved"
            )
        layers = self.global_layers
        if layers is not None:
            if self.attention != "dual":
                raise UserError(
                    f"model.global_layers works with attention dual, and model.attention is "
                    f"{self.attention}: leave it out"
                )
            if not layers or layers != sorted(set(layers)) or layers[-1] >= self.num_layers:
                raise UserError(
                    f"model.global_layers is {layers}: give ascending numbers of layers, of 0 to "
                    f"{self.num_layers - 1}, or null for all of them"
                )
        for name, least in (("layer_windows", 1), ("layer_top_k", 0), ("layer_ffn_dims", 1)):
            values = getattr(self, name)
            if values is not None and (len(values) != self.num_layers or min(values) < least):
                raise UserError(
                    f"model.{name} is {values}: give {self.num_layers} numbers of at least {least}, one for "
                    f"each layer, or null"
                )
        self._check_shared_choice()
        if self.parts is not None and self.causal:
            raise UserError("model.parts are those of an encoder: set model.causal to false")
        _check_rope_scaling(self.rope_scaling)
        heads = self._heads()
        ffn_dim = -(-8 * self.dim // (3 * 64)) * 64 if self.ffn_dim is None else self.ffn_dim
        if ffn_dim < 1:
            raise UserError(f"model.ffn_dim is {ffn_dim}: it must be at least 1, or null")
        return {
            "head_dim": heads.head_dim,
            "num_kv_heads": self.num_heads // heads.group,
            "ffn_dim": ffn_dim,
            "global_heads": heads.global_heads,
            "local_heads": heads.local_heads,
        }

    @property
    def choice_groups(self) -> list[list[int]]:
        """Numbers of the layers that read the blocks which the first of them chooses; none that choose for
        themselves alone."""
        layers = range(self.num_layers) if self.global_layers is None else self.global_layers
        firsts = range(0, len(layers) - 1, self.share_choice) if self.share_choice > 1 else ()
        return [list(layers[first : first + self.share_choice]) for first in firsts]

    @property
    def choosers(self) -> list[int]:
        """For each layer the number of the one whose choice of blocks it reads, mostly its own."""
        first = {layer: group[0] for group in self.choice_groups for layer in group}
        return [first.get(layer, layer) for layer in range(self.num_layers)]

    def _check_shared_choice(self) -> None:
        if self.share_choice == 1:
            return
        if self.attention != "dual" or self.cluster_span:
            name = "cluster_span" if self.attention == "dual" else "attention"
            raise UserError(
                f"model.share_choice {self.share_choice} lets layers read the same blocks of attention dual, "
                f"as they stand in the text, and model.{name} is {getattr(self, name)}: use share_choice 1"
            )
        for group in self.choice_groups if self.layer_top_k is not None else ():
            top_k = [self.layer_top_k[number] for number in group]  # type: ignore[index]
            if len(set(top_k)) > 1:
                raise UserError(
                    f"model.layer_top_k is {top_k} in the layers {group}, which read the same blocks "
                    f"(model.share_choice {self.share_choice}): give equal numbers, or use share_choice 1"
                )

    def _heads(self) -> Heads:
        """The numbers of heads; the attention layer's own rules are asked for these and for all it reads."""
        given = {
            "dual": (self.global_heads, self.local_heads),
            "dense": (self.num_heads, 0),
            "local": (0, self.num_heads),
            "interleaved": (self.num_heads, self.num_heads),  # a layer gives all of its heads to one of them
        }[self.attention]
        try:
            check_routes(
                window=self.window,
                global_mode=self.global_mode,
                auto_break_even=self.auto_break_even,
                block=self.block,
                top_k=self.top_k,
                router=self.router,
                sub_block=self.sub_block,
                far_summary=self.far_summary,
                rope_theta=self.rope_theta,
                cluster_span=self.cluster_span,
                causal=self.causal,
            )
            heads = resolve_heads(
                dim=self.dim,
                num_heads=self.num_heads,
                num_kv_heads=self.num_kv_heads,
                head_dim=self.head_dim,
                global_heads=given[0],
                local_heads=given[1],
            )
            if self.grid is not None:
                scaled = self.rope_scaling is not None
                check_grid(
                    self.grid, block=self.block, causal=self.causal, head_dim=heads.head_dim, scaled=scaled
                )
            check_rotary(
                heads.head_dim,
                grid=self.grid is not None,
                global_rotary_factor=self.global_rotary_factor,
                local_rotary_factor=self.local_rotary_factor,
            )
        except ValueError as error:
            raise UserError(f"model.{error}") from error
        if self.attention == "dual" and not (heads.global_heads and heads.local_heads):
            raise UserError(
                f"model.global_heads={heads.global_heads} and local_heads={heads.local_heads}: with "
                "attention dual both must be at least 1; for one route alone set attention to dense or local"
            )
        return heads

    def to_dict(self) -> dict[str, Any]:
        """Every field as it was given, JSON-ready, in the order of the class.

        Those that came later are left out where they say what was so before."""
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if _LEFT_OUT.get(name, ...) != value}

    def require_tokens(self, what: str) -> None:
        """Refuse ``what``, which knows token ids alone, where other things enter.

        Raises:
            UserError: The model has a frontend.
        """
        if self.frontend is not None:
            raise UserError(
                f"{what} is for models of token ids, and this one reads {self.frontend.kind}: use the "
                f"checkpoint as it is (dualroute predict, dualroute evaluate)"
            )

    def require_causal(self, what: str) -> None:
        """Refuse ``what``, which reads from left to right, where the model does not.

        Raises:
            UserError: ``causal`` is false, there are no tokens, or a task's head writes none.
        """
        self.require_tokens(what)
        if self.task_head is not None:
            raise UserError(
                f"{what} predicts the next token, and this model answers a task (model.task_head "
                f"{self.task_head.kind}): use dualroute predict or dualroute evaluate"
            )
        if not self.causal:
            raise UserError(
                f"{what} predicts the next token, and this model sees both sides of each token (model.causal "
                f"false): give a model with model.causal true"
            )

    @classmethod
    def from_file(cls, path: str | Path) -> ModelConfig:
        """Read a ``model.json`` that a checkpoint carries.

        Raises:
            UserError: The file is missing or not JSON, or holds a key that this version does not know or a
                value of another type.
        """
        try:
            values = read_json(path)
        except FileNotFoundError as error:
            raise UserError(f"{path} is missing: the checkpoint is damaged") from error
        if not isinstance(values, dict):
            raise UserError(f"{path} is no table of keys and values: the checkpoint is damaged")
        unknown = set(values) - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise UserError(f"{path} holds unknown keys {sorted(unknown)}: written by another version?")
        try:
            return cls(**values)
        except UserError:
            raise
        except (TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path} holds a value of another type ({error}): it is damaged") from error


def _check_rope_scaling(scaling: dict[str, float] | None) -> None:
    if scaling is None:
        return
    llama3 = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
    if set(scaling) not in ({"factor"}, llama3) or min(scaling.values()) <= 0:
        raise UserError(
            f"model.rope_scaling is {scaling}: give factor alone, or {', '.join(sorted(llama3))}, all above 0"
        )
    if len(scaling) > 1 and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        raise UserError(
            f"model.rope_scaling.high_freq_factor {scaling['high_freq_factor']} is not above "
            f"low_freq_factor {scaling['low_freq_factor']}: raise it"
        )
