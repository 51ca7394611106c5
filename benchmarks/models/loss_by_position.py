"""Loss of held-out text by the number of tokens before, in windows of any length that a model may read.

    python benchmarks/models/loss_by_position.py runs/books_1m-0 runs/books_1m_dense-0 --data data/books_2k \\
        --context 4096 --max_tokens 262144
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from dualroute.data.manifest import Manifest
from dualroute.data.plan import SequentialPlan, WalkSequence
from dualroute.data.reader import IGNORE_INDEX, ShardReader, WindowDataset, collate, open_stream
from dualroute.evaluate.load import Loaded, load
from dualroute.evaluate.parts.perplexity import by_position

sys.path.insert(0, str(Path(__file__).parents[1]))  # where measure.py is
from measure import show


@torch.no_grad()
def losses_by_position(loaded: Loaded, data: Path, context: int, tokens: int) -> list[dict[str, float]]:
    """`by_position` of the first `tokens` held-out tokens, in windows of `context`."""
    manifest = Manifest.load(str(data))
    plan = SequentialPlan(open_stream(manifest, "val"), context, tokens)
    windows = WindowDataset(ShardReader(manifest, "val"), plan)
    losses = []
    for batch in DataLoader(windows, batch_sampler=WalkSequence(plan, 0, 1, 1), collate_fn=collate):
        hidden = loaded.model.hidden_states(batch["input_ids"], segment_ids=batch.get("segment_ids"))
        wanted = batch["labels"] != IGNORE_INDEX
        logits = loaded.model.head(hidden[wanted]).float()
        losses.append(F.cross_entropy(logits, batch["labels"][wanted], reduction="none").numpy())
    return by_position(losses, [1] * len(losses))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--max_tokens", type=int, default=262144)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--output", type=Path, help="folder for the CSV")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    rows = []
    for checkpoint in options.checkpoints:
        found = losses_by_position(load(checkpoint, "cpu"), options.data, options.context, options.max_tokens)
        rows.append(
            {
                "checkpoint": checkpoint.name,
                **{f"from {row['from']:,}": f"{row['loss']:.3f}" for row in found},
            }
        )
    show("loss by tokens before", rows, options.output, "loss_by_position")


if __name__ == "__main__":
    main()
