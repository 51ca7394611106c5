"""Tokens a second of one reader process from local shards, beside what other loaders make of the same tokens.

    python -m benchmarks.data.reading FOLDER [--tokens 8000000] [--context 1024] [--step_seconds 0.5]

Each side reads the same documents into batches of (8, context) ids and targets, in one process, shuffled as
it shuffles; seconds are those that the process computed, medians of rounds in which the sides take turns.
Sides whose package is missing are left out:

- dualroute: any window of the stream at once, through the index; documents told apart, order exact
- webdataset: tars in random order, a buffer of documents shuffled, ids laid end to end; the same tars
- litdata, mosaicml-streaming: their own chunks of windows, written from the same ids before the clock starts

Also: the share of a step that waits for data with 0 and 2 workers, a step being a sleep, and peak memory.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from benchmarks.measure import medians
from data_prep.clean import CleanDocument
from data_prep.notes import STATE_FOLDER
from data_prep.shards import ShardWriter, write_index
from dualroute.data.manifest import TOKENIZER_FILE, Manifest, TokenizerInfo
from dualroute.data.module import ShardDataModule
from dualroute.files import appearing_folder

ROWS = 8
VOCABULARY = 32_000
SHARD_TOKENS = 2_000_000
MEAN_TOKENS = 700  # of a document


def write_shards(output: Path, tokens: int) -> Manifest:
    """A set of documents of lognormal lengths and random ids, in shards of 4 MB."""
    draw = np.random.default_rng(0)
    with appearing_folder(output) as folder:
        (folder / STATE_FOLDER).mkdir()
        (folder / TOKENIZER_FILE).write_bytes(b"ids alone")
        splits = {}
        for split, size in (("train", tokens), ("val", SHARD_TOKENS // 20)):
            shards, written, writer = [], 0, ShardWriter(folder, split, 0)
            in_shard = 0
            while written < size:
                length = 2 + int(draw.lognormal(np.log(MEAN_TOKENS) - 0.5, 1.0))
                if in_shard >= SHARD_TOKENS:
                    shards.append(writer.close())
                    writer, in_shard = ShardWriter(folder, split, len(shards)), 0
                ids = draw.integers(3, VOCABULARY, length).astype("<u2")
                ids[0], ids[-1] = 1, 2
                digest = hashlib.sha256(ids.tobytes()).digest()
                writer.add(CleanDocument(f"{split}/{written}", "", 4 * length, digest, split), ids)
                written, in_shard = written + length, in_shard + length
            shards.append(writer.close())
            splits[split] = write_index(folder, split, shards)
        shutil.rmtree(folder / STATE_FOLDER)
        sha256 = hashlib.sha256(b"ids alone").hexdigest()
        info = TokenizerInfo(TOKENIZER_FILE, sha256, VOCABULARY, 1, 2, 2)
        Manifest(folder, "uint16", info, splits, {"made_by": "benchmarks/data/reading.py"}).save(folder)
    return Manifest.load(output)


def ours(folder: Path, context: int, workers: int = 0) -> DataLoader[Any]:
    """The loader of a training."""
    data = ShardDataModule(folder, context, ROWS, ROWS * context, num_workers=workers)
    data.setup("fit")
    return data.train_dataloader()


def plain_webdataset(folder: Path, context: int) -> Iterator[torch.Tensor]:
    """The same tars through webdataset's own pipeline."""
    import webdataset

    tars = sorted(str(path) for path in folder.glob("train-*.tar"))
    documents = webdataset.WebDataset(tars, shardshuffle=len(tars), seed=0, empty_check=False)
    decoded = documents.shuffle(1000).decode().to_tuple("npy")

    def windows() -> Iterator[np.ndarray]:
        held, count = [], 0
        for (ids,) in decoded:
            held.append(ids)
            count += len(ids)
            if count > context:
                stream = np.concatenate(held)
                whole = (len(stream) - 1) // context
                for place in range(whole):
                    yield stream[place * context : (place + 1) * context + 1].astype(np.int64)
                held, count = [stream[whole * context :]], len(stream) - whole * context

    yield from batched(windows())


def batched(windows: Iterator[np.ndarray]) -> Iterator[torch.Tensor]:
    """(ROWS, context + 1) int64 tensors."""
    while len(rows := list(itertools.islice(windows, ROWS))) == ROWS:
        yield torch.from_numpy(np.stack(rows))


def stream_of(manifest: Manifest) -> np.ndarray:
    """All training ids end to end."""
    rows, parts = manifest.open_index("train"), []
    for number, path in enumerate(manifest.shard_paths("train")):
        tar = np.memmap(path, dtype=np.uint8, mode="r")
        for _, offset, tokens, _ in rows[rows[:, 0] == number].tolist():
            parts.append(tar[offset : offset + 2 * tokens].view("<u2"))
    return np.concatenate(parts)


def litdata_side(manifest: Manifest, folder: Path, context: int) -> Callable[[], Iterator[Any]]:
    """Chunks of tokens written by litdata's writer, read through its TokensLoader."""
    from litdata import StreamingDataset, TokensLoader
    from litdata.streaming.writer import BinaryWriter

    if not (folder / "index.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        writer = BinaryWriter(str(folder), chunk_bytes="4MB", item_loader=TokensLoader(context + 1))
        stream = torch.from_numpy(stream_of(manifest).astype(np.uint16))
        for number, part in enumerate(stream.split(16 * (context + 1))):
            writer.add_item(number, part)
        writer.done()
        writer.merge()

    def batches() -> Iterator[Any]:
        dataset = StreamingDataset(str(folder), item_loader=TokensLoader(context + 1), shuffle=True, seed=0)
        yield from batched(np.asarray(item).astype(np.int64) for item in dataset)

    return batches


def mosaic_side(manifest: Manifest, folder: Path, context: int) -> Callable[[], Iterator[Any]]:
    """MDS shards of windows, read through a StreamingDataset."""
    from streaming import MDSWriter, StreamingDataset

    if not folder.exists():
        stream = stream_of(manifest)
        with MDSWriter(out=str(folder), columns={"ids": "ndarray:uint16"}, size_limit=1 << 22) as writer:
            for place in range((len(stream) - 1) // context):
                writer.write({"ids": stream[place * context : (place + 1) * context + 1]})

    def batches() -> Iterator[Any]:
        dataset = StreamingDataset(local=str(folder), shuffle=True, shuffle_seed=0, batch_size=ROWS)
        yield from batched(item["ids"].astype(np.int64) for item in dataset)

    return batches


def waiting_share(folder: Path, context: int, workers: int, seconds: float, steps: int = 12) -> float:
    """Share of a step of ``seconds`` that waits for its batch, the median over steps but the first two."""
    loader, shares = iter(ours(folder, context, workers)), []
    for step in range(steps):
        begin = time.perf_counter()
        next(loader)
        waited = time.perf_counter() - begin
        time.sleep(seconds)
        if step >= 2:
            shares.append(waited / (waited + seconds))
    return float(np.median(shares))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, help="working folder; the sets in it are made once")
    parser.add_argument("--tokens", type=int, default=8_000_000)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--step_seconds", type=float, default=0.5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder, context = options.folder, options.context
    shards = folder / f"shards-{options.tokens}"
    manifest = Manifest.load(shards) if shards.exists() else write_shards(shards, options.tokens)
    sides: dict[str, Callable[[], Iterator[Any]]] = {
        "dualroute": lambda: iter(ours(shards, context)),
        "webdataset": lambda: plain_webdataset(shards, context),
    }
    for name, make in (("litdata", litdata_side), ("mosaicml-streaming", mosaic_side)):
        try:
            sides[name] = make(manifest, folder / f"{name}-{options.tokens}-{context}", context)
        except (ImportError, RuntimeError) as error:
            print(f"{name} is left out: {error}")
    count = min(options.tokens // (ROWS * context) - 2, 2_000_000 // (ROWS * context))
    read = {name: _reading(batches, count) for name, batches in sides.items()}
    times = medians(read, options.repeats, torch.device("cpu"), clock=time.process_time)
    tokens = count * ROWS * context
    print(
        f"{tokens:,} tokens in batches of {ROWS} x {context}, seconds of CPU, medians of {options.repeats}:"
    )
    for name, seconds in times.items():
        ratio = times["dualroute"] / seconds
        print(f"{name:20} {tokens / seconds / 1e6:7.2f} M tokens/s  {ratio:6.2f} x dualroute's")
    for workers in (0, 2):
        share = waiting_share(shards, context, workers, options.step_seconds)
        print(f"waits for data, {workers} workers, steps of {options.step_seconds:g} s: {share:.2%}")
    print(f"peak memory of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:,.0f} MiB")


def _reading(batches: Callable[[], Iterator[Any]], count: int) -> Callable[[], None]:
    def read() -> None:
        found = sum(1 for _ in itertools.islice(batches(), count))
        if found != count:
            raise RuntimeError(f"{found} batches instead of {count}")

    return read


if __name__ == "__main__":
    main()
