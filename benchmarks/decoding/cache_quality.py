"""What a quantised cache costs in quality: the loss of decoding over it, beside a float cache, and its bytes.

    python benchmarks/decoding/cache_quality.py --checkpoint runs/books_5m --data data/books

Windows of held-out text are read up to `--prefix` at once, then token by token (`--chunk` at once, which
reads the cache alike), each time giving the true token; every loss is that of a prediction over the cache.
`share` is the whole cache over that of a dense model with as many heads, in the same arithmetic and in
bfloat16.
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
    model: DualRoutingTransformer, ids: torch.Tensor, prefix: int, chunk: int, cache_dtype: str
) -> tuple[torch.Tensor, float]:
    """Losses (B, n - prefix) of tokens behind `prefix` of ids (B, n); bytes of cache per token."""
    batch, length = ids.shape
    caches = model.new_caches(batch, length, cache_dtype=cache_dtype)
    hidden = model.hidden_states(ids[:, :prefix], caches=caches)[:, -1:]
    losses = []
    for at in range(prefix, length, chunk):
        fed = ids[:, at : at + chunk]
        if at + chunk < length or chunk > 1:
            later = model.hidden_states(fed, caches=caches)
            hidden = torch.cat([hidden, later], 1)
        logits = model.head(hidden[:, : fed.shape[1]]).float()
        losses.append(F.cross_entropy(logits.transpose(1, 2), fed, reduction="none"))
        hidden = hidden[:, -1:]
    size = sum(cache_bytes(cache) for cache in caches)
    return torch.cat(losses, 1).double(), size / (batch * length)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--prefix", type=int, default=512)
    parser.add_argument("--chunk", type=int, default=1)
    parser.add_argument("--caches", nargs="+", default=["auto", "int8", "int4"])
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    prepare(options.threads, "cpu")
    model = load(options.checkpoint, "cpu").model
    manifest = Manifest.load(options.data)
    plan = SequentialPlan(open_stream(manifest, "val"), options.context, None)
    windows = WindowDataset(ShardReader(manifest, "val"), plan)
    ids = torch.stack([torch.as_tensor(windows[number]["input_ids"]) for number in range(options.windows)])
    config = model.config
    dense = 2 * config.num_layers * (config.num_kv_heads or config.num_heads) * (config.head_dim or 0)
    rows, exact = [], None
    for name in options.caches:
        losses, size = decoding_loss(model, ids, options.prefix, options.chunk, name)
        exact = losses if exact is None else exact
        rows.append(
            {
                "cache": name,
                "loss": f"{losses.mean():.5f}",
                f"against {options.caches[0]}": f"{100 * (losses.mean() / exact.mean() - 1):+.4f} %",
                "bytes per token": f"{size:,.0f}",
                "share": f"{size / (dense * model.norm.weight.itemsize):.3f}",
                "share of bfloat16": f"{size / (2 * dense):.3f}",
            }
        )
    title = f"{ids[:, options.prefix :].numel():,} tokens behind {options.prefix:,} of the cache"
    show(title, rows, None, "cache_quality")


if __name__ == "__main__":
    main()
