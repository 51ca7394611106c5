"""Near duplicates: documents a second and core, peak memory and F1, beside text-dedup and datasketch, in
one run.

    python benchmarks/data/dedup.py TEXT [TEXT ...] --megabytes 1 10

TEXT: files of plain text (also .xz .gz .zst, or archives), cut into documents of 500 to 4,000
characters; where they do not suffice, they are read again, each with its words in another order. Of one
document in ten a copy is planted in which one word in a hundred is another; as many get a copy in which one
word in five is, which is no near duplicate. With --graded a copy has any share of other words from 0 to 10 %,
and is a near duplicate if the Jaccard similarity of both texts' runs of 5 words, counted exactly, is at least
0.7: that judges a method at its threshold. Each method works in a process of
its own, with one thread, on 128 permutations of runs of 5 words; its time is CPU time, from the texts
in memory to the list of what is dropped. text-dedup's steps are called without the data set around
them. A method that is not installed is left out (pip install datasketch; pip install --no-deps
text-dedup click-option-group pybloom-live bitarray ftfy).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import resource
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

os.environ |= {"RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}

from data_prep.readers.documents import ReadOptions
from data_prep.readers.formats import read_documents

SIMILARITY = 0.7
PERMUTATIONS = 128


def pieces(paths: list[Path], draw: random.Random) -> Iterator[str]:
    """The texts of files, cut into documents of 500 to 4,000 characters; after the last, all of them again,
    with words (of a text without spaces: letters) in another order, without end."""
    for again in count():
        for path in paths:
            for source in read_documents(path, path.name, ReadOptions()):
                place = 0
                while place < len(source.text):
                    text = source.text[place : place + draw.randint(500, 4000)]
                    place += len(text)
                    if again:
                        parts, between = words_of(text)
                        draw.shuffle(parts)
                        text = between.join(parts)
                    yield text


def words_of(text: str) -> tuple[list[str], str]:
    """Its words and what is between them; of a text without spaces, letters."""
    words = text.split(" ")
    return (words, " ") if len(words) > len(text) / 20 else (list(text), "")


def alike(one: str, other: str) -> bool:
    """Whether the exact Jaccard similarity of the runs of 5 words is that of near duplicates."""
    sets = []
    for text in (one, other):
        words = words_of(text)[0]
        sets.append({tuple(words[place : place + 5]) for place in range(max(1, len(words) - 4))})
    return len(sets[0] & sets[1]) >= SIMILARITY * len(sets[0] | sets[1])


def planted(paths: list[Path], size: int, graded: bool) -> tuple[list[str], list[bool]]:
    """Documents of about ``size`` bytes in all, and which of them are copies with few changes."""
    draw = random.Random(0)
    texts: list[str] = []
    copies: list[bool] = []
    total = 0

    def add(text: str, copy: bool) -> None:
        nonlocal total
        texts.append(text)
        copies.append(copy)
        total += len(text.encode())

    for text in pieces(paths, draw):
        if total >= size:
            break
        add(text, False)
        if draw.random() < 0.2:
            few = draw.random() < 0.5
            copy = changed(draw, text, draw.random() / 10 if graded else 0.01 if few else 0.2)
            add(copy, alike(text, copy) if graded else few)
    return texts, copies


def changed(draw: random.Random, text: str, share: float) -> str:
    """One word in ``1 / share`` is another; of a text without spaces, one letter."""
    parts, between = words_of(text)
    for place in draw.sample(range(len(parts)), max(1, round(share * len(parts)))):
        parts[place] = f"x{draw.randrange(1 << 30)}" if between else chr(draw.randrange(0x4E00, 0x9000))
    return between.join(parts)


def ours(texts: list[str]) -> list[bool]:
    """`data_prep.dedup`, files and all."""
    from data_prep.dedup.near import STAYS, Documents, merged, write_pairs
    from data_prep.dedup.signatures import Banding, signatures
    from data_prep.dedup.signed_part import SignedPart, signed_bytes

    banding = Banding.of(SIMILARITY)
    with tempfile.TemporaryDirectory() as folder:
        parts = []
        for start in range(0, len(texts), 1 << 14):
            some = texts[start : start + (1 << 14)]
            part = SignedPart(Path(folder) / f"{start}.signed", len(some), banding)
            digests = [hashlib.sha256(text.encode()).digest() for text in some]
            part.write(signed_bytes(digests, signatures(some), banding))
            parts.append(part)
        documents = Documents(parts, SIMILARITY)
        columns = [Path(folder) / f"column-{number}" for number in range(documents.columns)]
        for number, path in enumerate(columns):
            write_pairs(path, *documents.pairs(number, Path(folder)))
        return (merged(documents.total, columns).fates != STAYS).tolist()


def text_dedup(texts: list[str]) -> list[bool]:
    """text-dedup's `embed_func`, tables and union-find, as its command calls them."""
    import numpy as np
    from text_dedup.minhash import embed_func
    from text_dedup.utils import UnionFind, optimal_param, xxh3_32hash

    bands, rows = optimal_param(SIMILARITY, PERMUTATIONS, 0.5, 0.5)
    ranges = [(number * rows, (number + 1) * rows) for number in range(bands)]
    prime = np.uint64((1 << 61) - 1)
    draw = np.random.RandomState(42)
    size = (PERMUTATIONS,)
    permutations = (draw.randint(1, prime, size, np.uint64), draw.randint(0, prime, size, np.uint64))
    tables: list[dict[bytes, set[int]]] = [defaultdict(set) for _ in ranges]
    for number, text in enumerate(texts):
        found = embed_func(
            text, number, num_perm=PERMUTATIONS, ngram_size=5, min_length=5, hashranges=ranges,
            permutations=permutations, hash_func=xxh3_32hash, dtype=np.uint64,
            max_hash=np.uint32((1 << 32) - 1), modulo_prime=prime,
        )  # fmt: skip
        for band, table in zip(found["__signatures__"], tables, strict=True):
            table[band].add(number)
    union = UnionFind()
    for table in tables:
        for cluster in table.values():
            if len(cluster) > 1:
                first = min(cluster)
                for number in cluster:
                    union.union(number, first)
    first: dict[int, int] = {}  # of each cluster, which is what stays
    return [first.setdefault(union.find(number), number) != number for number in range(len(texts))]


def datasketch(texts: list[str]) -> list[bool]:
    """datasketch's MinHash and MinHashLSH."""
    import re

    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(threshold=SIMILARITY, num_perm=PERMUTATIONS)
    dropped = []
    for number, text in enumerate(texts):
        words = re.findall(r"\w+", text.lower())
        shingles = {" ".join(words[place : place + 5]).encode() for place in range(max(1, len(words) - 4))}
        signature = MinHash(num_perm=PERMUTATIONS)
        signature.update_batch(shingles)
        dropped.append(bool(index.query(signature)))
        index.insert(number, signature)
    return dropped


METHODS: dict[str, Callable[[list[str]], list[bool]]] = {
    "dualroute": ours,
    "text-dedup": text_dedup,
    "datasketch": datasketch,
}


def peak_kib() -> int:
    """Largest resident memory of this process since its peak was forgotten."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measured(name: str, texts: list[str], copies: list[bool]) -> dict[str, Any]:
    """One method on one corpus; runs in a process of its own."""
    method = METHODS[name]
    try:
        method(texts[:20])  # imports and tables
    except ImportError as error:
        return {"method": name, "missing": str(error)}
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far, which has the texts twice
    before = peak_kib()
    start, wall = time.process_time(), time.perf_counter()
    dropped = method(texts)
    seconds, wall = time.process_time() - start, time.perf_counter() - wall
    scores = []
    for positive in (True, False):
        hits = sum(found == copy == positive for found, copy in zip(dropped, copies, strict=True))
        wrong = sum(found != copy for found, copy in zip(dropped, copies, strict=True))
        scores.append(2 * hits / max(1, 2 * hits + wrong))
    memory = (peak_kib() - before) / 1024
    return {
        "method": name,
        "documents": len(texts),
        "megabytes": round(sum(len(text.encode()) for text in texts) / 1e6, 1),
        "documents_per_second_and_core": round(len(texts) / seconds),
        "megabytes_per_second_and_core": round(sum(len(text.encode()) for text in texts) / 1e6 / seconds, 2),
        "wall_seconds": round(wall, 1),
        "peak_memory_above_texts_mib": round(memory),
        "precision": round(
            sum(f and c for f, c in zip(dropped, copies, strict=True)) / max(1, sum(dropped)), 4
        ),
        "recall": round(sum(f and c for f, c in zip(dropped, copies, strict=True)) / max(1, sum(copies)), 4),
        "macro_f1": round(sum(scores) / 2, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("texts", nargs="+", type=Path)
    parser.add_argument("--megabytes", nargs="+", type=float, default=[1, 10])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--graded", action="store_true", help="copies of all degrees of likeness")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")  # with the texts, and no more, in its memory
    for megabytes in options.megabytes:
        texts, copies = planted(options.texts, int(megabytes * 1e6), options.graded)
        for name in options.methods:
            with context.Pool(1) as pool:
                print(json.dumps(pool.apply(measured, (name, texts, copies))), flush=True)


if __name__ == "__main__":
    main()
