"""Acceptance of the attention alone: kernels, speed against FlashAttention, decoding.

    PYTHONPATH=.:benchmarks python -m acceptance.attention kernels|speed|decode --rows FILE --work FOLDER

FOLDER stays empty: only trainings leave something to the parts that follow.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from attention import Route, Shape, dense, dual
from decoding.decode import filled_cache, token_step
from measure import medians, peak_mebibytes
from torch.nn.attention import SDPBackend, sdpa_kernel

from acceptance.rows import Rows, given
from dualroute.attention import DualRouting, backend
from dualroute.attention.verification import Decision, Problem, problems_of
from dualroute.model.kernel_choice import compared

ROOT = Path(__file__).parents[2]
TESTS = ("tests/attention/backends/triton", "tests/attention/backends/flash")
TOY_TESTS = ("tests/attention/backends/triton/test_pair_lists.py",)
TEST_SECONDS = 110
RECIPES = ("160m", "1b", "7b")


def kernels(rows: Rows, device: torch.device, toy: bool) -> None:
    """Every back end on the shapes of the recipes against float64; the kernels' own tests on this device."""
    for name, problems in _problems(device, toy).items():
        decision = compared(problems, device, fresh=True)
        for finding in decision.findings:
            taken = ", taken by auto" if finding.name == decision.name else ""
            left = f", torch takes {'; '.join(finding.left_to_torch)}" if finding.left_to_torch else ""
            what = f"{finding.name} at {name}"
            if finding.milliseconds is None:
                bad = finding.raised or finding.why_not.startswith("WRONG")
                rows.add(what, finding.why_not, "right where it can be had", False if bad else None)
            elif finding.name == "torch":
                rows.add(what, f"all layers{taken}", "", milliseconds=finding.milliseconds)
            else:
                found = f"values {finding.values:.0e}, gradients {finding.gradients:.0e}{taken}{left}"
                wanted = "within rounding of float64"
                rows.add(what, found, wanted, milliseconds=finding.milliseconds)
    workers = ["-n", str(min(8, os.cpu_count() or 1))]
    _tests(rows, [*TOY_TESTS] if toy else [*TESTS, *workers])


def _tests(rows: Rows, arguments: list[str]) -> None:
    """The kernels' own tests, as far as they come in their time."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", *arguments]
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=TEST_SECONDS,
            check=False,
        )
        printed, status = done.stdout, done.returncode
    except subprocess.TimeoutExpired as error:
        printed, status = error.stdout or b"", None
    text = printed.decode(errors="replace")
    outcomes = "".join(line.split()[0] for line in text.splitlines() if re.match(r"^[.sxXFE]+( |$)", line))
    failed = outcomes.count("F") + outcomes.count("E")
    found = f"{outcomes.count('.')} passed, {failed} failed"
    if status is None:
        found += f", the others did not come to their turn in {TEST_SECONDS} s"
    elif status:
        found += f": {text.strip().splitlines()[-1][:200]}"
    rows.add("tests of the kernels", found, "none fails", failed == 0 and not status)


def _problems(device: torch.device, toy: bool) -> dict[str, list[Problem]]:
    if not toy:
        from dualroute.doctor.kernels import recipe_problems  # with a trainer, seconds

        return {name: recipe_problems(name, device) for name in RECIPES}
    layer = DualRouting(64, 4, num_kv_heads=2, window=24, block=16, top_k=2, global_mode="routed")
    return {"toy": problems_of(layer, torch.bfloat16, 400, packed=True)}


def speed(rows: Rows, device: torch.device, toy: bool) -> None:
    """Both routes against FlashAttention with as many heads, in one run, in turns."""
    lengths, heads, dim = ((256, 1024), 4, 16) if toy else ((4096, 16384, 65536), 16, 128)
    texts = ("16/16/2",) if toy else ("512/64/16", "128/64/4")
    for text in texts:
        window, block, top_k = (int(number) for number in text.split("/"))
        route = Route(window, block, top_k, "minmax", 16, "second_order", "routed")
        layer = DualRouting(heads * dim, heads, window=window, block=block, top_k=top_k, global_mode="routed")
        _decide(layer, max(lengths), device)
        print(backend.describe(device))
        for length in lengths:
            shape = Shape(length, heads, dim, torch.bfloat16, device)
            for backward in (False, True):
                _speed_row(rows, shape, route, backward, toy)


def _decide(layer: DualRouting, context: int, device: torch.device) -> Decision:
    """Let auto stand for the fastest kernels that are right at these shapes, as a run would."""
    decision = compared(problems_of(layer, torch.bfloat16, context, packed=False), device)
    backend.decide(device.type, decision.name, decision.line())
    return decision


def _speed_row(rows: Rows, shape: Shape, route: Route, backward: bool, toy: bool) -> None:
    ours, theirs = dual(shape, route, backward), _flash(dense(shape, backward), shape.device)
    times = medians({"dense": theirs, "dual": ours}, 3, shape.device)
    ratio = times["dense"] / times["dual"]
    peak = peak_mebibytes(dual, shape, route, backward, device=shape.device) if not toy else float("nan")
    way = "forward + backward" if backward else "forward"
    found = f"{ratio:.2f} × FlashAttention ({1e3 * times['dense']:.3g} ms)"
    asks = backward and shape.length >= 65536  # a length at which routing is meant to pay
    wanted = "faster than FlashAttention" if asks else ""
    rows.add(
        f"{way}, {shape.length:,} tokens, {route.name}", found, wanted, ratio > 1 or not asks,
        milliseconds=1e3 * times["dual"], peak_mebibytes=peak,
    )  # fmt: skip


def _flash(call: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """The call, with torch's FlashAttention or an error."""

    def run() -> None:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if device.type == "cuda" else nullcontext():
            call()

    return run


def decode(rows: Rows, device: torch.device, toy: bool) -> None:
    """A step of decoding against a dense cache of equal length."""
    lengths, heads, dim = ((512,), 4, 16) if toy else ((8192, 65536), 16, 128)
    dtype, block = torch.bfloat16, 16 if toy else 64
    for length in lengths:
        layer = DualRouting(heads * dim, heads, window=2 * block, block=block, top_k=4, global_mode="routed")
        decision = _decide(layer, length, device)
        layer = layer.to(device, dtype)
        wide = torch.randn(1, heads, 1, dim, device=device, dtype=dtype)
        keys = torch.randn(1, heads, length, dim, device=device, dtype=dtype)
        full = partial(torch.nn.functional.scaled_dot_product_attention, wide, keys, torch.randn_like(keys))
        cache = filled_cache(layer, length, device, dtype)  # a step knows the addresses in it only
        with torch.inference_mode():
            step = token_step(layer, cache, device, dtype)
            times = medians({"dense": full, "dual": step}, 20, device)
        found = f"{times['dense'] / times['dual']:.2f} × dense attention, {decision.name}"
        rows.add(f"a step at {length:,} tokens", found, milliseconds=1e3 * times["dual"])


if __name__ == "__main__":
    parts = {"kernels": kernels, "speed": speed, "decode": decode}
    asked = given(parts, __doc__.splitlines()[0])
    parts[asked.part](asked.rows, torch.device(asked.device), asked.toy)
