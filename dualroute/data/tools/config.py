"""The options of ``dualroute data inspect | stats | sample | diff``.  No torch is imported here."""

from __future__ import annotations

from dataclasses import dataclass

from dualroute.errors import UserError
from dualroute.paths import DataPath, LocalPath
from dualroute.settings import at_least, check_fields

MOST_DOCUMENTS = 1 << 27  # 16 bytes of each are held
MOST_TOKENS = 1 << 20


@dataclass(frozen=True)
class ShowDataConfig:
    """What a data set holds.

    Args:
        data: Dataset folder, or the address of a set elsewhere.
    """

    data: DataPath

    def __post_init__(self) -> None:
        check_fields(self, "")


@dataclass(frozen=True)
class StatsDataConfig:
    """Figures of the documents of a data set: lengths, sources, languages, bytes per token, duplicates.

    Args:
        data: Dataset folder, or the address of a set elsewhere.
        output: Folder for stats.json and the figures as PNG (extra: compress, which brings matplotlib).
        max_documents: Sources, languages and duplicates are those of so many documents, in whole shards from
            all over the set; lengths are those of all.
        sources: Sources that are listed; the rest is summed up.
    """

    data: DataPath
    output: LocalPath | None = None
    max_documents: int = 1_000_000
    sources: int = 20

    def __post_init__(self) -> None:
        check_fields(self, "", {"max_documents": at_least(1, MOST_DOCUMENTS), "sources": at_least(1, 1000)})


@dataclass(frozen=True)
class SampleDataConfig:
    """Documents of a data set as text.

    Args:
        data: Dataset folder, or the address of a set elsewhere.
        split: Which documents: train, val.
        documents: So many, drawn at random.
        seed: Of the draw.
        number: This document instead, counted from 0.
        max_tokens: Tokens that are shown of each.
        ids: Show the ids beside the text.
    """

    data: DataPath
    split: str = "train"
    documents: int = 5
    seed: int = 0
    number: int | None = None
    max_tokens: int = 200
    ids: bool = False

    def __post_init__(self) -> None:
        ranges = {"documents": at_least(1, 10_000), "max_tokens": at_least(1, MOST_TOKENS)}
        check_fields(self, "", ranges)


@dataclass(frozen=True)
class DiffDataConfig:
    """What two data sets do not have in common: options, tokenizers, documents.

    Args:
        first: Dataset folder, or the address of a set elsewhere.
        second: Another one.
        documents: Compare the documents too, by the sha256 of their text; false compares the manifests alone.
        examples: Names of added and removed documents that are shown.
    """

    first: DataPath
    second: DataPath
    documents: bool = True
    examples: int = 5

    def __post_init__(self) -> None:
        check_fields(self, "", {"examples": at_least(0, 10_000)})
        if self.first == self.second:
            raise UserError(f"first and second are both {self.first}: name two data sets")
