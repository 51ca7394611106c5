"""Decoding with a long cache: DualRouting in int8 against a dense model of equal shape in llama.cpp.

    pip install llama-cpp-python
    python benchmarks/decoding/llama_cpp_decode.py --lengths 8192 32768 --threads 2

Random weights; vocabulary, width, layers, heads and feed-forward are equal.  The dense model is exported as
`dualroute export --format gguf --quantize true` does (q8_0) and read by llama-cpp-python; ours has int8
weights and is compiled, as `dualroute generate --compile` has it.  Both read a prompt of random tokens, then
take turns with `--steps` steps each, always from the same length; a figure is the median.
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dualroute.compress.quantize import quantize_model
from dualroute.data.tokenizer import Tokenizer
from dualroute.evaluate.load import load
from dualroute.export import gguf_file
from dualroute.model import DualRoutingTransformer, ModelConfig
from dualroute.model.checkpoint.format import save_model
from dualroute.model.quantized import Quantization, require_torchao

sys.path.insert(0, str(Path(__file__).parents[1]))  # where measure.py and generate.py are
from generate import stepper
from measure import medians, prepare, show

#: {name: (type of llama.cpp's cache, whether it reads it by tiles)}; 1 is float16, 8 is q8_0
THEIRS = {
    "float16 cache": (1, False),
    "float16 cache, flash_attn": (1, True),
    "q8_0 cache, flash_attn": (8, True),
}


def tokenizer_of(folder: Path) -> Path:
    """A tokenizer of made-up words, which a GGUF file has to have."""
    from data_prep.train_tokenizer import train_tokenizer

    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnoprstuvw", k=draw.randint(2, 8))) for _ in range(4000)]
    path = folder / "tokenizer.model"
    path.write_bytes(train_tokenizer([" ".join(draw.choices(words, k=40)) for _ in range(2000)], 4096))
    return path


def shape(options: argparse.Namespace, vocab_size: int, **more: Any) -> ModelConfig:
    """Of either model."""
    return ModelConfig(
        vocab_size=vocab_size,
        dim=options.dim,
        num_layers=options.layers,
        num_heads=options.dim // 64,
        max_context=max(options.lengths) + options.steps,
        **more,
    )


def their_step(
    path: Path, cache: tuple[int, bool], filled: int, options: argparse.Namespace
) -> tuple[Callable[[], Any], float]:
    """As `stepper`, of llama.cpp."""
    import llama_cpp

    kind, flash = cache
    model = llama_cpp.Llama(
        str(path), n_ctx=filled + options.steps, n_batch=512, n_threads=options.threads,
        n_threads_batch=options.threads, n_gpu_layers=0, flash_attn=flash, type_k=kind, type_v=kind,
        verbose=False,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(8, model.n_vocab(), (filled,), generator=generator).tolist()
    begin = time.perf_counter()
    model.eval(prompt)
    took = time.perf_counter() - begin

    def run() -> None:
        for _ in range(options.steps):
            model.eval(prompt[:1])
        model.n_tokens = filled  # what lies behind is thrown away by the next call

    run()
    return run, took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--top_k", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--theirs", nargs="+", choices=THEIRS, default=list(THEIRS))
    parser.add_argument("--output", type=Path, help="folder for the CSV")
    options = parser.parse_args()
    device = prepare(options.threads, "cpu")
    require_torchao("this benchmark")
    rows = []
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        folder = Path(name)
        tokenizer = Tokenizer(tokenizer_of(folder))
        torch.manual_seed(0)
        dense = DualRoutingTransformer(shape(options, tokenizer.vocab_size, attention="dense"))
        checkpoint = save_model(dense, folder / "dense", tokenizer.path, {})
        path = folder / "model.gguf"
        gguf_file.write(load(checkpoint.folder, "cpu"), path, "q8_0", "dense")
        routes = {"window": options.window, "block": options.block, "top_k": options.top_k}
        config = shape(options, tokenizer.vocab_size, global_mode="routed", **routes)
        ours = DualRoutingTransformer(config).eval()
        sizes = f"{dense.num_parameters() / 1e6:.1f} and {ours.num_parameters() / 1e6:.1f} M parameters"
        quantize_model(ours, Quantization("int8_weight_only"))
        ours = ours.to(torch.bfloat16).eval()
        for filled in options.lengths:
            works = {"DualRouting, int8": stepper(copy.deepcopy(ours), True, filled, options.steps)}
            for called in options.theirs:
                works[called] = their_step(path, THEIRS[called], filled, options)
                print(f"{filled:,} tokens, {called}: read in {works[called][1]:.0f} s", flush=True)
            times = medians({key: run for key, (run, _) in works.items()}, options.repeats, device)
            own = times["DualRouting, int8"]
            rows += [
                {
                    "tokens in the cache": f"{filled:,}",
                    "model": key if key.startswith("Dual") else f"dense, llama.cpp q8_0, {key}",
                    "ms per token": f"{seconds / options.steps * 1e3:.2f}",
                    "tokens per second": f"{options.steps / seconds:,.0f}",
                    "DualRouting is faster by": f"{seconds / own:.1f}",
                }
                for key, seconds in times.items()
            ]
    title = f"dim {options.dim}, {options.layers} layers, {sizes}, {options.threads} threads"
    show(title, rows, options.output, "llama_cpp_decode")


if __name__ == "__main__":
    main()
