"""Films that users saw one after the other, with a structure that is known, in the form of MovieLens 100K.

    python benchmarks/data/interactions.py --output data/interactions

Each film belongs to a series, and is followed by the next one of it with probability `--follow`; else the
user turns to another film, a popular one more often (Zipf). Popularity knows the Zipf part alone, and
neighbours by cosine cannot tell the next film of a series from those before it.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

SERIES = 8  # films of a series


def histories(users: int, items: int, follow: float, seed: int) -> list[list[int]]:
    """Films of each user, none twice, in the order in which they were seen."""
    draw = random.Random(seed)
    order = list(range(items))
    draw.shuffle(order)  # which film follows which, and which is popular, have nothing in common
    after = {
        order[at]: order[at + 1] for at in range(items - 1) if (at + 1) % SERIES
    }  # the last of a series has none
    weights = [1 / (rank + 1) for rank in range(items)]
    found = []
    for _ in range(users):
        seen: dict[int, None] = {}
        last = None
        for _ in range(draw.randint(20, 60)):
            following = after.get(last) if last is not None else None
            if following is None or following in seen or draw.random() >= follow:
                following = draw.choices(range(items), weights)[0]
                while following in seen:
                    following = draw.choices(range(items), weights)[0]
            seen[following] = None
            last = following
        found.append(list(seen))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write u.data into")
    parser.add_argument("--users", type=int, default=2000)
    parser.add_argument("--items", type=int, default=400)
    parser.add_argument("--follow", type=float, default=0.7)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.output.exists():
        parser.error(f"{args.output} is there already: remove it, or give another --output")
    args.output.mkdir(parents=True)
    with (args.output / "u.data").open("w") as stream:
        for user, films in enumerate(histories(args.users, args.items, args.follow, args.seed)):
            stream.writelines(f"{user}\t{film}\t4\t{time}\n" for time, film in enumerate(films))


if __name__ == "__main__":
    main()
