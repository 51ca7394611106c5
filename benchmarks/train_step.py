"""Time of one training step (forward, loss, backward) with DualRouting against dense attention.

    python benchmarks/train_step.py --preset 5m --contexts 1024 4096 8192

Equal parameters, equal tokens per step, interleaved in one run, medians; the ratio is dense / variant, above
1 where the variant is faster.  Dense attention is torch's scaled_dot_product_attention(is_causal=True).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import yaml
from rich.console import Console
from rich.table import Table

from dualroute.model import DualRoutingTransformer, ModelConfig
from dualroute.training.losses import chunked_cross_entropy

VARIANTS = {
    "dense": {"attention": "dense"},
    "dual, full": {"global_mode": "full"},
    "dual, routed": {"global_mode": "routed"},
    "local only": {"attention": "local"},
}


def build(preset: str, vocab_size: int, context: int, **changes: str) -> DualRoutingTransformer:
    path = Path(__file__).parents[1] / "configs" / "model" / f"{preset}.yaml"
    values = {**yaml.safe_load(path.read_text()), "vocab_size": vocab_size, "max_context": context, **changes}
    torch.manual_seed(0)
    return DualRoutingTransformer(ModelConfig(**values))


def step(model: DualRoutingTransformer, ids: torch.Tensor) -> None:
    hidden = model.hidden_states(ids[:, :-1]).flatten(0, 1)
    loss = partial(chunked_cross_entropy, labels=ids[:, 1:].flatten())
    (model.head(hidden, loss).total / hidden.shape[0]).backward()
    model.zero_grad(set_to_none=True)


def seconds(work: Callable[[], None]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="5m", help="a file of configs/model")
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of a step")
    parser.add_argument("--vocab_size", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    table = Table("context", "attention", "tokens/s", "ratio to dense", title=f"{options.preset}, float32")
    for context in options.contexts:
        ids = torch.randint(options.vocab_size, (max(1, options.tokens // context), context + 1))
        models = {
            name: build(options.preset, options.vocab_size, context + 1, **changes)
            for name, changes in VARIANTS.items()
        }
        times: dict[str, list[float]] = {name: [] for name in models}
        for repeat in range(options.repeats + 1):  # the first round warms up
            for name, model in models.items():
                taken = seconds(partial(step, model, ids))
                if repeat:
                    times[name].append(taken)
        median = {name: statistics.median(taken) for name, taken in times.items()}
        tokens = ids.shape[0] * context
        for name, taken in median.items():
            table.add_row(f"{context:,}", name, f"{tokens / taken:,.0f}", f"{median['dense'] / taken:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
