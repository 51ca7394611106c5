"""A dataset folder of text that a model wrote: what a conversion loses is best measured on text that fits.

    python benchmarks/models/sampled_corpus.py CHECKPOINT OUTPUT --train 1000000 --val 100000

The ids are stored as they were drawn. (Text that is tokenised again may get other ids: a model now and then
spells a word in pieces that the tokenizer would join.) Each document is one draw of `--length` tokens at
temperature 1, beginning with <bos>; training and validation are drawn with different seeds.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
from pathlib import Path

import numpy as np
import torch

from data_prep.clean import CleanDocument
from data_prep.shards import STATE_FOLDER, ShardWriter, write_index
from dualroute.data.manifest import TOKENIZER_FILE, Manifest, TokenizerInfo, token_dtype
from dualroute.data.tokenizer import Tokenizer
from dualroute.evaluate.load import load
from dualroute.files import appearing_folder
from dualroute.model.decoding.generation import continue_batch

ROWS = 256  # texts that are drawn together


def sample_corpus(checkpoint: Path, output: Path, sizes: dict[str, int], length: int) -> Manifest:
    """Draw a dataset folder; `sizes` are tokens of each split."""
    loaded = load(checkpoint, "cpu")
    tokenizer = loaded.tokenizer
    with appearing_folder(output) as folder:
        (folder / STATE_FOLDER).mkdir()
        (folder / TOKENIZER_FILE).write_bytes(tokenizer.path.read_bytes())
        splits = {}
        for seed, (split, tokens) in enumerate(sizes.items()):
            generator = torch.Generator().manual_seed(seed)
            writer = ShardWriter(folder, split, 0)
            texts = -(-tokens // length)
            for first in range(0, texts, ROWS):
                rows = min(ROWS, texts - first)
                begin = torch.full((rows, 1), tokenizer.bos_id)
                drawn = continue_batch(loaded.model, begin, length - 1, generator).numpy()
                for number, ids in enumerate(drawn, first):
                    add(writer, ids, f"{split}-{number}", tokenizer)
            splits[split] = write_index(folder, split, [writer.close()])
        shutil.rmtree(folder / STATE_FOLDER)
        pad = tokenizer.pad_id if tokenizer.pad_id >= 0 else tokenizer.eos_id
        info = TokenizerInfo(
            TOKENIZER_FILE,
            tokenizer.sha256,
            tokenizer.vocab_size,
            tokenizer.bos_id,
            tokenizer.eos_id,
            pad,
        )
        dtype = token_dtype(tokenizer.vocab_size)
        Manifest(folder, dtype, info, splits, {"sampled_from": str(checkpoint)}).save(folder)
    return Manifest.load(output)


def add(writer: ShardWriter, ids: np.ndarray, name: str, tokenizer: Tokenizer) -> None:
    """Append one text, stored as ids; its bytes are those of what the ids spell."""
    text = tokenizer.decode(ids.tolist()).encode()
    document = CleanDocument(name, text.decode(), len(text), hashlib.sha256(text).digest(), name)
    writer.add(document, ids.astype(np.dtype(token_dtype(tokenizer.vocab_size)).newbyteorder("<")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--train", type=int, default=1_000_000)
    parser.add_argument("--val", type=int, default=100_000)
    parser.add_argument("--length", type=int, default=512)
    options = parser.parse_args()
    sizes = {"train": options.train, "val": options.val}
    manifest = sample_corpus(options.checkpoint, options.output, sizes, options.length)
    print({name: split.tokens for name, split in manifest.splits.items()})


if __name__ == "__main__":
    main()
