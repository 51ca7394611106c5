"""The options of ``dualroute convert``, ``prune``, ``sparsify`` and ``quantize``.

No torch is imported here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from dualroute.errors import UserError
from dualroute.model.quantization import GROUPED, Quantization, SchemeName
from dualroute.paths import DataPath, LocalPath
from dualroute.settings import SEEDS, Range, at_least, check_fields

Criterion = Literal["activation", "random"]
Axis = Literal["layers", "dim", "ffn", "heads"]
Target = Literal["parameters", "flops", "latency"]
SIZES = ("dim", "ffn_dim", "num_layers", "global_heads", "local_heads")
#: What belongs to dual attention alone.
ROUTING = (
    "window", "block", "sub_block", "top_k", "global_mode", "router", "far_summary", "cluster_span",
    "global_layers",
)  # fmt: skip
_OF_DUAL = (*ROUTING, "local_heads", "keys")


@dataclass
class ConvertConfig:
    """Turn a model from elsewhere, or a dense checkpoint, into a checkpoint.

    Args:
        source: A checkpoint or run folder, a Hugging Face directory (Llama, Mistral, Qwen2, Qwen3, or one
            that export wrote, also after a training elsewhere), or a llama2.c .bin file.
        output: Checkpoint folder to write.
        tokenizer: The source's tokenizer, where none lies in its folder: a sentencepiece .model, a
            tokenizer.json or a llama2.c .bin file.
        attention: dense keeps what the model computes; dual gives it two routes.  An export that has them
            already keeps them.
        heads: divide sends each head, with those that share its keys, to one route; both lets either route
            begin with all heads, and their mean be the output.
        local_heads: With divide: query heads of the local route; null means half.
        choose: Which heads become local: those with the least attention beyond the window (distance), or
            any (random), to compare with.
        global_layers: Numbers of the layers, from 0, that get a global route; the others become local. null
            means every layer.
        keys: Share of the dense model's keys that a token may read, on texts of ``context`` tokens: window,
            top_k and global route of each layer are given up where that costs least, and what is given for
            window and top_k (64 and 8 by default) is what the search begins with.  null searches nothing.
        window: Keys that the local route sees, the token itself included; null keeps the source's.
        block: Keys per routed block; null keeps the source's.
        sub_block: Keys per bound of the minmax router; null keeps the source's.
        top_k: Blocks that each token reads exactly; null keeps the source's.
        global_mode: full, routed or auto; null keeps the source's.
        router: minmax, moment or mean; null keeps the source's.
        far_summary: second_order, first_order or none; null means first_order, since the second order's
            variance outweighs all else where a model not trained with it has keys that vary much in a block.
        cluster_span: Tokens of the longest past span whose blocks are made of similar keys, 0 for blocks as
            they stand in the text; null keeps the source's.
        data: Folder of shards to measure the heads on; null lets the model write the text.
        calibration_tokens: Tokens to measure on.
        context: Tokens of one text to measure on; null means the model's, 2048 at most.
        dtype: Of the weights that are written.
        seed: Of the text that is sampled, and of random.
        device: Where to measure: auto, cpu, cuda, ….
    """

    source: LocalPath
    output: LocalPath
    tokenizer: LocalPath | None = None
    attention: Literal["dense", "dual"] = "dual"
    heads: Literal["divide", "both"] = "divide"
    local_heads: int | None = None
    choose: Literal["distance", "random"] = "distance"
    global_layers: list[int] | None = None
    keys: float | None = None
    window: int | None = None
    block: int | None = None
    sub_block: int | None = None
    top_k: int | None = None
    global_mode: Literal["auto", "full", "routed"] | None = None
    router: Literal["minmax", "moment", "mean"] | None = None
    far_summary: Literal["second_order", "first_order", "none"] | None = None
    cluster_span: int | None = None
    data: DataPath | None = None
    calibration_tokens: int = 16384
    context: int | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        sizes = ("window", "block", "sub_block", "local_heads", "calibration_tokens")
        ranges = {
            "context": at_least(2),
            "seed": SEEDS,
            "cluster_span": at_least(0, 2**31 - 1),
            "keys": Range(0, 1, without_least=True, without_most=True),
        }
        check_fields(self, "", {**dict.fromkeys(sizes, at_least(1, 2**31 - 1)), **ranges})
        given = [name for name in _OF_DUAL if getattr(self, name) is not None]
        if self.attention == "dense" and given:
            raise UserError(f"{given[0]} works with --attention dual only: leave it out")
        if self.heads == "both" and self.local_heads is not None:
            raise UserError("local_heads works with --heads divide only: with both, each route has all heads")
        if self.keys is not None and (self.heads == "both" or self.global_layers is not None):
            other = "global_layers" if self.heads == "divide" else "heads both"
            raise UserError(f"keys looks for the layers and heads itself: leave {other} out")

    @property
    def changes(self) -> bool:
        """Whether an option of dual attention was given."""
        given = any(getattr(self, name) is not None for name in _OF_DUAL)
        return given or self.heads == "both"

    @property
    def routing(self) -> dict[str, Any]:
        """The options of dual attention; null keeps the source's."""
        given = {name: getattr(self, name) for name in ROUTING}
        given["far_summary"] = self.far_summary or "first_order"
        if self.keys is not None:
            given |= {"window": self.window or 64, "top_k": 8 if self.top_k is None else self.top_k}
            given["global_mode"] = self.global_mode or "routed"
        return given


@dataclass
class PruneConfig:
    """Cut a trained model to a smaller one.

    Args:
        checkpoint: A checkpoint folder or a run folder (its newest checkpoint, or the best one of a task).
        output: Folder of the new checkpoint; must not exist.
        data: Folder of the shards that the model was trained on, for calibration; of a model of a task a file
            or folder of rows, null taking those of its training.
        keep: Share of the target that the new model may have at most; null keeps the shape, but for sizes
            given below.
        target: What keep counts: parameters, training flops per token, or the measured latency of a forward
            pass of context tokens on this device.
        axes: What may shrink to reach it.
        dim: Width of the residual stream, instead of the one that the search finds.
        ffn_dim: Inner width of the feed-forward, likewise.
        num_layers: Layers, likewise.
        global_heads: Heads of the global route, likewise; whole key/value groups.
        local_heads: Heads of the local route, likewise.
        shape_of: A checkpoint whose sizes are taken, all of them, instead of keep and axes.
        multiple: Widths stay multiples of this; group-wise quantisation wants 64 or 128.
        ffn_by_layer: Give each layer a feed-forward of its own width, by the loss that its cut costs; as many
            channels in all as one width for all layers has.  Classes of transformers and llama.cpp know one
            width only.
        criterion: activation keeps what contributes most; random is the control.
        compensate: Refit the weights that stay to make up for those that go.
        keys: Also halve windows and top_k of single layers, whichever costs least, until a token reads at
            most this share of the keys that it read before.
        fit_routing: Also give each layer the smallest window and top_k that it needs.
        routing_tolerance: Loss, in nats, that the smaller windows and top_k may cost in all.
        axis_report: Measure what each axis costs at a few sizes, beside random pruning; without it the search
            takes all axes as equally costly.
        calibration_tokens: Tokens of the training split to measure on.
        context: Tokens of a window; null takes the one the model was trained with.
        batch_size: Windows at once.
        seed: Of the calibration's windows and of random pruning.
        device: auto, cpu, cuda, ….
    """

    checkpoint: LocalPath
    output: LocalPath
    data: DataPath | None = None
    keep: float | None = None
    target: Target = "parameters"
    axes: list[Literal["layers", "dim", "ffn", "heads"]] = field(
        default_factory=lambda: ["dim", "ffn", "heads"]
    )
    dim: int | None = None
    ffn_dim: int | None = None
    num_layers: int | None = None
    global_heads: int | None = None
    local_heads: int | None = None
    shape_of: LocalPath | None = None
    multiple: int = 64
    ffn_by_layer: bool = False
    criterion: Criterion = "activation"
    compensate: bool = True
    keys: float | None = None
    fit_routing: bool = False
    routing_tolerance: float = 0.005
    axis_report: bool = True
    calibration_tokens: int = 65536
    context: int | None = None
    batch_size: int = 4
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        counts = ("multiple", "calibration_tokens", "context", "batch_size", *SIZES)
        shares = dict.fromkeys(("keep", "keys"), Range(0, 1, without_least=True, without_most=True))
        check_fields(self, "", {**dict.fromkeys(counts, at_least(1, 2**31 - 1)), **shares, "seed": SEEDS})
        if self.keys is not None and self.fit_routing:
            raise UserError("keys and fit_routing both choose windows and top_k: give one of them")
        if self.keep is not None and not self.axes:
            raise UserError("axes is empty: name what may shrink, of layers, dim, ffn, heads")
        if self.shape_of is not None and (self.keep is not None or self._given_sizes()):
            raise UserError("shape_of gives all sizes: leave out keep and the sizes")
        if not (self.keep or self.shape_of or self.fit_routing or self.keys or self._given_sizes()):
            raise UserError("nothing to prune: give keep, a size such as ffn_dim, keys, or fit_routing")

    def _given_sizes(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in SIZES if getattr(self, name) is not None}

    def sizes(self, parent: Any, group: int) -> dict[str, int]:
        """Fields of `Shape` that were given; ``parent`` is the shape of the model that is pruned.

        Raises:
            UserError: A size is above the parent's, or no whole number of groups or multiples.
        """
        sizes: dict[str, int] = {}
        for name, value in self._given_sizes().items():
            field_name = name.replace("heads", "groups")
            unit = group if name.endswith("heads") else self.multiple if name != "num_layers" else 1
            full = getattr(parent, field_name) * (group if name.endswith("heads") else 1)
            if value != full and (value < 1 or value > full or value % unit):
                raise UserError(f"{name} is {value}: it must be at most {full} and a multiple of {unit}")
            sizes[field_name] = value // group if name.endswith("heads") else value
        return sizes


@dataclass
class SparsifyConfig:
    """Set single weights to zero; a research option that gives no speed.

    Args:
        checkpoint: A checkpoint folder or a run folder (its newest checkpoint).
        output: Folder of the new checkpoint; must not exist.
        data: Shards to calibrate wanda on, and to measure the loss on.
        method: wanda weighs each weight by its input; magnitude does not.
        sparsity: Share of the weights of each row that become zero.
        pattern: unstructured, or 2:4, two zeros among each four neighbours of a row (sparsity is then 0.5).
        calibration_tokens: Tokens of the training split to measure on.
        context: Tokens of a window; null takes the one the model was trained with.
        batch_size: Windows at once.
        seed: Of the calibration's windows.
        device: auto, cpu, cuda, ….
    """

    checkpoint: LocalPath
    output: LocalPath
    data: DataPath
    method: Literal["wanda", "magnitude"] = "wanda"
    sparsity: float = 0.5
    pattern: Literal["unstructured", "2:4"] = "unstructured"
    calibration_tokens: int = 65536
    context: int | None = None
    batch_size: int = 4
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        counts = ("calibration_tokens", "context", "batch_size")
        ranges = {"sparsity": Range(0, 1, without_least=True, without_most=True), "seed": SEEDS}
        check_fields(self, "", {**dict.fromkeys(counts, at_least(1)), **ranges})
        if self.pattern == "2:4" and self.sparsity != 0.5:
            raise UserError(f"sparsity is {self.sparsity}, and pattern 2:4 is always 0.5: leave sparsity out")


@dataclass
class QuantizeConfig:
    """Store a model's weights in fewer bits.

    Args:
        checkpoint: A run folder (its newest finished checkpoint) or a checkpoint folder, with float weights.
        output: Folder to make; it appears whole or not at all.
        scheme: int8_weight_only and int8_dynamic (activations too) keep one scale a row; int4_weight_only one
            for each group, two weights a byte; these run anywhere. int4_tile_packed and float8_dynamic are
            laid out for the kernels of a CUDA device, which they need from the start.
        group_size: Columns that share a scale, for the int4 schemes.
        embeddings: Make embedding and head int8 as well, one scale a row.
        device: Where to quantize: auto, cpu, cuda, ….
    """

    checkpoint: LocalPath
    output: LocalPath
    scheme: SchemeName = "int8_weight_only"
    group_size: int = 32
    embeddings: bool = True
    device: str = "auto"

    def __post_init__(self) -> None:
        check_fields(self, "", {"group_size": at_least(1)})
        if self.scheme in GROUPED and self.group_size not in (32, 64, 128, 256):
            raise UserError(f"group_size is {self.group_size}: kernels have 32, 64, 128 and 256")

    @property
    def quantization(self) -> Quantization:
        """What ``checkpoint.json`` will say."""
        group_size = self.group_size if self.scheme in GROUPED else None
        return Quantization(self.scheme, group_size, self.embeddings)
