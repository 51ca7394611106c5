"""What a model costs to run: bytes on the disk, memory, tokens per second, and what it writes.

Run by the pipeline for each model, in a process of its own so that the peak of its memory is that model's
alone: ``python -m dualroute.pipeline.speed --checkpoint C --output F.json``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from dualroute.evaluate.load import Loaded, load
from dualroute.files import write_bytes_atomically
from dualroute.model import SamplingConfig, generate
from dualroute.model.checkpoint.format import WEIGHTS
from dualroute.model.decoding.compiled_decode import CompiledDecoder

REPEATS = 3


def measure_speed(options: argparse.Namespace) -> dict[str, Any]:
    """Figures of one checkpoint; lengths in tokens, sizes in bytes; memory above that of the libraries."""
    before = _memory("VmRSS")
    loaded = load(options.checkpoint)
    model = loaded.model
    figures: dict[str, Any] = {
        "weights_bytes": (loaded.checkpoint.folder / WEIGHTS).stat().st_size,
        "parameters": model.num_parameters(),
        "threads": torch.get_num_threads(),
        "device": str(loaded.device),
        "decode_tokens": options.tokens,
    }
    figures["samples"] = {prompt: sample(loaded, prompt, options.sample_tokens) for prompt in options.prompt}
    prompt = loaded.tokenizer.encode(options.prompt[0], bos=True)
    limit = model.config.max_context - len(prompt)
    sampling = SamplingConfig(max_new_tokens=min(options.tokens, limit), temperature=0)
    figures["eager_tokens_per_second"] = tokens_per_second(lambda: generate(model, prompt, sampling))
    after = _memory("VmHWM")
    figures["peak_memory_bytes"] = None if before is None or after is None else after - before
    if options.compile:
        decoder = CompiledDecoder(load(options.checkpoint, compiled=True).model)
        figures["compiled_tokens_per_second"] = tokens_per_second(
            lambda: generate(decoder.model, prompt, sampling, decoder=decoder)
        )
    return figures


def _memory(field: str) -> int | None:
    """VmRSS, what this process holds now, or VmHWM, its peak since VmRSS was asked for; null but on Linux."""
    try:
        if field == "VmRSS":
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def sample(loaded: Loaded, prompt: str, tokens: int) -> str:
    """A continuation, the same seed for every model."""
    ids = loaded.tokenizer.encode(prompt, bos=True)
    new = generate(loaded.model, ids, SamplingConfig(max_new_tokens=tokens), loaded.tokenizer.eos_ids)
    return loaded.tokenizer.decode(ids + [token for token in new if token not in loaded.tokenizer.eos_ids])


def tokens_per_second(decode: Callable[[], Iterable[int]]) -> float:
    """Median over repeats, after one to warm up; the prompt's pass is not counted."""
    rates = []
    for repeat in range(REPEATS + 1):
        times = [time.perf_counter() for _ in decode()]
        if repeat and len(times) > 1:
            rates.append((len(times) - 1) / (times[-1] - times[0]))
    return sorted(rates)[len(rates) // 2] if rates else float("nan")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--sample_tokens", type=int, default=60)
    parser.add_argument("--compile", type=int, default=1)
    parser.add_argument("--prompt", action="append", default=[])
    options = parser.parse_args()
    options.prompt = options.prompt or ["The"]
    figures = measure_speed(options)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_bytes_atomically(options.output, json.dumps(figures, indent=1).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
