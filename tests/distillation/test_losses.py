"""The chunked distillation loss is the literal one, and never holds a [tokens, vocab] matrix."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dualroute.distillation.losses import Logits, Objective, TopK, chunked_distillation, top_k_of
from tests.training.step.test_losses import LargestTensor, problem

KINDS = ["forward_kl", "reverse_kl", "jsd"]


def pair(rows: int, vocab: int, seed: int = 0, ignored: float = 0.3, **more: Any) -> tuple[Any, ...]:
    hidden, weight, labels = problem(rows, 7, vocab, seed=seed, ignored=ignored, **more)
    theirs = problem(rows, 5, vocab, seed=seed + 1, **more)
    return hidden, weight, labels, Logits(theirs[0].detach(), theirs[1].detach())


def divergence(p: Tensor, q: Tensor, objective: Objective) -> Tensor:
    """Sum over rows, from probabilities, as the formulas stand in a book."""
    if objective.loss == "forward_kl":
        return (q * (q / p).log()).sum()
    if objective.loss == "reverse_kl":
        return (p * (p / q).log()).sum()
    beta = objective.beta
    m = beta * q + (1 - beta) * p
    return beta * (q * (q / m).log()).sum() + (1 - beta) * (p * (p / m).log()).sum()


def buckets(probabilities: Tensor, ids: Tensor) -> Tensor:
    chosen = probabilities.gather(1, ids)
    if ids.shape[1] == probabilities.shape[1]:
        return chosen
    return torch.cat([chosen, 1 - chosen.sum(1, keepdim=True)], 1)


def reference(
    hidden: Tensor, weight: Tensor, labels: Tensor, teacher: Logits, objective: Objective, k: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """total, cross-entropy and divergence from whole matrices and autograd."""
    kept = labels != -100
    logits, theirs = (hidden @ weight.t())[kept], (teacher.hidden @ teacher.weight.t())[kept]
    p, q = ((x / objective.temperature).softmax(1) for x in (logits, theirs))
    if k is not None:
        ids = q.topk(k).indices
        p, q = buckets(p, ids), buckets(q, ids)
    loss = F.cross_entropy(logits, labels[kept], reduction="sum")
    distance = divergence(p, q, objective)
    z = logits.logsumexp(-1).square().sum()
    ce, kl, z_factor = objective.factors
    return ce * loss + kl * distance + z_factor * z, loss, distance


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 30),
    vocab=st.integers(3, 40),
    k=st.one_of(st.none(), st.integers(1, 3)),
    chunk=st.one_of(st.none(), st.integers(1, 40)),
    kind=st.sampled_from(KINDS),
    temperature=st.sampled_from([1.0, 2.0, 0.7]),
    beta=st.sampled_from([0.1, 0.5, 0.9]),
    weights=st.sampled_from([(1.0, 0.0, 0.0), (0.5, 0.5, 1e-3), (0.0, 1.0, 0.0)]),
    seed=st.integers(0, 1000),
)
def test_equals_autograd_of_the_literal_formula_in_float64(
    rows: int, vocab: int, k: int | None, chunk: int | None, kind: Any, temperature: float, beta: float,
    weights: tuple[float, float, float], seed: int,
) -> None:  # fmt: skip
    hidden, weight, labels, teacher = pair(rows, vocab, seed)
    objective = Objective(kind, temperature, beta, *weights)
    told = teacher if k is None else top_k_of(teacher, k, temperature, chunk_size=chunk)
    sums = chunked_distillation(hidden, weight, labels, told, objective, chunk_size=chunk)
    expected = reference(hidden, weight, labels, teacher, objective, k)
    for ours, theirs in zip((sums.total, sums.loss_sum, sums.divergence_sum), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-8)
    assert int(sums.count) == int((labels != -100).sum())
    ours = torch.autograd.grad(-3.0 * sums.total, (hidden, weight))
    theirs = torch.autograd.grad(-3.0 * expected[0], (hidden, weight))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_gradients_are_within_1e6_of_autograd(kind: Any) -> None:
    hidden, weight, labels, teacher = pair(64, 300, dtype=torch.float32)
    objective = Objective(kind, 2.0, 0.3, 0.5, 0.5)
    sums = chunked_distillation(hidden, weight, labels, teacher, objective, chunk_size=16)
    total, *_ = reference(hidden, weight, labels, teacher, objective, None)
    ours = torch.autograd.grad(sums.total / sums.count, (hidden, weight))
    theirs = torch.autograd.grad(total / sums.count, (hidden, weight))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_no_matrix_of_tokens_by_vocabulary_exists() -> None:
    hidden, weight, labels, teacher = pair(256, 1000, dtype=torch.float32)
    for told in (teacher, top_k_of(teacher, 8, chunk_size=8)):
        with LargestTensor() as largest:
            objective = Objective("jsd", 2.0, ce_weight=1.0)
            sums = chunked_distillation(hidden, weight, labels, told, objective, chunk_size=8)
            sums.total.backward()
        assert largest.elements <= max(8 * 1000, 256 * 8, weight.numel())
    with LargestTensor() as largest:
        top_k_of(teacher, 8, chunk_size=8)
    assert largest.elements <= 8 * 1000


def test_what_stands_in_ignored_rows_does_not_matter() -> None:
    hidden, weight, labels, teacher = pair(20, 30)
    ignored = labels == -100
    spoilt = [x.detach().clone() for x in (hidden, teacher.hidden)]
    for rows in spoilt:
        rows[ignored] = math.nan
    spoilt[0].requires_grad_()
    objective = Objective("jsd", ce_weight=1.0)
    clean = chunked_distillation(hidden, weight, labels, teacher, objective)
    other = chunked_distillation(spoilt[0], weight, labels, Logits(spoilt[1], teacher.weight), objective)
    assert torch.equal(clean.total, other.total)
    (gradient,) = torch.autograd.grad(other.total, spoilt[0])
    assert torch.equal(gradient[ignored], torch.zeros_like(gradient[ignored]))


def test_a_student_that_is_its_teacher_has_no_distance_and_no_gradient() -> None:
    hidden, weight, labels, _ = pair(20, 30)
    same = Logits(hidden.detach(), weight.detach())
    for kind in KINDS:
        for told in (same, top_k_of(same, 4, 2.0)):
            sums = chunked_distillation(hidden, weight, labels, told, Objective(kind, 2.0))
            assert abs(float(sums.divergence_sum)) < 1e-10
            (gradient,) = torch.autograd.grad(sums.total, hidden)
            assert gradient.abs().max() < 1e-10


def test_no_gradient_is_computed_where_none_is_wanted() -> None:
    hidden, weight, labels, teacher = pair(20, 30)
    with torch.no_grad():
        sums = chunked_distillation(hidden, weight, labels, teacher, Objective())
    assert not sums.total.requires_grad
    frozen = chunked_distillation(hidden, weight.detach(), labels, teacher, Objective())
    torch.testing.assert_close(frozen.total.detach(), sums.total)
    assert torch.autograd.grad(frozen.total, hidden)[0].abs().max() > 0


def test_a_tiny_rest_is_not_lost() -> None:
    """In float32, 1 − Σ p would be 0 or noise where the rest is 1e-12; the divergence must see it."""
    hidden = torch.tensor([[1.0]], requires_grad=True)
    weight = torch.tensor([[0.0], [-28.0], [-28.0]])
    labels = torch.zeros(1, dtype=torch.int64)
    told = TopK(torch.tensor([[-1e-9]]), torch.tensor([[0]]), torch.tensor([math.log(1e-9)]))
    sums = chunked_distillation(hidden, weight, labels, told, Objective("forward_kl"))
    rest = 2 * math.exp(-28)
    assert float(sums.divergence_sum) == pytest.approx(1e-9 * math.log(1e-9 / rest), rel=0.01)
    (gradient,) = torch.autograd.grad(sums.total, hidden)
    assert float(gradient) == pytest.approx(-28 * (rest - 1e-9), rel=1e-3)


def test_an_empty_rest_is_handled_where_it_is_defined_and_refused_where_it_is_not() -> None:
    hidden, weight, labels, teacher = pair(6, 10, ignored=0.0)
    told = top_k_of(teacher, 4)
    certain = TopK(told.log_probs, told.ids, torch.full_like(told.rest, -math.inf))
    for kind in ("forward_kl", "jsd"):
        sums = chunked_distillation(hidden, weight, labels, certain, Objective(kind))
        assert torch.isfinite(sums.total)
        assert float(sums.divergence_sum) > 0
        assert torch.isfinite(torch.autograd.grad(sums.total, hidden)[0]).all()
    with pytest.raises(ValueError, match="reverse_kl is infinite"):
        chunked_distillation(hidden, weight, labels, certain, Objective("reverse_kl"))


def test_truncation_only_lowers_the_divergence_and_vanishes_with_all_tokens() -> None:
    hidden, weight, labels, teacher = pair(20, 30)
    for kind in KINDS:
        distances = [
            float(
                chunked_distillation(
                    hidden, weight, labels, top_k_of(teacher, k), Objective(kind)
                ).divergence_sum
            )
            for k in (1, 4, 15, 30)
        ]
        whole = chunked_distillation(hidden, weight, labels, teacher, Objective(kind)).divergence_sum
        assert distances == sorted(distances)
        assert distances[-1] == pytest.approx(float(whole), rel=1e-9)


def test_half_precision_under_autocast_stays_close() -> None:
    hidden, weight, labels, teacher = pair(64, 200, dtype=torch.float32)
    objective = Objective("forward_kl", ce_weight=0.5)
    exact = chunked_distillation(hidden, weight, labels, teacher, objective)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = chunked_distillation(hidden, weight, labels, teacher, objective)
    assert rough.total.dtype == torch.float32
    assert float(rough.total.detach()) == pytest.approx(float(exact.total.detach()), rel=0.02)


def test_what_does_not_fit_is_named() -> None:
    hidden, weight, labels, teacher = pair(6, 10, ignored=0.0)
    with pytest.raises(ValueError, match="vocabulary of 10"):
        chunked_distillation(hidden, weight, labels, Logits(teacher.hidden, teacher.weight[:9]), Objective())
    told = top_k_of(teacher, 3)
    outside = told._replace(ids=told.ids.index_fill(0, torch.tensor([2]), 10))
    with pytest.raises(ValueError, match="10 are outside"):
        chunked_distillation(hidden, weight, labels, outside, Objective())
    with pytest.raises(ValueError, match="must be"):
        chunked_distillation(hidden, weight, labels, told._replace(rest=told.rest[:3]), Objective())
