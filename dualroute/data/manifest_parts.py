"""What a manifest is made of: the tokenizer, the shards, and the splits that they add up to.

In: what `data_prep` counted, or what stands in manifest.json. Out: parts of
    `dualroute.data.manifest.Manifest`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dualroute.data.tokenizer import Tokenizer


def token_dtype(vocab_size: int) -> str:
    """Smallest numpy type that holds every id: ``uint16`` up to a vocabulary of 65,536, else ``uint32``."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def canonical_json(value: Any) -> bytes:
    """JSON that is equal for equal values: keys sorted, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


@dataclass(frozen=True)
class TokenizerInfo:
    """The tokenizer that made the ids; ``pad_id`` is an id to fill with (<eos> in a model without <pad>),
    ``settings`` what stood beside its file, see `TokenizerSettings.to_json`."""

    file: str
    sha256: str
    vocab_size: int
    bos_id: int
    eos_id: int
    pad_id: int
    settings: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        if not values["settings"]:  # the manifest is what it was before there were any
            del values["settings"]
        return values

    def opened(self, folder: Path) -> Tokenizer:
        """The tokenizer of a set in ``folder``; raises UserError where it cannot be used."""
        from dualroute.data.tokenizer import (
            Tokenizer,  # needs sentencepiece, which reading a manifest does not
        )
        from dualroute.data.tokenizer_settings import settings_in

        path = folder / self.file
        return Tokenizer(path, settings_in(self.settings, path) if self.settings else None)


@dataclass(frozen=True)
class Shard:
    """One tar. ``bytes`` counts the UTF-8 bytes of the text, ``size`` those of the file."""

    file: str
    documents: int
    tokens: int
    bytes: int
    size: int
    sha256: str


@dataclass(frozen=True)
class Split:
    """Train or validation: the totals over its shards, and its index file."""

    name: str
    documents: int
    tokens: int
    bytes: int
    index_file: str
    index_sha256: str
    shards: tuple[Shard, ...]

    @property
    def targets(self) -> int:
        """Next-token targets: every token but the first of its document is predicted once."""
        return self.tokens - self.documents

    @property
    def targets_per_byte(self) -> float:
        """Turns nats per target into nats per byte of text, which compares models across tokenizers."""
        return self.targets / self.bytes

    def to_json(self) -> dict[str, Any]:
        """The split as it stands in manifest.json."""
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "index": {"file": self.index_file, "sha256": self.index_sha256},
            "shards": [dataclasses.asdict(shard) for shard in self.shards],
        }
