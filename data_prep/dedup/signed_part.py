"""What is kept on the disk of each document to find its duplicates: 16 bytes of digest, 8 for each band,
256 of signature.

A file holds the documents of a part, column after column, so that `near` reads one column of all parts in
turn and maps the rest. Signatures keep the low 16 bits of each number: two that differ agree in them once
in 65,536.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.dedup.shingles import Hashes
from data_prep.dedup.signatures import PERMUTATIONS, Banding
from dualroute.errors import UserError
from dualroute.files import write_bytes_atomically

_DIGEST = 2  # numbers of 8 bytes


def signed_bytes(digests: list[bytes], signed: NDArray[np.uint32], banding: Banding) -> bytes:
    """The contents of a file: SHA-256 of the texts (16 bytes are kept), their signatures and bands."""
    kept = np.frombuffer(b"".join(digest[:16] for digest in digests), "<u8").reshape(-1, _DIGEST)
    columns = (kept.T, banding.hashes(signed), signed.astype("<u2"))
    return b"".join(np.ascontiguousarray(column).tobytes() for column in columns)


@dataclass(frozen=True)
class SignedPart:
    """A file of `signed_bytes`, mapped when it is needed.

    Attributes:
        path: of the file.
        documents: how many it is of.
        banding: that it was made with.
    """

    path: Path
    documents: int
    banding: Banding

    def write(self, data: bytes) -> None:
        write_bytes_atomically(self.path, data)

    def column(self, number: int) -> Hashes:
        """8 bytes of each document: columns 0 and 1 are the digest, those from 2 on the bands."""
        start = 8 * number * self.documents
        return self._mapped("<u8", start, (self.documents,))

    @property
    def signatures(self) -> NDArray[np.uint16]:
        """(documents, 128)."""
        start = 8 * (_DIGEST + self.banding.bands) * self.documents
        return self._mapped("<u2", start, (self.documents, PERMUTATIONS))

    def _mapped(self, dtype: str, start: int, shape: tuple[int, ...]) -> NDArray:
        if not self.documents:
            return np.zeros(shape, dtype)
        try:
            return np.memmap(self.path, dtype, "r", start, shape)
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path}: is gone or cut short; use --force true to start again") from error
