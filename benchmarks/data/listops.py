"""ListOps of the Long Range Arena, made afresh: lists of digits under operators, and their value.

    python benchmarks/data/listops.py --output listops        train.jsonl, validation.jsonl, test.jsonl

A row is {"text": "M29e478]0]", "label": "9"}. Each symbol is one character, so that a tokenizer of characters
reads it as the benchmark does: M, m, e and s open a list and are its maximum, minimum, median and sum modulo
10; ] closes it. Lengths are those of the benchmark (Tay et al., arXiv 2011.04006): 500 to 2000 symbols, 10
elements of a list at most, nested 10 deep. The median of an even number of elements is the mean of both
middle ones, rounded down.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

OPERATORS = "Mmes"
Tree = int | tuple[str, list["Tree"]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--train", type=int, default=96_000)
    parser.add_argument("--validation", type=int, default=2_000)
    parser.add_argument("--test", type=int, default=2_000)
    parser.add_argument("--min_length", type=int, default=500)
    parser.add_argument("--max_length", type=int, default=2_000)
    parser.add_argument("--max_depth", type=int, default=10)
    parser.add_argument("--max_elements", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.output.exists():
        parser.error(f"{args.output} is there already: remove it, or give another --output")
    args.output.mkdir(parents=True)
    draw, seen = random.Random(args.seed), set[str]()
    for part in ("train", "validation", "test"):
        with (args.output / f"{part}.jsonl").open("w") as stream:
            for _ in range(getattr(args, part)):
                text, value = expression(
                    draw, seen, (args.min_length, args.max_length), args.max_depth, args.max_elements
                )
                stream.write(json.dumps({"text": text, "label": str(value)}) + "\n")


def expression(
    draw: random.Random, seen: set[str], lengths: tuple[int, int], depth: int, elements: int
) -> tuple[str, int]:
    """A text that was not there before, of a length between `lengths`, and its value."""
    while True:
        tree = random_tree(draw, depth, elements)
        text = written(tree)
        if lengths[0] <= len(text) <= lengths[1] and text not in seen:
            seen.add(text)
            return text, value_of(tree)


def random_tree(draw: random.Random, depth: int, elements: int) -> Tree:
    """A digit with probability 3/4, as in the benchmark, except at the top; else a list of 2 to
    `elements`."""

    def grow(level: int) -> Tree:
        if level > 1 and (level >= depth or draw.random() > 0.25):
            return draw.randrange(10)
        return draw.choice(OPERATORS), [grow(level + 1) for _ in range(draw.randint(2, elements))]

    return grow(1)


def written(tree: Tree) -> str:
    """The text of a tree."""
    if isinstance(tree, int):
        return str(tree)
    return tree[0] + "".join(map(written, tree[1])) + "]"


def value_of(tree: Tree) -> int:
    """The digit that a tree stands for."""
    if isinstance(tree, int):
        return tree
    values = sorted(map(value_of, tree[1]))
    middle = len(values) // 2
    return {
        "M": values[-1],
        "m": values[0],
        "e": values[middle] if len(values) % 2 else (values[middle - 1] + values[middle]) // 2,
        "s": sum(values) % 10,
    }[tree[0]]


if __name__ == "__main__":
    main()
