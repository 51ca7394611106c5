"""Which documents stay, what their text becomes, and on which side of the split they fall.

A document passes these steps, in this order:

1. `formats.read_documents` gives (name, text); undecodable text has been dealt with there.
2. newlines: CR LF, CR and NEL become LF.
3. control characters go, all but newline and tab; so does the byte-order mark.
4. Unicode NFC: one spelling for each accented letter; more than 64 accents on one letter stay as they are.
5. nothing but white space: dropped (``empty``).
6. shorter than ``min_chars`` or longer than ``max_chars``: dropped (``too_short``, ``too_long``).
7. the same text as an earlier document: dropped (``duplicate``).
8. ``max_documents`` or ``max_bytes`` reached: the rest of the corpus is not read.
9. train or val: by the hash of the text, or by name (``val_documents``); of a lone document the end is val
   (``val_tail``).

Comes from `formats`; goes to `train_tokenizer` (train side only) and to `shards`.

Every step depends on the document and the ones before it alone, so the whole pass can be
repeated - once to survey, once to write - with the same outcome and without storing decisions. Duplicates
cost 16 bytes of digest each (`dedup.digests`: 160 MB for ten million, twice that while arrays are merged).
"""

from __future__ import annotations

import fnmatch
import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from data_prep.cleaning.text import clean_text
from data_prep.dedup.digests import DigestSet
from data_prep.readers.documents import Document


@dataclass(frozen=True)
class Selection:
    """What stays and where it goes.

    Attributes:
        min_chars, max_chars: limits of a document's length in characters, after cleaning.
        max_documents, max_bytes: stop after the document that reaches them.
        val_fraction: share of documents held out, by the hash of their text.
        val_documents: names or globs of documents held out; replaces ``val_fraction``.
        seed: changes which documents the fraction holds out.
        val_tail: hold out the fraction at the end of each document, not whole documents.
    """

    min_chars: int = 1
    max_chars: int | None = None
    max_documents: int | None = None
    max_bytes: int | None = None
    val_fraction: float = 0.02
    val_documents: tuple[str, ...] = ()
    seed: int = 0
    val_tail: bool = False


@dataclass(frozen=True)
class CleanDocument:
    """A document that stays; ``num_bytes`` and ``digest`` (SHA-256) are of the cleaned text in UTF-8."""

    name: str
    text: str
    num_bytes: int
    digest: bytes
    split: str
    language: str | None = None  # where one was asked for


def in_validation(digest: bytes, fraction: float, seed: int) -> bool:
    """Whether a text falls into the held-out ``fraction``: a pure function of text and seed."""
    key = (seed % (1 << 64)).to_bytes(8, "little")
    draw = hashlib.blake2b(digest, digest_size=8, key=key).digest()
    return int.from_bytes(draw, "big") < fraction * (1 << 64)


def tail_start(text: str, fraction: float) -> int | None:
    """Where the last ``fraction`` of a text begins, at the nearest border of paragraphs, lines or words.

    None when the text has no two parts. A border counts only if it leaves the tail between half and one and
    a half of what was asked for.
    """
    wanted = len(text) * (1 - fraction)
    slack = len(text) * min(fraction, 1 - fraction) / 2
    for mark in ("\n\n", "\n", " "):
        near = [
            place + len(mark)
            for place in (text.rfind(mark, 0, int(wanted) + len(mark)), text.find(mark, int(wanted)))
            if place >= 0 and abs(place + len(mark) - wanted) <= slack
        ]
        for start in sorted(near, key=lambda place: abs(place - wanted)):
            if not text[:start].isspace() and text[start:].strip():
                return start
    start = min(max(1, round(wanted)), len(text) - 1)
    return start if text[:start].strip() and text[start:].strip() else None


def matches(name: str, pattern: str) -> bool:
    """Whether a document's name fits a glob: the whole name, its last part, or that without its ending."""
    last = re.split(r"[/!]", name)[-1]
    return any(fnmatch.fnmatchcase(text, pattern) for text in (name, last, last.partition(".")[0]))


def length_fault(text: str, selection: Selection) -> str | None:
    """Why a cleaned text is dropped for its length (steps 5 and 6); None if it is not."""
    if not text or text.isspace():
        return "empty"
    if len(text) < selection.min_chars:
        return "too_short"
    return "too_long" if selection.max_chars is not None and len(text) > selection.max_chars else None


def select(
    documents: Iterable[Document],
    selection: Selection,
    dropped: Counter[str],
    matched: set[str] | None = None,
    distinct: bool = False,
) -> Iterator[CleanDocument]:
    """Steps 2 to 9.

    Args:
        documents: from `corpora.documents`.
        selection: the limits.
        dropped: receives the number of documents dropped, by reason.
        matched: receives the members of ``val_documents`` that held out something.
        distinct: no two documents are the same, so step 7 need not remember them.
    """
    seen = DigestSet()
    kept = kept_bytes = 0
    for document in documents:
        text = clean_text(document.text)
        if fault := length_fault(text, selection):
            dropped[fault] += 1
            continue
        data = text.encode()
        digest = hashlib.sha256(data).digest()
        if not distinct and not seen.add(digest):
            dropped["duplicate"] += 1
            continue
        start = tail_start(text, selection.val_fraction) if selection.val_tail else None
        if start is None:
            split = _split(document.name, digest, selection, matched)
            yield CleanDocument(document.name, text, len(data), digest, split, document.language)
        else:
            yield _part(document, "", text[:start], "train")
            yield _part(document, "#tail", text[start:], "val")
        kept += 1
        kept_bytes += len(data)
        if kept == selection.max_documents or (
            selection.max_bytes is not None and kept_bytes >= selection.max_bytes
        ):
            return


def _part(document: Document, ending: str, text: str, split: str) -> CleanDocument:
    data = text.encode()
    digest = hashlib.sha256(data).digest()
    return CleanDocument(document.name + ending, text, len(data), digest, split, document.language)


def _split(name: str, digest: bytes, selection: Selection, matched: set[str] | None) -> str:
    if not selection.val_documents:
        return "val" if in_validation(digest, selection.val_fraction, selection.seed) else "train"
    hits = [pattern for pattern in selection.val_documents if matches(name, pattern)]
    if matched is not None:
        matched.update(hits)
    return "val" if hits else "train"
