"""What each stage of `dualroute prepare` costs, beside the library that does the bare work, and what a
terabyte would take.

    python benchmarks/data/stages.py TEXT [TEXT ...] --megabytes 8

TEXT: files of plain text (also .xz .gz .zst, or archives), cut into documents of 500 to 4,000 characters.
Every stage and its bare library work on the same documents in turn, in this process, with one thread; what is
shown is the median of three rounds of CPU time, as megabytes of text a second and core.  A row of "-" has no
library that does the same; near duplicates are compared with others by dedup.py.

The table below it is an estimate: core-hours are bytes / speed.  It takes for granted that CPU time grows
with the text, that every stage sees all of it (in truth each sees what the one before has left), and that
nothing is waited for.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import os
import random
import statistics
import tarfile
import tempfile
import time
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ |= {"RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}

import numpy as np
from dedup import ours as without_near_duplicates
from dedup import pieces

from data_prep.clean import CleanDocument
from data_prep.cleaning.text import clean_text
from data_prep.readers.documents import ReadOptions
from data_prep.readers.formats import read_documents

Stage = Callable[[], Any]
EVALUATION_TEXTS = 2000


def cut(paths: list[Path], size: int) -> list[str]:
    """About ``size`` bytes of documents."""
    texts: list[str] = []
    total = 0
    for text in pieces(paths, random.Random(0)):
        if total >= size:
            break
        texts.append(text)
        total += len(text.encode())
    return texts


def reading(texts: list[str], folder: Path) -> tuple[Stage, Stage]:
    path = folder / "texts.jsonl.gz"
    with gzip.open(path, "wt", compresslevel=1) as stream:
        stream.writelines(f"{json.dumps({'text': text})}\n" for text in texts)

    def bare() -> int:
        with gzip.open(path, "rt") as stream:
            return sum(len(json.loads(line)["text"]) for line in stream)

    return (lambda: sum(len(d.text) for d in read_documents(path, path.name, ReadOptions()))), bare


def normalising(texts: list[str], folder: Path) -> tuple[Stage, Stage]:
    return (lambda: [clean_text(text) for text in texts]), (
        lambda: [unicodedata.normalize("NFC", text) for text in texts]
    )


def exact_duplicates(texts: list[str], folder: Path) -> tuple[Stage, Stage]:
    from data_prep.dedup.digests import DigestSet

    def ours() -> int:
        seen = DigestSet()
        return sum(seen.add(hashlib.sha256(text.encode()).digest()) for text in texts)

    return ours, lambda: len({hashlib.sha256(text.encode()).digest() for text in texts})


def languages(texts: list[str], folder: Path) -> tuple[Stage, Stage]:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    from data_prep.cleaning.language import language_of

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    return (lambda: [language_of(text, "") for text in texts]), (
        lambda: [identifier.classify(text) for text in texts]
    )


def quality(texts: list[str], folder: Path) -> tuple[Stage, Stage]:
    from datatrove.data import Document
    from datatrove.pipeline.filters import (
        FineWebQualityFilter,
        GopherQualityFilter,
        GopherRepetitionFilter,
    )

    from data_prep.cleaning.quality import judge
    from data_prep.cleaning.words import datatrove_tokenizer

    words = datatrove_tokenizer()  # its own for English wants spacy
    filters = [
        filter(language=words)
        for filter in (GopherQualityFilter, GopherRepetitionFilter, FineWebQualityFilter)
    ]

    def bare() -> None:
        for text in texts:
            document = Document(text=text, id="")
            for one in filters:
                result = one.filter(document)
                if result is not True:
                    break

    rules = ("gopher", "gopher_repetition", "fineweb")
    return (lambda: [judge(text, "", rules, "en") for text in texts]), bare


def evaluation_sets(texts: list[str], folder: Path) -> tuple[Stage, None]:
    from data_prep.cleaning.contamination import Contamination

    path = folder / "evaluation.jsonl"
    draw = random.Random(1)
    with path.open("w") as stream:
        for _ in range(EVALUATION_TEXTS):
            words = draw.choice(texts).split()[:100]
            draw.shuffle(words)  # texts of such words that no document holds
            stream.write(f"{json.dumps({'text': ' '.join(words)})}\n")
    contamination = Contamination([str(path)], 13)
    return (lambda: [contamination.hits(text) for text in texts]), None


def personal_data(texts: list[str], folder: Path) -> tuple[Stage, Stage]:
    from datatrove.pipeline.formatters import PIIFormatter

    from data_prep.cleaning.scrub import scrub

    formatter = PIIFormatter()
    return (lambda: [scrub(text, ("email", "ip")) for text in texts]), (
        lambda: [formatter.format(text) for text in texts]
    )


def near_duplicates(texts: list[str], folder: Path) -> tuple[Stage, None]:
    return (lambda: without_near_duplicates(texts)), None


def tokenising(texts: list[str], folder: Path) -> tuple[Stage, Stage]:
    tokenizer = trained(texts, folder)
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(str(tokenizer.path))
    return (lambda: [tokenizer.encode_array(text, "<u2", bos=True, eos=True) for text in texts]), (
        lambda: [np.array(processor.encode(text), "<u2") for text in texts]
    )


def one_long_text(texts: list[str], folder: Path) -> tuple[Stage, Stage]:
    tokenizer = trained(texts, folder)
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(str(tokenizer.path))
    text = " ".join("".join(texts).split())  # no line break in it
    return (lambda: tokenizer.encode_array(text, "<u2")), (lambda: np.array(processor.encode(text), "<u2"))


def trained(texts: list[str], folder: Path) -> Any:
    """A tokenizer of 8,192 tokens, learnt once."""
    from data_prep.train_tokenizer import train_tokenizer
    from dualroute.data.tokenizer import Tokenizer

    path = folder / "tokenizer.model"
    if not path.exists():
        path.write_bytes(train_tokenizer(texts[: 1 << 11], 8192, "bpe", 0))
    return Tokenizer(path)


def writing(texts: list[str], folder: Path) -> tuple[Stage, Stage]:
    from data_prep.shards import STATE_FOLDER, ShardWriter

    (folder / STATE_FOLDER).mkdir(exist_ok=True)
    ids = [np.arange(max(1, len(text) // 4), dtype="<u2") for text in texts]
    digest = hashlib.sha256(b"").digest()
    documents = [CleanDocument("name", text, len(text.encode()), digest, "train") for text in texts]

    def ours() -> None:
        writer = ShardWriter(folder, "train", 0)
        for document, tokens in zip(documents, ids, strict=True):
            writer.add(document, tokens)
        writer.close()

    def bare() -> None:
        """tarfile with numpy's format, which webdataset's writer uses."""
        with tarfile.open(folder / "bare.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for number, tokens in enumerate(ids):
                stream = io.BytesIO()
                np.save(stream, tokens)
                about = json.dumps({"source": "name"}).encode()
                for ending, data in (("npy", stream.getvalue()), ("json", about)):
                    info = tarfile.TarInfo(f"{number:07d}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))

    return ours, bare


#: name -> (what it is made of, what the bare work is)
STAGES: dict[str, tuple[Callable[..., tuple[Stage, Stage | None]], str]] = {
    "reading json lines, gzip": (reading, "gzip + json"),
    "normalising": (normalising, "unicodedata alone"),
    "exact duplicates": (exact_duplicates, "sha256 in a Python set"),
    "language": (languages, "py3langid"),
    "quality rules": (quality, "datatrove"),
    "evaluation sets": (evaluation_sets, "-"),
    "personal data": (personal_data, "datatrove"),
    "near duplicates": (near_duplicates, "-"),
    "tokenising": (tokenising, "sentencepiece"),
    "tokenising one line": (one_long_text, "sentencepiece"),
    "writing shards": (writing, "tarfile + numpy"),
}
#: One line is another measurement of the same stage; near duplicates find the exact ones as well.
IN_A_RUN = [name for name in STAGES if name not in ("tokenising one line", "exact duplicates")]


def rounds(stages: list[Stage | None], count: int) -> Iterator[float | None]:
    """Median CPU seconds of each, measured in turn."""
    seconds: list[list[float]] = [[] for _ in stages]
    for _ in range(count + 1):
        for stage, taken in zip(stages, seconds, strict=True):
            if stage is not None:
                begin = time.process_time()
                stage()
                taken.append(time.process_time() - begin)
    for taken in seconds:
        yield statistics.median(taken[1:]) if taken else None  # the first is to get warm


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("texts", nargs="+", type=Path)
    parser.add_argument("--megabytes", type=float, default=8.0)
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=list(STAGES))
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    texts = cut(options.texts, int(options.megabytes * 1e6))
    size = sum(len(text.encode()) for text in texts) / 1e6
    print(f"{len(texts):,} documents, {size:.1f} MB; medians of {options.rounds}, one core")
    print("\n| stage | MB a second and core | bare library | MB a second and core | share of its speed |")
    print("|---|---|---|---|---|")
    speed = {}
    for name in options.stages:
        make, library = STAGES[name]
        with tempfile.TemporaryDirectory() as folder:
            mine, bare = rounds(list(make(texts, Path(folder))), options.rounds)
        assert mine is not None
        speed[name] = size / mine
        beside = "- | -" if bare is None else f"{size / bare:,.1f} | {bare / mine:.0%}"
        print(f"| {name} | {speed[name]:,.1f} | {library} | {beside} |", flush=True)
    if not all(name in speed for name in IN_A_RUN):
        return
    print("\n| estimated core-hours | 1 TB | 15 TB |\n|---|---|---|")
    for name in IN_A_RUN:
        hours = 1e6 / speed[name] / 3600
        print(f"| {name} | {hours:,.0f} | {15 * hours:,.0f} |")
    hours = sum(1e6 / speed[name] / 3600 for name in IN_A_RUN)
    print(f"| all | {hours:,.0f} | {15 * hours:,.0f} |")


if __name__ == "__main__":
    main()
