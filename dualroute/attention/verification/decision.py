"""Every back end checked and timed on a model's layers; the fastest that is right, and the line that says so.

In: problems, a device and the names of back ends. Out: a `Decision`.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from dualroute.attention.backend import CHOICES, Backend, load
from dualroute.attention.verification.correctness import Errors, Wrong, check, passes, reference
from dualroute.attention.verification.problem import Problem, draw

ROUNDS = 3  # of timing, after one to warm up; the median counts
#: what a back end has to be faster by to be taken over plain torch or over one that stands before it
CLEARLY = 0.97


class DeviceLost(RuntimeError):
    """Kernels of the back end `args[0]` have left this process without its device; `args[1]` says how."""


@dataclass(frozen=True)
class Finding:
    """What was seen of one back end, over all problems.

    Attributes:
        milliseconds: Forward and backward of the attention of all layers; None where it is not right.
        why_not: Why it is not taken, whatever its speed; empty where it is right.
        raised: It ended in an exception: perhaps only this time.
        left_to_torch: What it does not take, for plain torch.
        values, gradients: The largest relative errors.
    """

    name: str
    milliseconds: float | None = None
    why_not: str = ""
    raised: bool = False
    left_to_torch: tuple[str, ...] = ()
    values: float = 0.0
    gradients: float = 0.0


@dataclass(frozen=True)
class Decision:
    """The back end to take, and what was found of each."""

    name: str
    findings: tuple[Finding, ...]

    def line(self) -> str:
        """Which, and why: for a log."""
        by_name = {finding.name: finding for finding in self.findings}
        chosen = by_name[self.name]
        parts = []
        for finding in self.findings:
            if finding.milliseconds is None:
                parts.append(f"{finding.name} not: {finding.why_not}")
            elif finding is not chosen:
                parts.append(f"{finding.name} {finding.milliseconds:.3g} ms")
        took = "" if chosen.milliseconds is None else f", {chosen.milliseconds:.3g} ms forward and backward"
        exact = f", values within {chosen.values:.0e} and gradients within {chosen.gradients:.0e} of float64"
        if self.name == "torch":
            exact = ""
        rest = f"; plain torch takes {', '.join(chosen.left_to_torch)}" if chosen.left_to_torch else ""
        others = f" ({'; '.join(parts)})" if parts else ""
        title = "plain torch" if self.name == "torch" else f"{self.name} kernels"
        return f"{title}, the fastest of what is right here{took}{exact}{others}{rest}"


def decide(
    problems: Sequence[Problem],
    device: torch.device,
    names: Sequence[str] | None = None,
    backends: Mapping[str, Backend] | None = None,
    tell: Callable[[str], None] = lambda name: None,
) -> Decision:
    """Check and time what there is; plain torch is right by definition, and taken where nothing else is.

    Args:
        names: the back ends in question; None: all, but on a GPU not the C++ kernels, which would be compiled
            in vain.
        backends: others under their names, instead of those that `load` gives.
        tell: called with the name of each before its turn.

    Raises:
        DeviceLost: kernels have failed in a way after which this process cannot use the device.
    """
    given = dict(backends or {})
    tell("torch")
    findings = [_plain(problems, device)]
    if names is None:
        names = [name for name in CHOICES[1:] if name != "cpp" or device.type == "cpu"]
    for name in names:
        if name == "torch":
            continue
        tell(name)
        try:
            findings.append(_examine(name, given.get(name) or load(name), problems, device))
        except ValueError as error:  # it cannot be had here
            findings.append(Finding(name, why_not=_line(error)))
    best = findings[0]
    for finding in findings[1:]:
        limit = CLEARLY * (best.milliseconds or math.inf)
        if finding.milliseconds is not None and finding.milliseconds < limit:
            best = finding
    return Decision(best.name, tuple(findings))


def _plain(problems: Sequence[Problem], device: torch.device) -> Finding:
    """Plain torch, which is what the others are compared with; it may be too large to be timed."""
    try:
        return Finding("torch", _time(load("torch"), problems, device))
    except RuntimeError as error:
        _still_there("torch", device, error)
        return Finding("torch", why_not=f"it cannot be timed: {_line(error)}", raised=True)


def _still_there(name: str, device: torch.device, error: Exception) -> None:
    """After an illegal address a CUDA context answers nothing any more.

    Raises:
        DeviceLost: so it is.
    """
    try:
        _finish(device)
    except RuntimeError:
        raise DeviceLost(name, _line(error)) from error


def _examine(name: str, backend: Backend, problems: Sequence[Problem], device: torch.device) -> Finding:
    left = left_to_torch(backend, problems, device)
    if left is None:
        reason = next(iter(_reasons(backend, problems[0], device).values()))
        return Finding(name, why_not=reason)
    worst = Errors(0.0, 0.0)
    try:
        for problem in problems:
            found = check(backend, problem, reference(problem, device))
            worst = Errors(*(max(pair) for pair in zip(worst, found, strict=True)))
        taken = _time(backend, problems, device)
    except Wrong as error:
        return Finding(name, why_not=f"WRONG, {error}", left_to_torch=left)
    except Exception as error:
        _still_there(name, device, error)
        return Finding(
            name,
            why_not=f"it ended in {type(error).__name__}: {_line(error)}",
            raised=True,
            left_to_torch=left,
        )
    return Finding(name, taken, left_to_torch=left, values=worst.values, gradients=worst.gradients)


def _reasons(backend: Backend, problem: Problem, device: torch.device) -> dict[str, str]:
    """Why a back end does not take a route, by route; a route that it takes is not there."""
    query = torch.empty(0, problem.head_dim, dtype=getattr(torch, problem.dtype), device=device)
    found = {
        route: backend.why_not(query, causal=problem.causal, block=block)
        for route, block in _routes(problem).items()
    }
    return {route: reason for route, reason in found.items() if reason is not None}


def _routes(problem: Problem) -> dict[str, int | None]:
    """What a back end is asked for, with the block that it is asked with."""
    routes: dict[str, int | None] = {}
    if problem.global_heads:
        routes["the global route"] = None if problem.max_exact_blocks is None else problem.block
    if problem.local_heads:
        routes["the local route"] = None
    return routes


def left_to_torch(
    backend: Backend, problems: Sequence[Problem], device: torch.device
) -> tuple[str, ...] | None:
    """What plain torch has to take, with the reason; None where that is all."""
    left: dict[str, None] = {}
    takes_any = False
    for problem in problems:
        reasons = _reasons(backend, problem, device)
        takes_any = takes_any or len(reasons) < len(_routes(problem))
        left.update(dict.fromkeys(f"{route}: {reason}" for route, reason in reasons.items()))
    return tuple(left) if takes_any else None


def _time(backend: Backend, problems: Sequence[Problem], device: torch.device) -> float:
    """Milliseconds of the attention of all layers, forward and backward."""
    total = 0.0
    for problem in problems:
        run = passes(backend, problem, draw(problem, problem.timed_documents(), device))
        taken = []
        for round_ in range(ROUNDS + 1):
            _finish(device)
            begin = time.perf_counter()
            run()
            _finish(device)
            if round_:
                taken.append(time.perf_counter() - begin)
        total += problem.layers * statistics.median(taken)
    return 1e3 * total


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _line(error: BaseException) -> str:
    """The first line of an error, not too long."""
    lines = str(error).strip().splitlines() or ["no message"]
    return lines[0][:200]
