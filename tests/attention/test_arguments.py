"""What does not fit is refused by name, and unusual arguments that do fit give what usual ones give."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dualroute.attention import (
    DualRouting,
    Layout,
    Routing,
    full_attention,
    local_attention,
    routed_attention,
    select_blocks,
)
from dualroute.attention.backends import cpp as cpu_kernels
from tests.attention.mutated_arguments import rows

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_every_wrong_argument_is_refused_by_name() -> None:
    """In a process of its own, on the C++ kernels and on plain torch: a fault would end it."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.attention.mutated_arguments"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, (lines[-1:], done.stderr)
    wrong = [f"{call}: {line}" for call, line in itertools.pairwise(lines) if "WRONG" in line]
    assert not wrong, "\n".join(wrong)
    assert int(lines[-1].split()[0]) > 400


def test_the_kernels_themselves_look_at_what_they_are_given() -> None:
    stream = Layout.build(1, 80, 8).stream
    query, key = rows(4, 80), rows(2, 80)
    routing = Routing(2, sub_block=4)
    chosen = select_blocks(query, key, stream, top_k=2, sub_block=4)
    for name in ("query", "key", "value"):
        right = {"query": query, "key": key, "value": key}
        wrong = {**right, name: right[name].int() if name == "query" else right[name].double()}
        with pytest.raises(TypeError, match=name if name != "query" else "query has dtype"):
            cpu_kernels.local_attention(**wrong, stream=stream, window=3)
        with pytest.raises(TypeError, match="has dtype"):
            cpu_kernels.routed_attention(**wrong, stream=stream, routing=routing, selected=chosen)
    for number in (99, -99, 2**31 - 1, 9):
        spoilt = chosen.clone()
        spoilt[1, 50, 2] = number
        if number < 0:
            cpu_kernels.routed_attention(query, key, key, stream, routing, selected=spoilt)
            continue
        with pytest.raises(ValueError, match="selected has a block"):
            cpu_kernels.routed_attention(query, key, key, stream, routing, selected=spoilt)
    with pytest.raises(ValueError, match="selected is"):
        cpu_kernels.routed_attention(query, key, key, stream, routing, selected=chosen[:, :-1])


@pytest.mark.usefixtures("each_kernels")
@pytest.mark.parametrize("window", [1, 80, 81, 10**12])
def test_windows_larger_than_the_text(window: int) -> None:
    stream = Layout.build(1, 80, 8).stream
    parts = rows(4, 80), rows(2, 80), rows(2, 80)
    wanted = full_attention(*parts, stream) if window >= 80 else parts[2].repeat_interleave(2, 0)
    torch.testing.assert_close(local_attention(*parts, stream, window=window), wanted)


@pytest.mark.usefixtures("each_kernels")
def test_blocks_larger_than_the_text() -> None:
    layout = Layout.build(1, 5, 64)
    parts = [torch.nn.functional.pad(rows(heads, 5), (0, 0, 0, 59)) for heads in (4, 2, 2)]
    routed = routed_attention(*parts, layout.stream, Routing(3))
    torch.testing.assert_close(routed[:, :5], full_attention(*parts, layout.stream)[:, :5])
    assert (select_blocks(*parts[:2], layout.stream, top_k=3) == -1).all()


@pytest.mark.usefixtures("each_kernels")
@pytest.mark.parametrize("route", ["routed", "local", "full"])
def test_rows_that_are_not_contiguous(route: str) -> None:
    stream = Layout.build(1, 80, 8).stream
    whole = torch.randn(80, 8, 2 * 8)  # heads side by side, every second number
    strided = [part.transpose(0, 1)[..., ::2] for part in whole.split([4, 2, 2], 1)]
    results = []
    for parts in (strided, [part.contiguous() for part in strided]):
        parts = [part.detach().requires_grad_() for part in parts]
        if route == "routed":
            out = routed_attention(*parts, stream, Routing(2, sub_block=4))
        elif route == "local":
            out = local_attention(*parts, stream, window=9)
        else:
            out = full_attention(*parts, stream)
        cotangent = torch.ones(8, 80, 4).permute(2, 1, 0)
        results.append([out, *torch.autograd.grad(out, parts, cotangent)])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.usefixtures("each_kernels")
@pytest.mark.parametrize("route", ["routed", "local"])
def test_second_derivatives_are_refused(route: str) -> None:
    stream = Layout.build(1, 80, 8).stream
    parts = [rows(heads, 80).requires_grad_() for heads in (4, 2, 2)]
    if route == "routed":
        out = routed_attention(*parts, stream, Routing(2, sub_block=4))
    else:
        out = local_attention(*parts, stream, window=9)
    (slope,) = torch.autograd.grad(out.square().sum(), parts[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        slope.sum().backward()


@pytest.mark.parametrize("shape", [(0, 5, 32), (2, 0, 32)])
def test_empty_batches_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must all be at least 1"):
        DualRouting(32, 4)(torch.zeros(shape))


@pytest.mark.usefixtures("each_kernels")
def test_a_batch_of_padding_alone() -> None:
    layer = DualRouting(32, 4, block=8, sub_block=4, global_mode="routed")
    out = layer(torch.randn(2, 20, 32), attention_mask=torch.zeros(2, 20))
    assert not out.any()
