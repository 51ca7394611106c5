"""Validation loss of several runs over tokens, as one picture.

python benchmarks/models/plot_losses.py runs/books_5m runs/books_5m_dense --output docs/images/results.svg
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

from dualroute.training.monitoring.metrics_log import read_metrics


def curve(run: Path) -> tuple[list[float], list[float]]:
    """Millions of tokens and validation losses of a run, the one before the first step left out."""
    tokens: dict[int, float] = {}
    losses: dict[int, float] = {}
    for row in read_metrics(run / "metrics.jsonl"):
        if row["event"] == "train":
            tokens[row["step"]] = row["train/tokens"] / 1e6
        elif row["event"] == "validation" and row["step"]:
            losses[row["step"]] = row["val/loss"]
    steps = sorted(losses.keys() & tokens.keys())
    return [tokens[step] for step in steps], [losses[step] for step in steps]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--labels", nargs="+", help="one a run; its folder's name by default")
    parser.add_argument("--output", type=Path, required=True, help=".svg or .png")
    options = parser.parse_args()
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "dualroute"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for run, label in zip(options.runs, options.labels or [run.name for run in options.runs], strict=True):
        axes.plot(*curve(run), marker="o", markersize=3, label=label)
    axes.set(xlabel="million tokens", ylabel="validation loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(options.output, metadata={"Date": None} if options.output.suffix == ".svg" else None)


if __name__ == "__main__":
    main()
