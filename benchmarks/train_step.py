"""Time of one training step (forward, loss, backward) with DualRouting against dense attention.

    python benchmarks/train_step.py --preset 5m --contexts 1024 4096 8192
    python benchmarks/train_step.py --preset 5m --contexts 4096 --variants "dual, routed" \
        --activations none full full/2 feed_forward

Equal parameters, equal tokens per step, interleaved in one run, medians; the ratio is dense / variant, above
1 where the variant is faster. Dense attention is torch's scaled_dot_product_attention(is_causal=True), even
where the project has kernels that are faster.
`--activations` adds activation checkpointing (full/2: every second layer) and the peak memory of a step;
`--compile` adds each case with compiled layers (`train.compile`), whose first step, which compiles, is not
timed.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import yaml
from measure import medians, peak_mebibytes, prepare, show

from dualroute.attention.backend import plain_torch
from dualroute.model import DualRoutingTransformer, ModelConfig
from dualroute.training.step.activations import keep_fewer_activations
from dualroute.training.step.compilation import compile_layers
from dualroute.training.step.losses import chunked_cross_entropy

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
    kernels = plain_torch() if model.config.attention == "dense" else contextlib.nullcontext()
    with kernels, torch.autocast(ids.device.type, torch.bfloat16, enabled=bf16):
        hidden = model.hidden_states(ids[:, :-1]).flatten(0, 1)
        loss = partial(chunked_cross_entropy, labels=ids[:, 1:].flatten())
        total = model.head(hidden, loss).total / hidden.shape[0]
    total.backward()
    model.zero_grad(set_to_none=True)


def prepared_step(
    options: argparse.Namespace, context: int, variant: str, activations: str, layers: str, bf16: bool
) -> Callable[[], None]:
    """The step of a new model on random tokens; `layers` are "eager" or "compiled"."""
    model = build(options.preset, options.vocab_size, context + 1, **VARIANTS[variant]).to(options.device)
    if layers == "compiled":
        compile_layers(model)
    what, _, every = activations.partition("/")
    keep_fewer_activations(model, what, every=int(every or 1))
    ids = torch.randint(options.vocab_size, (max(1, options.tokens // context), context + 1))
    return partial(step, model, ids.to(options.device), bf16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="5m", help="a file of configs/model")
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of a step")
    parser.add_argument("--vocab_size", type=int, default=8192)
    parser.add_argument("--precisions", nargs="+", default=["32"], choices=("32", "bf16-mixed"))
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--activations", nargs="+", default=["none"], help="none, full, full/K, feed_forward")
    parser.add_argument("--compile", action="store_true", help="compiled layers beside eager ones")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: on a machine that others use, 1 thread"
    )
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help="folder for the CSV")
    options = parser.parse_args()
    device = prepare(options.threads, options.device)

    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    rows = []
    for context, precision in itertools.product(options.contexts, options.precisions):
        compiled = ["eager", "compiled"] if options.compile else ["eager"]
        cases = list(itertools.product(options.variants, options.activations, compiled))
        arguments = {case: (options, context, *case, precision == "bf16-mixed") for case in cases}
        works = {" ".join(case): prepared_step(*given) for case, given in arguments.items()}
        times = dict(zip(cases, medians(works, options.repeats, device, clock).values(), strict=True))
        tokens = max(1, options.tokens // context) * context
        for variant, activations, layers in cases:
            taken = times[variant, activations, layers]
            row = {"context": f"{context:,}", "precision": precision, "attention": variant}
            row["tokens/s"] = f"{tokens / taken:,.0f}"
            if "dense" in options.variants:
                row["ratio to dense"] = f"{times['dense', activations, layers] / taken:.2f}"
            if options.compile:
                row["layers"] = layers
                row["faster than eager"] = f"{times[variant, activations, 'eager'] / taken:.2f}"
            if len(options.activations) > 1:
                row["activations"] = activations
                row["time"] = f"{taken / times[variant, options.activations[0], layers]:.2f}"
                peak = peak_mebibytes(prepared_step, *arguments[variant, activations, layers], device=device)
                row["peak MiB"] = f"{peak:.0f}"
            rows.append(row)
    show(f"training step of {options.preset}", rows, options.output, "train_step")


if __name__ == "__main__":
    main()
