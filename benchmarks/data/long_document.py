"""Time and memory to tokenise a long document in one line, in parts and all at once.

    python benchmarks/data/long_document.py TEXT TOKENIZER --megabytes 40

TEXT is a file of any text, which is repeated or cut to the size asked for; its white space becomes single
spaces. Each way runs in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from dualroute.data import text_parts
from dualroute.data.tokenizer import Tokenizer


def one_line(path: Path, size: int) -> str:
    text = " ".join(path.read_text(encoding="utf-8").split()) + " "
    return (text * (1 + size // len(text)))[:size]


def measure(options: argparse.Namespace) -> None:
    text = one_line(options.text, int(options.megabytes * 1e6))
    tokenizer = Tokenizer(options.tokenizer)
    tokenizer.encode(text[:1000])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    if options.way == "parts":
        ids = tokenizer.encode_array(text, np.uint32)
    else:
        text_parts.PART_CHARS = len(text)
        ids = np.array(tokenizer.encode(text), np.uint32)
    seconds = time.process_time() - started
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        f"{options.way}: {len(ids):,} tokens, {seconds:.1f} s of CPU, peak {before / 1024:.0f} MiB before, "
        f"{after / 1024:.0f} MiB after, checksum {int(ids.astype(np.uint64).sum())}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--megabytes", type=float, default=40)
    parser.add_argument("--way", choices=["parts", "whole"], help="in this process, that way only")
    options = parser.parse_args()
    if options.way:
        measure(options)
        return
    for way in ("parts", "whole"):
        subprocess.run([sys.executable, *sys.argv, "--way", way], check=True)


if __name__ == "__main__":
    main()
