"""Compiled decoding: one program for a whole step, from the token's id to its logits.

In: a model, float or quantised, and the caches that its prompt was read into.  Here: layer by layer one call
of the CPU's kernels (:mod:`dualroute.attention.backends.cpp`), or without them the step of
:mod:`dualroute.attention.backends.torch.static_decode`, and ``torch.compile`` with frozen weights, which
packs them for the processor and fuses everything between two products.  Out: the next logits;
:func:`dualroute.model.decoding.generation.generate` draws from them.

Projections that read the same rows are joined (:mod:`dualroute.model.fused_linear`).

Int8 weights gain nothing without it.  Run layer by layer they are widened to floats
before each product, which costs more than it saves; inside the program they stay bytes until they are in a
register, and a step of decoding, which reads every weight once, is as fast as memory.  For one text the CPU's
kernels multiply, for several the compiler's, which knows that pattern in bfloat16 alone: in float32 it would
widen the weights for good.
"""

from __future__ import annotations

import contextlib
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from dualroute import compat
from dualroute.attention.backend import token_kernels
from dualroute.attention.backends.cpp import C_FUNCTIONS
from dualroute.attention.backends.torch.static_decode import static_full, static_local, static_routed
from dualroute.attention.core.cache import LayerCache
from dualroute.attention.core.precision import outside_inference_mode
from dualroute.attention.core.rope import Table, token_tables
from dualroute.attention.decoding import token_heads
from dualroute.attention.layer import DualRouting
from dualroute.errors import UserError
from dualroute.model.fused_linear import Joined
from dualroute.model.layers import TransformerBlock
from dualroute.model.quantized import QuantizedHead, QuantizedLinear
from dualroute.model.transformer import DualRoutingTransformer

#: cached tokens that a program looks at; one more program is made for each size that a text grows into
SIZES = (1024, 4096, 16384, 65536, 262144)


def check_compiler(device: torch.device) -> None:
    """Refuse to compile where there is nothing to compile with.

    Raises:
        UserError: There is no C++ compiler (CPU).
    """
    if device.type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        raise UserError("--compile needs a C++ compiler on a CPU: install g++, or leave --compile out")


class CompiledDecoder:
    """Decodes token by token with one compiled program; reads prompts as the model itself does.

    Args:
        model: In evaluation mode; its weights must not change any more (some become views of joined ones).
        compile: False runs the same step without compiling (for tests).

    Raises:
        UserError: There is no compiler.
    """

    @outside_inference_mode
    def __init__(self, model: DualRoutingTransformer, *, compile: bool = True) -> None:
        if compile:
            check_compiler(model.norm.weight.device)
        self.model = model
        self._compile = compile
        self._step = DecodeStep(model)
        in_steps = set(self._step.projections())
        for module in self._step.modules():
            if isinstance(module, QuantizedLinear | QuantizedHead):
                grouped = isinstance(module, QuantizedLinear) and module.group_size is not None
                if grouped or module in in_steps:  # kernels for int4 read prompts as well
                    module.pack_for_cpu()
        self._programs: dict[tuple[Any, ...], Program] = {}  # by what they were compiled for
        self._held: WeakKeyDictionary[LayerCache, _Held] = WeakKeyDictionary()  # by the first layer's cache
        self._position = torch.zeros((), dtype=torch.long, device=model.norm.weight.device)
        #: the same memory, to write to without the detour of an operator
        self._place: Any = self._position.numpy() if self._position.device.type == "cpu" else self._position

    def __call__(self, tokens: Tensor, caches: list[LayerCache]) -> Tensor:
        """Logits (B, V) after the last of tokens (B, n), which continue what the caches hold.

        Raises:
            ValueError: The caches are full.
        """
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self(tokens, caches)
        batch, count = tokens.shape
        length = caches[0].length
        if count > 1 or length == 0:
            return self.model.head(self.model.hidden_states(tokens, caches=caches)[:, -1])
        if length >= caches[0].max_length:
            raise ValueError(f"the caches hold max_length={length} tokens: make new ones, larger")
        for cache in caches:
            cache.regroup()
        held = self._held.get(caches[0])
        if held is None or length >= held.room or not held.still():
            for cache in caches:
                if cache.global_cache is not None:
                    cache.global_cache.reserve(length + 1)
            kernels, like = self._step.kernels, self.model.norm.weight
            usable = kernels is not None and all(kernels.can_decode(like, cache) for cache in caches)
            held = self._held[caches[0]] = _Held(caches, kernels if usable else None)
        self._place[()] = length
        position = self._position
        size = 0 if held.memory is not None else _size(caches[0])
        if not self._compile:
            logits = self._step(tokens, position, caches, held.memory, size)
        else:
            shapes = size, batch, *held.shapes
            if shapes not in self._programs:
                self._programs[shapes] = Program(self._step)
            logits = self._programs[shapes](tokens, position, caches, held, size)
        for part in held.parts:
            part.advance()
        return logits


def _size(cache: LayerCache) -> int:
    """How many cached tokens a step without kernels looks at."""
    return next((size for size in SIZES if size > cache.length), max(cache.max_length, cache.length + 1))


class _Held:
    """What a text's caches consist of, found once and not at every token."""

    def __init__(self, caches: list[LayerCache], kernels: ModuleType | None) -> None:
        pairs = ((cache.global_cache, cache.local_cache) for cache in caches)
        self.parts = [part for pair in pairs for part in pair if part is not None]
        self._keys = [(part, part.keys) for part in self.parts]
        far = [cache.global_cache.keys.shape[1] for cache in caches if cache.global_cache is not None]
        #: tokens that fit until they grow
        self.room = min(far, default=caches[0].max_length)
        #: where the caches lie, for kernels that look there by themselves
        self.memory: Tensor | None = None
        #: what a step reads and writes: the tensors of the caches in one order, or only their memory
        self.tensors: list[Tensor] = []
        #: what a program depends on in the caches
        self.shapes: tuple[Any, ...] = ()
        if kernels is not None:
            self.memory = kernels.cache_memory(caches)
            self.tensors = [self.memory]
            return
        self.tensors = [
            value for part in self.parts for value in vars(part).values() if isinstance(value, Tensor)
        ]
        kinds = [(type(part), part.keys.shape, part.keys.dtype) for part in self.parts]
        self.shapes = caches[0].exact, *dict.fromkeys(kinds)

    def still(self) -> bool:
        """Whether the caches have neither grown nor been put in another order since."""
        return all(part.keys is keys for part, keys in self._keys)


class Program:
    """A step, compiled for caches of one shape at its first call.

    From then on it is called directly: what torch.compile checks before each call, on every module of the
    model, cannot change here.
    """

    def __init__(self, step: DecodeStep) -> None:
        self._step = step
        self._run: Callable[..., Sequence[Tensor]] | None = None
        self._inputs: list[Any] = []  # of the first call: weights; None where a step brings something
        self._places: list[tuple[int, int]] = []  # of those among the inputs, and among what a step brings

    def __call__(
        self, tokens: Tensor, position: Tensor, caches: list[LayerCache], held: _Held, size: int
    ) -> Tensor:
        """See :meth:`DecodeStep.forward`."""
        brought = [tokens, position, *held.tensors]
        if self._run is None:
            logits, run, self._inputs = _compiled(self._step, tokens, position, caches, held.memory, size)
            number = {id(tensor): place for place, tensor in enumerate(brought)}
            for place, tensor in enumerate(self._inputs):
                if id(tensor) in number:
                    self._places.append((place, number[id(tensor)]))
                    self._inputs[place] = None
            self._run = run
            return logits
        inputs = list(self._inputs)
        for place, here in self._places:
            inputs[place] = brought[here]
        return self._run(inputs)[0]


def _compiled(step: DecodeStep, *arguments: Any) -> tuple[Tensor, Callable[..., Any], list[Any]]:
    """Compile a step by calling it: its logits, the program, and the inputs that the program had.

    The compiler holds on to its back end for good: nothing that this one refers to is left in it.
    """
    program: list[Any] = []
    compile_fx, _, _ = compat.inductor()
    inputs: list[Any] = []

    def innermost(graph: torch.fx.GraphModule, examples: Sequence[Any], **options: Any) -> Any:
        program.append(compile_fx.compile_fx_inner(graph, examples, **options))

        def first(given: list[Any]) -> Any:
            inputs.extend(given)
            return program[0](given)

        return first

    def back_end(graph: torch.fx.GraphModule, examples: list[Any]) -> Any:
        return compile_fx.compile_fx(graph, examples, inner_compile=innermost)

    with freezing():
        logits = torch.compile(step, backend=back_end, fullgraph=True, dynamic=False)(*arguments)
    found = program[0], list(inputs)
    program.clear()
    inputs.clear()
    return logits, *found


@contextlib.contextmanager
def freezing() -> Iterator[None]:
    """A context in which the compiler takes weights for constants, packs them and tries out kernels.

    Set around the call that compiles: torch reads it while it traces, where ``torch.compile``'s own options
    have no effect yet.
    """
    warnings.filterwarnings("ignore", message="TypedStorage is deprecated")  # torch's own use of it
    _, inductor, dynamo = compat.inductor()
    options: dict[str, Any] = {"freezing": True, "max_autotune": True}
    options |= {"autotune_num_choices_displayed": 0, "max_autotune_report_choices_stats": False}  # quietly
    options["size_asserts"] = False  # a program is chosen by its shapes: see `CompiledDecoder`
    if not torch.cuda.is_available():
        options["max_autotune_gemm_backends"] = "CPP,ATEN"
        options["cpp_wrapper"] = True  # what calls the kernels is C++ as well, and not Python
        options["aot_inductor.custom_ops_to_c_shims"] = C_FUNCTIONS  # and calls ours without a dispatcher
    # as many programs as there are lengths of caches: the usual limit of 8 is against surprises
    with inductor.patch(options), dynamo.patch(recompile_limit=1024, accumulated_recompile_limit=1024):
        yield


class DecodeStep(nn.Module):
    """One step for tokens (B, 1): position, caches and their size in, logits (B, V) out."""

    def __init__(self, model: DualRoutingTransformer) -> None:
        super().__init__()
        self.model = model
        self.kernels = token_kernels(model.norm.weight)
        self.qkv, self.gate_up = nn.ModuleList(), nn.ModuleList()  # of each layer
        for layer in model.layers:
            assert isinstance(layer, TransformerBlock)
            routes = layer.attention.global_qkv, layer.attention.local_qkv
            self.qkv.append(Joined([route for route in routes if route is not None]))
            self.gate_up.append(Joined([layer.ffn.gate, layer.ffn.up]))

    def projections(self) -> Iterator[nn.Module]:
        """Every product with a weight that a step makes."""
        for joined in (*self.qkv, *self.gate_up):
            assert isinstance(joined, Joined)
            yield from joined.layers
        for layer in self.model.layers:
            assert isinstance(layer, TransformerBlock)
            yield layer.attention.out_proj
            yield layer.ffn.down
        yield self.model.head

    def forward(
        self, tokens: Tensor, position: Tensor, caches: list[LayerCache], memory: Tensor | None, size: int
    ) -> Tensor:
        """Write the tokens at ``position`` of the caches and look at up to ``size`` > position of them.

        With ``memory`` the kernels find the caches there, and look at what they need.
        """
        model = self.model
        hidden = model.embedding(tokens[:, 0])  # (B, dim)
        first: Any = model.layers[0].attention  # all layers rotate alike
        tables = token_tables((first.global_rope, first.local_rope), position, hidden.dtype)
        choosers = model.config.choosers
        chosen: dict[int, Tensor | None] = {}  # by the layer that chooses
        for number, (layer, cache) in enumerate(zip(model.layers, caches, strict=True)):
            assert isinstance(layer, TransformerBlock)
            rows = layer.attention_norm(hidden)
            projected = self.qkv[number](rows)
            if memory is None:
                before = chosen.get(choosers[number])
                heads, chosen[choosers[number]] = attend(
                    layer.attention, projected, tables, position, cache, size, before
                )
            else:
                assert self.kernels is not None
                pair = _by_route(layer.attention, projected)
                heads = token_heads(layer.attention, self.kernels, pair, tables, memory, number, position)
            hidden = hidden + layer.attention.combine(heads[:, None], rows[:, None])[:, 0]
            gate_up = self.gate_up[number]
            hidden = hidden + layer.ffn.down_project(*gate_up(layer.ffn_norm(hidden)))
        return model.head(model.norm(hidden))


def attend(
    attention: DualRouting,
    projected: Sequence[Tensor],
    tables: Table,
    position: Tensor,
    cache: LayerCache,
    size: int,
    chosen: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The heads (B, H * d) of both routes of a layer for their projections, the global route's first, and the
    blocks that were chosen; those of another layer, where given."""
    outputs = []
    far_table, near_table = zip(*tables, strict=True)
    far_rows, near_rows = _by_route(attention, projected)
    if far_rows is not None and cache.global_cache is not None:
        query, key, value = _heads(attention, far_rows, far_table)
        far = cache.global_cache
        top_k = attention.routing.top_k
        size = min(-(-size // far.block) * far.block, far.keys.shape[1])  # whole blocks
        if cache.exact or size // far.block <= top_k + 2:
            # statistics are kept where a longer text will want them
            keeps = not cache.exact
            outputs.append(static_full(query, key, value, far, position, size, statistics=keeps))
        else:
            out, chosen = static_routed(query, key, value, far, position, size, top_k, chosen)
            outputs.append(out)
    if near_rows is not None and cache.local_cache is not None:
        query, key, value = _heads(attention, near_rows, near_table)
        outputs.append(static_local(query, key, value, cache.local_cache, position))
    return torch.cat([out.reshape(len(projected[0]), -1) for out in outputs], dim=-1), chosen


def _by_route(attention: DualRouting, projected: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """What belongs to the global and to the local route of the projections, the global route's first."""
    rest = iter(projected)
    far = None if attention.global_qkv is None else next(rest)
    return far, None if attention.local_qkv is None else next(rest)


def _heads(attention: DualRouting, projected: Tensor, table: Table) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (B * H_kv, group, d), keys and values (B * H_kv, d), rotated."""
    dim, group = attention.head_dim, attention.group
    heads = projected.unflatten(-1, (-1, dim))  # (B, H + 2 H_kv, d)
    kv_heads = heads.shape[1] // (group + 2)
    turned, value = heads.split([kv_heads * group + kv_heads, kv_heads], dim=1)
    if attention.query_norm is not None and attention.key_norm is not None:
        query, key = turned.split([kv_heads * group, kv_heads], dim=1)
        turned = torch.cat([attention.query_norm(query), attention.key_norm(key)], dim=1)
    query, key = _rotated(turned, table).split([kv_heads * group, kv_heads], dim=1)
    return query.reshape(-1, group, dim), key.reshape(-1, dim), value.reshape(-1, dim)


def _rotated(rows: Tensor, table: Table) -> Tensor:
    """Rotate (B, heads, d) by the table (d / 2,) of one position, in float32 at least."""
    cos, sin = table
    first, second = rows.to(cos.dtype).chunk(2, dim=-1)
    # Put together by `cat`, which a compiler stores; else it would rotate anew for every key that is read.
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(rows.dtype)
