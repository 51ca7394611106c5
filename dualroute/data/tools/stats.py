"""``dualroute data stats``: what the documents of a data set are like, in tables, JSON and PNG."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from dualroute.data.manifest import Manifest
from dualroute.data.tools.charts import draw_charts
from dualroute.data.tools.config import StatsDataConfig
from dualroute.data.tools.documents import documents, length_histogram, spread
from dualroute.data.tools.inspect import cell, table
from dualroute.errors import UserError
from dualroute.files import write_bytes_atomically

_MOST_GROUPS = 100_000  # sources that are counted apart


@dataclass
class Group:
    """What documents of one source or language add up to."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text for each token, <bos> and <eos> counted."""
        return self.bytes / self.tokens if self.tokens else 0.0


@dataclass
class SplitStats:
    """Figures of a split.

    Attributes:
        documents, tokens, bytes: of all.
        read: documents that sources, languages and duplicates are of.
        duplicates: of those, documents whose text one before them has.
        lengths: documents of each bin; edges of the bins in tokens.
        shortest, longest: length in tokens.
        sources, languages: by name.
    """

    documents: int
    tokens: int
    bytes: int
    lengths: list[int]
    edges: list[int]
    shortest: int
    longest: int
    read: int = 0
    duplicates: int = 0
    sources: dict[str, Group] = field(default_factory=lambda: defaultdict(Group))
    languages: dict[str, Group] = field(default_factory=lambda: defaultdict(Group))


def stats_data(config: StatsDataConfig) -> int:
    """The command.

    Raises:
        UserError: the set cannot be read, or the output not written.
    """
    manifest, console = Manifest.load(config.data), Console()
    digests: dict[str, np.ndarray] = {}
    found = {split: _of_split(manifest, split, config, digests) for split in manifest.splits}
    shared = _shared(digests)
    for split, stats in found.items():
        _print(console, split, stats, config.sources)
    if shared:
        console.print(f"{shared:,} texts stand in several splits: what is validated on has been trained on")
    if config.output is not None:
        folder = Path(config.output)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            content = {
                "data": manifest.place,
                "fingerprint": manifest.fingerprint,
                "texts_in_several_splits": shared,
                "splits": {name: asdict(stats) for name, stats in found.items()},
            }
            text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
            write_bytes_atomically(folder / "stats.json", text.encode(errors="backslashreplace"))
            names = draw_charts(folder, found, config.sources)
        except OSError as error:
            raise UserError(
                f"output {folder}: cannot be written ({error.strerror}); choose another"
            ) from error
        console.print(f"written: {', '.join(['stats.json', *names])} in {folder}", markup=False)
    return 0


def _of_split(
    manifest: Manifest, split: str, config: StatsDataConfig, digests: dict[str, np.ndarray]
) -> SplitStats:
    info = manifest.split(split)
    counts, edges, shortest, longest = length_histogram(manifest, split)
    stats = SplitStats(
        info.documents, info.tokens, info.bytes, counts.tolist(), edges.tolist(), shortest, longest
    )
    held = bytearray()
    for document in documents(manifest, split, spread(info.shards, config.max_documents)):
        stats.read += 1
        held += document.digest
        for groups, name in ((stats.sources, document.source), (stats.languages, document.language)):
            if not name:
                continue
            if name not in groups and len(groups) >= _MOST_GROUPS:
                name = "(others)"
            group = groups[name]
            group.documents += 1
            group.tokens += document.tokens
            group.bytes += document.num_bytes
    found = np.unique(np.frombuffer(bytes(held), dtype="V16").view([("a", "<u8"), ("b", "<u8")]))
    stats.duplicates = stats.read - len(found)
    stats.sources, stats.languages = dict(stats.sources), dict(stats.languages)
    digests[split] = found
    return stats


def _shared(digests: dict[str, np.ndarray]) -> int:
    """Texts that more than one split has."""
    together = np.concatenate(list(digests.values()))
    return len(together) - len(np.unique(together))


def largest(groups: dict[str, Group], most: int) -> list[tuple[str, Group]]:
    """The groups with most tokens, and the rest as one."""
    ordered = sorted(groups.items(), key=lambda item: (-item[1].tokens, item[0]))
    rest = ordered[most:]
    if not rest:
        return ordered
    keys = ("documents", "tokens", "bytes")
    total = Group(*(sum(getattr(group, key) for _, group in rest) for key in keys))
    return [*ordered[:most], (f"({len(rest):,} others)", total)]


def _print(console: Console, split: str, stats: SplitStats, most: int) -> None:
    title = f"{split}: {stats.documents:,} documents, {stats.tokens:,} tokens, {stats.bytes:,} bytes of text"
    lengths = table(title, "tokens", "", "documents", "share", numbers=2)
    top = max(stats.lengths)
    for place, count in enumerate(stats.lengths):
        low, high = max(stats.edges[place], stats.shortest), min(stats.edges[place + 1] - 1, stats.longest)
        bar = "█" * round(30 * count / top) or ("▏" if count else "")
        lengths.add_row(cell(f"{low:,}–{high:,}"), bar, cell(count), f"{count / stats.documents:.1%}")
    console.print(lengths)
    for word, groups in (("source", stats.sources), ("language", stats.languages)):
        if not groups:
            continue
        shown = table(
            f"{split}, by {word} ({stats.read:,} of {stats.documents:,} documents were read)",
            *(word, "documents", "tokens", "share", "bytes", "bytes a token"),
            numbers=5,
        )
        tokens = sum(group.tokens for group in groups.values())
        for name, group in largest(groups, most):
            row: list[Any] = [
                name,
                group.documents,
                group.tokens,
                f"{group.tokens / tokens:.1%}",
                group.bytes,
            ]
            shown.add_row(*map(cell, row), f"{group.bytes_per_token:.2f}")
        console.print(shown)
    console.print(
        f"{split}: {stats.duplicates:,} exact duplicates among {stats.read:,} documents\n", markup=False
    )
