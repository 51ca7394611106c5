"""DualRouting against dense attention: time, arithmetic and memory of the attention alone.

    python benchmarks/attention.py speed  --lengths 1024 2048 4096 8192 16384 32768
    python benchmarks/attention.py packed --lengths 32768 --document 2048
    python benchmarks/attention.py router --lengths 4096 16384 65536 131072
    python benchmarks/attention.py sweep  --lengths 8192

With `--bidirectional`, tokens see both sides of themselves, in dense attention too. Else dense is
torch's scaled_dot_product_attention(is_causal=True). It has `--heads` heads; DualRouting divides the
same heads between its routes. Both read random queries, keys and values; projections, equal on both sides,
are left out. All figures of a length come from one run in which the sides take turns; times are medians, a
ratio is dense / DualRouting. With `--clock cpu --threads 1` seconds are those that this process computed, for
a machine that others use too. The ceiling is the ratio of the pairs of tokens that are read exactly: router,
far summary and sorting count as losses. `--output` also writes CSV and, for speed and sweep, a PNG.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from measure import medians, peak_mebibytes, prepare, show
from torch import Tensor

from dualroute.attention import (
    Layout,
    Routing,
    global_attention,
    local_attention,
    routed_attention,
    select_blocks,
)
from dualroute.attention.backends import cpp
from dualroute.attention.core.routing import exact_blocks

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class Shape(NamedTuple):
    """What is attended to."""

    length: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    causal: bool = True
    document: int | None = None  # tokens of each packed document; None = one document


class Route(NamedTuple):
    """How DualRouting reads it."""

    window: int
    block: int
    top_k: int
    router: str
    sub_block: int
    far_summary: str
    mode: str
    cluster_span: int = 0
    unit: str = ""  # what multiplies bfloat16 on a CPU, as `cpp.use_unit` wants it; empty: as it is

    @property
    def name(self) -> str:
        return f"{self.window}/{self.block}/{self.top_k}" + (f", {self.unit}" if self.unit else "")


class Point(NamedTuple):
    """One measurement of a plot: forward and backward of one attention at one length."""

    length: int
    ratio: float
    seconds: float
    operations: float


def dense(shape: Shape, backward: bool) -> Callable[[], Any]:
    """One call of dense attention; packed documents are its batch, which is the best that it can do."""
    rows = shape.document or shape.length
    size = (shape.length // rows, shape.heads, rows, shape.head_dim)
    inputs = [torch.randn(size, dtype=shape.dtype, device=shape.device) for _ in range(3)]
    return _call(partial(F.scaled_dot_product_attention, is_causal=shape.causal), inputs, backward)


def dual(shape: Shape, route: Route, backward: bool) -> Callable[[], Any]:
    """One call of both routes, half of the heads each, layout included."""
    half = shape.heads // 2
    inputs = [
        torch.randn(half, shape.length, shape.head_dim, dtype=shape.dtype, device=shape.device)
        for _ in range(6)
    ]
    segments = None
    if shape.document is not None:
        segments = torch.arange(shape.length, device=shape.device)[None] // shape.document

    def attend(*heads: Tensor) -> tuple[Tensor, Tensor]:
        if route.unit:
            cpp.use_unit(route.unit)
        layout = Layout.build(1, shape.length, route.block, segments, device=shape.device)
        routing = Routing(route.top_k, route.router, route.far_summary, route.sub_block, route.cluster_span)
        far = global_attention(
            *heads[:3],
            layout.stream,
            routing=routing,
            max_exact_blocks=exact_blocks(route.mode, route.block, route.top_k),
            causal=shape.causal,
        )
        return far, local_attention(*heads[3:], layout.stream, window=route.window, causal=shape.causal)

    return _call(attend, inputs, backward)


def _call(attend: Callable[..., Any], inputs: list[Tensor], backward: bool) -> Callable[[], Any]:
    if not backward:

        def forward() -> None:
            with torch.no_grad():
                attend(*inputs)

        return forward
    for rows in inputs:
        rows.requires_grad_()
    cotangents: list[Tensor] = []

    def both() -> None:
        out = attend(*inputs)
        outputs = [out] if isinstance(out, Tensor) else list(out)
        if not cotangents:
            cotangents.extend(torch.randn_like(part) for part in outputs)
        torch.autograd.grad(outputs, inputs, cotangents)

    return both


def dense_pairs(length: int, causal: bool) -> float:
    """Keys that a token of dense attention reads, on average."""
    return (length + 1) / 2 if causal else length


def exact_pairs(length: int, route: Route, causal: bool) -> tuple[float, float]:
    """Keys that a token reads exactly on the global and on the local route, on average."""
    limit = exact_blocks(route.mode, route.block, route.top_k)
    local = route.window - route.window * (route.window - 1) / (2 * length)
    local = local if causal else 2 * local - 1
    everything = dense_pairs(length, causal)
    if limit is None or length <= limit * route.block:
        return everything, min(local, everything)
    own = 0.5 if causal else 1
    return min(everything, (route.top_k + 1 + own) * route.block), local


def flops(length: int, heads: int, head_dim: int, route: Route | None, backward: bool, causal: bool) -> float:
    """Floating-point operations of the matrix products; backward adds 5/2 of the forward's attention."""
    grow = 3.5 if backward else 1.0
    if route is None:
        return grow * 4 * heads * head_dim * length * dense_pairs(length, causal)
    half = heads / 2
    total = grow * 4 * half * head_dim * length * sum(exact_pairs(length, route, causal))
    limit = exact_blocks(route.mode, route.block, route.top_k)
    if limit is not None and length > limit * route.block:
        blocks = length / route.block / (2 if causal else 1)  # candidates of an average token
        width = {"mean": 1, "moment": 2, "minmax": 2 * route.block / route.sub_block}[route.router]
        order = {"none": 0, "first_order": 1, "second_order": 2}[route.far_summary]
        total += 2 * half * length * head_dim * blocks * width
        if order:
            far = 2 * half * length * head_dim * blocks
            total += far * (order + 1) + (far * (3 * order + 2) if backward else 0)
    return total


def speed(options: argparse.Namespace, device: torch.device) -> None:
    """Time, ratio, share of the ceiling and peak memory at each length."""
    rows = []
    points: dict[str, list[Point]] = {}
    for length, name in itertools.product(options.lengths, options.dtypes):
        shape = Shape(length, options.heads, options.head_dim, getattr(torch, name), device, options.causal)
        units = options.units if name == "bfloat16" else [""]
        routes = [_route(options, text)._replace(unit=unit) for text in options.routes for unit in units]
        for backward in (False, True):
            works = {"dense": dense(shape, backward)}
            works |= {route.name: dual(shape, route, backward) for route in routes}
            times = medians(works, options.repeats, device, CLOCKS[options.clock])
            memory = {}
            if backward and options.memory:
                memory["dense"] = peak_mebibytes(dense, shape, True, device=device)
                for route in routes:
                    memory[route.name] = peak_mebibytes(dual, shape, route, True, device=device)
            kind = "fwd + bwd" if backward else "forward"
            for route in [None, *routes]:
                which = route.name if route else "dense"
                ratio = times["dense"] / times[which]
                ceiling = 1.0
                if route is not None:
                    read = sum(exact_pairs(length, route, options.causal))
                    ceiling = 2 * dense_pairs(length, options.causal) / read
                sizes = (length, options.heads, options.head_dim)
                operations = flops(*sizes, route, backward, options.causal)
                rate = operations / times[which] / 1e9
                if backward:
                    point = Point(length, ratio, times[which], operations)
                    points.setdefault(f"{which}, {name}", []).append(point)
                rows.append(
                    {
                        "tokens": f"{length:,}",
                        "dtype": name,
                        "pass": kind,
                        "attention": which,
                        "ms": f"{times[which] * 1e3:.1f}",
                        "ratio": f"{ratio:.2f}",
                        "ceiling": f"{ceiling:.1f}",
                        "share": f"{ratio / ceiling:.0%}",
                        "GFLOP/s": f"{rate:.0f}",
                        "peak MiB": f"{memory[which]:.0f}" if which in memory else "",
                    }
                )
    title = f"{options.heads} heads of {options.head_dim}; window/block/top_k, {options.router} router"
    show(title, rows, options.output, "speed")
    _plot_speed(points, options.output)


def packed(options: argparse.Namespace, device: torch.device) -> None:
    """Packed documents against one document of the same number of tokens."""
    rows = []
    for length in options.lengths:
        one = Shape(length, options.heads, options.head_dim, torch.float32, device, options.causal)
        many = one._replace(document=options.document)
        for text in options.routes:
            route = _route(options, text)
            works = {"one": dual(one, route, True), "packed": dual(many, route, True)}
            works |= {"dense one": dense(one, True), "dense packed": dense(many, True)}
            times = medians(works, options.repeats, device, CLOCKS[options.clock])
            rows.append(
                {
                    "tokens": f"{length:,}",
                    "documents": f"{length // options.document}",
                    "attention": route.name,
                    **{f"{name} ms": f"{seconds * 1e3:.0f}" for name, seconds in times.items()},
                }
            )
    show("forward + backward", rows, options.output, "packed")


def router(options: argparse.Namespace, device: torch.device) -> None:
    """Time per token, forward, of the router alone and of the whole global route, with blocks of a fixed size
    and with blocks ~ sqrt(n)."""
    rows = []
    half = options.heads // 2
    for length, name in itertools.product(options.lengths, options.dtypes):
        query, key, value = (
            torch.randn(half, length, options.head_dim, dtype=getattr(torch, name), device=device)
            for _ in range(3)
        )
        base = _route(options, options.routes[0])
        grown = 1 << round((length.bit_length() - 1) / 2)  # the power of two nearest to sqrt(n)
        sizes = {"fixed": base.block, "sqrt": max(grown, base.block)}
        for (kind, block), unit in itertools.product(
            sizes.items(), options.units if name == "bfloat16" else [""]
        ):
            if unit:
                cpp.use_unit(unit)
            sub_block = options.sub_block * block // base.block
            stream = Layout.build(1, length, block, device=device).stream
            routing = Routing(base.top_k, options.router, options.far_summary, sub_block)
            chosen = {"top_k": base.top_k, "router": options.router, "sub_block": sub_block}
            works: dict[str, Callable[[], Any]] = {
                "router": partial(select_blocks, query, key, stream, causal=options.causal, **chosen),
                "route": partial(routed_attention, query, key, value, stream, routing, causal=options.causal),
            }
            with torch.no_grad():
                times = medians(works, options.repeats, device, CLOCKS[options.clock])
            rows.append(
                {
                    "tokens": f"{length:,}",
                    "dtype": f"{name}, {unit}" if unit else name,
                    "block/sub_block": f"{kind} {block}/{sub_block}",
                    "us per token": f"{times['router'] / length * 1e6:.2f}",
                    "whole route": f"{times['route'] / length * 1e6:.2f}",
                }
            )
    show(f"{options.router} router, {half} heads", rows, options.output, "router")


def sweep(options: argparse.Namespace, device: torch.device) -> None:
    """Ratio to dense over window, block and top_k: what each of them costs."""
    rows = []
    for length in options.lengths:
        shape = Shape(length, options.heads, options.head_dim, torch.float32, device, options.causal)
        base = medians({"dense": dense(shape, True)}, options.repeats, device, CLOCKS[options.clock])["dense"]
        for window, block, top_k in itertools.product((128, 256, 512), (32, 64, 128), (2, 4, 8, 16)):
            route = _route(options, f"{window}/{block}/{top_k}")
            taken = medians(
                {"dual": dual(shape, route, True)}, options.repeats, device, CLOCKS[options.clock]
            )["dual"]
            reads = sum(exact_pairs(length, route, options.causal))
            rows.append(
                {
                    "tokens": f"{length:,}",
                    "window": str(window),
                    "block": str(block),
                    "top_k": str(top_k),
                    "keys read": f"{reads:.0f}",
                    "ratio": f"{base / taken:.2f}",
                }
            )
    show("forward + backward, ratio to dense", rows, options.output, "sweep")
    _plot_sweep(rows, options.output)


def _plot_speed(points: dict[str, list[Point]], output: Path | None) -> None:
    """Ratio to dense, and time against the growth of the operations, forward and backward."""
    if output is None:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.5))
    for name, line in points.items():
        lengths = [point.length for point in line]
        if not name.startswith("dense"):
            left.plot(lengths, [point.ratio for point in line], marker="o", label=name)
        (drawn,) = right.plot(lengths, [point.seconds for point in line], "o", label=name)
        scale = line[-1].seconds / line[-1].operations
        predicted = [point.operations * scale for point in line]
        right.plot(lengths, predicted, "--", color=drawn.get_color(), linewidth=1)
    left.axhline(1, color="grey", linewidth=1)
    left.set(yscale="log", xlabel="tokens", ylabel="times faster than dense attention")
    right.set(yscale="log", xlabel="tokens", ylabel="seconds; dashed: operations, scaled to the longest")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3, which="both")
    figure.tight_layout()
    figure.savefig(output / "speed.png", dpi=100)


def _plot_sweep(rows: list[dict[str, str]], output: Path | None) -> None:
    if output is None:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for block in sorted({row["block"] for row in rows}, key=int):
        chosen = [row for row in rows if row["block"] == block]
        axes.scatter(
            [float(row["keys read"]) for row in chosen],
            [float(row["ratio"]) for row in chosen],
            label=f"block {block}",
        )
    axes.set(
        xlabel="keys that a token reads exactly, both routes", ylabel="times faster than dense attention"
    )
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(output / "sweep.png", dpi=120)


def _route(options: argparse.Namespace, text: str) -> Route:
    window, block, top_k = (int(number) for number in text.split("/"))
    sub_block = min(options.sub_block, block)
    return Route(
        window, block, top_k, options.router, sub_block, options.far_summary, options.mode,
        options.cluster_span,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("speed", "packed", "router", "sweep"))
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--routes", nargs="+", default=["128/64/4", "256/64/8"], help="window/block/top_k")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head_dim", type=int, default=64)
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=("float32", "bfloat16"))
    parser.add_argument(
        "--units", nargs="+", default=[""], choices=("floats", "AMX"), help="what multiplies bfloat16"
    )
    parser.add_argument("--router", default="minmax")
    parser.add_argument("--sub_block", type=int, default=16)
    parser.add_argument("--far_summary", default="second_order")
    parser.add_argument("--cluster_span", type=int, default=0)
    parser.add_argument("--mode", default="routed", choices=("routed", "auto", "full"))
    parser.add_argument("--document", type=int, default=2048, help="packed: tokens of a document")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--bidirectional", dest="causal", action="store_false", help="as encoders read")
    parser.add_argument("--clock", default="wall", choices=CLOCKS, help="cpu: one thread on a shared machine")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help="folder for CSV and PNG")
    options = parser.parse_args()
    works = {"speed": speed, "packed": packed, "router": router, "sweep": sweep}
    works[options.what](options, prepare(options.threads, options.device))


if __name__ == "__main__":
    main()
