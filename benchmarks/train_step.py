"""Time of one training step (forward, loss, backward) with DualRouting against dense attention.

    python benchmarks/train_step.py --preset 5m --contexts 1024 4096 8192

Equal parameters, equal tokens per step, interleaved in one run, medians; the ratio is dense / variant, above
1 where the variant is faster. Dense attention is torch's scaled_dot_product_attention(is_causal=True).
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch
import yaml
from measure import medians, prepare, show

from dualroute.model import DualRoutingTransformer, ModelConfig
from dualroute.training.losses import chunked_cross_entropy

VARIANTS = {
    "dense": {"attention": "dense"},
    "dual, full": {"global_mode": "full"},
    "dual, routed": {"global_mode": "routed"},
    "local only": {"attention": "local"},
}


def build(preset: str, vocab_size: int, context: int, **changes: str) -> DualRoutingTransformer:
    """A model of a file of configs/model, with some of its options changed."""
    path = Path(__file__).parents[1] / "configs" / "model" / f"{preset}.yaml"
    values = {**yaml.safe_load(path.read_text()), "vocab_size": vocab_size, "max_context": context, **changes}
    torch.manual_seed(0)
    return DualRoutingTransformer(ModelConfig(**values))


def step(model: DualRoutingTransformer, ids: torch.Tensor, bf16: bool) -> None:
    """Forward, loss and backward of ids (B, n + 1); with `bf16` under autocast, as `bf16-mixed` trains."""
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=bf16):
        hidden = model.hidden_states(ids[:, :-1]).flatten(0, 1)
        loss = partial(chunked_cross_entropy, labels=ids[:, 1:].flatten())
        total = model.head(hidden, loss).total / hidden.shape[0]
    total.backward()
    model.zero_grad(set_to_none=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="5m", help="a file of configs/model")
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of a step")
    parser.add_argument("--vocab_size", type=int, default=8192)
    parser.add_argument("--precisions", nargs="+", default=["32"], choices=("32", "bf16-mixed"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help="folder for the CSV")
    options = parser.parse_args()
    device = prepare(options.threads, options.device)

    rows = []
    for context in options.contexts:
        ids = torch.randint(options.vocab_size, (max(1, options.tokens // context), context + 1)).to(device)
        models = {
            name: build(options.preset, options.vocab_size, context + 1, **changes).to(device)
            for name, changes in VARIANTS.items()
        }
        for precision in options.precisions:
            works = {
                name: partial(step, model, ids, precision == "bf16-mixed") for name, model in models.items()
            }
            times = medians(works, options.repeats, device)
            for name, taken in times.items():
                rows.append(
                    {
                        "context": f"{context:,}",
                        "precision": precision,
                        "attention": name,
                        "tokens/s": f"{ids.shape[0] * context / taken:,.0f}",
                        "ratio to dense": f"{times['dense'] / taken:.2f}",
                    }
                )
    show(f"training step of {options.preset}", rows, options.output, "train_step")


if __name__ == "__main__":
    main()
