"""Bytes of text a token, by language: a tokenizer learnt from two languages and code, one learnt from one
language, and GPT-2's.

    python benchmarks/data/bilingual_tokenizer.py --english books.tar.xz --chinese zh.txt.xz [MORE ...] \
        --gpt2 FOLDER --megabytes 3 --vocab_size 8192 16384

The texts are cut into pieces of about 2,000 characters.  Of each language (source code is the running
Python's standard library) so many megabytes are taken; every tenth piece is held out and measured, the others
are learnt from, as `dualroute prepare` does it.  A Chinese character has three bytes, so 3.0 is a token a
character.  FOLDER holds GPT-2's encoder.json(.gz) and vocab.bpe.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from data_prep import corpora
from data_prep.readers.documents import ReadOptions
from data_prep.readers.formats import read_documents
from data_prep.train_tokenizer import cut, train_tokenizer
from dualroute.data.tokenizer import Tokenizer

HELD_OUT = 10  # one in


def pieces_of(texts: Iterable[str], size: int) -> list[str]:
    """About ``size`` bytes, spread over the texts."""
    found = [piece for text in texts for piece in cut(text) if piece.strip()]
    total = sum(len(piece.encode()) for piece in found)
    step = max(1, total // size)
    return found[::step]


def texts_of(paths: list[Path]) -> Iterable[str]:
    for path in paths:
        for document in read_documents(path, path.name, ReadOptions()):
            yield document.text


def code() -> Iterable[str]:
    options = ReadOptions()
    corpus = corpora.open_corpus(corpora.STDLIB, options)
    return (document.text for document in corpora.documents(corpus, options, Path(tempfile.gettempdir())))


def gpt2(folder: Path) -> tuple[int, Callable[[str], int]]:
    """The size of GPT-2's vocabulary, and its number of tokens of a text."""
    from tokenizers import ByteLevelBPETokenizer

    with tempfile.TemporaryDirectory() as scratch:
        packed = folder / "encoder.json.gz"
        data = (
            gzip.decompress(packed.read_bytes())
            if packed.exists()
            else (folder / "encoder.json").read_bytes()
        )
        (Path(scratch) / "vocab.json").write_bytes(data)
        tokenizer = ByteLevelBPETokenizer(str(Path(scratch) / "vocab.json"), str(folder / "vocab.bpe"))
    return tokenizer.get_vocab_size(), lambda text: len(tokenizer.encode(text).ids)


def learnt(texts: list[str], vocab_size: int) -> Callable[[str], int]:
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "tokenizer.model"
        path.write_bytes(train_tokenizer(texts, vocab_size))
        tokenizer = Tokenizer(path)
    return lambda text: len(tokenizer.encode(text))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--english", type=Path, nargs="+", required=True)
    parser.add_argument("--chinese", type=Path, nargs="+", required=True)
    parser.add_argument("--gpt2", type=Path)
    parser.add_argument("--megabytes", type=float, default=4.0)
    parser.add_argument("--vocab_size", type=int, nargs="+", default=[8192, 16384])
    options = parser.parse_args()
    size = int(options.megabytes * 1e6)
    pieces = {
        "English": pieces_of(texts_of(options.english), size),
        "Chinese": pieces_of(texts_of(options.chinese), size),
        "code": pieces_of(code(), size),
    }
    train = {name: [p for i, p in enumerate(some) if i % HELD_OUT] for name, some in pieces.items()}
    held_out = {name: some[::HELD_OUT] for name, some in pieces.items()}
    print(f"| tokenizer | vocabulary | {' | '.join(pieces)} |")
    print("|---|---|---|---|---|")

    def row(name: str, vocabulary: int, tokens: Callable[[str], int]) -> None:
        found = []
        for some in held_out.values():
            found.append(sum(len(p.encode()) for p in some) / sum(map(tokens, some)))
        print(f"| {name} | {vocabulary:,} | {' | '.join(f'{one:.2f}' for one in found)} |", flush=True)

    for vocab_size in options.vocab_size:
        everything = list(itertools.chain.from_iterable(train.values()))
        row("English, Chinese and code", vocab_size, learnt(everything, vocab_size))
        row("English alone", vocab_size, learnt(train["English"], vocab_size))
    if options.gpt2:
        row("GPT-2", *gpt2(options.gpt2))


if __name__ == "__main__":
    main()
