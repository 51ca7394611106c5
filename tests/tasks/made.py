"""Small made-up data with a known answer, and trainings on them that take a second or two."""

import json
import random
from pathlib import Path
from typing import Any

from dualroute.cli import main

GOOD = ["fine", "lovely", "superb", "warm", "bright", "clever"]
BAD = ["dull", "awful", "weak", "cold", "grim", "silly"]
FILLER = ["the", "film", "was", "and", "story", "with", "some", "actors", "in", "a", "city"]
SMALL = (
    "--model.dim 32 --model.num_layers 1 --model.num_heads 4 --data.context 64 --train.micro_batch 2 "
    "--train.tokens_per_batch 512 --train.val_every_steps 10 --optim.lr 0.01 --optim.warmup_steps 3 "
    "--checkpoint.every_steps 10 --monitor.log_every_steps 1 --monitor.peak_tflops 0.1 "
    "--monitor.sample_every_steps 0 --monitor.router_statistics_every 0 --data.vocab_size 340"
).split()


def reviews(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Sentences with words of one mood, and the mood."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        mood = draw.choice(["good", "bad"])
        words = draw.choices(FILLER, k=draw.randint(3, 9)) + draw.choices(
            GOOD if mood == "good" else BAD, k=2
        )
        draw.shuffle(words)
        rows.append(
            {"id": number, "review": " ".join(words), "mood": "positive" if mood == "good" else "negative"}
        )
    return rows


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_tsv(path: Path, rows: list[dict[str, Any]]) -> Path:
    names = list(rows[0])
    lines = ["\t".join(names), *("\t".join(str(row[name]) for name in names) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def finetune(data: Path, output: Path, *more: str) -> int:
    return main(["finetune", *SMALL, "--data.path", str(data), "--output", str(output), *more])


MOODS = ("--task.columns", "{text: review, label: mood}")
