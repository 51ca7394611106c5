"""The chunked distillation loss against plain autograd: time and memory of one forward and backward pass.

python benchmarks/training/distillation_loss.py --threads 1 --output results/distillation_loss

Both get the hidden states and output weights of a student and a teacher and return the gradients of hidden
states and student's weight; plain makes both matrices of logits and leaves the rest to autograd.  Memory is
that of one call at its peak beside its inputs, in a process of its own; time the median of rounds in which
the variants take turns.  Figures are worth comparing within one run only.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from dualroute.distillation.losses import Logits, Objective, chunked_distillation, top_k_of

sys.path.insert(0, str(Path(__file__).parents[1]))  # where measure.py is
from measure import medians, peak_mebibytes, prepare, show


def inputs(tokens: int, vocab: int, dim: int, teacher_dim: int, device: str) -> tuple[Any, ...]:
    """Hidden states and weights of both models and labels, as of trained models: logits of a few units."""
    draw = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, device=device)

    student = normal(tokens, dim).requires_grad_(), (normal(vocab, dim) * 2 / dim**0.5).requires_grad_()
    teacher = Logits(normal(tokens, teacher_dim), normal(vocab, teacher_dim) * 2 / teacher_dim**0.5)
    return (*student, torch.randint(vocab, (tokens,), generator=draw, device=device), teacher)


def plain_loss(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, teacher: Logits, objective: Objective
) -> torch.Tensor:
    """The same objective as people write it."""
    logits, temperature = hidden @ weight.t(), objective.temperature
    with torch.no_grad():
        log_q = F.log_softmax(teacher.hidden @ teacher.weight.t() / temperature, -1)
    log_p = F.log_softmax(logits / temperature, -1)
    if objective.loss == "forward_kl":
        distance = F.kl_div(log_p, log_q, reduction="sum", log_target=True)
    else:
        distance = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    ce_factor, kl_factor, _ = objective.factors
    return ce_factor * F.cross_entropy(logits, labels, reduction="sum") + kl_factor * distance


def work(variant: str, loss: str, sizes: tuple[Any, ...], threads: int | None) -> Callable[[], Any]:
    """The call that is measured; runs in a fresh process too."""
    if threads is not None:
        torch.set_num_threads(threads)
    hidden, weight, labels, teacher = inputs(*sizes)
    objective = Objective(loss, temperature=2.0, kl_weight=0.5, ce_weight=0.5)  # type: ignore[arg-type]
    told = top_k_of(teacher, 64, 2.0) if variant == "top 64" else teacher
    compiled = torch.compile(plain_loss) if variant == "compiled" else plain_loss

    def call() -> Any:
        if variant in ("chunked", "top 64"):
            total = chunked_distillation(hidden, weight, labels, told, objective).total
        else:
            total = compiled(hidden, weight, labels, teacher, objective)
        return torch.autograd.grad(total, (hidden, weight))

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--dim", type=int, default=512, help="of the student")
    parser.add_argument("--teacher_dim", type=int, default=768)
    parser.add_argument("--losses", nargs="+", default=["forward_kl", "reverse_kl"])
    parser.add_argument("--compiled", action="store_true", help="also plain under torch.compile")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="folder for a CSV")
    options = parser.parse_args()
    device = prepare(options.threads, options.device)
    sizes = (options.tokens, options.vocab, options.dim, options.teacher_dim, options.device)
    variants = ["plain", *(["compiled"] if options.compiled else []), "chunked", "top 64"]
    rows = []
    for loss in options.losses:
        made = partial(work, loss=loss, sizes=sizes, threads=options.threads)
        seconds = medians({name: made(name) for name in variants}, options.repeats, device)
        peaks = {
            name: peak_mebibytes(work, name, loss, sizes, options.threads, device=device) for name in variants
        }
        for name in variants:
            rows.append(
                {
                    "loss": loss,
                    "variant": name,
                    "seconds": f"{seconds[name]:.2f}",
                    "× plain's time": f"{seconds[name] / seconds['plain']:.2f}",
                    "MiB": f"{peaks[name]:,.0f}",
                    "plain's memory ÷": f"{peaks['plain'] / peaks[name]:.1f}",
                }
            )
    title = f"{options.tokens} tokens, vocabulary {options.vocab}, widths {options.dim}/{options.teacher_dim}"
    show(title, rows, options.output, "distillation_loss")


if __name__ == "__main__":
    main()
