"""``dualroute runs compare``: what differs between two runs, and how their losses went."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from dualroute.errors import UserError, printable
from dualroute.files import atomic_path, read_limited
from dualroute.training.monitoring.metrics_log import read_metrics
from dualroute.training.runs.config import CompareRunsConfig

_CONFIG_BYTES = 1 << 20
#: Steps at which losses are shown.
ROWS = 8
Curve = dict[int, float]


def compare_runs(config: CompareRunsConfig) -> None:
    """Print the settings that differ and both losses by step; write a plot.

    Raises:
        UserError: One is no run, or matplotlib is missing.
    """
    runs = [Path(config.first), Path(config.second)]
    names = _names(runs)
    settings = [_flat(_settings(run)) for run in runs]
    table = Table("setting", *names, box=None, pad_edge=False)
    for key in sorted({*settings[0], *settings[1]}):
        values = [one.get(key, "–") for one in settings]
        if values[0] != values[1] and key != "output":
            table.add_row(key, *(printable(str(value)) for value in values))
    console = Console(soft_wrap=True)
    console.print(table if table.row_count else "their settings are the same")
    curves = {
        event: [_curve(run, event, f"{short}/loss") for run in runs]
        for event, short in (("train", "train"), ("validation", "val"))
    }
    for event, (first, second) in curves.items():
        steps = sorted(first.keys() & second.keys())
        if not steps:
            console.print(f"\nno step has a {event} loss in both")
            continue
        shown = sorted({steps[round(n * (len(steps) - 1) / (ROWS - 1))] for n in range(ROWS)})
        table = Table(
            "step", *(f"{event} loss, {name}" for name in names), "difference", box=None, pad_edge=False
        )
        for step in shown:
            table.add_row(
                f"{step:,}", f"{first[step]:.4f}", f"{second[step]:.4f}", f"{second[step] - first[step]:+.4f}"
            )
        console.print()
        console.print(table)
    if config.plot is not None:
        _plot(Path(config.plot), names, curves)
        console.print(f"\n{config.plot} is written")


def _names(runs: list[Path]) -> list[str]:
    names = [run.resolve().name for run in runs]
    return names if names[0] != names[1] else [str(run) for run in runs]


def _settings(run: Path) -> dict[str, Any]:
    path = run / "config.yaml"
    if not path.is_file():
        raise UserError(f"{run} is not a run folder: it has no config.yaml")
    try:
        content = yaml.safe_load(read_limited(path, _CONFIG_BYTES))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path} is damaged: it is no YAML") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it holds no settings")
    return content


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _curve(run: Path, event: str, key: str) -> Curve:
    lines = read_metrics(run / "metrics.jsonl", event)
    return {line["step"]: line[key] for line in lines if isinstance(line.get(key), int | float)}


def _plot(path: Path, names: list[str], curves: dict[str, list[Curve]]) -> None:
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("a plot needs matplotlib: pip install -e '.[compress]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for place, name in enumerate(names):
        for event, both in curves.items():
            line = both[place]
            style = {"alpha": 0.35} if event == "train" else {"marker": "."}
            axes.plot(list(line), list(line.values()), color=f"C{place}", label=f"{name}, {event}", **style)
    axes.set(xlabel="step", ylabel="loss")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    pyplot.close(figure)
