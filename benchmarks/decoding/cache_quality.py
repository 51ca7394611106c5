"""What an int8 cache costs in quality: the loss of decoding token by token over it, beside a float cache.

    python benchmarks/decoding/cache_quality.py --checkpoint runs/books_5m --data data/books

Windows of held-out text are read up to `--prefix` at once, then token by token, each time giving the true
token; every loss is that of a prediction over the cache.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from decode import cache_bytes

from dualroute.data.manifest import Manifest
from dualroute.data.plan import SequentialPlan
from dualroute.data.reader import ShardReader, WindowDataset, open_stream
from dualroute.evaluate.load import load
from dualroute.model import DualRoutingTransformer

sys.path.insert(0, str(Path(__file__).parents[1]))  # where measure.py is
from measure import prepare, show


@torch.no_grad()
def decoding_loss(
    model: DualRoutingTransformer, ids: torch.Tensor, prefix: int, *, int8: bool
) -> tuple[float, float]:
    """Mean loss of tokens behind `prefix` of ids (B, n), decoded one by one; bytes of cache per token."""
    batch, length = ids.shape
    caches = model.new_caches(batch, length, int8=int8)
    hidden = model.hidden_states(ids[:, :prefix], caches=caches)[:, -1]
    total = 0.0
    for at in range(prefix, length):
        total += float(F.cross_entropy(model.head(hidden).float(), ids[:, at], reduction="sum"))
        hidden = model.hidden_states(ids[:, at : at + 1], caches=caches)[:, -1]
    size = sum(cache_bytes(cache) for cache in caches)
    return total / (batch * (length - prefix)), size / (batch * length)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--prefix", type=int, default=512)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    prepare(options.threads, "cpu")
    model = load(options.checkpoint, "cpu").model
    manifest = Manifest.load(options.data)
    plan = SequentialPlan(open_stream(manifest, "val"), options.context, None)
    windows = WindowDataset(ShardReader(manifest, "val"), plan)
    ids = torch.stack([torch.as_tensor(windows[number]["input_ids"]) for number in range(options.windows)])
    rows = []
    for name, int8 in (("float32", False), ("int8", True)):
        loss, size = decoding_loss(model, ids, options.prefix, int8=int8)
        rows.append({"cache": name, "loss": f"{loss:.5f}", "bytes per token": f"{size:,.0f}"})
    title = f"{options.windows * (options.context - options.prefix):,} tokens decoded one by one"
    show(title, rows, None, "cache_quality")


if __name__ == "__main__":
    main()
