"""The chunked loss is F.cross_entropy, and never holds a [tokens, vocab] matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dualroute.training.step import losses
from dualroute.training.step.losses import automatic_chunk_size, chunked_cross_entropy


def problem(
    rows: int,
    dim: int,
    vocab: int,
    *,
    seed: int = 0,
    ignored: float = 0.3,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, dim, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocab, dim, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(vocab, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) < ignored] = -100
    return hidden, weight, labels


def reference(hidden: Tensor, weight: Tensor, labels: Tensor, z_loss: float) -> tuple[Tensor, Tensor, Tensor]:
    """total, loss_sum, z_sum, from the whole matrix of logits and autograd."""
    logits = hidden @ weight.t()
    loss = F.cross_entropy(logits, labels, reduction="sum", ignore_index=-100)
    z = logits.logsumexp(-1)[labels != -100].square().sum()
    return loss + z_loss * z, loss, z


class LargestTensor(TorchDispatchMode):
    """Records the most elements that any tensor made under it had."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return made


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 40),
    vocab=st.integers(2, 50),
    chunk=st.one_of(st.none(), st.integers(1, 50)),
    z_loss=st.sampled_from([0.0, 1e-4, 0.3]),
    ignored=st.sampled_from([0.0, 0.4, 1.0]),
    scale=st.sampled_from([1.0, 0.125, -3.0]),
    seed=st.integers(0, 1000),
)
def test_equals_autograd_of_cross_entropy_in_float64(
    rows: int, vocab: int, chunk: int | None, z_loss: float, ignored: float, scale: float, seed: int
) -> None:
    hidden, weight, labels = problem(rows, 7, vocab, seed=seed, ignored=ignored)
    sums = chunked_cross_entropy(hidden, weight, labels, chunk_size=chunk, z_loss=z_loss)
    total, loss, z = reference(hidden, weight, labels, z_loss)
    for ours, theirs in ((sums.total, total), (sums.loss_sum, loss), (sums.z_sum, z)):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    assert sums.count.dtype == torch.int64
    assert int(sums.count) == int((labels != -100).sum())
    gradients = torch.autograd.grad(sums.total * scale, (hidden, weight))
    expected = torch.autograd.grad(total * scale, (hidden, weight))
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_gradcheck() -> None:
    hidden, weight, labels = problem(6, 4, 9)
    assert torch.autograd.gradcheck(
        lambda h, w: chunked_cross_entropy(h, w, labels, chunk_size=2, z_loss=0.1).total, (hidden, weight)
    )


def test_no_matrix_of_tokens_by_vocabulary_is_ever_made() -> None:
    rows, dim, vocab, chunk = 512, 8, 300, 16
    hidden, weight, labels = problem(rows, dim, vocab, dtype=torch.float32)
    with LargestTensor() as recorded:
        chunked_cross_entropy(hidden, weight, labels, chunk_size=chunk, z_loss=1e-4).total.backward()
    assert recorded.elements <= max(chunk * vocab, rows * dim, vocab * dim)
    with LargestTensor() as whole:
        reference(hidden, weight, labels, 0.0)[0].backward()
    assert whole.elements == rows * vocab, "the recorder must see what it is there to see"


def test_automatic_chunks_stay_within_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CHUNK_BYTES_CPU", 4 * 300 * 50)
    hidden, weight, labels = problem(512, 8, 300, dtype=torch.float32, ignored=0.0)
    with LargestTensor() as recorded:
        chunked_cross_entropy(hidden, weight, labels).total.backward()
    assert recorded.elements <= max(300 * 50, 512 * 8)


@given(rows=st.integers(0, 100_000), vocab=st.integers(2, 300_000))
def test_automatic_chunk_size_covers_all_rows(rows: int, vocab: int) -> None:
    size = automatic_chunk_size(rows, vocab, torch.float32, torch.device("cpu"))
    assert size >= 1
    assert size == 1 or size * vocab * 4 <= losses.CHUNK_BYTES_CPU
    assert size <= max(rows, 1)


def test_saved_for_backward_are_only_the_two_gradients() -> None:
    hidden, weight, labels = problem(64, 8, 200, dtype=torch.float32)
    saved: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        chunked_cross_entropy(hidden, weight, labels)
    assert sorted(saved) == sorted([hidden.shape, weight.shape])


def test_bfloat16_autocast_is_as_near_to_the_truth_as_the_plain_way() -> None:
    hidden, weight, labels = problem(96, 64, 500, dtype=torch.float32)
    with torch.no_grad():
        weight.mul_(0.1)
    exact_total = reference(hidden.double(), weight.double(), labels, 1e-3)[0]
    truth = torch.autograd.grad(exact_total, (hidden, weight))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sums = chunked_cross_entropy(hidden, weight, labels, z_loss=1e-3, chunk_size=20)
        logits = F.linear(hidden, weight)
    plain = F.cross_entropy(logits.float(), labels, reduction="sum")
    plain = plain + 1e-3 * logits.float().logsumexp(-1)[labels != -100].square().sum()
    assert logits.dtype == torch.bfloat16
    assert sums.total.dtype == torch.float32
    torch.testing.assert_close(sums.total, plain, rtol=1e-6, atol=0)
    ours = torch.autograd.grad(sums.total, (hidden, weight))
    theirs = torch.autograd.grad(plain, (hidden, weight))
    for mine, other, exact in zip(ours, theirs, truth, strict=True):
        assert mine.dtype == torch.float32
        assert (mine - exact).norm() / exact.norm() < 0.01
        assert (mine - exact).norm() <= 1.1 * (other - exact).norm()


def test_the_weight_gradient_is_summed_in_float32() -> None:
    """4096 equal rows in chunks of one: a bfloat16 sum would stop growing at 256 times the first term."""
    hidden = torch.ones(4096, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    chunked_cross_entropy(hidden, weight, torch.zeros(4096, dtype=torch.long), chunk_size=1).total.backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.bfloat16
    assert weight.grad.flatten().tolist() == [-2048.0, 2048.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_keep_their_dtype(dtype: torch.dtype) -> None:
    hidden, weight, labels = problem(32, 16, 40, dtype=dtype)
    sums = chunked_cross_entropy(hidden, weight, labels)
    sums.total.backward()
    assert sums.loss_sum.dtype == torch.float32
    assert hidden.grad is not None
    assert weight.grad is not None
    assert (hidden.grad.dtype, weight.grad.dtype) == (dtype, dtype)
    expected = reference(hidden.double(), weight.double(), labels, 0.0)[1]
    torch.testing.assert_close(sums.loss_sum.double(), expected.detach(), rtol=1e-2, atol=0)


def test_ignored_rows_cost_and_change_nothing() -> None:
    """Not even a NaN in an ignored row reaches the sums or the gradients of the others."""
    hidden, weight, labels = problem(30, 5, 11)
    clean = chunked_cross_entropy(hidden, weight, labels)
    expected = torch.autograd.grad(clean.total, (hidden, weight))
    poisoned = hidden.detach().clone()
    poisoned[labels == -100] = float("nan")
    poisoned.requires_grad_()
    sums = chunked_cross_entropy(poisoned, weight, labels)
    gradients = torch.autograd.grad(sums.total, (poisoned, weight))
    assert torch.equal(sums.total, clean.total)
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))
    assert not gradients[0][labels == -100].any()


def test_only_ignored_rows_give_zero_and_zero_gradients() -> None:
    hidden, weight, labels = problem(9, 4, 6, ignored=1.1)
    sums = chunked_cross_entropy(hidden, weight, labels, z_loss=1.0)
    sums.total.backward()
    assert (sums.total.item(), sums.count.item()) == (0.0, 0)
    assert hidden.grad is not None
    assert weight.grad is not None
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_without_gradients() -> None:
    hidden, weight, labels = problem(20, 4, 30)
    with_gradient = chunked_cross_entropy(hidden, weight, labels, chunk_size=7)
    with torch.no_grad():
        without = chunked_cross_entropy(hidden, weight, labels, chunk_size=7)
    assert not without.total.requires_grad
    assert torch.equal(without.loss_sum, with_gradient.loss_sum)
    assert with_gradient.total.requires_grad
    assert not with_gradient.loss_sum.requires_grad
    assert not with_gradient.z_sum.requires_grad
    frozen = chunked_cross_entropy(hidden, weight.detach(), labels)
    (gradient,) = torch.autograd.grad(frozen.total, hidden)
    expected = torch.autograd.grad(reference(hidden, weight, labels, 0.0)[0], hidden)[0]
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-10)


def test_enormous_logits_do_not_overflow() -> None:
    hidden = torch.tensor([[1e4]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]])
    sums = chunked_cross_entropy(hidden, weight, torch.tensor([1]))
    assert float(sums.loss_sum) == 2e4
    sums.total.backward()
    assert hidden.grad is not None
    assert float(hidden.grad) == 2.0


@pytest.mark.parametrize(
    ("hidden", "weight", "labels", "chunk", "message"),
    [
        ((4, 3), (5, 2), [0, 1, 2, 3], None, "do not fit"),
        ((2, 2, 3), (5, 3), [0, 1], None, "do not fit"),
        ((4, 3), (5, 3), [0, 1, 2], None, "one id for each of the 4"),
        ((2, 3), (5, 3), [0, 5], None, "a label is 5, outside the 5"),
        ((2, 3), (5, 3), [0, -1], None, "a label is -1"),
        ((2, 3), (5, 3), [0, 1], 0, "chunk_size is 0"),
    ],
)
def test_bad_inputs_are_named(
    hidden: tuple[int, ...], weight: tuple[int, ...], labels: list[int], chunk: int | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        chunked_cross_entropy(
            torch.zeros(hidden), torch.zeros(weight), torch.tensor(labels), chunk_size=chunk
        )


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_smoothed_labels_are_torchs(chunk_size):
    torch.manual_seed(0)
    hidden = torch.randn(10, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(17, 6, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(17, (10,))
    labels[4] = -100
    expected = torch.nn.functional.cross_entropy(
        hidden @ weight.T, labels, reduction="sum", label_smoothing=0.2
    )
    wanted = torch.autograd.grad(expected, (hidden, weight))
    sums = chunked_cross_entropy(hidden, weight, labels, label_smoothing=0.2, chunk_size=chunk_size)
    torch.testing.assert_close(sums.total, expected)
    plain = torch.nn.functional.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    torch.testing.assert_close(sums.loss_sum, plain.detach())
    for ours, theirs in zip(torch.autograd.grad(sums.total, (hidden, weight)), wanted, strict=True):
        torch.testing.assert_close(ours, theirs)
