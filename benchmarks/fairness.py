"""Bias of checkpoints, each against the first, with intervals.

    python benchmarks/fairness.py --checkpoints runs/mine runs/pruned runs/int8 --sets crows_pairs winobias

A change is called one only where the paired bootstrap interval leaves 0 out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from measure import show

from dualroute.evaluate.fairness import SETS, compare, measure
from dualroute.evaluate.load import load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoints", type=Path, nargs="+", required=True)
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--folder", type=Path, help="default: $DUALROUTE_DATA/fairness")
    parser.add_argument("--max_items", type=int)
    parser.add_argument("--kinds", action="store_true", help="each category too")
    parser.add_argument("--output", type=Path, help="folder for the CSV")
    options = parser.parse_args()
    rows, first = [], {}
    for path in options.checkpoints:
        loaded = load(path)
        for name in options.sets:
            scores = measure(
                loaded.model, loaded.tokenizer, name, folder=options.folder, max_items=options.max_items
            )
            before = first.setdefault(name, scores)
            changes = {change.name: change for change in compare(before, scores)}
            for score in scores.values():
                if (
                    not options.kinds
                    and "/" in score.name
                    and not score.name.startswith(("bbq/ambig", "winobias/male"))
                ):
                    continue
                row = {
                    "checkpoint": path.name,
                    "score": score.name,
                    "value": f"{score.value:.3f}",
                    "95 %": f"{score.low:.3f} to {score.high:.3f}",
                    "items": f"{score.items:,}",
                    "change": "",
                }
                if scores is not before:
                    change = changes[score.name]
                    within = "" if change.is_difference else ", no difference"
                    row["change"] = (
                        f"{change.difference:+.3f} ({change.low:+.3f} to {change.high:+.3f}){within}"
                    )
                rows.append(row)
    show("bias", rows, options.output, "fairness")


if __name__ == "__main__":
    main()
