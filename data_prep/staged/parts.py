"""The files of one part: texts that stay, what is needed to find their duplicates, what was dropped and
why.

In ``.prepare/staged`` of the output folder, until the manifest is written::

    00000-0000.zst       a JSON list for each document that stays: name, text, language
    00000-0000.signed    digests and signatures (`dedup.signed_part`), if near duplicates are looked for
    00000-0000.hits      what evaluation sets hold too, a JSON object a line
    00000-0000.json      counts, samples and checksums (`notes`); written last
    00000.json           the lot is done: what its files were
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray

from data_prep.cleaning.stage import Outcome
from data_prep.dedup.signatures import PERMUTATIONS, Banding
from data_prep.dedup.signed_part import SignedPart, signed_bytes
from data_prep.notes import Unusable, read_note, write_note
from data_prep.readers.documents import Document
from dualroute.errors import UserError
from dualroute.files import file_sha256, write_bytes_atomically

SAMPLES = 5  # of each reason
_SAMPLE_CHARS = 600


@dataclass
class Part:
    """A part as its note tells.

    Attributes:
        base: its files without their endings.
        read: documents that went in.
        documents, size: that stay, and bytes of their lines.
        dropped, counts: documents by reason, and what was done to those that stay.
        samples: the first of each reason, as (name, beginning of the text).
        languages: documents that stay, by language.
        hits: documents that evaluation sets hold too.
        sha256: of the files, by ending.
    """

    base: Path
    read: int = 0
    documents: int = 0
    size: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    samples: dict[str, list[list[str]]] = field(default_factory=dict)
    hits: int = 0
    sha256: dict[str, str] = field(default_factory=dict)

    def file(self, ending: str) -> Path:
        return self.base.with_name(self.base.name + ending)

    def signed(self, banding: Banding) -> SignedPart:
        return SignedPart(self.file(".signed"), self.documents, banding)

    def texts(self) -> Iterator[Document]:
        """The documents that stay, one after another."""
        try:
            with (
                open(self.file(".zst"), "rb") as stream,
                zstandard.ZstdDecompressor().stream_reader(stream) as opened,
            ):
                for line in io.BufferedReader(opened, 1 << 18):
                    yield Document(*json.loads(line))
        except (OSError, ValueError, zstandard.ZstdError) as error:
            raise UserError(
                f"{self.file('.zst')}: damaged since it was written ({error}); run again (it is made anew)"
            ) from error

    def hit_lines(self) -> Iterator[bytes]:
        if self.hits:
            with open(self.file(".hits"), "rb") as stream:
                yield from stream


class PartWriter:
    """Gathers a part's outcomes, and writes them when it is complete.

    Args:
        base: of the files.
        origin: what the part is made from and with.
        banding: of signatures; None: none are kept.
        keeps_texts: False for corpora that are only compared with.
    """

    def __init__(self, base: Path, origin: str, banding: Banding | None, keeps_texts: bool = True) -> None:
        self.part = Part(base)
        self._origin, self._banding, self._keeps_texts = origin, banding, keeps_texts
        self._buffer = io.BytesIO()
        self._stream = zstandard.ZstdCompressor(level=1).stream_writer(self._buffer, closefd=False)
        self._digests: list[bytes] = []
        self._signed: list[NDArray[np.uint32]] = []
        self._hits: list[bytes] = []

    def add(self, outcomes: list[Outcome], signed: NDArray[np.uint32]) -> None:
        part = self.part
        for outcome in outcomes:
            part.read += 1
            part.counts.update(outcome.counts)
            if outcome.hit is not None:
                self._hits.append(json.dumps(outcome.hit, ensure_ascii=False).encode() + b"\n")
            if outcome.why is not None:
                part.dropped[outcome.why] += 1
                samples = part.samples.setdefault(outcome.why, [])
                if len(samples) < SAMPLES:
                    samples.append([outcome.name[-300:], outcome.text[:_SAMPLE_CHARS]])
                continue
            part.documents += 1
            self._digests.append(outcome.digest)
            line = json.dumps([outcome.name, outcome.text, outcome.language], ensure_ascii=False)
            data = line.encode(errors="backslashreplace") + b"\n"
            part.size += len(data)
            if self._keeps_texts:
                self._stream.write(data)
        self._signed.append(signed)

    def close(self) -> Part:
        """Write the files, the note last."""
        part = self.part
        part.hits = len(self._hits)
        self._stream.close()
        files = {".zst": self._buffer.getvalue()} if self._keeps_texts else {}
        if self._banding is not None:
            signed = np.concatenate([np.zeros((0, PERMUTATIONS), np.uint32), *self._signed])
            files[".signed"] = signed_bytes(self._digests, signed, self._banding)
        if self._hits:
            files[".hits"] = b"".join(self._hits)
        for ending, data in files.items():
            write_bytes_atomically(part.file(ending), data)
            part.sha256[ending] = hashlib.sha256(data).hexdigest()
        write_note(part.file(".json"), {"origin": self._origin, **_content(part)})
        return part


def _content(part: Part) -> dict[str, Any]:
    content = {name: value for name, value in vars(part).items() if name != "base"}
    return content | {"dropped": dict(part.dropped), "counts": dict(part.counts)}


def finished_part(base: Path, origin: str) -> Part | None:
    """A part that an earlier run finished; None if none did.

    Raises:
        Unusable: there is a note of it, but note or files are not what was written.
    """
    part = Part(base)
    content = read_note(part.file(".json"))
    if content is None:
        return None
    if content.pop("origin", None) != origin:
        raise Unusable("it is of another preparation")
    try:
        part = Part(base, **content)
        part.dropped, part.counts = Counter(part.dropped), Counter(part.counts)
        for ending, sha256 in part.sha256.items():
            if file_sha256(part.file(ending)) != sha256:
                raise Unusable(f"{part.file(ending).name} is not what was written")
    except (TypeError, AttributeError, UserError, OSError) as error:
        raise Unusable("a file of it is gone, or its note is none of this version") from error
    return part
