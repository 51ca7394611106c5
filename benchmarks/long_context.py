"""What averages hide: small models trained on tasks of RULER's kinds, dense attention beside routed.

    python benchmarks/long_context.py --length 1024 --block 16 --sub_block 8 --top_k 4 --seeds 0 1 2

A model that knows language is asked by ``dualroute evaluate --suite ruler``.  Here models learn the task
itself, on ids instead of words, so that the attention is judged and not the knowledge:

- needle: one key and its value in filler (niah_single);
- multikey: eight of them, all asked for (niah_multikey, niah_multiquery);
- variables: chains of two assignments, k2 = k1, k1 = value; the value of k2 is asked for (vt): two searches,
  the second for what the first has found;
- common: the value that has come most often so far (cwe, fwe), which no single block knows.

Training is that of recall.py: texts double as they are learnt.  Shown is the share of right answers of the
worst seed, and of all seeds; a routed text reads top_k + 2 blocks of its own exactly.
"""

from __future__ import annotations

import argparse
import time

import recall
import torch
from measure import prepare, show
from recall import FILLER, KEYS, MARK, VALUES
from torch import Tensor

ASKED = 16  # questions of a text


def needle(batch: int, length: int, min_distance: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One key; see :func:`recall.mqar`."""
    return recall.mqar(batch, length, min_distance, generator, pairs=1)


def variables(
    batch: int, length: int, min_distance: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Four chains k1 = value, k2 = k1, in that order; the values of all keys are asked for.

    Of half the questions the answer is one search away, of half two.  The value is a label where k2 is set to
    k1, too: a model that is not shown the first search does not find out that there are two.
    """
    ids, labels = _filler(batch, length, generator)
    room = (length - 2 * ASKED - min_distance) // 2
    asked = length - 2 * ASKED + 2 * torch.arange(ASKED)
    for row in range(batch):
        keys = torch.randperm(KEYS, generator=generator)[:8]
        values = KEYS + torch.randint(VALUES, (4,), generator=generator)
        place = (2 * torch.randperm(room, generator=generator)[:8]).view(2, 4).sort(0).values
        ids[row, place[0]], ids[row, place[0] + 1] = keys[:4], values
        ids[row, place[1]], ids[row, place[1] + 1] = keys[4:], keys[:4]
        labels[row, place[1] + 1] = values
        which = torch.randint(8, (ASKED,), generator=generator)
        ids[row, asked] = keys[which]
        labels[row, asked] = values[which % 4]
    return ids, labels


def two_hops(batch: int, length: int, min_distance: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """:func:`variables`, of which only the questions at the end that are two searches away are counted."""
    ids, labels = variables(batch, length, min_distance, generator)
    labels[:, : length - 2 * ASKED] = -100
    for row in range(batch):
        first = ids[row, : length - 2 * ASKED]
        handed = first[1:][(first[:-1] < KEYS) & (first[1:] < KEYS)]  # keys that another one was set to
        labels[row, torch.isin(ids[row], handed)] = -100
    return ids, labels


def common(batch: int, length: int, min_distance: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Values all over the text, one of them three times as often as each other; marks ask which has come most
    often so far."""
    ids, labels = _filler(batch, length, generator)
    for row in range(batch):
        weights = torch.ones(VALUES)
        weights[torch.randint(VALUES, (1,), generator=generator)] = 3.0
        place = torch.randperm(length - 1, generator=generator)[: length // 4].sort().values
        drawn = torch.multinomial(weights, len(place), replacement=True, generator=generator)
        ids[row, place] = KEYS + drawn
        asked = torch.randperm(length // 2, generator=generator)[:ASKED] + length // 2 - 1
        asked[0] = length - 1
        for mark in asked.tolist():
            ids[row, mark] = MARK
        for mark in asked.tolist():
            shown = ids[row, :mark]
            shown = shown[(shown >= KEYS) & (shown < KEYS + VALUES)] - KEYS
            labels[row, mark] = KEYS + int(torch.bincount(shown, minlength=VALUES).argmax())
    return ids, labels


def commonest(
    batch: int, length: int, min_distance: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """:func:`common`, of which only the question at the end is counted."""
    ids, labels = common(batch, length, min_distance, generator)
    labels[:, :-1] = -100
    return ids, labels


def _filler(batch: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    ids = KEYS + VALUES + torch.randint(FILLER, (batch, length), generator=generator)
    return ids, torch.full((batch, length), -100)


#: {name: (what is trained on, what is counted)}
TASKS = {
    "needle": (needle, needle),
    "multikey": (recall.mqar, recall.mqar),
    "variables": (variables, two_hops),
    "common": (common, commonest),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    recall.options_of_training(parser, ["dense", "routed", "routed mean"])
    options = parser.parse_args()
    device = prepare(options.threads, options.device)
    read = (options.top_k + 2) * options.block
    print(
        f"a routed token reads {read} of {options.length} keys exactly: sparsity "
        f"{1 - read / options.length:.1%}"
    )
    rows = []
    for task in options.tasks:
        options.task = task
        row: dict[str, str] = {"task": task}
        for variant in options.variants:
            scores = []
            begin = time.process_time()
            for seed in options.seeds:
                recall.TASKS[task] = TASKS[task][0]
                model, _ = recall.train(options, variant, seed, device)
                recall.TASKS[task] = TASKS[task][1]
                scores.append(recall.accuracy(options, model, options.length, device))
            row[f"{variant}, worst"] = f"{min(scores):.3f}"
            row[f"{variant}, all"] = " ".join(f"{score:.3f}" for score in scores)
            row[f"{variant}, CPU s"] = f"{(time.process_time() - begin) / len(scores):.0f}"
        rows.append(row)
        print(row, flush=True)
    title = (
        f"trained on {options.length:,} tokens, {options.layers} layers, window {options.window}, block "
        f"{options.block}, top_k {options.top_k}, seeds {' '.join(map(str, options.seeds))}"
    )
    show(title, rows, options.output, "long_context")


if __name__ == "__main__":
    main()
