"""Language-model loss of attention variants with equal parameters, tokens, data order and schedule.

    dualroute prepare --config configs/prepare/books.yaml --corpus /path/to/books.tar.xz
    python benchmarks/models/quality.py --config configs/pretrain/books_5m.yaml --tokens 2000000 --seeds 0 1 2

Each variant is an ordinary `dualroute pretrain` run in OUTPUT/VARIANT-sSEED, so an interrupted benchmark
continues, and each run can be looked at in TensorBoard. `--lengths` then evaluates the trained models on
longer windows than they were trained with (4 means four times as long). The comparison with dense attention
is made seed by seed. "every second layer" and "every third layer" are for models of six layers.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path

from dualroute.evaluate.perplexity import EvaluateConfig, evaluate
from dualroute.training.monitoring.metrics_log import read_metrics

sys.path.insert(0, str(Path(__file__).parents[1]))  # where measure.py is
from measure import show

VARIANTS = {
    "dense": ["--model.attention", "dense"],
    "sliding window": ["--model.attention", "local"],
    "interleaved 5:1": ["--model.attention", "interleaved"],
    "dual, full": ["--model.global_mode", "full"],
    "dual, routed": ["--model.global_mode", "routed"],
    "dense, no positions": ["--model.attention", "dense", "--model.global_rotary_factor", "0"],
    "dual, routed, no positions": ["--model.global_mode", "routed", "--model.global_rotary_factor", "0"],
    "dual, routed, every second layer": ["--model.global_mode", "routed", "--model.global_layers", "[1,3,5]"],
    "dual, routed, every third layer": ["--model.global_mode", "routed", "--model.global_layers", "[2,5]"],
    "dual, routed, a choice for two": ["--model.global_mode", "routed", "--model.share_choice", "2"],
    "dual, routed, a choice for three": ["--model.global_mode", "routed", "--model.share_choice", "3"],
    "dual, routed, clusters": ["--model.global_mode", "routed", "--model.cluster_span", "1024"],
    "dual, routed, moment": ["--model.global_mode", "routed", "--model.router", "moment"],
    "dual, routed, no far": ["--model.global_mode", "routed", "--model.far_summary", "none"],
}


def folder_of(output: Path, variant: str, seed: int) -> Path:
    """Run folder of a variant and seed."""
    words = "".join(character if character.isalnum() else " " for character in variant).split()
    return output / f"{'_'.join(words)}-s{seed}"


def train(options: argparse.Namespace, variant: str, seed: int) -> None:
    """Run, continue or recognise as finished one variant."""
    command = [sys.executable, "-m", "dualroute.cli", "pretrain", "--config", str(options.config)]
    command += ["--output", str(folder_of(options.output, variant, seed)), "--seed", str(seed)]
    command += ["--train.max_tokens", str(options.tokens), "--data.path", str(options.data)]
    context = longest(options)
    command += ["--model.max_context", str(context)] if context else []
    subprocess.run([*command, *VARIANTS[variant], *options.extra], check=True)


def longest(options: argparse.Namespace) -> int | None:
    """Tokens of the longest window that will be evaluated, if it is longer than those of the training."""
    return options.context * max(options.lengths) if options.lengths else None


def last_loss(folder: Path) -> float:
    """Validation loss after the last step, nats per token."""
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if row["event"] == "validation"]
    return float(rows[-1]["val/loss"])


def loss_at(folder: Path, data: Path, context: int, tokens: int) -> float:
    """Loss on the first `tokens` tokens of the validation split, in windows of `context` tokens."""
    cached = folder / f"loss-{context}.json"
    if not cached.exists():
        evaluate_config = EvaluateConfig(
            str(folder), data=str(data), context=context, max_tokens=tokens, batch_size=1
        )
        cached.write_text(json.dumps({"loss": evaluate(evaluate_config).loss}))
    return float(json.loads(cached.read_text())["loss"])


def mean_and_spread(values: list[float]) -> str:
    """Mean and, of several values, their standard deviation."""
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=Path("configs/pretrain/books_5m.yaml"))
    parser.add_argument("--data", type=Path, default=Path("data/books"))
    parser.add_argument("--output", type=Path, default=Path("runs/quality"))
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--context", type=int, default=2048, help="data.context of the configuration")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument(
        "--lengths", type=int, nargs="*", default=[], help="windows, in multiples of the context"
    )
    parser.add_argument("--eval_tokens", type=int, default=131072)
    parser.add_argument(
        "--extra", nargs=argparse.REMAINDER, default=[], help="more options of dualroute pretrain"
    )
    options = parser.parse_args()
    for seed in options.seeds:
        for variant in options.variants:
            train(options, variant, seed)

    losses = {
        v: [last_loss(folder_of(options.output, v, s)) for s in options.seeds] for v in options.variants
    }
    rows = []
    for variant, values in losses.items():
        row = {"attention": variant, "val loss": mean_and_spread(values)}
        row["perplexity"] = f"{math.exp(statistics.mean(values)):.2f}"
        if "dense" in losses:
            differences = [mine / theirs - 1 for mine, theirs in zip(values, losses["dense"], strict=True)]
            spread = f" ± {100 * statistics.stdev(differences):.2f}" if len(differences) > 1 else ""
            row["against dense"] = f"{100 * statistics.mean(differences):+.2f}{spread} %"
        for length in options.lengths:
            context = length * options.context
            at = [
                loss_at(folder_of(options.output, variant, seed), options.data, context, options.eval_tokens)
                for seed in options.seeds
            ]
            row[f"loss at {context:,}"] = mean_and_spread(at)
        rows.append(row)
    show(f"{options.tokens:,} tokens, {len(options.seeds)} seed(s)", rows, options.output, "quality")


if __name__ == "__main__":
    main()
