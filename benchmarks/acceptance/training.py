"""Acceptance of whole trainings: 100 steps at the shape of the 1b recipe with fewer layers, and what follows.

    PYTHONPATH=.:benchmarks python -m acceptance.training training|zero3|quantized --rows FILE --work FOLDER

training makes a text of long documents, trains, and compares the memory with what `dualroute estimate` says;
zero3 lets all GPUs of this machine train the same few steps as one process; quantized stores the model of
training in fewer bits and measures it again.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from acceptance.rows import Rows, given
from dualroute.cli import main as dualroute
from dualroute.cli import parse_stage
from dualroute.doctor.smoke import write_text
from dualroute.estimate.command import GIB, estimate
from dualroute.training.monitoring.metrics_log import read_metrics

ROOT = Path(__file__).parents[2]
COMMON = (
    "--optim.lr 3e-4 --optim.warmup_steps 2 --optim.schedule constant --data.val_tokens 4096 "
    "--train.val_every_steps 1000 --checkpoint.every_steps 1000 --monitor.sample_every_steps 0 "
    "--monitor.router_statistics_every 0 --train.micro_batch 1"
)
FULL = (
    "--model.dim 2048 --model.num_heads 16 --model.ffn_dim 5632 --model.num_layers 4 --model.window 512 "
    "--model.block 64 --model.top_k 16 --model.qk_norm true --model.max_context 16384 --data.context 16384 "
    "--train.precision bf16-mixed --monitor.log_every_steps 5"
)
TOY = (
    "--model.dim 64 --model.num_heads 4 --model.num_layers 1 --model.window 16 --model.block 16 "
    "--model.top_k 2 --model.global_mode routed --model.max_context 256 --data.context 256 "
    "--monitor.log_every_steps 1 --monitor.peak_tflops 0.05"
)
LEAST_MFU = 0.1  # below it the GPU mostly waits
SCHEMES = {  # scheme → largest rise of the loss, relative
    "int8_weight_only": 0.02, "int4_weight_only": 0.1, "int4_tile_packed": 0.1, "float8_dynamic": 0.02,
}  # fmt: skip


def options(work: Path, output: str, toy: bool, steps: int, ranks: int = 1) -> list[str]:
    """Arguments of a training after the stage's name."""
    context = 256 if toy else 16384
    return [
        *COMMON.split(), *(TOY if toy else FULL).split(),
        *("--data.path", str(work / "shards"), "--output", str(work / output)),
        *("--train.max_steps", str(steps), "--train.tokens_per_batch", str(ranks * context)),
    ]  # fmt: skip


def training(rows: Rows, device: torch.device, toy: bool, work: Path) -> None:
    """100 steps: the loss falls, MFU, memory beside the estimate."""
    _prepare(work, toy)
    given = options(work, "run", toy, 20 if toy else 100)
    _run(["pretrain", *given])
    lines = list(read_metrics(work / "run" / "metrics.jsonl", "train"))
    later = [line for line in lines if line["step"] > lines[-1]["step"] // 4]  # past all compiling
    losses = [line["train/loss"] for line in lines]
    mfu, tokens, step = (
        statistics.median(line[f"speed/{name}"] for line in later)
        for name in ("mfu", "tokens_per_second", "step_time")
    )
    kernels = (work / "run" / "config.yaml").read_text().splitlines()[0].removeprefix("# ")
    rows.add(
        f"{lines[-1]['step']} steps",
        f"loss {losses[0]:.3f} → {losses[-1]:.3f}; {kernels}",
        "it falls",
        losses[-1] < losses[0],
    )
    rows.add(
        "speed", f"MFU {mfu:.1%}, {tokens:,.0f} tokens/s", "" if toy else f"MFU at least {LEAST_MFU:.0%}",
        toy or mfu >= LEAST_MFU, milliseconds=1e3 * step,
    )  # fmt: skip
    _memory(rows, lines[-1], given, device)


def _memory(rows: Rows, line: dict[str, Any], given: list[str], device: torch.device) -> None:
    config = parse_stage("estimate", given)
    expected = estimate(config)
    memory = expected.memory
    total = (memory.total - memory.buffers - memory.fragmentation) / GIB  # those the allocator does not count
    wanted = "between half and 1.3 × of the estimate"
    if device.type != "cuda":
        rows.add("memory", f"{total:.3g} GiB estimated; only a GPU counts what is allocated", wanted, None)
        return
    peak = line["memory/peak_allocated_gib"]
    found = f"{peak:.2f} GiB allocated, {total:.2f} estimated"
    rows.add("memory", found, wanted, 0.5 * total <= peak <= 1.3 * total, peak_mebibytes=1024 * peak)


def _prepare(work: Path, toy: bool) -> None:
    """Shards of a text whose documents are long enough to be routed."""
    write_text(work / "corpus", documents=6, sentences=200 if toy else 8000)
    shards = ["--corpus", str(work / "corpus"), "--output", str(work / "shards"), "--progress", "false"]
    _run(["prepare", *shards, "--vocab_size", "320", "--reserved_tokens", "0", "--val_fraction", "0.2"])


def zero3(rows: Rows, device: torch.device, toy: bool, work: Path) -> None:
    """The same steps under ZeRO-3 on all GPUs, and in one process."""
    ranks = torch.cuda.device_count() if device.type == "cuda" else 2
    steps = 4
    each_step = ["--monitor.log_every_steps", "1"]
    sharded = ["--parallel.strategy", "deepspeed", "--parallel.zero_stage", "3"]
    _launch([*options(work, "zero3", toy, steps, ranks), *each_step, *sharded], ranks)
    _run(["pretrain", *options(work, "alone", toy, steps, ranks), *each_step])
    curves, times = [], []
    for name in ("zero3", "alone"):
        lines = list(read_metrics(work / name / "metrics.jsonl", "train"))
        curves.append([line["train/loss"] for line in lines])
        times.append(1e3 * statistics.median(line["speed/step_time"] for line in lines[1:]))
    apart = max(abs(a - b) for a, b in zip(*curves, strict=True))
    allowed = 1e-4 if toy else 0.05  # one has float32 weights under autocast, the other bfloat16 ones
    rows.add(
        f"{ranks} rank(s), {steps} steps",
        f"losses within {apart:.1e} of one process ({times[1]:.3g} ms a step)",
        f"within {allowed:g}", apart <= allowed, milliseconds=times[0],
    )  # fmt: skip


def quantized(rows: Rows, device: torch.device, toy: bool, work: Path) -> None:
    """The loss of the trained model in int8, int4 and fp8 beside that in floats."""
    loss = _loss(work / "run", work, "float")
    rows.add("float", f"loss {loss:.4f}")
    _fp8_training(rows, toy, work)
    for scheme, rise in SCHEMES.items():
        output = work / scheme
        try:
            _run(["quantize", "--checkpoint", str(work / "run"), "--output", str(output), "--scheme", scheme])
        except RuntimeError as error:
            possible = "needs a CUDA device" not in str(error) and "compute capability" not in str(error)
            rows.add(scheme, str(error), "", False if possible else None)
            continue
        found = _loss(output, work, scheme)
        rows.add(scheme, f"loss {found:.4f}", f"at most {rise:.0%} more", found <= loss * (1 + rise))


def _fp8_training(rows: Rows, toy: bool, work: Path) -> None:
    """The first steps of training once more, in fp8."""
    steps = 10
    given = [*options(work, "fp8", toy, steps), "--train.precision", "fp8", "--monitor.log_every_steps", "1"]
    try:
        _run(["pretrain", *given])
    except RuntimeError as error:
        possible = "sm_89" not in str(error) and "compute capability" not in str(error)
        rows.add("training in fp8", str(error), "", False if possible else None)
        return
    wide, fp8 = (
        {line["step"]: line for line in read_metrics(work / run / "metrics.jsonl", "train")}
        for run in ("run", "fp8")
    )
    last = max(wide.keys() & fp8.keys())
    apart = abs(fp8[last]["train/loss"] / wide[last]["train/loss"] - 1)
    step = 1e3 * statistics.median(line["speed/step_time"] for line in fp8.values())
    found = f"loss of step {last} off by {apart:.2%}"
    rows.add("training in fp8", found, "within 2%", apart <= 0.02, milliseconds=step)


def _loss(checkpoint: Path, work: Path, name: str) -> float:
    result = work / f"{name}.json"
    data = ["--data", str(work / "shards"), "--max_tokens", "16384", "--batch_size", "1"]
    _run(["evaluate", "--checkpoint", str(checkpoint), *data, "--output", str(result)])
    loss: float = json.loads(result.read_text())["loss"]
    return loss


def _run(arguments: list[str]) -> None:
    """A command of dualroute in this process; raises RuntimeError with its message."""
    told = io.StringIO()
    with contextlib.redirect_stderr(told):
        status = dualroute(arguments)
    print(told.getvalue(), end="", file=sys.stderr)
    if status:
        errors = [line.partition("error: ")[2] for line in told.getvalue().splitlines() if "error: " in line]
        raise RuntimeError(" ".join(errors)[-300:] or f"dualroute {arguments[0]} ended with {status}")


def _launch(arguments: list[str], ranks: int) -> None:
    """A pretraining on so many ranks of this machine.

    Raises:
        RuntimeError: It failed.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command += ["launch/pretrain.py", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(
            f"{ranks} rank(s): {(done.stderr.strip().splitlines() or ['no message'])[-1][:300]}"
        )


if __name__ == "__main__":
    parts = {"training": training, "zero3": zero3, "quantized": quantized}
    asked = given(parts, __doc__.splitlines()[0])
    parts[asked.part](asked.rows, torch.device(asked.device), asked.toy, asked.work)
