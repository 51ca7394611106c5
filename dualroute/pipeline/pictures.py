"""Pictures of a pipeline's report, as SVG text; the empty string where matplotlib is not installed."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from dualroute.evaluate.suite.cells import Score


@contextmanager
def _drawing(buffer: io.StringIO, width: float, height: float) -> Iterator[Any]:
    """Axes; what was drawn on them is SVG in ``buffer`` afterwards.  Equal figures give equal bytes.

    Raises:
        ImportError: Without matplotlib.
    """
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    with pyplot.rc_context({"svg.hashsalt": "dualroute", "font.size": 9}):
        figure, axes = pyplot.subplots(figsize=(width, height))
        try:
            yield axes
            figure.tight_layout()
            figure.savefig(buffer, format="svg", metadata={"Date": None})
        finally:
            pyplot.close(figure)


def draw_curves(series: Mapping[str, list[tuple[float, float]]], x_label: str, y_label: str) -> str:
    """Lines, or a labelled point where a series is one point."""
    buffer = io.StringIO()
    try:
        with _drawing(buffer, 6.4, 3.6) as axes:
            for label, points in series.items():
                xs, ys = zip(*points, strict=True)
                if len(points) == 1:
                    axes.plot(xs, ys, "o")
                    axes.annotate(label, (xs[0], ys[0]), xytext=(5, 5), textcoords="offset points")
                else:
                    axes.plot(xs, ys, label=label)
            if any(len(points) > 1 for points in series.values()):
                axes.legend()
            axes.set_xlabel(x_label)
            axes.set_ylabel(y_label)
            axes.margins(0.15)
            axes.grid(alpha=0.3)
    except ImportError:
        return ""
    return buffer.getvalue()


def draw_intervals(scores: Mapping[str, Mapping[str, Score]]) -> str:
    """A line of points with their intervals for each score, a point for each model.

    Args:
        scores: ``{score: {model: it}}``; each has an interval.
    """
    buffer = io.StringIO()
    models = list(dict.fromkeys(model for of in scores.values() for model in of))
    names = list(scores)
    try:
        with _drawing(buffer, 6.4, 0.8 + len(names) * (0.25 + 0.12 * len(models))) as axes:
            for place, model in enumerate(models):
                lines = [number for number, name in enumerate(names) if model in scores[name]]
                found = [scores[names[number]][model] for number in lines]
                bounds = [one.interval or (one.value, one.value) for one in found]
                axes.errorbar(
                    [one.value for one in found],
                    [number + 0.7 * ((place + 0.5) / len(models) - 0.5) for number in lines],
                    xerr=[
                        [max(0.0, one.value - low) for one, (low, _) in zip(found, bounds, strict=True)],
                        [max(0.0, high - one.value) for one, (_, high) in zip(found, bounds, strict=True)],
                    ],
                    fmt="o",
                    markersize=4,
                    capsize=2,
                    label=model,
                )
            axes.set_yticks(range(len(names)), names)
            axes.invert_yaxis()
            axes.grid(axis="x", alpha=0.3)
            axes.legend(fontsize=8)
    except ImportError:
        return ""
    return buffer.getvalue()
