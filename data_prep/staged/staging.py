"""A corpus through `cleaning` and `dedup` onto the disk, and back as documents.

Comes in: a corpus and options. Goes out: the documents that stay, in the corpus' order, to `clean.select`;
what was dropped and why, to `report`.

1. `clean_lot`: every lot is read, cleaned and written in parts. Lots are independent: any task may do any
   of them.
2. `find_column`: digests and each band of the signatures are a column; columns are independent too.
3. `documents`: the parts in order, without the duplicates.

What is finished is kept and checked as in `notes`, so each step goes on where it stopped, and its files do
not depend on who did what when.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from data_prep import corpora
from data_prep.cleaning.stage import CleaningOptions
from data_prep.dedup.near import SAME, STAYS, Documents, Duplicates, merged, write_pairs
from data_prep.dedup.signatures import Banding
from data_prep.notes import Unusable, read_note, write_note
from data_prep.readers.documents import Document, ReadOptions
from data_prep.staged.lots import Lot, batches_of, lots_of
from data_prep.staged.parts import SAMPLES, Part, PartWriter, finished_part
from data_prep.staged.pool import Pool
from data_prep.tally import Tally
from dualroute.errors import UserError
from dualroute.files import file_sha256

FOLDER = "staged"
DUPLICATE, NEAR_DUPLICATE = "duplicate", "near_duplicate"  # reasons for dropping
_PAIR_SAMPLES = 10
_SAMPLE_CHARS = 600

Progress = Callable[[int, int], None]  # (documents, characters) read


@dataclass(frozen=True)
class Limit:
    """Where reading ends: different documents that stay, and their bytes; None is no limit."""

    documents: int | None = None
    bytes: int | None = None


@dataclass
class Found:
    """What all parts together tell.

    Attributes:
        dropped, counts, samples: see `staged.parts.Part`.
        files: what was read and passed over.
        pairs: samples of near duplicates: (name, text, name of the earlier one, its text).
        read: documents that came in.
    """

    dropped: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    samples: dict[str, list[list[str]]] = field(default_factory=dict)
    files: Tally = field(default_factory=Tally)
    pairs: list[list[str]] = field(default_factory=list)
    read: int = 0


class Staging:
    """One corpus in one folder.

    Args:
        corpus: to be read.
        folder: for parts and notes.
        origin: SHA-256 of options and inputs; what was made from others is made again.
        read_options: makes fresh ones, with their counts.
        cleaning: what documents have to pass.
        downloads: folder of remote files.
        part_bytes: about how large a part or a lot is.
        similarity: from which on texts are near duplicates; None: they are not looked for.
        limit: where to stop.
        note: told a line about each piece of an earlier run that has to be made again.
        keeps_texts: False for a corpus that is only compared with.
    """

    def __init__(
        self,
        corpus: corpora.Corpus,
        folder: Path,
        origin: str,
        read_options: Callable[[], ReadOptions],
        cleaning: CleaningOptions,
        downloads: Path,
        part_bytes: int,
        similarity: float | None = None,
        limit: Limit | None = None,
        note: Callable[[str], None] = lambda line: None,
        keeps_texts: bool = True,
    ) -> None:
        self.corpus, self.folder, self.origin = corpus, folder, origin
        self.cleaning, self.similarity, self.part_bytes = cleaning, similarity, part_bytes
        self.seen: list[Staging] = []  # corpora whose documents count as seen before
        self._read_options, self._downloads = read_options, downloads
        self._limit, self._note, self._keeps_texts = limit or Limit(), note, keeps_texts
        self._banding = None if similarity is None else Banding.of(similarity)
        self.lots = lots_of(corpus, part_bytes)
        self._known: list[Part] | None = None

    @property
    def has_documents(self) -> bool:
        """Whether a part is finished in which a document stays."""
        for path in self.folder.glob("*-*.json"):
            with contextlib.suppress(Unusable):
                if (read_note(path) or {}).get("documents"):
                    return True
        return False

    @property
    def is_limited(self) -> bool:
        return self._limit != Limit()

    # 1: lots to parts

    def clean_all(self, pool: Pool, progress: Progress = lambda documents, chars: None) -> None:
        """Every lot that an earlier run left undone, up to the limit."""
        self.folder.mkdir(exist_ok=True)
        kept = _Kept(self._limit)
        for lot in self.lots:
            self.clean_lot(lot, pool, progress, kept)
            if kept.is_full:
                return

    def clean_lot(
        self,
        lot: Lot,
        pool: Pool,
        progress: Progress = lambda documents, chars: None,
        kept: _Kept | None = None,
    ) -> None:
        """One lot to its parts; those that are finished stay."""
        self.folder.mkdir(exist_ok=True)
        self._known = None
        kept = kept or _Kept(Limit())
        parts = list(self._finished(lot))
        done = self._lot_note(lot)
        if done is not None and done.get("parts") == len(parts):
            for part in parts:
                kept.count(part)
            return
        options = self._read_options()
        of_lot = replace(self.corpus, files=lot.files, passed_over=Tally())
        documents = corpora.documents(of_lot, options, self._downloads)
        for part in parts:
            kept.count(part)
            for _ in range(part.read):  # read and cleaned by an earlier run
                next(documents, None)
        read = chars = 0
        writer: PartWriter | None = None
        batches = batches_of(documents, self.part_bytes) if not kept.is_full else iter(())
        for batch, (outcomes, signed) in pool.clean(batches):
            if writer is None:
                writer = PartWriter(
                    self._base(lot, len(parts)), self.origin, self._banding, self._keeps_texts
                )
            writer.add(outcomes, signed)
            read += len(batch.documents)
            chars += sum(len(document.text) for document in batch.documents)
            progress(read, chars)
            if batch.ends:
                parts.append(writer.close())
                writer = None
                kept.count(parts[-1])
                if kept.is_full:
                    break
        content = {"files": options.files.to_json(), "dropped": dict(options.dropped)}
        write_note(self._lot_path(lot), {"origin": self.origin, "parts": len(parts), **content})

    def _lot_path(self, lot: Lot) -> Path:
        return self.folder / f"{lot.number:05d}.json"

    def _base(self, lot: Lot, number: int) -> Path:
        return self.folder / f"{lot.number:05d}-{number:05d}"

    def _finished(self, lot: Lot) -> Iterator[Part]:
        """The parts of a lot that an earlier run finished, up to the first that is not as it was written."""
        number = 0
        while True:
            base = self._base(lot, number)
            try:
                part = finished_part(base, self.origin)
            except Unusable as error:
                self._note(f"{base}: made again; {error}")
                return
            if part is None:
                return
            yield part
            number += 1

    def _lot_note(self, lot: Lot) -> dict[str, Any] | None:
        try:
            content = read_note(self._lot_path(lot))
        except Unusable:
            return None
        return content if content is not None and content.get("origin") == self.origin else None

    def parts(self) -> list[Part]:
        """All parts, in order; each is compared with its checksum once.

        Raises:
            UserError: a lot has not been done.
        """
        if self._known is None:
            self._known = self._all_parts()
        return self._known

    def _all_parts(self) -> list[Part]:
        found: list[Part] = []
        kept = _Kept(self._limit)
        for lot in self.lots:
            if kept.is_full:
                break
            done = self._lot_note(lot)
            parts = list(self._finished(lot))
            if done is None or done.get("parts") != len(parts):
                raise UserError(
                    f"{self.folder}: lot {lot.number} of {len(self.lots)} is not done; run the tasks that "
                    f"clean "
                    f"again (they continue)"
                )
            for part in parts:
                kept.count(part)
            found += parts
        return found

    # 2: duplicates

    def _all(self) -> tuple[Documents, int]:
        """Documents of the corpora that were seen before and of this one, and the number of the former."""
        assert self._banding is not None
        seen = [part.signed(self._banding) for other in self.seen for part in other.parts()]
        own = [part.signed(self._banding) for part in self.parts()]
        return Documents([*seen, *own], self.similarity or 1.0), sum(part.documents for part in seen)

    @property
    def columns(self) -> int:
        """How many there are to look at, the digests' included; 0 if duplicates are not looked for."""
        return 0 if self._banding is None else 1 + self._banding.bands

    def column_path(self, column: int) -> Path:
        return self.folder / f"column-{column:03d}"

    def find_column(self, column: int, documents: Documents | None = None) -> None:
        """Who repeats whom by one column, unless an earlier run has found it out."""
        path, note = self.column_path(column), self.column_path(column).with_suffix(".json")
        documents = documents or self._all()[0]
        parts = hashlib.sha256(repr([part.documents for part in documents.parts]).encode()).hexdigest()
        try:
            known = read_note(note)
            if known is not None and known == {
                "origin": self.origin,
                "parts": parts,
                "sha256": file_sha256(path),
            }:
                return
        except (Unusable, OSError, UserError):
            pass
        write_pairs(path, *documents.pairs(column, self.folder))
        write_note(note, {"origin": self.origin, "parts": parts, "sha256": file_sha256(path)})

    def find_all(self) -> None:
        """Every column."""
        documents, _ = self._all()
        for column in range(self.columns):
            self.find_column(column, documents)

    def duplicates(self) -> tuple[Duplicates, int]:
        """Everybody's fate, and the number of documents of other corpora that come first."""
        documents, seen = self._all()
        columns = [self.column_path(column) for column in range(self.columns)]
        return merged(documents.total, columns), seen

    # 3: what stays

    def documents(self, dropped: Counter[str]) -> Iterator[Document]:
        """The documents that stay; those that do not are counted in ``dropped``."""
        parts = self.parts()
        fates = np.zeros(0, np.uint8)
        if self.similarity is not None:
            found, seen = self.duplicates()
            fates = found.fates[seen:]
        place = 0
        for part in parts:
            dropped.update(part.dropped)
            for document in part.texts():
                fate = fates[place] if len(fates) else STAYS
                place += 1
                if fate == STAYS:
                    yield document
                else:
                    dropped[DUPLICATE if fate == SAME else NEAR_DUPLICATE] += 1
        dropped.update(self._reader_dropped())

    def _reader_dropped(self) -> Counter[str]:
        total: Counter[str] = Counter()
        for lot in self.lots:
            total.update((self._lot_note(lot) or {}).get("dropped", {}))
        return total

    def found(self) -> Found:
        """What the parts tell, for the survey and the report."""
        result = Found()
        result.files.add(self.corpus.passed_over)
        for lot in self.lots:
            files = (self._lot_note(lot) or {}).get("files")
            if files:
                result.files.add(Tally.from_json(files))
        parts = self.parts()
        for part in parts:
            result.read += part.read
            result.dropped.update(part.dropped)
            result.counts.update(part.counts)
            for reason, samples in part.samples.items():
                mine = result.samples.setdefault(reason, [])
                mine += samples[: SAMPLES - len(mine)]
        if self.similarity is not None:
            result.pairs = self._pair_samples(parts)
        return result

    def _pair_samples(self, parts: list[Part]) -> list[list[str]]:
        """The first near duplicates beside what they resemble."""
        found, seen = self.duplicates()
        dropped = np.flatnonzero(found.fates[seen:] > SAME)[:_PAIR_SAMPLES] + seen
        wanted = {int(place) for place in (*dropped, *found.of[dropped])}
        texts: dict[int, Document] = {}
        place = seen
        for part in parts:
            if any(place <= number < place + part.documents for number in wanted):
                for number, document in enumerate(part.texts(), start=place):
                    if number in wanted:
                        texts[number] = document
            place += part.documents
        pairs = []
        for number in dropped.tolist():
            other = texts.get(int(found.of[number]))
            named = (other.name, other.text) if other else ("a corpus of near_duplicates_of", "")
            pairs.append(
                [texts[number].name, texts[number].text[:_SAMPLE_CHARS], named[0], named[1][:_SAMPLE_CHARS]]
            )
        return pairs

    def write_hits(self, path: Path) -> int:
        """The list of what evaluation sets hold too, a JSON object a line; how many there are."""
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        count = 0
        with open(temporary, "wb") as stream:
            for part in self.parts():
                for line in part.hit_lines():
                    stream.write(line)
                    count += 1
        os.replace(temporary, path)
        return count

    def discard(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


class _Kept:
    """Different documents that stay, counted until a limit is reached."""

    def __init__(self, limit: Limit) -> None:
        self._limit, self._digests, self._documents, self._bytes = limit, set[bytes](), 0, 0

    def count(self, part: Part) -> None:
        if self._limit == Limit() or self.is_full:
            return
        for document in part.texts():
            data = document.text.encode()
            digest = hashlib.blake2b(data, digest_size=16).digest()
            if digest not in self._digests:
                self._digests.add(digest)
                self._documents += 1
                self._bytes += len(data)

    @property
    def is_full(self) -> bool:
        documents, size = self._limit.documents, self._limit.bytes
        return (documents is not None and self._documents >= documents) or (
            size is not None and self._bytes >= size
        )
