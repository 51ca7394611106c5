"""What it would cost if neighbouring layers read the blocks that one of them has chosen.

    python benchmarks/models/shared_choice.py --checkpoint runs/books_5m --data data/books --context 2048

Of every `--layers` routed layers the first chooses, and the others read the same blocks, head by head, with
their own queries, keys and values. Nothing is trained for it: what is seen is whether the layers of a model
agree. Beside the loss stands the share of a layer's own choice that is among the blocks of the first.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from dualroute.attention import routes
from dualroute.evaluate.load import load
from dualroute.evaluate.perplexity import evaluate_shards

sys.path.insert(0, str(Path(__file__).parents[1]))  # where measure.py is
from measure import show


@contextmanager
def one_choice_for(layers: int, of: int) -> Iterator[list[float]]:
    """Every first of `layers` routed layers, of the `of` that a forward pass has, chooses for the others.

    Yields:
        Shares of their own choice that the others find in it, one for each pass and layer.
    """
    choose, calls, agreed = routes.select_blocks, 0, []
    chosen: Tensor | None = None

    def select_blocks(*args: Any, **options: Any) -> Tensor:
        nonlocal calls, chosen
        number, calls = calls % of % layers, calls + 1
        own = choose(*args, **options)
        if number == 0:
            chosen = own
            return own
        assert chosen is not None
        assert chosen.shape == own.shape, "the layers have different numbers of heads or top_k"
        there = own[..., 1:] >= 0
        same = (own[..., 1:, None] == chosen[..., None, 1:]).any(-1) & there
        agreed.append(float(same.sum() / there.sum().clamp_min(1)))
        return chosen

    with mock.patch.object(routes, "select_blocks", select_blocks):
        yield agreed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="of a model with global_mode routed")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--max_tokens", type=int, default=131072)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 3], help="that share a choice")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--output", type=Path, help="folder for the CSV")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    loaded = load(options.checkpoint, "cpu")
    attentions: list[Any] = [layer.attention for layer in loaded.model.layers]
    routed = sum(bool(attention.global_heads) for attention in attentions)
    if loaded.model.config.global_mode != "routed" or loaded.model.config.cluster_span:
        raise SystemExit(f"{options.checkpoint} has no routed layers with blocks as they stand in the text")
    rows, base = [], 0.0
    for layers in [1, *options.layers]:
        with one_choice_for(layers, routed) as agreed:
            score = evaluate_shards(loaded, options.data, "val", options.context, 4, options.max_tokens)
        base = base or score.loss
        rows.append(
            {
                "layers to a choice": str(layers),
                "loss": f"{score.loss:.4f}",
                "above": f"{100 * (score.loss / base - 1):+.2f} %",
                "agree": f"{sum(agreed) / len(agreed):.0%}" if agreed else "–",
            }
        )
    show(f"{options.checkpoint}, {routed} routed layers", rows, options.output, "shared_choice")


if __name__ == "__main__":
    main()
