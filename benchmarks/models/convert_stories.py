"""What converting a pretrained dense model to DualRouting costs, and what healing brings back.

    python benchmarks/models/convert_stories.py --model stories260K.bin --tokenizer tok512.bin --seeds 0 1 2

The model (llama2.c, 260,032 parameters, context 512) writes its own corpus; no other text is used. Losses are
on held-out texts of the same kind, so the original's loss is the least possible: what is above it is the
divergence from it. Each variant is an ordinary `dualroute convert` and `dualroute distill` in
OUTPUT/VARIANT-sSEED, so an interrupted benchmark continues. Gaps are relative to the original's loss.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import sys
from pathlib import Path

from sampled_corpus import sample_corpus

from dualroute.cli import main as main_of_dualroute
from dualroute.evaluate.perplexity import EvaluateConfig, evaluate
from dualroute.model.checkpoint.format import find_checkpoint, load_model
from dualroute.model.cost.flops import keys_read as keys_of

sys.path.insert(0, str(Path(__file__).parents[1]))  # where measure.py is
from measure import show

#: variant → options of convert, options of distill
VARIANTS = {
    "divide by distance": (["--choose", "distance"], []),
    "divide at random": (["--choose", "random"], []),
    "both": (["--heads", "both"], []),
    "by distance, healed without a teacher": (
        ["--choose", "distance"],
        ["--distill.kl_weight", "0", "--distill.ce_weight", "1"],
    ),
}
DISTILL = ["--distill.kl_weight", "1", "--distill.ce_weight", "0"]


def command(stage: str, *options: object) -> None:
    """Run one stage of dualroute, in this process: importing it all anew would cost more than a healing."""
    with contextlib.redirect_stdout(io.StringIO()):
        status = main_of_dualroute([stage, *map(str, options)])
    if status:
        raise SystemExit(status)


def convert(options: argparse.Namespace, source: Path, variant: str, seed: int) -> Path:
    """The converted checkpoint of a variant."""
    output = folder_of(options, variant, seed) / "converted"
    if not output.exists():
        routing = ["--window", options.window, "--block", options.block, "--top_k", options.top_k]
        routing += ["--sub_block", min(16, options.block), "--global_mode", options.global_mode]
        routing += ["--far_summary", options.far_summary]
        texts = ["--calibration_tokens", options.calibration_tokens, "--seed", seed, "--device", "cpu"]
        command("convert", "--source", source, "--output", output, *routing, *texts, *VARIANTS[variant][0])
    return output


def heal(options: argparse.Namespace, teacher: Path, student: Path, variant: str, seed: int) -> Path:
    """The run folder of its healing."""
    output = folder_of(options, variant, seed) / "healed"
    steps = -(-options.tokens // options.tokens_per_batch)
    command(
        "distill",
        *("--output", output, "--seed", seed, "--init_from", student, "--teacher", teacher),
        *("--data.path", options.output / "data", "--data.context", options.context),
        *("--data.val_tokens", 8 * options.context),
        *("--train.tokens_per_batch", options.tokens_per_batch, "--train.max_steps", steps),
        *("--train.micro_batch", options.tokens_per_batch // options.context),
        *("--train.val_every_steps", steps, "--checkpoint.every_steps", steps, "--checkpoint.keep_last", 1),
        *("--optim.lr", options.lr, "--optim.warmup_steps", max(1, steps // 20)),
        *("--optim.weight_decay", 0, "--optim.min_lr_ratio", 0),
        *("--monitor.sample_every_steps", 0, "--monitor.router_statistics_every", 0),
        *("--monitor.peak_tflops", 0.1, *DISTILL, *VARIANTS[variant][1]),
    )
    return output


def folder_of(options: argparse.Namespace, variant: str, seed: int) -> Path:
    """Where a variant lies."""
    return options.output / f"{variant.replace(',', '').replace(' ', '_')}-s{seed}"


def loss(options: argparse.Namespace, model: Path) -> float:
    """Loss on the held-out texts, nats per token; remembered beside the model."""
    cached = model.with_name(f"{model.name}-loss.json")
    if not cached.exists():
        score = evaluate(
            EvaluateConfig(
                str(model),
                data=str(options.output / "data"),
                context=options.context,
                max_tokens=options.val_tokens,
                device="cpu",
            )
        )
        cached.write_text(json.dumps({"loss": score.loss, "targets": score.targets}))
    return float(json.loads(cached.read_text())["loss"])


def keys_read(model: Path, context: int) -> float:
    """Keys that a token reads, over all layers and heads."""
    config = load_model(find_checkpoint(model)).config
    return sum(sum(keys_of(config.of_layer(number), context)) for number in range(config.num_layers))


def per_cent(values: list[float], whole: float) -> str:
    """Mean above `whole` and, of several values, their standard deviation."""
    gaps = [100 * (value / whole - 1) for value in values]
    spread = f" ± {statistics.stdev(gaps):.2f}" if len(gaps) > 1 else ""
    return f"{statistics.mean(gaps):+.2f}{spread} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="stories260K.bin")
    parser.add_argument("--tokenizer", type=Path, required=True, help="tok512.bin")
    parser.add_argument("--output", type=Path, default=Path("runs/convert"))
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--train_tokens", type=int, default=500_000, help="that the model writes")
    parser.add_argument("--val_tokens", type=int, default=100_000)
    parser.add_argument("--calibration_tokens", type=int, default=8192)
    parser.add_argument("--window", type=int, default=32)
    parser.add_argument("--block", type=int, default=16)
    parser.add_argument("--top_k", type=int, default=4)
    parser.add_argument("--global_mode", default="full")
    parser.add_argument("--far_summary", default="first_order")
    parser.add_argument("--tokens", type=int, default=204_800, help="of each healing; 0 measures only")
    parser.add_argument("--tokens_per_batch", type=int, default=2048)
    parser.add_argument("--lr", type=float, default=1e-4)
    options = parser.parse_args()

    dense = options.output / "dense"
    if not dense.exists():
        source = ["--source", options.model, "--tokenizer", options.tokenizer]
        command("convert", *source, "--output", dense, "--attention", "dense")
    if not (options.output / "data").exists():
        sizes = {"train": options.train_tokens, "val": options.val_tokens}
        sample_corpus(dense, options.output / "data", sizes, options.context)
    original, all_keys = loss(options, dense), keys_read(dense, options.context)
    rows = [{"attention": "original (dense)", "keys read": "100 %", "converted": f"{original:.4f} nats",
             "healed": "–"}]  # fmt: skip
    for variant in options.variants:
        before, after = [], []
        for seed in options.seeds:
            student = convert(options, dense, variant, seed)
            before.append(loss(options, student))
            if options.tokens:
                after.append(loss(options, heal(options, dense, student, variant, seed)))
        row = {"attention": variant, "keys read": f"{keys_read(student, options.context) / all_keys:.0%}"}
        row |= {
            "converted": per_cent(before, original),
            "healed": per_cent(after, original) if after else "–",
        }
        rows.append(row)
    title = f"{options.tokens:,} tokens of healing, {len(options.seeds)} seed(s), window {options.window}"
    show(title, rows, options.output, "convert_stories")


if __name__ == "__main__":
    main()
