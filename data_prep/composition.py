"""What a finished data set is made of: tokens and bytes by source and by language, and whether its
vocabulary fits.

Comes in: the shards and index files. Goes out: tables for manifest.json, `report` and the last lines of a
preparation.

A document's source is the first part of its name: a file or folder of the corpus. Its language is what
`cleaning` found, if it was asked.
"""

from __future__ import annotations

import json
import mmap
import re
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dualroute.data.index import map_index
from dualroute.data.manifest import Split

_MOST_NAMES = 10_000  # that are told apart while counting
_SHOWN = 50
_COUNTED_TOKENS = 50_000_000
_BLOCK_TOKENS = 1 << 20
_OTHER = "(others)"
#: Fewest examples that a piece should have, for 95 % of the pieces: Gowda and May, Finding the Optimal
#: Vocabulary Size
#: for Neural Machine Translation, 2020.
EXAMPLES = 100


def composition(folder: Path, splits: Mapping[str, Split], dtype: str, vocab_size: int) -> dict[str, Any]:
    """``sources`` and ``languages`` (documents, bytes, tokens of each) and ``vocabulary`` of a data set."""
    sources: dict[str, list[int]] = {}
    languages: dict[str, list[int]] = {}
    seen = np.zeros(vocab_size, np.int64)
    for split in splits.values():
        for about, size, tokens in _documents(folder, split, np.dtype(dtype).itemsize):
            source = re.split(r"[/!:#]", str(about.get("source", "")), maxsplit=1)[0]
            _count(sources, source, size, tokens)
            if "language" in about:
                _count(languages, str(about["language"]), size, tokens)
    for ids in _ids(folder, splits["train"], np.dtype(dtype)):
        seen += np.bincount(ids, minlength=vocab_size)
    train = splits["train"].tokens
    vocabulary = {
        "size": vocab_size,
        "tokens_counted": int(seen.sum()),
        "tokens": train,
        "pieces_with_100_examples": int(np.count_nonzero(seen >= EXAMPLES)),
        "pieces_unused": int(np.count_nonzero(seen == 0)),
    }
    return {"sources": _table(sources), "languages": _table(languages), "vocabulary": vocabulary}


def warning(vocabulary: Mapping[str, int]) -> str | None:
    """One line where the vocabulary is too large for the corpus, else None.

    A sample of `_COUNTED_TOKENS` is not held against a corpus that is larger.
    """
    size, enough = vocabulary["size"], vocabulary["pieces_with_100_examples"]
    whole = vocabulary["tokens_counted"] >= vocabulary["tokens"]
    if not whole or 2 * enough >= size:
        return None
    return (
        f"the vocabulary is large for this corpus: {size - enough:,} of {size:,} pieces occur fewer than "
        f"{EXAMPLES} times in {vocabulary['tokens']:,} tokens; lower vocab_size, or add text"
    )


def described(made_of: Mapping[str, Any]) -> list[str]:
    """Lines for people: bytes a token of the largest sources and of each language."""
    lines = []
    for what in ("sources", "languages"):
        table = made_of.get(what, {})
        if len(table) > 1:
            shown = [
                f"{name} {entry['bytes'] / max(1, entry['tokens']):.2f} ({entry['tokens']:,} tokens)"
                for name, entry in list(table.items())[:6]
            ]
            more = f", and {len(table) - 6} more in manifest.json" if len(table) > 6 else ""
            lines.append(f"bytes a token by {what[:-1]}: {', '.join(shown)}{more}")
    return lines


def _count(table: dict[str, list[int]], name: str, size: int, tokens: int) -> None:
    if name not in table and len(table) >= _MOST_NAMES:
        name = _OTHER
    entry = table.setdefault(name, [0, 0, 0])
    for place, value in enumerate((1, size, tokens)):
        entry[place] += value


def _table(counts: dict[str, list[int]]) -> dict[str, dict[str, int]]:
    """The largest, then what is left, summed."""
    ordered = sorted(counts.items(), key=lambda item: (item[0] == _OTHER, -item[1][2], item[0]))
    rest = [sum(entry[place] for _, entry in ordered[_SHOWN:]) for place in range(3)]
    shown = ordered[:_SHOWN] + ([(_OTHER, rest)] if len(ordered) > _SHOWN else [])
    return {name: dict(zip(("documents", "bytes", "tokens"), entry, strict=True)) for name, entry in shown}


def _shards(folder: Path, split: Split) -> Iterator[tuple[mmap.mmap, list[list[int]]]]:
    """(tar, rows of its index) of each shard."""
    rows = map_index(folder / split.index_file, split.documents, "run `dualroute prepare` again")
    first = 0
    for shard in split.shards:
        with (
            open(folder / shard.file, "rb") as stream,
            mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as tar,
        ):
            yield tar, np.asarray(rows[first : first + shard.documents]).tolist()
        first += shard.documents


def _documents(folder: Path, split: Split, itemsize: int) -> Iterator[tuple[dict[str, Any], int, int]]:
    """(KEY.json, bytes, tokens) of each document; the JSON stands behind the ids that the index points at."""
    for tar, rows in _shards(folder, split):
        for _, offset, tokens, size in rows:
            header = -(-(offset + itemsize * tokens) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            length = int(tar[header + 124 : header + 135], 8)
            start = header + tarfile.BLOCKSIZE
            yield json.loads(tar[start : start + length]), size, tokens


def _ids(folder: Path, split: Split, dtype: np.dtype[Any]) -> Iterator[np.ndarray]:
    """Ids of the first documents, until there are `_COUNTED_TOKENS`, many at a time."""
    held: list[np.ndarray] = []
    total = size = 0
    for tar, rows in _shards(folder, split):
        for _, offset, tokens, _ in rows:
            held.append(
                np.frombuffer(tar[offset : offset + dtype.itemsize * tokens], dtype.newbyteorder("<"))
            )
            size += tokens
            if size >= _BLOCK_TOKENS:
                yield np.concatenate(held)
                held, total, size = [], total + size, 0
                if total >= _COUNTED_TOKENS:
                    return
    if held:
        yield np.concatenate(held)
