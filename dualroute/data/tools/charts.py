"""The figures of ``dualroute data stats`` as PNG: lengths, sources, bytes per token."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dualroute.errors import UserError, printable
from dualroute.files import atomic_path


def draw_charts(folder: Path, splits: Mapping[str, Any], most: int) -> list[str]:
    """Draw lengths.png, and sources.png and languages.png where something is noted of them.

    Args:
        folder: exists.
        splits: name → `dualroute.data.tools.stats.SplitStats`.
        most: groups that are drawn.

    Returns:
        Names of the files.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("figures need matplotlib: pip install -e '.[compress]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = []

    def save(figure: Any, name: str) -> None:
        figure.tight_layout()
        with atomic_path(folder / name) as temporary:
            figure.savefig(temporary, format="png", dpi=110)
        pyplot.close(figure)
        names.append(name)

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    for split, stats in splits.items():
        axes.stairs(
            [count / stats.documents for count in stats.lengths],
            stats.edges,
            label=split,
            fill=True,
            alpha=0.5,
        )
    axes.set(xscale="log", xlabel="tokens of a document", ylabel="share of the documents")
    axes.legend()
    axes.grid(alpha=0.3)
    save(figure, "lengths.png")
    for kind in ("sources", "languages"):
        for split, stats in splits.items():
            groups = getattr(stats, kind)
            if not groups:
                continue
            ordered = sorted(groups.items(), key=lambda item: (-item[1].tokens, item[0]))[:most][::-1]
            labels = [printable(name)[:40].replace("$", r"\$") for name, _ in ordered]
            places = range(len(ordered))
            figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 1.5 + 0.3 * len(ordered)), sharey=True)
            left.barh(places, [group.tokens for _, group in ordered])
            left.set(yticks=places, yticklabels=labels, xlabel="tokens", title=f"{split}, by {kind[:-1]}")
            right.barh(places, [group.bytes_per_token for _, group in ordered], color="C1")
            right.set(xlabel="bytes per token")
            for axes in (left, right):
                axes.grid(alpha=0.3, axis="x")
            save(figure, f"{kind}-{split}.png")
    return names
