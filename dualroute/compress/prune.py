"""``dualroute prune``: a trained model cut to a smaller one in layers, widths and heads.

In: a checkpoint and the shards that it was trained on.  Here: statistics on calibration windows, the loss
that each axis costs at a few sizes (against random pruning), the best shape within the target, the cut with
its closed-form corrections; on request the windows and top_k that each layer needs.  Out: an ordinary
checkpoint of weights, with ``prune.json``, the whole account.  Next: ``dualroute distill``, which wins
back what was lost.

At most about a third of the parameters should go at once; prune, distil and prune again
(Muralidharan et al. 2024, https://arxiv.org/abs/2407.14679, §4.3).
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from dualroute import __version__
from dualroute.compress.calibration import Calibrated, Statistics, calibrate, described, measure
from dualroute.compress.config import Axis, Criterion, PruneConfig
from dualroute.compress.importance import Shape, choose
from dualroute.compress.routing_budget import KeySearch
from dualroute.compress.routing_need import Need, fit_routing
from dualroute.compress.shapes import (
    FIELDS,
    Search,
    Sensitivity,
    axis_sizes,
    latency,
    share,
    widths_by_need,
)
from dualroute.compress.slicing import slice_model
from dualroute.errors import UserError
from dualroute.model import DualRoutingTransformer, ModelConfig
from dualroute.model.checkpoint.format import CONFIG, find_checkpoint, save_model
from dualroute.tasks.evaluate import scored_rows, usable_rows

REPORT = "prune.json"
_SHARES = (0.75, 0.5, 0.25)
_DRAWS: dict[Criterion, int] = {"activation": 1, "random": 3}


def prune(config: PruneConfig) -> None:
    """Prune a checkpoint; see the module's docstring.

    Raises:
        UserError: The inputs do not fit together, or the target cannot be reached.
    """
    found = calibrate(config)
    loaded, batches, context = found.loaded, found.batches, found.context
    parent = loaded.model
    statistics = measure(parent, batches, loaded.device)
    account: dict[str, Any] = {
        "options": asdict(config),
        "dualroute": __version__,
        "parent": str(loaded.checkpoint.folder),
        "loss": {"parent": found.loss(parent, batches)},
    }
    shape = _shape(config, found, statistics, account)
    kept = choose(parent, statistics, shape, config.criterion, config.seed)
    widths = _widths(config, found, statistics, shape, kept.layers, account)
    if widths is not None:
        kept = choose(parent, statistics, shape, config.criterion, config.seed, widths)
    small = slice_model(parent, kept, statistics if config.compensate else None).to(loaded.device)
    account["loss"]["pruned"] = found.loss(small, batches)
    if config.fit_routing:
        small, need = fit_routing(small, batches, loaded.device, config.routing_tolerance, found.loss)
        account["routing"] = asdict(need)
        account["loss"]["with fitted routing"] = need.loss
    if config.keys is not None:
        small = _fewer_keys(config, found, small, account)
    account["shape"] = {"parent": asdict(Shape.of(parent.config)), "pruned": asdict(shape)}
    account["kept"] = {"layers": kept.layers, "channels": kept.channels.tolist()}
    account["parameters"] = {"parent": parent.num_parameters(), "pruned": small.num_parameters()}
    account["flops_per_token"] = {
        "parent": parent.flops_per_token(context), "pruned": small.flops_per_token(context)
    }  # fmt: skip
    if config.keep is not None and config.target == "latency":
        account["forward_ms"] = {
            name: 1e3 * latency(parent.config, one, context, loaded.device)
            for name, one in (("parent", Shape.of(parent.config)), ("pruned", shape))
        }
    if found.answerer is not None:
        account["task"] = _task_scores(found, small)
    _show(account)
    metadata = described(loaded, "prune", pruned_from=str(loaded.checkpoint.folder), context=context)
    extra = {REPORT: json.dumps(account, indent=1).encode(), **loaded.checkpoint.task_file()}
    save_model(small.cpu(), config.output, loaded.tokenizer.path, metadata, extra)
    follows = f"distill --init_from {config.output} --teacher {config.checkpoint}"
    if found.answerer is not None:
        follows = f"finetune --init_from {config.output} … (the task's configuration)"
    print(f"{config.output}: next, dualroute {follows}")


def _shape(config: PruneConfig, found: Calibrated, statistics: Statistics, account: dict[str, Any]) -> Shape:
    """The shape that is asked for: sizes that were given, the others by search."""
    loaded, context = found.loaded, found.context
    parent = Shape.of(loaded.model.config)
    given = config.sizes(parent, loaded.model.config.heads_per_group)
    if loaded.model.config.attention == "interleaved" and (
        "layers" in config.axes or given.get("num_layers", parent.num_layers) != parent.num_layers
    ):
        raise UserError("layers cannot be pruned from attention interleaved: the dense ones would move")
    if loaded.model.config.share_choice > 1 and (
        (config.keep is not None and "layers" in config.axes)
        or given.get("num_layers", parent.num_layers) != parent.num_layers
    ):
        raise UserError(
            f"layers cannot be pruned from a model with share_choice {loaded.model.config.share_choice}: "
            f"other ones would choose the blocks; choose --axes without layers"
        )
    if loaded.model.config.global_layers is not None:
        changed = sorted(name for name, size in given.items() if size != getattr(parent, name))
        for axis in ("layers", "heads"):
            fields = set(FIELDS[axis]).intersection(changed)
            if (config.keep is not None and axis in config.axes) or fields:
                raise UserError(
                    f"{axis} cannot be pruned from a model with global_layers, whose layers have different "
                    f"routes: choose --axes of dim and ffn"
                )
    if config.shape_of is not None:
        shape = Shape.of(ModelConfig.from_file(find_checkpoint(config.shape_of).folder / CONFIG))
        larger = [name for name, size in asdict(shape).items() if size > asdict(parent)[name]]
        if larger:
            raise UserError(f"shape_of {config.shape_of} is larger than the model in {', '.join(larger)}")
        return shape
    if config.keep is None:
        return dataclasses.replace(parent, **given)
    sensitivities: dict[Axis, Sensitivity] = {}
    account["axes"] = {}
    for axis in config.axes:
        if not config.axis_report:
            sensitivities[axis] = Sensitivity([0.0, 1.0], [1.0, 0.0])
            continue
        sensitivities[axis], account["axes"][axis] = _sensitivity(config, found, statistics, axis)
    search = Search(loaded.model.config, sensitivities, config.multiple, context, loaded.device)
    for axis, shapes in search.sizes.items():
        fixed = [one for one in shapes if all(getattr(one, name) == v for name, v in given.items())]
        if fixed and any(name in given for name in FIELDS[axis]):
            search.sizes[axis] = fixed
    return dataclasses.replace(search.best(config.target, config.keep), **given)


def _sensitivity(
    config: PruneConfig, found: Calibrated, statistics: Statistics, axis: Axis
) -> tuple[Sensitivity, list[dict[str, Any]]]:
    """What an axis costs at a few sizes, beside the same sizes chosen at random."""
    loaded, batches = found.loaded, found.batches
    parent = Shape.of(loaded.model.config)
    possible = axis_sizes(parent, axis, config.multiple)
    sizes = {
        min(possible, key=lambda one, wanted=wanted: abs(share(one, parent, axis) - wanted))  # type: ignore[misc]
        for wanted in _SHARES
    } - {parent}
    if not sizes:
        return Sensitivity([0.0, 1.0], [1.0, 0.0]), []
    few = batches[: max(1, len(batches) // 4)]
    base = found.loss(loaded.model, few)
    rows = []
    for shape in sorted(sizes, key=lambda one: -share(one, parent, axis)):
        row: dict[str, Any] = {"shape": asdict(shape), "share": share(shape, parent, axis)}
        for criterion, draws in _DRAWS.items():
            losses = []
            for draw in range(draws):
                kept = choose(loaded.model, statistics, shape, criterion, config.seed + draw)
                small = slice_model(loaded.model, kept, statistics if config.compensate else None)
                losses.append(found.loss(small.to(loaded.device), few) - base)
            row[criterion] = sum(losses) / draws
        rows.append(row)
    ascending = rows[::-1]
    sizes_of = [row["share"] for row in ascending] + [1.0]
    return Sensitivity(sizes_of, [row["activation"] for row in ascending] + [0.0]), rows


def _widths(
    config: PruneConfig,
    found: Calibrated,
    statistics: Statistics,
    shape: Shape,
    layers: list[int],
    account: dict[str, Any],
) -> list[int] | None:
    """Feed-forward widths of the layers that stay, where they are not all the shape's."""
    parent = found.loaded.model.config
    if config.shape_of is not None:
        return ModelConfig.from_file(find_checkpoint(config.shape_of).folder / CONFIG).layer_ffn_dims
    if shape.ffn_dim == Shape.of(parent).ffn_dim:
        return None
    if not config.ffn_by_layer:
        if parent.layer_ffn_dims is not None:
            raise UserError(
                f"the layers of {config.checkpoint} have widths of their own ({parent.layer_ffn_dims}): "
                f"give --ffn_by_layer true to make them narrower"
            )
        return None
    costs = _costs_by_layer(config, found, statistics, layers)
    before = [parent.ffn_dims[index] for index in layers]
    widths = widths_by_need(costs, before, shape.ffn_dim * len(layers), config.multiple)
    account["ffn_by_layer"] = {
        "layers": layers, "parent": before, "widths": widths, "costs": [asdict(cost) for cost in costs]
    }  # fmt: skip
    return widths


def _fewer_keys(
    config: PruneConfig, found: Calibrated, small: DualRoutingTransformer, account: dict[str, Any]
) -> DualRoutingTransformer:
    """The same weights with windows and top_k under the budget."""
    if small.config.attention != "dual" or small.task_head is not None or not small.config.causal:
        raise UserError(
            f"--keys is for models with attention dual that continue a text, and {config.checkpoint} is "
            f"none: leave it out, or use --fit_routing true"
        )
    assert config.keys is not None
    search = KeySearch(small, found.batches, found.context, found.loaded.device)
    best = search.within(config.keys)
    fitted = DualRoutingTransformer(best.config)
    fitted.load_state_dict(small.state_dict())
    fitted = fitted.to(found.loaded.device).eval()
    loss = found.loss(fitted, found.batches)
    need = Need(best.config.layer_windows or [], best.config.layer_top_k or [], loss)
    account["routing"] = asdict(need)
    account["keys"] = {"asked": config.keys, "read": best.share, "divergence": best.divergence}
    account["loss"]["with fewer keys"] = loss
    return fitted


def _costs_by_layer(
    config: PruneConfig, found: Calibrated, statistics: Statistics, layers: list[int]
) -> list[Sensitivity]:
    """What a narrower feed-forward costs in each of ``layers`` alone, the others as they were."""
    parent, few = found.loaded.model, found.batches[: max(1, len(found.batches) // 4)]
    whole = parent.config.ffn_dims
    base = found.loss(parent, few)
    costs = []
    for index in layers:
        sizes, losses = [1.0], [0.0]
        for wanted in _SHARES:
            width = max(1, round(wanted * whole[index]))
            widths = [*whole[:index], width, *whole[index + 1 :]]
            kept = choose(parent, statistics, Shape.of(parent.config), config.criterion, config.seed, widths)
            small = slice_model(parent, kept, statistics if config.compensate else None)
            sizes.insert(0, width / whole[index])
            losses.insert(0, found.loss(small.to(found.loaded.device), few) - base)
        costs.append(Sensitivity(sizes, losses))
    return costs


def _task_scores(found: Calibrated, small: DualRoutingTransformer) -> dict[str, Any]:
    """The task's metrics before and after, on rows that were held out where they are still there."""
    answerer = found.answerer
    assert answerer is not None
    try:
        source, rows, _ = usable_rows(answerer)
    except UserError:  # they were moved, or were never kept
        source, rows, _ = usable_rows(answerer, found.source)
    before, _ = scored_rows(answerer, rows)
    answerer.loaded = dataclasses.replace(answerer.loaded, model=small)
    after, _ = scored_rows(answerer, rows)
    return {"rows": len(rows), "measured_on": source, "parent": before, "pruned": after}


def _show(account: dict[str, Any]) -> None:
    console = Console()
    if account.get("axes"):
        table = Table("axis", "size", "loss +", "random +", title="Loss of each axis alone", min_width=50)
        for axis, rows in account["axes"].items():
            for row in rows:
                table.add_row(axis, f"{row['share']:.0%}", f"{row['activation']:.4f}", f"{row['random']:.4f}")
        console.print(table)
    table = Table("", "parent", "pruned", "ratio")
    for name, digits in (("parameters", 0), ("flops_per_token", 0), ("forward_ms", 1)):
        if name in account:
            of_parent, pruned = account[name]["parent"], account[name]["pruned"]
            figures = f"{of_parent:,.{digits}f}", f"{pruned:,.{digits}f}", f"{pruned / of_parent:.3f}"
            table.add_row(name.replace("_", " "), *figures)
    losses = account["loss"]
    table.add_row("calibration loss", f"{losses['parent']:.4f}", f"{losses['pruned']:.4f}", "")
    if "task" in account:
        before, after = account["task"]["parent"], account["task"]["pruned"]
        for name in before:
            row = f"{name.replace('_', ' ')}, {account['task']['rows']:,} rows"
            table.add_row(row, f"{before[name]:.4f}", f"{after[name]:.4f}", "")
    for name, size in account["shape"]["pruned"].items():
        table.add_row(name, f"{account['shape']['parent'][name]:,}", f"{size:,}", "")
    console.print(table)
    if "ffn_by_layer" in account:
        console.print(f"feed-forwards {account['ffn_by_layer']['widths']}, by layer")
    if "keys" in account:
        read, divergence = account["keys"]["read"], account["keys"]["divergence"]
        console.print(f"a token reads {read:.3f} of the keys, {divergence:.4f} nats from what it said")
    if "routing" in account:
        need = Need(**account["routing"])
        console.print(f"windows {need.windows}, top_k {need.top_k}; calibration loss {need.loss:.4f}")
