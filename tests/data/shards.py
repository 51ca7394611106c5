"""A tiny dataset folder for tests: documents given as lists of ids, written as `data_prep` would."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dualroute.data.manifest import Manifest, Shard, Split, TokenizerInfo, token_dtype
from dualroute.files import file_sha256

Documents = Sequence[Sequence[int]]


def numbered(lengths: Sequence[int], first: int = 0) -> list[list[int]]:
    """Documents whose ids are their positions in the stream: a batch tells where each id came from."""
    ends = np.cumsum(lengths).tolist()
    return [list(range(first + end - n, first + end)) for n, end in zip(lengths, ends, strict=True)]


def write_dataset(
    folder: Path,
    train: Documents,
    val: Documents = (),
    vocab_size: int = 1 << 17,
    documents_per_shard: int = 4,
    pad_id: int = 3,
    tokenizer: bytes = b"not a tokenizer",
) -> Manifest:
    """Write shards, indices, a stand-in for the tokenizer and the manifest; load the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(tokenizer)
    dtype = token_dtype(vocab_size)
    splits = {
        name: _write_split(folder, name, documents, dtype, documents_per_shard)
        for name, documents in {"train": train, "val": val}.items()
        if documents
    }
    sha256 = file_sha256(folder / "tokenizer.model")
    info = TokenizerInfo("tokenizer.model", sha256, vocab_size, bos_id=1, eos_id=2, pad_id=pad_id)
    Manifest(folder, dtype, info, splits).save(folder)
    return Manifest.load(folder)


def _write_split(folder: Path, name: str, documents: Documents, dtype: str, per_shard: int) -> Split:
    rows: list[tuple[int, int, int, int]] = []
    shards: list[Shard] = []
    for first in range(0, len(documents), per_shard):
        path = folder / f"{name}-{len(shards):05d}.tar"
        with tarfile.open(path, "w") as tar:
            for number, ids in enumerate(documents[first : first + per_shard], start=first):
                payload = io.BytesIO()
                np.save(payload, np.asarray(ids, dtype=dtype))
                content = payload.getvalue()
                header = len(content) - len(ids) * np.dtype(dtype).itemsize
                text_bytes = 3 * len(ids)
                meta = {"source": "test", "bytes": text_bytes, "sha256": hashlib.sha256(content).hexdigest()}
                # a member's header is one block of 512 bytes
                rows.append((len(shards), tar.offset + 512 + header, len(ids), text_bytes))
                for suffix, data in (("npy", content), ("json", json.dumps(meta).encode())):
                    member = tarfile.TarInfo(f"{number:08d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        lengths = [row[2] for row in rows[first:]]
        shards.append(
            Shard(
                file=path.name,
                documents=len(lengths),
                tokens=sum(lengths),
                bytes=3 * sum(lengths),
                size=path.stat().st_size,
                sha256=file_sha256(path),
            )
        )
    index = folder / f"{name}.index.npy"
    np.save(index, np.array(rows, dtype=np.int64).reshape(-1, 4))
    tokens = sum(row[2] for row in rows)
    return Split(name, len(rows), tokens, 3 * tokens, index.name, file_sha256(index), tuple(shards))
