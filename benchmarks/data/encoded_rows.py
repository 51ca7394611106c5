"""What a fine-tuning costs before its first step: rows encoded in memory, into files, and found there.

    python benchmarks/data/encoded_rows.py --chats 100000

Chats of made-up words are encoded as `dualroute finetune` does at its start.  Each row is a process of its
own: CPU seconds from the rows to batches, its peak of private memory (what a second process on the machine
costs again), and that after the start.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

WORDS = [f"{a}{b}" for a in ("ba", "ke", "li", "mo", "su", "ta") for b in ("lan", "der", "mis", "tor", "ven")]


def chats(path: Path, count: int, words: int) -> None:
    """Two turns each way, of `words` words together."""
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as stream:
        for _ in range(count):
            turns = [
                {"role": role, "content": " ".join(draw.choices(WORDS, k=words // 4))}
                for role in ("user", "assistant") * 2
            ]
            stream.write(json.dumps({"messages": turns}) + "\n")


def private_mib() -> float:
    """Memory of this process that no other could share."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def start(words: list[str]) -> None:
    """The part of a start that reads rows, and what it took."""
    from dualroute.cli import parse_stage
    from dualroute.tasks.run import check

    before, cpu = private_mib(), time.process_time()
    peak, stop = [before], threading.Event()

    def watch() -> None:
        while not stop.wait(0.5):
            peak[0] = max(peak[0], private_mib())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    prepared = check(parse_stage("finetune", words))
    windows = prepared.data.train_windows()  # type: ignore[union-attr]
    for number in range(64):
        windows[number]
    taken = time.process_time() - cpu
    after = private_mib()
    stop.set()
    thread.join()
    print(
        json.dumps(
            {
                "cpu_seconds": round(taken, 1),
                "peak_mib": round(max(peak[0], after) - before),
                "after_mib": round(after - before),
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chats", type=int, default=100_000)
    parser.add_argument("--words", type=int, default=200, help="of a chat")
    parser.add_argument("--start", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.start:
        start(options.start)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        chats(folder / "chats.jsonl", options.chats, options.words)
        chats(folder / "held_out.jsonl", 200, options.words)
        chats(folder / "sample.jsonl", 2000, options.words)
        from dualroute.tasks.data.tokenizers import trained

        sample = (folder / "sample.jsonl").read_text(encoding="utf-8").splitlines()
        (folder / "tokenizer.model").write_bytes(trained(sample, 400))
        words = [
            *("--task.kind", "chat", "--data.path", str(folder / "chats.jsonl")),
            *("--data.validation", str(folder / "held_out.jsonl")),
            *(
                "--data.tokenizer",
                str(folder / "tokenizer.model"),
                "--train.max_steps",
                "10",
                "--train.micro_batch",
                "1",
            ),
            *(
                "--model.dim",
                "32",
                "--model.num_layers",
                "1",
                "--model.num_heads",
                "4",
                "--data.context",
                "2048",
            ),
            *("--output", str(folder / "run")),
        ]
        kept = ["--data.encoded", str(folder / "kept")]
        size = (folder / "chats.jsonl").stat().st_size / 2**20
        print(f"{options.chats:,} chats, {size:,.0f} MiB")
        print("| examples | CPU s | peak MiB | after the start, MiB |\n|---|---|---|---|")
        for called, more in (("in memory", []), ("into files", kept), ("found in files", kept)):
            program = [sys.executable, __file__, "--start", *words, *more]
            answer = subprocess.run(program, check=True, stdout=subprocess.PIPE, text=True).stdout
            found = json.loads(answer.splitlines()[-1])
            print(f"| {called} | {found['cpu_seconds']} | {found['peak_mib']:,} | {found['after_mib']:,} |")
        files = sum(path.stat().st_size for path in (folder / "kept").rglob("*.bin")) / 2**20
        print(f"files: {files:,.0f} MiB")


if __name__ == "__main__":
    main()
