"""What it costs, and what it saves, when neighbouring layers read the blocks that one of them has chosen.

    python benchmarks/models/shared_choice.py --checkpoint runs/books_5m --data data/books --context 2048 \\
        --lengths 8192 32768 131072

`model.share_choice` of a trained model is set to each of `--layers`. Nothing is trained for it: what is seen
is whether the layers of a model agree. Behind the loss stand the microseconds of this process for a token of
one pass over a text of random tokens, and for one step of decoding behind it, medians of turns.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path

import torch

from dualroute.evaluate.load import load
from dualroute.evaluate.perplexity import evaluate_shards
from dualroute.model import DualRoutingTransformer

sys.path.insert(0, str(Path(__file__).parents[1]))  # where measure.py is
from measure import medians, prepare, show

STEPS = 16  # of decoding, timed as one


def sharing(model: DualRoutingTransformer, layers: int) -> DualRoutingTransformer:
    """The same weights, with so many layers to a choice."""
    changed = DualRoutingTransformer(dataclasses.replace(model.config, share_choice=layers))
    changed.load_state_dict(model.state_dict())
    return changed.eval()


@torch.no_grad()
def speed(
    models: dict[int, DualRoutingTransformer], length: int, repeats: int
) -> dict[int, tuple[float, float]]:
    """For each number of layers: microseconds a token of one pass, and of a step behind it."""
    device = torch.device("cpu")
    ids = torch.randint(models[1].config.vocab_size or 0, (1, length))
    passes = medians(
        {str(n): lambda model=model: model.hidden_states(ids) for n, model in models.items()},
        repeats, device, time.process_time,
    )  # fmt: skip
    caches = {n: model.new_caches(1, length + STEPS * (repeats + 1)) for n, model in models.items()}
    for n, model in models.items():
        model.hidden_states(ids, caches=caches[n])

    def step(n: int) -> None:
        for _ in range(STEPS):
            models[n].hidden_states(ids[:, :1], caches=caches[n])

    steps = medians({str(n): lambda n=n: step(n) for n in models}, repeats, device, time.process_time)
    return {n: (1e6 * passes[str(n)] / length, 1e6 * steps[str(n)] / STEPS) for n in models}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="of a model with global_mode routed")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--max_tokens", type=int, default=131072)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 3], help="that share a choice")
    parser.add_argument("--lengths", type=int, nargs="*", default=[], help="of the texts that are timed")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="folder for the CSV")
    options = parser.parse_args()
    prepare(options.threads, "cpu")
    loaded = load(options.checkpoint, "cpu")
    config = loaded.model.config
    if config.global_mode != "routed" or config.attention != "dual" or config.cluster_span:
        raise SystemExit(f"{options.checkpoint} has no routed layers with blocks as they stand in the text")
    models = {n: sharing(loaded.model, n) for n in (1, *options.layers)}
    rows: dict[int, dict[str, str]] = {}
    losses = {}
    for n, model in models.items():
        changed = dataclasses.replace(loaded, model=model)
        losses[n] = evaluate_shards(changed, options.data, "val", options.context, 4, options.max_tokens).loss
        above = f"{100 * (losses[n] / losses[1] - 1):+.2f} %"
        rows[n] = {"layers to a choice": str(n), "loss": f"{losses[n]:.4f}", "above": above}
    for length in options.lengths:
        for n, (of_pass, of_step) in speed(models, length, options.repeats).items():
            rows[n][f"us/token, {length:,}"] = f"{of_pass:.1f}"
            rows[n][f"us/step, {length:,}"] = f"{of_step:.0f}"
    show(f"{options.checkpoint}", rows.values(), options.output, "shared_choice")


if __name__ == "__main__":
    main()
