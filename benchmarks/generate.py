"""Generation on a CPU, token by token: eager and compiled, in float32, bfloat16 and with quantised weights.

    python benchmarks/generate.py --checkpoint runs/books_5m --threads 1
    python benchmarks/generate.py --dim 1024 --layers 4 --threads 1

Batch 1.  A figure is the median time of a step (embedding to logits; drawing the token is left out) of
variants that take turns, each on a cache that holds `--filled` tokens.  Quantised variants are made from the
same weights.  With random weights the shape can be chosen so that they do not fit into the processor's
caches, as those of real models do not.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import medians, prepare, show

from dualroute.compress.quantize import quantize_model
from dualroute.model import DualRoutingTransformer, ModelConfig
from dualroute.model.checkpoint.format import find_checkpoint, load_model
from dualroute.model.decoding.compiled_decode import CompiledDecoder
from dualroute.model.quantized import Quantization, require_torchao, stored_tensors

#: name → (what is done to the weights, arithmetic, compiled?)
VARIANTS: dict[str, tuple[Quantization | None, torch.dtype, bool]] = {
    "eager fp32": (None, torch.float32, False),
    "eager int8": (Quantization("int8_weight_only"), torch.float32, False),
    "fp32": (None, torch.float32, True),
    "bf16": (None, torch.bfloat16, True),
    "int8": (Quantization("int8_weight_only"), torch.bfloat16, True),
    "int8_dynamic": (Quantization("int8_dynamic"), torch.bfloat16, True),
    "int4": (Quantization("int4_weight_only", 32), torch.bfloat16, True),
}


def eager(model: DualRoutingTransformer, tokens: torch.Tensor, caches: list[Any]) -> torch.Tensor:
    """One step of ordinary decoding: logits (1, V)."""
    return model.head(model.hidden_states(tokens, caches=caches)[:, -1])


def stepper(
    model: DualRoutingTransformer, compiled: bool, filled: int, steps: int
) -> tuple[Callable[[], Any], float]:
    """A call that makes `steps` steps, always at the same lengths, and the seconds its compilation took."""
    caches = model.new_caches(1, filled + steps)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(model.config.vocab_size or 2, (1, filled), generator=generator)
    decode = CompiledDecoder(model) if compiled else partial(eager, model)
    decode(prompt, caches)
    token = prompt[:, :1]

    def run() -> None:
        for _ in range(steps):
            decode(token, caches)
        for cache in caches:  # back to where it was; what was written is overwritten
            for part in (cache.global_cache, cache.local_cache):
                if part is not None:
                    part.length = filled

    begin = time.perf_counter()
    run()
    return run, time.perf_counter() - begin


def source_model(options: argparse.Namespace, ffn_dim: int | None = None) -> DualRoutingTransformer:
    """The float model that variants are made from."""
    if options.checkpoint:
        return load_model(find_checkpoint(options.checkpoint)).float()
    torch.manual_seed(0)
    shape = ModelConfig(
        vocab_size=options.vocab_size,
        dim=options.dim,
        num_layers=options.layers,
        num_heads=options.dim // 64,
        ffn_dim=ffn_dim,
        max_context=4096,
        global_mode="routed",
        top_k=4,
    )
    return DualRoutingTransformer(shape).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", help="float weights; else random ones of --dim and --layers")
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab_size", type=int, default=8192)
    parser.add_argument(
        "--pruned_ffn_dim", type=int, help="with random weights: another fp32 and int8, of this ffn_dim"
    )
    parser.add_argument("--filled", type=int, default=256)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--threads", type=int)
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: on a machine that others use, 1 thread"
    )
    parser.add_argument("--output", type=Path, help="folder for the CSV")
    options = parser.parse_args()
    if options.checkpoint and options.pruned_ffn_dim:
        parser.error("--pruned_ffn_dim is for random weights: prune a checkpoint with `dualroute prune`")
    device = prepare(options.threads, "cpu")
    require_torchao("this benchmark")
    source = source_model(options)
    sources = {name: (source, *VARIANTS[name]) for name in options.variants}
    if options.pruned_ffn_dim:
        pruned = source_model(options, options.pruned_ffn_dim)
        sources |= {f"pruned {name}": (pruned, *VARIANTS[name]) for name in ("fp32", "int8")}
    works, took = {}, {}
    sizes = {}
    with torch.no_grad():
        for name, (original, quantization, dtype, compiled) in sources.items():
            model = copy.deepcopy(original)
            if quantization is not None:
                quantize_model(model, quantization)
            model = model.to(dtype).eval()
            sizes[name] = sum(value.nbytes for value in stored_tensors(model).values())
            works[name], took[name] = stepper(model, compiled, options.filled, options.steps)
            print(f"{name}: ready after {took[name]:.0f} s", flush=True)
        clock = time.process_time if options.clock == "cpu" else time.perf_counter
        times = medians(works, options.repeats, device, clock)
    base = times.get("fp32", next(iter(times.values())))
    rows = [
        {
            "variant": name + (" (compiled)" if sources[name][3] else ""),
            "ms per token": f"{seconds / options.steps * 1e3:.2f}",
            "tokens per second": f"{options.steps / seconds:,.0f}",
            "times compiled fp32": f"{base / seconds:.2f}",
            "MB of weights": f"{sizes[name] / 1e6:.1f}",
            "s to compile": f"{took[name]:.0f}" if sources[name][3] else "",
        }
        for name, seconds in times.items()
    ]
    model = source.config
    title = (
        f"{source.num_parameters() / 1e6:.1f} M parameters, dim {model.dim}, {model.num_layers} layers, "
        f"{options.filled} tokens in the cache, {torch.get_num_threads()} threads, {options.clock} time"
    )
    show(title, rows, options.output, "generate")


if __name__ == "__main__":
    main()
