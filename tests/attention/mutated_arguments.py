"""Calls every public function with one argument made wrong; run as a process, which a fault would end.

Prints a line for each call that did not raise ValueError or TypeError with the name of the argument.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from dualroute.attention import (
    DualRouting,
    Layout,
    Routing,
    Stream,
    full_attention,
    global_attention,
    local_attention,
    routed_attention,
    select_blocks,
)
from dualroute.attention.backend import plain_torch
from dualroute.attention.backends import cpp as cpu_kernels
from dualroute.attention.backends.cpp import decode
from dualroute.attention.backends.cpp.build import load
from dualroute.attention.core.layout import Bucket

LAYOUT = Layout.build(1, 100, 8, (torch.arange(100) // 37)[None])
STREAM = LAYOUT.stream
LAST = -4  # the last slot that holds a token
ROUTING = Routing(2, sub_block=4)


def rows(heads: int, slots: int = STREAM.num_slots, dim: int = 8) -> Tensor:
    return torch.randn(heads, slots, dim, generator=torch.Generator().manual_seed(heads))


def wrong_tensors(right: Tensor) -> Iterator[Any]:
    yield from (right.double(), right.int(), right.bool(), right.to(torch.complex64), right.to_sparse())
    yield from (right[:, :-1], right[:, :0], right[:0], right[..., :0], right[..., :5], right[0], right[None])
    yield from (
        torch.cat([right] * 2, 1),
        torch.cat([right] * 2, 2),
        right.to("meta"),
        None,
        3,
        "rows",
        [right],
    )


def wrong_numbers(least: int) -> Iterator[Any]:
    yield from (least - 1, -(2**40), 2.5, float("nan"), None, "3", True, torch.tensor(float("nan")))


def wrong_selections(right: Tensor) -> Iterator[Any]:
    yield from (right[:, :-1], right[:0], right[..., :0], right[0], right.float(), right.bool(), 7, "blocks")
    yield from (torch.full(right.shape, float("nan")), right.repeat(2, 1, 1), right.to("meta"))
    for place, number in itertools.product(
        (0, 1, 2), (-2, 1_000_000, 2**31 - 1, -(2**31), STREAM.num_blocks)
    ):
        spoilt = right.clone()
        spoilt[-1, LAST, place] = number
        yield spoilt
    for wrong in (STREAM.num_blocks - 1, 0):  # the own block, and that of another document
        spoilt = right.clone()
        spoilt[0, LAST, 1] = wrong
        yield spoilt
    spoilt = right.clone()
    spoilt[0, LAST, 1] = spoilt[0, LAST, 2]  # twice the same
    yield spoilt


def public_calls() -> Iterator[tuple[str, Callable[..., Any], dict[str, Any], str, Any]]:
    """(name of the function, function, right arguments, name of the wrong one, its value)."""
    tensors = {"query": rows(4), "key": rows(2), "value": rows(2)}
    chosen = select_blocks(tensors["query"], tensors["key"], STREAM, top_k=2, sub_block=4)
    calls: dict[Callable[..., Any], dict[str, Any]] = {
        full_attention: {},
        local_attention: {"window": 9},
        global_attention: {"routing": ROUTING, "max_exact_blocks": 1},
        routed_attention: {"routing": ROUTING, "selected": chosen},
        select_blocks: {"top_k": 2, "sub_block": 4, "router": "minmax"},
    }
    least = {"window": 1, "max_exact_blocks": 0, "top_k": 0, "sub_block": 1}
    for function, options in calls.items():
        given = {
            name: part for name, part in tensors.items() if name != "value" or function is not select_blocks
        }
        right = {**given, "stream": STREAM, **options}
        for name, part in given.items():
            for wrong in wrong_tensors(part):
                if isinstance(wrong, Tensor) and name == "query" and wrong.dtype == torch.float64:
                    continue  # then the key is the one that differs
                yield function.__name__, function, right, name, wrong
        yield function.__name__, function, right, "key", rows(3)  # divides no 4 heads
        for wrong in (None, 5, Layout.build(1, 99, 8).stream, LAYOUT):
            yield function.__name__, function, right, "stream", wrong
        for name in set(options) & set(least):
            for wrong in wrong_numbers(least[name]):
                if (
                    wrong is not None
                    or name not in ("window", "max_exact_blocks")
                    or function is local_attention
                ):
                    yield function.__name__, function, right, name, wrong
    right = {**tensors, "stream": STREAM, **calls[routed_attention]}
    for wrong in wrong_selections(chosen):
        yield "routed_attention", routed_attention, right, "selected", wrong
    right = {"query": rows(4), "key": rows(2), "stream": STREAM, **calls[select_blocks]}
    for wrong in ("min", None, 3):
        yield "select_blocks", select_blocks, right, "router", wrong
    yield "select_blocks", select_blocks, right, "sub_block", 3


def other_calls() -> Iterator[tuple[str, Callable[..., Any], dict[str, Any], str, Any]]:
    for name, wrong in (
        *((name, wrong) for name in ("top_k", "sub_block") for wrong in (-1, 2.5, None, True)),
        ("router", "min"),
        ("far_summary", "third_order"),
    ):
        yield "Routing", Routing, {}, name, wrong
    right = {"batch": 2, "length": 9, "block": 4}
    for name in right:
        yield "Layout.build", Layout.build, right, name, 0
    for wrong in (torch.zeros(2, 8), torch.zeros(2, 9), torch.zeros(18, dtype=torch.long)):
        yield "Layout.build", Layout.build, right, "segment_ids", wrong
    yield "Layout.build", Layout.build, right, "attention_mask", torch.ones(2, 8)
    for wrong in (torch.zeros(1, 99, 4), torch.zeros(100, 4), torch.zeros(2, 100, 4)):
        yield "to_stream", LAYOUT.to_stream, {}, "rows", wrong
    for wrong in (torch.zeros(100, 4), torch.zeros(1, 104, 4), torch.zeros(0, 4)):
        yield "from_stream", LAYOUT.from_stream, {}, "rows", wrong
    buckets = (Bucket(0, 2, 1), Bucket(2, 1, 3))
    right = {"block": 4, "buckets": buckets, "slot_valid": None, "device": torch.device("cpu")}
    yield "Stream", Stream, right, "block", 0
    for wrong in (buckets[1:], (buckets[0], Bucket(1, 1, 3)), buckets[:1] * 2, (Bucket(0, -1, 1),)):
        yield "Stream", Stream, right, "buckets", wrong
    for wrong in (torch.ones(20), torch.ones(19, dtype=torch.bool)):
        yield "Stream", Stream, right, "slot_valid", wrong


def operator_calls() -> Iterator[tuple[str, Callable[..., Any], dict[str, Any], str, Any]]:
    load()
    weight = torch.randint(-9, 9, (70, 40), dtype=torch.int8)
    panels = cpu_kernels.int8_panels(weight, torch.ones(70, 1))
    right = {"row": torch.randn(1, 40), "panels": panels, "columns": 70}
    product = torch.ops.dualroute.int8_product.default
    row = right["row"]
    for wrong in (row.double(), row.half(), row.int(), row[0], row[:, :39], row.repeat(2, 1), row[:0]):
        yield "int8_product", product, right, "row", wrong
    yield "int8_product", product, right, "row", torch.randn(1, 80)[:, ::2]
    for wrong in (
        panels.float(),
        panels[:, :-1],
        panels[..., :32],
        panels[0],
        panels[:0],
        panels.transpose(0, 1),
    ):
        yield "int8_product", product, right, "panels", wrong
    for wrong in (0, -1, 129, 2**40):
        yield "int8_product", product, right, "columns", wrong

    layer = DualRouting(32, 4, head_dim=12, window=10, block=8, sub_block=4, global_mode="routed")
    caches = [layer.new_cache(2, 40)]
    projected = torch.randn(2, 6 * 12)
    right = {
        "position": torch.tensor(7), "cos": torch.ones(2, 6), "sin": torch.zeros(2, 6),
        "global_rows": projected, "local_rows": projected, "memory": decode.cache_memory(caches), "layer": 0,
        "head_dim": 12, "group": 1, "top_k": 2,
    }  # fmt: skip
    step = torch.ops.dualroute.decode_layer.default
    step(*right.values())
    for wrong in (
        torch.tensor(-1),
        torch.tensor(40),
        torch.tensor(2**40),
        torch.tensor([7]),
        torch.tensor(7.0),
    ):
        yield "decode_layer", step, right, "position", wrong
    tables = torch.ones(2, 5), torch.ones(2, 6).double(), torch.ones(2, 12)[:, ::2], torch.ones(6)
    tables += (torch.ones(1, 6), torch.ones(3, 6))
    for name, wrong in itertools.product(("cos", "sin"), tables):
        yield "decode_layer", step, right, name, wrong
    for name in ("global_rows", "local_rows"):
        for wrong in (projected.double(), projected.half(), projected[:1], projected[:, :-1], projected[0],
                      None, projected[:0], projected.T.contiguous().T):  # fmt: skip
            yield "decode_layer", step, right, name, wrong
    memory = right["memory"]
    for wrong in (memory.float(), memory[0], memory[:, :-1], memory[:0], memory.int()):
        yield "decode_layer", step, right, "memory", wrong
    for name, wrong in (("layer", 1), ("layer", -1), ("head_dim", 0), ("head_dim", 13), ("head_dim", 24),
                        ("group", 0), ("group", 3), ("top_k", -1)):  # fmt: skip
        yield "decode_layer", step, right, name, wrong


def tried(calls: Iterator[tuple[str, Callable[..., Any], dict[str, Any], str, Any]], words: bool) -> int:
    count = 0
    for function, call, right, name, wrong in calls:
        count += 1
        shown = f"{wrong.dtype} {tuple(wrong.shape)}" if isinstance(wrong, Tensor) else repr(wrong)
        print(f"{function} {name}={shown}", flush=True)
        arguments = {**right, name: wrong}
        try:
            call(*arguments.values()) if isinstance(call, torch._ops.OpOverload) else call(**arguments)
        except (ValueError, TypeError) as error:
            if words and not any(word in str(error) for word in (name, *ALSO.get(name, ()))):
                print(f"WRONG: {name} is not named: {error}")
        except Exception as error:
            print(f"WRONG: {type(error).__name__}: {error}")
        else:
            print("WRONG: accepted")
    return count


#: a wrong argument may be blamed on what it does not fit
ALSO = {"query": ("key",), "stream": ("query",), "buckets": ("block",), "head_dim": ("global_rows",),
        "group": ("global_rows",), "global_rows": ("local_rows", "cos"), "local_rows": ("global_rows",),
        "row": ("panels",), "panels": ("row",), "columns": ("row",)}  # fmt: skip


def main() -> None:
    torch.set_num_threads(2)
    for kernels in (contextlib.nullcontext(), plain_torch()):
        with kernels:
            count = tried(public_calls(), words=True)
    count += tried(other_calls(), words=True)
    count += tried(operator_calls(), words=True)
    print(f"{count} calls")


if __name__ == "__main__":
    main()
