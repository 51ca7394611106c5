"""``dualroute data diff``: options, tokenizers and documents that two data sets do not have in common."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console

from dualroute.data.manifest import Manifest
from dualroute.data.tokenizer import Tokenizer
from dualroute.data.tools.config import MOST_DOCUMENTS, DiffDataConfig
from dualroute.data.tools.documents import document, documents
from dualroute.data.tools.inspect import cell, table
from dualroute.errors import UserError

_PAIR = np.dtype([("a", "<u8"), ("b", "<u8")])


@dataclass(frozen=True)
class _Texts:
    """The texts of a set: digests in order, and which document (split, number) has each."""

    digests: np.ndarray
    splits: np.ndarray
    numbers: np.ndarray


def diff_data(config: DiffDataConfig) -> int:
    """The command.

    Returns:
        The exit status: 0 where the sets are equal, 1 where they differ.

    Raises:
        UserError: one of them cannot be read.
    """
    sets = [Manifest.load(config.first), Manifest.load(config.second)]
    console = Console()
    shown = table("", "", sets[0].place, sets[1].place)
    differs = False
    for key, one, other in _of_manifests(*sets):
        differs = True
        shown.add_row(cell(key), cell(one), cell(other))
    if differs:
        console.print(shown)
    if config.documents and sets[0].fingerprint != sets[1].fingerprint:
        differs |= _print_documents(console, sets, config.examples)
    if not differs:
        console.print("the two sets are equal: the same tokens in the same order, made with the same options")
    return int(differs)


def _of_manifests(one: Manifest, other: Manifest) -> Iterator[tuple[str, Any, Any]]:
    """(key, values) where the manifests differ."""
    for key in ("dtype", "fingerprint"):
        if getattr(one, key) != getattr(other, key):
            yield key, getattr(one, key), getattr(other, key)
    if one.tokenizer.sha256 != other.tokenizer.sha256:
        yield "tokenizer sha256", one.tokenizer.sha256, other.tokenizer.sha256
        yield "tokenizer ids", one.tokenizer.vocab_size, other.tokenizer.vocab_size
        try:
            same = Tokenizer(one.tokenizer_path).same_ids(Tokenizer(other.tokenizer_path))
            yield "tokenizers", "ids", "the same ids" if same else "other ids"
        except UserError as error:
            yield "tokenizers", "cannot be compared", error
    for split in sorted({*one.splits, *other.splits}):
        sides = [manifest.splits.get(split) for manifest in (one, other)]
        for key in ("documents", "tokens", "bytes"):
            values = ["none" if side is None else getattr(side, key) for side in sides]
            if values[0] != values[1]:
                yield f"{split}: {key}", values[0], values[1]
        counts = [0 if side is None else len(side.shards) for side in sides]
        if counts[0] != counts[1]:
            yield f"{split}: shards", counts[0], counts[1]
    options = [_options(manifest) for manifest in (one, other)]
    for key in sorted({*options[0], *options[1]}):
        values = [side.get(key, "not given") for side in options]
        if values[0] != values[1]:
            yield f"option {key}", values[0], values[1]


def _options(manifest: Manifest) -> dict[str, Any]:
    found = manifest.preparation.get("options")
    return found if isinstance(found, dict) else {}


def _print_documents(console: Console, sets: list[Manifest], examples: int) -> bool:
    """Tell which texts one set has and the other has not, or has in another split; whether there are any."""
    one, other = (_texts(manifest) for manifest in sets)
    shown = table("texts, by their sha256", "", "", "documents", numbers=1)
    removed = _less(one, other)
    added = _less(other, one)
    moved = _moved(one, other)
    for word, places, texts, manifest in (
        ("only in", removed, one, sets[0]),
        ("only in", added, other, sets[1]),
    ):
        shown.add_row(word, cell(manifest.place), cell(len(places)))
        for place in places[:examples].tolist():
            split = list(manifest.splits)[int(texts.splits[place])]
            number = int(texts.numbers[place])
            shown.add_row("", cell(f"{split} {number:,}: {document(manifest, split, number).name}"), "")
    shown.add_row("in another split of", cell(sets[1].place), cell(moved))
    console.print(shown)
    return bool(len(removed) or len(added) or moved)


def _texts(manifest: Manifest) -> _Texts:
    """Raises UserError where there are more than can be held."""
    total = sum(split.documents for split in manifest.splits.values())
    if total > MOST_DOCUMENTS:
        raise UserError(
            f"{manifest.place} has {total:,} documents, more than the {MOST_DOCUMENTS:,} that are "
            "compared in memory: leave them out (--documents false)"
        )
    held, splits, numbers = bytearray(), bytearray(), np.zeros(total, dtype=np.int64)
    for place, split in enumerate(manifest.splits):
        for one in documents(manifest, split):
            numbers[len(splits)] = one.number
            splits.append(place)
            held += one.digest
    digests = np.frombuffer(bytes(held), dtype=_PAIR)
    order = np.argsort(digests, kind="stable", order=("a", "b"))
    return _Texts(digests[order], np.frombuffer(bytes(splits), dtype=np.uint8)[order], numbers[order])


def _occurrence(sorted_digests: np.ndarray) -> np.ndarray:
    """(n,) how many equal ones stand before each."""
    places = np.arange(len(sorted_digests))
    begins = np.concatenate([[True], sorted_digests[1:] != sorted_digests[:-1]])
    return places - np.maximum.accumulate(np.where(begins, places, 0))


def _less(one: _Texts, other: _Texts) -> np.ndarray:
    """Places in ``one`` of the texts that ``other`` has not, or not as often, in the order of the set."""
    if not len(one.digests):
        return np.zeros(0, dtype=np.int64)
    low = np.searchsorted(other.digests, one.digests, side="left")
    high = np.searchsorted(other.digests, one.digests, side="right")
    places = np.flatnonzero(_occurrence(one.digests) >= high - low)
    return places[np.lexsort((one.numbers[places], one.splits[places]))]


def _moved(one: _Texts, other: _Texts) -> int:
    """Texts that each set has once, in different splits by number."""
    shared, places, others = np.intersect1d(one.digests, other.digests, return_indices=True)
    del shared
    return int(np.count_nonzero(one.splits[places] != other.splits[others]))
