"""What happens to one document before duplicates are looked for; the work of one process among many.

Comes in: names and texts as `readers` give them. Goes out: `Outcome`, in the same order.

1. `text.clean_text`, and the limits of length;
2. ``languages``: its language must be among them;
3. ``quality``: the rules, one after another;
4. ``decontaminate``: what evaluation sets hold too is cut out, or the document goes;
5. ``scrub``: personal data gives way;
6. its digest, and its MinHash if near duplicates are to be found.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.clean import Selection, length_fault
from data_prep.cleaning.contamination import Contamination, described
from data_prep.cleaning.language import language_of, require_languages
from data_prep.cleaning.quality import judge, require_rules
from data_prep.cleaning.scrub import scrub
from data_prep.cleaning.text import clean_text
from data_prep.dedup.signatures import PERMUTATIONS, signatures, signer
from data_prep.readers.chats import rewritten, said_in
from data_prep.readers.documents import Document


@dataclass(frozen=True)
class CleaningOptions:
    """What a document has to pass; see `config.PrepareConfig` for the fields."""

    selection: Selection = field(default_factory=Selection)
    languages: tuple[str, ...] = ()
    language_confidence: float = 0.0
    quality: tuple[str, ...] = ()
    decontaminate: tuple[str, ...] = ()
    decontaminate_ngram: int = 13
    decontaminate_action: str = "document"
    scrub: tuple[str, ...] = ()
    near_duplicates: bool = False
    chats: bool = False


@dataclass
class Outcome:
    """A document after all that.

    Attributes:
        name, text: of the document; the text as it was where it is dropped.
        why: it is dropped; None if it stays.
        language: if it was asked for.
        digest: SHA-256 of the text that stays.
        counts: of what was done to texts that stay.
        hit: a line for the list of what evaluation sets hold too.
    """

    name: str
    text: str
    why: str | None = None
    language: str | None = None
    digest: bytes = b""
    counts: Counter[str] = field(default_factory=Counter)
    hit: dict[str, Any] | None = None


class Cleaner:
    """The steps with what they need: models, and the n-grams of evaluation sets.

    Raises:
        UserError: a library is missing, a language is unknown, an evaluation set cannot be read.
    """

    def __init__(self, options: CleaningOptions) -> None:
        self.options = options
        if options.languages:
            require_languages(options.languages)
        if options.quality:
            require_rules()
        if options.near_duplicates:
            signer()
        self.contamination = (
            Contamination(options.decontaminate, options.decontaminate_ngram)
            if options.decontaminate
            else None
        )

    def clean(self, documents: Sequence[Document]) -> tuple[list[Outcome], NDArray[np.uint32]]:
        """What becomes of each, and the signatures (documents that stay, 128)."""
        outcomes = [self._one(document) for document in documents]
        if not self.options.near_duplicates:
            return outcomes, np.zeros((0, PERMUTATIONS), np.uint32)
        return outcomes, signatures([self._read(outcome) for outcome in outcomes if outcome.why is None])

    def _read(self, outcome: Outcome) -> str:
        """What is looked at: the text, or what is said in a chat."""
        return said_in(outcome.text) if self.options.chats else outcome.text

    def _one(self, document: Document) -> Outcome:
        options = self.options
        outcome = Outcome(document.name, clean_text(document.text), language=document.language)
        outcome.why = length_fault(outcome.text, options.selection)
        if outcome.why is None and options.languages:
            outcome.language, probability = language_of(self._read(outcome), outcome.name)
            if outcome.language not in options.languages:
                outcome.why = f"language: {outcome.language}"
            elif probability < options.language_confidence:
                outcome.why = "language: uncertain"
        if outcome.why is None and options.quality:
            text, outcome.why = judge(outcome.text, outcome.name, options.quality, outcome.language)
            if outcome.why is None:
                if len(text) < len(outcome.text):
                    outcome.counts["shortened by quality rules"] += 1
                outcome.text = text
        if outcome.why is None and self.contamination is not None:
            self._decontaminate(outcome, self.contamination)
        if outcome.why is None and options.scrub:
            self._scrub(outcome)
        if outcome.why is None:
            outcome.why = length_fault(outcome.text, options.selection)  # it may have become shorter
        if outcome.why is None:
            outcome.digest = hashlib.sha256(outcome.text.encode()).digest()
        return outcome

    def _scrub(self, outcome: Outcome) -> None:
        def without(text: str) -> str:
            text, found = scrub(text, self.options.scrub)
            outcome.counts.update({f"{kind} replaced": count for kind, count in found.items()})
            return text

        outcome.text = rewritten(without, outcome.text) if self.options.chats else without(outcome.text)

    def _decontaminate(self, outcome: Outcome, contamination: Contamination) -> None:
        read = self._read(outcome)
        hits = contamination.hits(read)
        if not hits:
            return
        whole = self.options.decontaminate_action == "document"
        left = "" if whole else contamination.without(outcome.text, hits)
        gone = not left.strip()
        outcome.hit = described(read, outcome.name, hits, "document" if gone else "passages")
        if gone:
            outcome.why = "contaminated"
        else:
            outcome.text = left
            outcome.counts["passages of evaluation sets cut out"] += len(hits)
