"""The kernels of the attention on the shapes of the recipes that come with the project: right, and how fast.

In: configs/pretrain.  Here: what `kernels: auto` does at the start of a run on a GPU
(:mod:`dualroute.model.kernel_choice`), made anew for every recipe; on a GPU the runs that follow find the
result.  Out: a verdict a recipe, and rows of a table.

On a CPU a recipe is cut down to one key head a route and to texts that are just long enough to be routed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml
from rich.console import Console
from rich.table import Table

from dualroute.attention.verification import Decision, Finding, Problem, problems_of
from dualroute.doctor.verdict import Verdict, fail, ok
from dualroute.model import DualRoutingTransformer, ModelConfig
from dualroute.model.kernel_choice import compared
from dualroute.training.kernels import arithmetic, device

RECIPES = ("160m", "410m", "1b", "7b")
_FOLDER = Path(__file__).parents[1] / "_configs" / "pretrain"


def recipe_problems(name: str, target: torch.device) -> list[Problem]:
    """What the layers of configs/pretrain/NAME.yaml ask; a smaller question on a CPU."""
    path = _FOLDER / f"{name}.yaml"
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    shape = yaml.safe_load((path.parent / recipe["model"]).read_text(encoding="utf-8"))
    with torch.device("meta"):
        model = DualRoutingTransformer(ModelConfig(**{**shape, "vocab_size": 8}))
    dtype = arithmetic(recipe["train"].get("precision", "32"))
    problems = problems_of(model, dtype, recipe["data"]["context"], packed=True)
    return problems if target.type == "cuda" else [_smaller(problem) for problem in problems]


def _smaller(problem: Problem) -> Problem:
    exact = problem.max_exact_blocks and min(problem.max_exact_blocks, problem.top_k + 2)
    return dataclasses.replace(
        problem,
        global_heads=min(problem.global_heads, problem.group),
        local_heads=min(problem.local_heads, problem.group),
        max_exact_blocks=exact,
        context=min(problem.context, 2 * ((exact or 0) + 2) * problem.block),
    )


def kernels(table: dict[str, Decision], names: tuple[str, ...] = RECIPES) -> Iterator[Verdict]:
    """A verdict for each recipe; what was found goes to ``table``."""
    target = device()
    for name in names:
        found = table[name] = compared(recipe_problems(name, target), target, fresh=True)
        bad = [finding for finding in found.findings if finding.raised or finding.why_not.startswith("WRONG")]
        if bad:
            wrong = "; ".join(f"{finding.name}: {finding.why_not}" for finding in bad)
            remedy = (
                f"train.kernels auto takes {found.name}, which is right; report it with versions and card"
            )
            yield fail("kernels", f"{name}: {wrong}", remedy)
        else:
            yield ok("kernels", f"{name}: {found.line()}")


def show(table: dict[str, Decision]) -> None:
    """Print milliseconds of forward and backward, and the largest errors against float64."""
    first = next(iter(table.values()), None)
    if first is None:
        return
    names = [finding.name for finding in first.findings]
    drawn = Table(
        "recipe", *names, "auto takes", title="attention of all layers: ms, errors of values, gradients"
    )
    for recipe, decision in table.items():
        drawn.add_row(recipe, *map(cell, decision.findings), decision.name)
    Console(width=max(100, 24 * (len(names) + 2))).print(drawn)


def cell(finding: Finding) -> str:
    """What a table says of a back end."""
    if finding.milliseconds is None:
        return finding.why_not
    if finding.name == "torch":
        return f"{finding.milliseconds:.3g} ms"
    rest = f"; torch takes {', '.join(finding.left_to_torch)}" if finding.left_to_torch else ""
    return f"{finding.milliseconds:.3g} ms, {finding.values:.0e}, {finding.gradients:.0e}{rest}"
