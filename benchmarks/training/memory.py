"""Peak memory of trainings on a CPU: predicted by `dualroute estimate`, and measured by the run itself.

    python benchmarks/training/memory.py --data data/stdlib [--only "5m" ...] [--output DIR]

Every row is a process of its own that trains two steps; after the second one it has compared its peak
with what was predicted of it (the event `memory` of its `metrics.jsonl`). What libraries and data took
before there was a model is measured, and stands in a column; the last column leaves it out on both sides.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # where measure.py is
from measure import show

import dualroute.training.run  # before the copies
from dualroute.cli import main as dualroute
from dualroute.training.monitoring.metrics_log import read_metrics

ROOT = Path(__file__).resolve().parents[2]
#: name → (preset, context, micro_batch, further words)
RUNS = {
    "5m": ("5m", 1024, 4, ""),
    "5m, 8 texts": ("5m", 1024, 8, ""),
    "5m, routed, long": ("5m", 4096, 1, ""),
    "5m, full": ("5m", 1024, 8, "--train.activation_checkpointing full"),
    "5m, full, every second layer": (
        *("5m", 1024, 4),
        "--train.activation_checkpointing full --train.recompute_every_layers 2",
    ),
    "5m, feed_forward": ("5m", 1024, 4, "--train.activation_checkpointing feed_forward"),
    "5m, bf16-mixed": ("5m", 1024, 4, "--train.precision bf16-mixed"),
    "5m, bf16-true": ("5m", 1024, 4, "--train.precision bf16-true"),
    "5m, dense": ("5m", 1024, 4, "--model.attention dense"),
    "5m, gate and qk_norm": ("5m", 1024, 4, "--model.gate true --model.qk_norm true"),
    "5m, LoRA": ("5m", 1024, 4, "--finetune.adapter lora"),
    "5m, lower half frozen": ("5m", 1024, 4, "--finetune.freeze [embedding,'layers.[0-2]']"),
    "5m, accumulation 2": ("5m", 1024, 4, "--train.tokens_per_batch 8192"),
    "wide, few tokens": ("5m", 256, 4, "--model.dim 768 --model.num_layers 8 --model.num_heads 12"),
}


def run(name: str, data: Path, folder: Path) -> dict[str, float]:
    """Train two steps; the event `memory`."""
    preset, context, micro_batch, further = RUNS[name]
    output = folder / name.replace(" ", "-").replace(",", "")
    more = further.split()
    if "--finetune.adapter" in more:  # changes a trained model
        if not (folder / "5m").exists():
            run("5m", data, folder)
        more += ["--init_from", str(folder / "5m")]
    if "--train.tokens_per_batch" not in more:
        more += ["--train.tokens_per_batch", str(context * micro_batch)]
    words = [
        *("pretrain", "--model", str(ROOT / f"configs/model/{preset}.yaml"), "--output", str(output)),
        *("--data.path", str(data), "--data.context", str(context), "--data.val_tokens", str(context)),
        *("--train.micro_batch", str(micro_batch), "--train.max_steps", "2", "--optim.warmup_steps", "1"),
        *("--monitor.sample_every_steps", "0", "--monitor.peak_tflops", "1", *more),
    ]
    child = os.fork()  # a copy of a process that has imported everything, and computed nothing
    if not child:
        os._exit(dualroute(words))
    if os.waitpid(child, 0)[1]:
        raise SystemExit(f"{name} failed")
    (line,) = read_metrics(output / "metrics.jsonl", "memory")
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="a folder of shards")
    parser.add_argument("--only", nargs="*", default=list(RUNS), choices=list(RUNS), metavar="NAME")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    rows, errors = [], []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.only:
            found = run(name, arguments.data.resolve(), Path(folder))
            predicted, measured, before = (
                found[f"{tag}_gib"] * 1024
                for tag in ("predicted/peak", "measured/peak", "predicted/libraries")
            )
            errors.append(abs(predicted / measured - 1))
            rows.append(
                {
                    "run": name,
                    "libraries, MiB": f"{before:,.0f}",
                    "predicted peak": f"{predicted:,.0f}",
                    "measured peak": f"{measured:,.0f}",
                    "error": f"{predicted / measured - 1:+.1%}",
                    "error without libraries": f"{(predicted - before) / (measured - before) - 1:+.1%}",
                }
            )
            print(
                {**rows[-1], **{k: round(v * 1024) for k, v in found.items() if k.endswith("_gib")}},
                flush=True,
            )
    show("peak memory of a training, MiB", rows, arguments.output, "memory")
    print(f"largest error {max(errors):.1%}, median {statistics.median(errors):.1%}")


if __name__ == "__main__":
    main()
