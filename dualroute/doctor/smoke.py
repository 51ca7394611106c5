"""Twenty steps of a real training on a text that is made here: does everything fit together?

The commands are those that a person would type (``dualroute prepare``, ``dualroute pretrain``), as processes
of their own, so that a crash of a library is a finding and not the end of the examination.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from dualroute.doctor.verdict import Verdict, fail, ok
from dualroute.training.monitoring.metrics_log import read_metrics

STEPS = 20
_WORDS = "the old red small river stone bird house sees finds leaves under over with a green hill".split()
_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID", "CROSS_RANK")
_TRAINING = (
    "--model.dim 32 --model.num_layers 2 --model.num_heads 4 --model.window 8 --model.block 16 "
    "--model.top_k 1 --model.global_mode routed --data.context 64 --data.val_tokens 512 "
    "--train.micro_batch 4 --train.tokens_per_batch 512 --optim.lr 0.01 --optim.warmup_steps 4 "
    f"--train.max_steps {STEPS} --train.val_every_steps {STEPS} --monitor.log_every_steps 1 "
    "--monitor.sample_every_steps 0 --checkpoint.every_steps 10"
).split()


def smoke(seconds: float = 300.0) -> Iterator[Verdict]:
    """One verdict: a small training learns, or what stopped it."""
    with TemporaryDirectory(prefix="dualroute-doctor-") as name:
        folder = Path(name)
        write_text(folder / "corpus")
        prepare = (
            *("prepare", "--corpus", str(folder / "corpus"), "--output", str(folder / "shards")),
            *(
                "--vocab_size",
                "320",
                "--reserved_tokens",
                "0",
                "--val_fraction",
                "0.1",
                "--progress",
                "false",
            ),
        )
        pretrain = ("pretrain", "--data.path", str(folder / "shards"), "--output", str(folder / "run"))
        for command in (prepare, (*pretrain, *_TRAINING)):
            error = run(command, seconds)
            if error:
                yield fail("smoke", f"dualroute {command[0]}: {error}", "mend that first: no run would start")
                return
        losses = [line["train/loss"] for line in read_metrics(folder / "run" / "metrics.jsonl", "train")]
    found = f"{len(losses)} steps, loss {losses[0]:.3f} -> {losses[-1]:.3f}, checkpoints written"
    if len(losses) == STEPS and losses[-1] < losses[0] - 0.5:
        yield ok("smoke", found)
    else:
        yield fail("smoke", found, "the loss did not fall: this machine computes wrongly; run the test suite")


def write_text(folder: Path, documents: int = 40, sentences: int = 40) -> None:
    """Documents of so many sentences of a tiny grammar, learnable at once."""
    draw = random.Random(0)
    folder.mkdir(parents=True)
    for number in range(documents):
        lines = (" ".join(draw.choices(_WORDS, k=draw.randint(4, 12))) + "." for _ in range(sentences))
        (folder / f"text-{number:02d}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def run(arguments: tuple[str, ...], seconds: float) -> str:
    """Run a dualroute command as one process; the last line of its errors, or "" when it went well."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if key not in _LAUNCHER and not key.startswith("SLURM_STEP")
    }
    try:
        result = subprocess.run(
            [sys.executable, "-m", "dualroute", *arguments],
            env=kept, capture_output=True, text=True, timeout=seconds,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"not finished after {seconds:.0f} s"
    if result.returncode == 0:
        return ""
    lines = result.stderr.strip().splitlines() or [""]
    return f"exit status {result.returncode}: {lines[-1]}"
