"""Pairs of passages, and whether both are of one book: a task of 4,000 tokens made from English books.

    python benchmarks/data/retrieval.py --source /path/to/english_books/books.tar.xz --output data/retrieval

A row is {"text": passage, "pair": passage, "label": "same" or "other"}, half of each. Passages are
`--characters` long and do not overlap. No book is in two of train.jsonl, validation.jsonl and test.jsonl, so
that a model has to compare, and cannot learn the books.
"""

from __future__ import annotations

import argparse
import json
import random
import tarfile
from pathlib import Path


def pairs(books: dict[str, str], count: int, characters: int, draw: random.Random) -> list[dict[str, str]]:
    """Rows from these books, of which there are two at least, each with two passages at least."""
    names = sorted(books)

    def passage(name: str, number: int) -> str:
        return books[name][number * characters : (number + 1) * characters]

    rows = []
    for row in range(count):
        first = draw.choice(names)
        same = row % 2 == 0
        if same:
            numbers = draw.sample(range(len(books[first]) // characters), 2)
            texts = [passage(first, number) for number in numbers]
        else:
            second = draw.choice([name for name in names if name != first])
            texts = [
                passage(name, draw.randrange(len(books[name]) // characters)) for name in (first, second)
            ]
        rows.append({"text": texts[0], "pair": texts[1], "label": "same" if same else "other"})
    draw.shuffle(rows)
    return rows


def read_books(source: Path) -> dict[str, str]:
    """{name: text} of the .txt files of an archive."""
    found = {}
    with tarfile.open(source) as archive:
        for member in archive:
            if member.isfile() and member.name.endswith(".txt"):
                stream = archive.extractfile(member)
                assert stream is not None
                found[Path(member.name).stem] = stream.read().decode()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", type=Path, required=True, help="books.tar.xz")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--train", type=int, default=4000)
    parser.add_argument("--validation", type=int, default=400)
    parser.add_argument("--test", type=int, default=400)
    parser.add_argument("--characters", type=int, default=2000, help="of a passage")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.output.exists():
        parser.error(f"{args.output} is there already: remove it, or give another --output")
    books = read_books(args.source)
    draw = random.Random(args.seed)
    names = sorted(books)
    draw.shuffle(names)
    held = max(len(names) // 6, 2)
    parts = {"test": names[:held], "validation": names[held : 2 * held], "train": names[2 * held :]}
    args.output.mkdir(parents=True)
    for part, some in parts.items():
        own = {name: books[name] for name in some}
        with (args.output / f"{part}.jsonl").open("w") as stream:
            for row in pairs(own, getattr(args, part), args.characters, draw):
                stream.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
