"""Is a back end right? Its values, gradients and chosen blocks against plain torch in float64.

In: a `Problem` and a back end. Out: `check` gives the `Errors`, or raises `Wrong`, which names what is not as
it should be.

Blocks are compared by their scores, not by their numbers: of two blocks with nearly equal scores, either may
be chosen. The attention itself is compared on the same blocks. What the back end does not take is plain
torch's, here as in a run.

An error is relative: the norm of the difference over that of the float64 result, of a whole tensor and of its
worst row. It may be as large as `TOLERANCE`, for gradients `GRADIENTS` times that, or half as large again as
that of plain torch in the same type, which on a GPU rounds more than kernels do.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from dualroute.attention.backend import Backend, load
from dualroute.attention.core.cache import GlobalCache
from dualroute.attention.core.layout import Stream, attend_by_length
from dualroute.attention.core.router import block_features, block_scores
from dualroute.attention.verification.problem import Batch, Problem, Rows, draw

#: relative errors that rounding explains, of a whole tensor; a single row may have `WORST_ROW` times as much
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.float16: 1.5e-3, torch.bfloat16: 8e-3}
WORST_ROW = 10
GRADIENTS = 2.5  # times as much for gradients: sums over the heads that share a key, and over its queries
#: how far below the k-th best score a chosen block's may lie, in standard deviations of a row's scores
SCORE_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 1e-2}


class Wrong(Exception):
    """A back end's result is not as it should be; the message says which and by how much."""


class Errors(NamedTuple):
    """The largest relative error of the values and of the gradients."""

    values: float
    gradients: float


class Reference(NamedTuple):
    """What is right, in float64, and by how much plain torch in the problem's own type is off."""

    batch: Batch
    selected: Tensor | None  # blocks of the documents that are routed
    wanted: dict[str, Tensor]
    plain: dict[str, tuple[float, float]]


def reference(problem: Problem, device: torch.device) -> Reference:
    """What `check` compares with; made once for all back ends."""
    batch = draw(problem, problem.checked_documents(), device)
    doubles = (None if rows is None else rows.each(Tensor.double) for rows in batch[1:])
    exact = Batch(batch.stream, *doubles)
    selected = None
    if exact.global_rows is not None:
        long, rows = _routed_part(problem, exact.stream, exact.global_rows)
        if long.num_slots and rows is not None:
            selected = _select(load("torch"), problem, long, rows)
    wanted = _results(load("torch"), problem, exact, selected)
    plain = _results(load("torch"), problem, batch, selected)
    scale = _largest(wanted)
    errors = {name: _error(plain[name], wanted[name], scale) for name in wanted}
    return Reference(batch, selected, wanted, errors)


def check(backend: Backend, problem: Problem, right: Reference) -> Errors:
    """Compare.

    Raises:
        Wrong: a result is not a number, too far off, or a block was chosen that should not have been.
    """
    batch = right.batch
    if right.selected is not None and batch.global_rows is not None:
        long, rows = _routed_part(problem, batch.stream, batch.global_rows)
        assert rows is not None
        _check_selection(_select(backend, problem, long, rows), right.selected, problem, long, rows)
    found = _results(backend, problem, batch, right.selected)
    largest = {"values": 0.0, "gradients": 0.0}
    dtype: torch.dtype = getattr(torch, problem.dtype)
    scale = _largest(right.wanted)
    for name, wanted in right.wanted.items():
        if not bool(torch.isfinite(found[name]).all()):
            raise Wrong(f"{name}: not a finite number")
        whole, row = _error(found[name], wanted, scale)
        kind = "gradients" if "gradient" in name else "values"
        tolerance = TOLERANCE[dtype] * (GRADIENTS if kind == "gradients" else 1)
        may = max(tolerance, 1.5 * right.plain[name][0])
        row_may = max(WORST_ROW * tolerance, 1.5 * right.plain[name][1])
        if whole > may:
            raise Wrong(f"{name} off by {whole:.1e} of the whole, {may:.1e} may be")
        if row > row_may:
            raise Wrong(f"{name} off by {row:.1e} in one row, {row_may:.1e} may be")
        largest[kind] = max(largest[kind], whole)
    if right.selected is not None and problem.causal:
        _check_step(backend, problem, batch)
    return Errors(**largest)


def route_of(backend: Backend, query: Tensor, problem: Problem, block: int | None) -> Backend:
    """The back end, or plain torch for what it does not take."""
    return backend if backend.supports(query, causal=problem.causal, block=block) else load("torch")


def attend(
    backend: Backend, problem: Problem, stream: Stream, rows: Rows, route: str, selected: Tensor | None = None
) -> Tensor:
    """One route's result (H, S, d); blocks are chosen by the back end where none are given."""
    query, key, value, _ = rows
    causal = problem.causal
    if route == "local":
        taken = route_of(backend, query, problem, None)
        return taken.local_attention(query, key, value, stream, window=problem.window, causal=causal)
    full = partial(route_of(backend, query, problem, None).full_attention, causal=causal)
    if problem.max_exact_blocks is None:
        return full(query, key, value, stream)

    def routed(query: Tensor, key: Tensor, value: Tensor, stream: Stream) -> Tensor:
        blocks = selected
        if blocks is None:
            blocks = _select(backend, problem, stream, Rows(query.detach(), key.detach(), value, query))
        taken = route_of(backend, query, problem, problem.block)
        return taken.routed_attention(
            query, key, value, stream, problem.routing, selected=blocks, causal=causal
        )

    return attend_by_length(full, routed, query, key, value, stream, problem.max_exact_blocks)


def passes(backend: Backend, problem: Problem, batch: Batch) -> Callable[[], None]:
    """Both routes forward and backward, the choice of blocks included: what is timed."""
    routes = {"global": batch.global_rows, "local": batch.local_rows}
    leaves = {name: rows.leaves() for name, rows in routes.items() if rows is not None}

    def run() -> None:
        for name, rows in leaves.items():
            out = attend(backend, problem, batch.stream, rows, name)
            torch.autograd.grad(out, rows[:3], rows.cotangent.to(out.dtype))

    return run


def _results(backend: Backend, problem: Problem, batch: Batch, selected: Tensor | None) -> dict[str, Tensor]:
    """Values and gradients of both routes, by name."""
    results = {}
    for route, rows in (("global", batch.global_rows), ("local", batch.local_rows)):
        if rows is None:
            continue
        leaves = rows.leaves()
        out = attend(backend, problem, batch.stream, leaves, route, selected)
        gradients = torch.autograd.grad(out, leaves[:3], rows.cotangent.to(out.dtype))
        valid = batch.stream.slot_valid
        values = out.detach() if valid is None else out.detach().masked_fill(~valid[:, None], 0)
        results[f"{route} values"] = values
        for name, gradient in zip(("query", "key", "value"), gradients, strict=True):
            results[f"{route} gradient of the {name}"] = gradient
    return results


def _largest(results: dict[str, Tensor]) -> float:
    """Root mean square of the rows of the largest result."""
    return max(float(one.norm(dim=-1).square().mean().sqrt()) for one in results.values())


def _error(found: Tensor, wanted: Tensor, scale: float = 0.0) -> tuple[float, float]:
    """Relative error of the whole and of the worst row, a row counting as no smaller than the average.

    What is zero but for rounding (a query's gradient where there is one key) is measured by ``scale``.
    """
    if found.shape != wanted.shape:
        raise Wrong(f"a result of shape {tuple(found.shape)}, {tuple(wanted.shape)} is right")
    difference = (found.to(wanted.dtype) - wanted).norm(dim=-1)
    size = wanted.norm(dim=-1)
    usual = size.square().mean().sqrt().clamp_min(torch.finfo(wanted.dtype).tiny)
    if float(usual) < 1e-12 * scale:
        usual = usual.new_tensor(scale)
    whole = difference.square().mean().sqrt() / usual
    return float(whole), float((difference / size.clamp_min(usual)).max())


def _routed_part(problem: Problem, stream: Stream, rows: Rows) -> tuple[Stream, Rows | None]:
    """The documents that are routed, and their rows."""
    if problem.max_exact_blocks is None:
        return Stream(stream.block, (), None, stream.device), None
    short, long = stream.split(problem.max_exact_blocks)
    return long, rows.each(lambda part: part[:, short.num_slots :])


def _select(backend: Backend, problem: Problem, stream: Stream, rows: Rows) -> Tensor:
    taken = route_of(backend, rows.query, problem, problem.block)
    with torch.no_grad():
        return taken.select_blocks(
            rows.query,
            rows.key,
            stream,
            top_k=problem.top_k,
            router=problem.router,
            sub_block=problem.sub_block,
            causal=problem.causal,
        )


def _check_selection(found: Tensor, right: Tensor, problem: Problem, stream: Stream, rows: Rows) -> None:
    """Whether the chosen blocks (H_kv, S, 1 + top_k) are as good as the right ones.

    Raises:
        Wrong: a block that may not be read, one twice, too few, or one that others beat.
    """
    if found.shape != right.shape or not torch.equal(found[..., 0], right[..., 0]):
        raise Wrong("blocks: the first of a document is not where it belongs")
    slots = torch.arange(stream.num_slots, device=stream.device)
    own = slots // stream.block  # (S,)
    first = stream.first_blocks().long()[own]
    chosen, best = found[..., 1:].long(), right[..., 1:].long()  # (H_kv, S, top_k)
    exists = chosen >= 0
    last = own if problem.causal else first + stream.blocks_in_document()[own]
    outside = (chosen <= first[:, None]) | (chosen >= last[:, None]) | (chosen == own[:, None])
    if bool((exists & outside).any()):
        raise Wrong("blocks: one was chosen that its token may not read")
    if not torch.equal(exists.sum(-1), (best >= 0).sum(-1)):
        raise Wrong("blocks: too few or too many were chosen")
    ordered = chosen.sort(-1).values
    if bool(((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any()):
        raise Wrong("blocks: one was chosen twice")
    _check_scores(chosen, best, problem, stream, rows)


def _check_scores(chosen: Tensor, best: Tensor, problem: Problem, stream: Stream, rows: Rows) -> None:
    """Compare the worst score of those that were chosen with the worst of the right ones, head by head."""
    if not problem.top_k:
        return
    grouped = rows.query.unflatten(0, (len(rows.key), -1)).double()  # (H_kv, group, S, d)
    blocks = rows.key.double().unflatten(1, (-1, stream.block))
    valid = stream.slot_valid
    valid = None if valid is None or problem.causal else valid.view(-1, stream.block)
    features = block_features(blocks, problem.router, problem.sub_block, valid)
    tolerance = SCORE_TOLERANCE[rows.query.dtype]
    for head in range(len(rows.key)):
        part = slice(head, head + 1)
        scores = block_scores(grouped[part], features[part], problem.router)[0]  # (S, nb)
        scale = scores.std(dim=-1) if scores.shape[-1] > 1 else scores.abs()[:, 0]
        lowest = [
            scores.gather(1, picked[head].clamp_min(0)).masked_fill_(picked[head] < 0, torch.inf)
            for picked in (chosen, best)
        ]
        short = (lowest[1].amin(-1) - lowest[0].amin(-1)).nan_to_num_(0.0) / scale.clamp_min(1e-30)
        if float(short.max()) > tolerance:
            raise Wrong(
                f"blocks: a better one was left out, by {float(short.max()):.1e} of the scores' spread"
            )


def _check_step(backend: Backend, problem: Problem, batch: Batch) -> None:
    """One step of decoding from a cache, whose statistics are rounded alike on both sides.

    Raises:
        Wrong: not a number, or too far from plain torch.
    """
    rows = batch.global_rows
    assert rows is not None
    query = rows.query.unflatten(0, (len(rows.key), -1))[:, :, -1:].contiguous()  # (H_kv, group, 1, d)
    taken = route_of(backend, query, problem, problem.block)
    tokens = batch.stream.num_slots - problem.block // 2
    cache = GlobalCache(
        len(rows.key), tokens, problem.head_dim, problem.block, problem.router, problem.sub_block,
        problem.far_summary, rows.key.device, rows.key.dtype,
    )  # fmt: skip
    with torch.no_grad():
        cache.append(rows.key[:, :tokens], rows.value[:, :tokens])
        wanted = load("torch").decode_step(query, cache, problem.top_k).float()
        found = taken.decode_step(query, cache, problem.top_k).float()
    if not bool(torch.isfinite(found).all()):
        raise Wrong("a step of decoding: not a finite number")
    whole, _ = _error(found, wanted)
    may = 2 * TOLERANCE[rows.query.dtype]
    if whole > may:
        raise Wrong(f"a step of decoding off by {whole:.1e} of the whole, {may:.1e} may be")
