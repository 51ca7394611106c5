"""Which files of a corpus are one piece of work, and which documents one part of it.

Comes in: a corpus and a size. Goes out: `Lot`, some files that follow one another; the borders depend on
the sizes of the files alone, so any number of tasks makes the same lots. A part is a stretch of a lot's
documents; a run that was interrupted goes on behind the last part that it finished.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from data_prep.corpora import Corpus, SourceFile
from data_prep.readers.documents import Document

_BATCH_CHARS = 1 << 18  # of text that is handed to a process at once
_BATCH_DOCUMENTS = 1 << 9
_PART_DOCUMENTS = 1 << 17  # 60 MB of digests and signatures


@dataclass(frozen=True)
class Lot:
    """Files ``files`` of a corpus, the ``number``-th such."""

    number: int
    files: tuple[SourceFile, ...]


def lots_of(corpus: Corpus, size: int) -> list[Lot]:
    """The files of a corpus in lots of about ``size`` bytes; a file that must be fetched is a lot by
    itself."""
    lots: list[Lot] = []
    held: list[SourceFile] = []
    total = 0
    for file in corpus.files:
        held.append(file)
        total += size if file.path is None else file.path.stat().st_size
        if total >= size:
            lots.append(Lot(len(lots), tuple(held)))
            held, total = [], 0
    return [*lots, Lot(len(lots), tuple(held))] if held else lots


@dataclass(frozen=True)
class Batch:
    """Documents of one part; ``ends`` where they are its last."""

    documents: list[Document]
    ends: bool


def batches_of(documents: Iterable[Document], part_chars: int) -> Iterator[Batch]:
    """Documents in batches, and where a part ends: behind the document that brings it to ``part_chars``."""
    held: list[Document] = []
    chars = part = count = 0
    for document in documents:
        held.append(document)
        chars += len(document.text)
        part += len(document.text)
        count += 1
        ends = part >= part_chars or count >= _PART_DOCUMENTS
        if ends or chars >= _BATCH_CHARS or len(held) >= _BATCH_DOCUMENTS:
            yield Batch(held, ends)
            held, chars = [], 0
            if ends:
                part = count = 0
    if held:
        yield Batch(held, True)
