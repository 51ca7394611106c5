"""Far recall: does a model find one token among thousands, however far away?

    python benchmarks/recall.py --task mqar --length 1024 --variants dense routed --seeds 0 1 2

mqar (multi-query associative recall, Arora et al., arXiv 2312.04927): key-value pairs are scattered over a
sea of filler; at the end, keys come again and their values are asked for. passkey: four digits behind a mark,
asked for behind a second mark. Between a pair and its question lie at least `--min_distance` tokens, so that
no window reaches it, not even through the layers (`layers * window`). A token's embedding holds its
predecessor's too (a token shift, as in RWKV): what is measured is finding, and a model that must first learn
to look one token back needs thousands of steps before it begins to search.

Trained from scratch on texts of `--start` tokens, which double whenever 90 % of the answers are right, and
then for `--steps` more at `--length`; what is not there after `--patience` steps goes there all the same.
"full then routed" learns in full mode and is routed in the second half of the last phase. Reported is the
share of right answers on fresh texts, at the trained length and at the `--evaluate` multiples.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measure import prepare, show
from torch import Tensor, nn

from dualroute.model import DualRoutingTransformer, ModelConfig

KEYS = VALUES = FILLER = 16
MARK = KEYS + VALUES + FILLER  # one more id, for the passkey
VOCABULARY = MARK + 1
ASKED = ("top_k", "sub_block", "cluster_span")  # what a trained model may be asked with
LEARNT = 0.9  # share of right answers at which the texts double

VARIANTS: dict[str, dict[str, Any]] = {
    "dense": {"attention": "dense"},
    "local": {"attention": "local"},
    "dense, no positions": {"attention": "dense", "global_rotary_factor": 0.0},
    "full": {"global_mode": "full"},
    "routed": {},
    "routed, clusters": {"cluster_span": 1024},
    "routed, no positions, clusters": {"global_rotary_factor": 0.0, "cluster_span": 1024},
    "routed, no positions": {"global_rotary_factor": 0.0},  # of the global route; the local one keeps them
    "routed, no positions, a choice for two": {"global_rotary_factor": 0.0, "share_choice": 2},
    "routed, no positions, one global layer": {"global_rotary_factor": 0.0, "global_layers": [1]},
    "routed moment": {"router": "moment"},
    "routed mean": {"router": "mean"},
    "routed mean, no far": {"router": "mean", "far_summary": "none"},
    "routed no far": {"far_summary": "none"},
    "routed whole blocks": {"sub_block": None},  # one bound per block
    "full then routed": {"then": True},
    "full, 3 far heads": {"global_mode": "full", "global_heads": 3, "local_heads": 1},  # of 4
    "routed, 3 far heads": {"global_heads": 3, "local_heads": 1},
}


def mqar(
    batch: int,
    length: int,
    min_distance: int,
    generator: torch.Generator,
    pairs: int = 8,
) -> tuple[Tensor, Tensor]:
    """Ids (batch, length) and labels, the value behind each asked key, -100 elsewhere.

    The answer is never shown, so that one question does not help with another.
    """
    questions = max(16, length // 32)
    ids = KEYS + VALUES + torch.randint(FILLER, (batch, length), generator=generator)
    labels = torch.full((batch, length), -100)
    room = (length - 2 * questions - min_distance) // 2  # places of two tokens
    if room < pairs:
        raise SystemExit(f"--length {length} leaves no room for {pairs} pairs at distance {min_distance}")
    asked = length - 2 * questions + 2 * torch.arange(questions)
    for row in range(batch):
        keys = torch.randperm(KEYS, generator=generator)[:pairs]
        values = KEYS + torch.randint(VALUES, (pairs,), generator=generator)
        place = 2 * torch.randperm(room, generator=generator)[:pairs]
        ids[row, place], ids[row, place + 1] = keys, values
        which = torch.randint(pairs, (questions,), generator=generator)
        ids[row, asked] = keys[which]
        labels[row, asked] = values[which]
    return ids, labels


def passkey(
    batch: int, length: int, min_distance: int, generator: torch.Generator, digits: int = 4
) -> tuple[Tensor, Tensor]:
    """Ids and labels: digits behind a mark somewhere, to be repeated behind the mark at the end."""
    ids = KEYS + VALUES + torch.randint(FILLER, (batch, length), generator=generator)
    labels = torch.full((batch, length), -100)
    key = torch.randint(KEYS, (batch, digits), generator=generator)
    room = length - 2 * digits - 2 - min_distance
    if room < 1:
        raise SystemExit(f"--length {length} leaves no room for a passkey at distance {min_distance}")
    place = torch.randint(room, (batch,), generator=generator)
    for row in range(batch):
        ids[row, place[row]] = MARK
        ids[row, place[row] + 1 : place[row] + 1 + digits] = key[row]
    ids[:, -digits - 1], ids[:, -digits:] = MARK, key
    labels[:, -digits - 1 : -1] = key
    return ids, labels


TASKS = {"mqar": mqar, "passkey": passkey}


class ShiftedEmbedding(nn.Embedding):
    """Embedding of a token plus another embedding of the token before it."""

    def __init__(self, vocabulary: int, dim: int) -> None:
        super().__init__(vocabulary, dim)
        self.before = nn.Parameter(0.02 * torch.randn(vocabulary, dim))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, input: Tensor) -> Tensor:
        before = F.embedding(input[:, :-1], self.before)
        return super().forward(input) + F.pad(before, (0, 0, 1, 0))


def build(options: argparse.Namespace, variant: str, seed: int) -> DualRoutingTransformer:
    """A freshly initialised model of a variant."""
    changes = {key: value for key, value in VARIANTS[variant].items() if key != "then"}
    if changes.get("sub_block", 0) is None:
        changes["sub_block"] = options.block
    config = ModelConfig(
        vocab_size=VOCABULARY,
        dim=options.dim,
        num_layers=options.layers,
        num_heads=options.heads,
        max_context=options.length * max([1, *options.evaluate]),
        tie_embeddings=False,
        rope_theta=options.theta,
        window=options.window,
        block=options.block,
        top_k=options.top_k,
        **{"global_mode": "routed", "sub_block": options.sub_block, **changes},
    )
    torch.manual_seed(seed)
    model = DualRoutingTransformer(config)
    model.embedding = ShiftedEmbedding(VOCABULARY, options.dim)
    return model


def set_routing(model: DualRoutingTransformer, **changes: int) -> None:
    """Change how the routed layers choose: one of `ASKED`."""
    for layer in model.layers:
        routing = getattr(layer.attention, "routing", None)
        if routing is not None:
            layer.attention.routing = dataclasses.replace(routing, **changes)


def set_mode(model: DualRoutingTransformer, mode: str) -> None:
    """Change how the global routes read, not what they have learnt."""
    for layer in model.layers:
        layer.attention.global_mode = mode


def train(options: argparse.Namespace, variant: str, seed: int, device: torch.device) -> tuple[Any, float]:
    """The trained model and the seconds that it took."""
    model = build(options, variant, seed).to(device)
    generator = torch.Generator().manual_seed(1000 + seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.01, betas=(0.9, 0.98))
    begin = time.perf_counter()
    length, learnt, last = min(options.start, options.length), 0.0, None
    for step in range(options.patience + options.steps):
        if last is None and (step >= options.patience or (length == options.length and learnt > LEARNT)):
            length, last = options.length, step  # the last phase begins
        elif last is None and learnt > LEARNT:
            length, learnt = min(2 * length, options.length), 0.0
        if last is not None and step - last == options.steps:
            break
        phase = (step - (last if last is not None else step)) / options.steps  # of the last phase, else 0
        if VARIANTS[variant].get("then"):
            set_mode(model, "full" if phase < 0.5 else "routed")
        rows = max(1, options.tokens // length)
        ids, labels = TASKS[options.task](rows, length, min(options.min_distance, length // 4), generator)
        for group in optimizer.param_groups:
            group["lr"] = options.lr * min(1.0, (step + 1) / 50, max(0.05, 2 * (1 - phase)))
        logits, targets = answers(model, ids.to(device), labels.to(device))
        loss = F.cross_entropy(logits, targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        right = float((logits.argmax(-1) == targets).float().mean())
        learnt += (right - learnt) / 10
        if options.verbose and step % 50 == 0:
            taken = time.perf_counter() - begin
            print(
                f"{variant} seed {seed} step {step} length {length} right {right:.3f} {taken:.0f} s",
                flush=True,
            )
    return model, time.perf_counter() - begin


def answers(model: DualRoutingTransformer, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and targets of the labelled tokens only: (answers, vocabulary), (answers,)."""
    hidden = model.hidden_states(ids)
    wanted = labels != -100
    return model.head(hidden[wanted]), labels[wanted]


@torch.no_grad()
def accuracy(options: argparse.Namespace, model: Any, length: int, device: torch.device) -> float:
    """Share of right answers on fresh texts of `length` tokens."""
    generator = torch.Generator().manual_seed(999)
    right = total = 0
    for _ in range(options.batches):
        rows = max(1, options.tokens // length)
        ids, labels = TASKS[options.task](rows, length, options.min_distance, generator)
        logits, targets = answers(model, ids.to(device), labels.to(device))
        right += int((logits.argmax(-1) == targets).sum())
        total += targets.numel()
    return right / total


def mean_and_range(scores: list[float]) -> str:
    """Mean and, of several seeds, the lowest and highest."""
    spread = f" ({min(scores):.3f}-{max(scores):.3f})" if len(scores) > 1 else ""
    return f"{statistics.mean(scores):.3f}{spread}"


def options_of_training(parser: argparse.ArgumentParser, variants: list[str]) -> None:
    """Add the options that :func:`build`, :func:`train` and :func:`accuracy` read."""
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=variants)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--start", type=int, default=128, help="tokens at which the curriculum begins")
    parser.add_argument("--evaluate", type=int, nargs="*", default=[], help="multiples of the length")
    parser.add_argument("--min_distance", type=int, default=256)
    parser.add_argument("--steps", type=int, default=300, help="at the full length")
    parser.add_argument("--patience", type=int, default=2000, help="steps by which it must be reached")
    parser.add_argument("--tokens", type=int, default=8192, help="of a step")
    parser.add_argument("--batches", type=int, default=8, help="of the evaluation")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--sub_block", type=int, default=16)
    parser.add_argument("--top_k", type=int, default=4)
    parser.add_argument("--theta", type=float, default=1e6, help="base of the rotary embedding")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--output", type=Path, help="folder for the CSV")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=list(TASKS), default="mqar")
    options_of_training(parser, ["dense", "local", "routed"])
    parser.add_argument(
        "--grow_top_k", action="store_true", help="evaluate long texts with as many times top_k too"
    )
    parser.add_argument("--ask_top_k", type=int, nargs="*", default=[], help="ask with these top_k too")
    parser.add_argument("--ask_sub_block", type=int, nargs="*", default=[], help="and with these sub_blocks")
    parser.add_argument("--ask_cluster_span", type=int, nargs="*", default=[], help="and these cluster_spans")
    options = parser.parse_args()
    device = prepare(options.threads, options.device)
    rows = []
    for variant in options.variants:
        trained = [train(options, variant, seed, device) for seed in options.seeds]
        row = {"attention": variant}
        for times in [1, *options.evaluate]:
            scores = [accuracy(options, model, times * options.length, device) for model, _ in trained]
            row[f"{times * options.length:,} tokens"] = mean_and_range(scores)
            if options.grow_top_k and times > 1 and VARIANTS[variant].get("attention") is None:
                for model, _ in trained:
                    set_routing(model, top_k=times * options.top_k)
                scores = [accuracy(options, model, times * options.length, device) for model, _ in trained]
                row[f"top_k {times * options.top_k}"] = mean_and_range(scores)
                for model, _ in trained:
                    set_routing(model, top_k=options.top_k)
            for name in ASKED if VARIANTS[variant].get("attention") is None else ():
                for value in getattr(options, f"ask_{name}"):
                    for model, _ in trained:
                        set_routing(model, **{name: value})
                    scores = [
                        accuracy(options, model, times * options.length, device) for model, _ in trained
                    ]
                    row[f"{name} {value}, {times * options.length:,}"] = mean_and_range(scores)
                    for model, _ in trained:
                        set_routing(model, **{name: getattr(model.config, name)})
        row["s per training"] = f"{statistics.mean(seconds for _, seconds in trained):.0f}"
        rows.append(row)
        print(row, flush=True)
    title = (
        f"{options.task}, {options.layers} layers, window {options.window}, block {options.block}, "
        f"top_k {options.top_k}, distance >= {options.min_distance}, {len(options.seeds)} seed(s)"
    )
    show(title, rows, options.output, f"recall-{options.task}")


if __name__ == "__main__":
    main()
