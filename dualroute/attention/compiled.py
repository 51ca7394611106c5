"""The routes as operators of torch: what `torch.compile` sees of them, whichever back end computes them.

In: queries (H, S, d), keys and values (H_kv, S, d), and the `handle` of a `Layout` instead of its stream.
Out: (H, S, d), like the functions of the same names in `routes`, which run inside.

How many documents there are and which blocks a token chose are numbers that no graph of fixed operators can
hold; to the compiler each route is one opaque operator with one for its gradients. So one compiled layer does
for every packing, and the back end is chosen when the operator runs, as ever.

The forward operator records the route's own backward pass (`Tape`) and hands it on behind a tensor
(`core.held`), as one more result that the graph saves. Of queries, keys, values and output the tape keeps
nothing: their memory is the graph's, to be used again or to be computed again. They are given to it once more
when it runs, which it does once.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dualroute.attention.core.grid import Grid
from dualroute.attention.core.held import held, hold
from dualroute.attention.core.layout import Layout, Stream
from dualroute.attention.core.routing import Routing, SharedChoice
from dualroute.attention.routes import global_attention as read_globally
from dualroute.attention.routes import local_attention as read_locally

#: Of the operators, whose names are registered once in a process: several exported folders may bring this
#: file, each as a module of another name.
_OWN = __name__.startswith("dualroute.")
NAMESPACE = "dualroute" if _OWN else f"dualroute_{hashlib.sha256(__name__.encode()).hexdigest()[:16]}"

Route = Callable[[Tensor, Tensor, Tensor, Stream], Tensor]
Edge = torch.autograd.graph.GradientEdge


def tracing() -> bool:
    """Whether `torch.compile` is recording what runs, so that the operators below are to be called."""
    return torch.compiler.is_compiling()


def global_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    handle: Tensor,
    *,
    routing: Routing,
    max_exact_blocks: int | None,
    causal: bool = True,
    choice: SharedChoice | None = None,
) -> Tensor:
    """`routes.global_attention` as an operator."""
    exact = -1 if max_exact_blocks is None else max_exact_blocks
    how = (routing.top_k, routing.router, routing.far_summary, routing.sub_block, routing.cluster_span)
    rows = (query.contiguous(), key.contiguous(), value.contiguous())
    shared = None if choice is None else choice.handle
    return global_route(*rows, handle, *how, exact, causal, _records(*rows), shared)[0]


def local_attention(
    query: Tensor, key: Tensor, value: Tensor, handle: Tensor, *, window: int, causal: bool = True
) -> Tensor:
    """`routes.local_attention` as an operator."""
    rows = (query.contiguous(), key.contiguous(), value.contiguous())
    return local_route(*rows, handle, window, causal, _records(*rows))[0]


def lay_out_in_graph(
    given: Layout | None, batch: int, length: int, block: int, segment_ids: Tensor | None,
    attention_mask: Tensor | None, device: torch.device, grid: Grid | None = None,
) -> Layout:  # fmt: skip
    """`Layout.of_batch`; one that is not given is made by an operator, and has no stream in the graph."""
    if given is not None and given.stream is None:  # made so for all layers, by a model that is one graph
        return given
    if given is not None:
        return Layout.of_batch(given, batch, length, block, segment_ids, attention_mask, device, grid)
    if grid is not None:
        raise ValueError(
            "a compiled layer with a grid is given no layout: give it one, Layout.build(grid=...)"
        )
    parts = new_layout(segment_ids, attention_mask, batch, length, block, device)
    handle, positions, documents, slot_token, token_slot = parts
    stream: Any = None
    layout = Layout(batch, length, stream, positions, documents, slot_token, token_slot)
    layout.handle = handle
    return layout


def _records(*rows: Tensor) -> bool:
    """Whether there will be a backward pass: the operators run where autograd does not see them."""
    return torch.is_grad_enabled() and any(part.requires_grad for part in rows)


@torch.library.custom_op(f"{NAMESPACE}::new_layout", mutates_args=())
def new_layout(
    segment_ids: Tensor | None, attention_mask: Tensor | None, batch: int, length: int, block: int,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Handle, positions, documents, slot_token and token_slot of `Layout.build`."""
    layout = Layout.build(batch, length, block, segment_ids, attention_mask, device)
    slot_token, token_slot = layout.slot_token, layout.token_slot
    if slot_token is None or token_slot is None:
        slot_token = torch.arange(batch * length, device=device)
        token_slot = slot_token.clone()
    places = layout.positions.contiguous(), layout.documents.contiguous()
    return hold(layout.stream), *places, slot_token, token_slot


@new_layout.register_fake
def _(
    segment_ids: Tensor | None, attention_mask: Tensor | None, batch: int, length: int, block: int,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    plain = segment_ids is None and attention_mask is None
    slots = -(-length // block) * block * batch if plain else torch.library.get_ctx().new_dynamic_size()
    places = torch.empty(batch, length, dtype=torch.int64, device=device)
    slot_token = torch.empty(slots, dtype=torch.int64, device=device)
    handle = torch.empty(1, dtype=torch.int64, device="cpu")
    return handle, places, torch.empty_like(places), slot_token, torch.empty_like(places.flatten())


def new_choice(layout: Layout, number: int) -> SharedChoice:
    """A `SharedChoice`; in a graph, whose every number has one of its own, made by an operator."""
    return SharedChoice(handle=_new_choice(layout.handle, number)) if tracing() else SharedChoice()


@torch.library.custom_op(f"{NAMESPACE}::new_choice", mutates_args=())
def _new_choice(layout: Tensor, number: int) -> Tensor:
    return SharedChoice().handle


@_new_choice.register_fake
def _(layout: Tensor, number: int) -> Tensor:
    return torch.empty(1, dtype=torch.int64, device="cpu")


@torch.library.custom_op(f"{NAMESPACE}::global_route", mutates_args=())
def global_route(
    query: Tensor, key: Tensor, value: Tensor, handle: Tensor, top_k: int, router: str, far_summary: str,
    sub_block: int, cluster_span: int, max_exact_blocks: int, causal: bool, records: bool,
    shared: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The route (H, S, d) and what stands for its backward pass; max_exact_blocks -1 = all, `shared` the
    handle of a `SharedChoice`."""
    choice = None if shared is None else SharedChoice(handle=shared)
    routing = Routing(top_k, router, far_summary, sub_block, cluster_span)
    exact = None if max_exact_blocks < 0 else max_exact_blocks

    def route(query: Tensor, key: Tensor, value: Tensor, stream: Stream) -> Tensor:
        return read_globally(
            query, key, value, stream, routing=routing, max_exact_blocks=exact, causal=causal, choice=choice
        )

    return _run(route, query, key, value, handle, records)


@torch.library.custom_op(f"{NAMESPACE}::local_route", mutates_args=())
def local_route(
    query: Tensor, key: Tensor, value: Tensor, handle: Tensor, window: int, causal: bool, records: bool
) -> tuple[Tensor, Tensor]:
    """The route (H, S, d) and what stands for its backward pass."""

    def route(query: Tensor, key: Tensor, value: Tensor, stream: Stream) -> Tensor:
        return read_locally(query, key, value, stream, window=window, causal=causal)

    return _run(route, query, key, value, handle, records)


@torch.library.custom_op(f"{NAMESPACE}::route_backward", mutates_args=())
def route_backward(
    grad: Tensor, tape: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values for grad (H, S, d)."""
    with torch.autocast(grad.device.type, enabled=False):
        grads = held(tape).backward(grad.contiguous(), query, key, value, out)
    to_query, to_key, to_value = (part.contiguous() for part in grads)
    return to_query, to_key, to_value


def _run(
    route: Route, query: Tensor, key: Tensor, value: Tensor, handle: Tensor, records: bool
) -> tuple[Tensor, Tensor]:
    stream: Stream = held(handle)
    with torch.autocast(query.device.type, enabled=False):
        if records:
            out, tape = Tape.record(lambda q, k, v: route(q, k, v, stream), query, key, value)
            return out, hold(tape)
        with torch.no_grad():
            return route(query, key, value, stream).contiguous(), hold(None)


class _Kept:
    """A tensor that a backward pass wants, or where it lies in one that it will be given."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor: Tensor | None = tensor.detach()  # itself, an output would keep its own graph alive
        self.given = -1
        self.view: tuple[Any, ...] = ()

    def leave_to(self, givers: Sequence[Tensor]) -> None:
        """Forget it where it is part of one of these contiguous tensors."""
        tensor = self.tensor
        assert tensor is not None
        for number, giver in enumerate(givers):
            first = giver.data_ptr()
            offset = tensor.data_ptr() - first
            same = tensor.untyped_storage().data_ptr() == giver.untyped_storage().data_ptr()
            if same and tensor.dtype == giver.dtype and 0 <= offset < giver.nbytes:
                self.given = number
                self.view = tensor.shape, tensor.stride(), offset // giver.element_size()
                self.tensor = None
                return


class Tape:
    """The backward pass of a function of three tensors, without them and without its result."""

    def __init__(self, end: Edge, begin: Sequence[Edge]) -> None:
        self.end, self.begin = end, begin
        self.given: Sequence[Tensor] = ()

    @staticmethod
    def record(function: Callable[..., Tensor], *rows: Tensor) -> tuple[Tensor, Tape]:
        """What the function gives, contiguous, and the tape; called below autograd, as operators are."""
        kept: list[_Kept] = []
        mine: list[weakref.ref[Tape]] = []  # weak: the graph that the tape holds holds these functions

        def keep(tensor: Tensor) -> _Kept:
            kept.append(_Kept(tensor))
            return kept[-1]

        def give_back(entry: _Kept) -> Tensor:
            if entry.tensor is not None:
                return entry.tensor
            shape, strides, offset = entry.view
            tape = mine[0]()
            assert tape is not None  # it is running
            giver = tape.given[entry.given]
            return giver.as_strided(shape, strides, giver.storage_offset() + offset)

        recording = torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)
        with recording, torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, give_back):
            anchor = torch.empty(0, requires_grad=True)
            begin = _Begin.apply(anchor, *(row.detach() for row in rows))
            out = function(*begin).contiguous()
            edges = [torch.autograd.graph.get_gradient_edge(part) for part in (out, *begin)]
        out = out.detach()
        for entry in kept:
            entry.leave_to((*rows, out))
        tape = Tape(edges[0], edges[1:])
        mine.append(weakref.ref(tape))
        return out, tape

    def backward(self, grad: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        """The gradients of the three tensors; `given` are they and the result, equal to what they were."""
        self.given = [part.contiguous() for part in given]
        try:
            return torch.autograd.grad(self.end, self.begin, grad)
        finally:
            self.given = ()


class _Begin(torch.autograd.Function):
    """Where a tape begins: tensors that want a gradient and that no graph holds."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
        return tuple(row.view_as(row) for row in rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        return (None,) * (1 + len(grads))


def _shapes(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), torch.empty(1, dtype=torch.int64, device="cpu")


@route_backward.register_fake
def _(
    grad: Tensor, tape: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    out, tape = output
    ctx.arguments = len(inputs)
    ctx.mark_non_differentiable(tape)
    ctx.save_for_backward(tape, *inputs[:3], out)


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    grads = route_backward(grad.contiguous(), *ctx.saved_tensors)
    return *grads, *[None] * (ctx.arguments - len(grads))


for operator in (global_route, local_route):
    operator.register_fake(_shapes)
    operator.register_autograd(_backward, setup_context=_save)
