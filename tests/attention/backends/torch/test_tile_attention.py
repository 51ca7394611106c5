"""The private operator and the plain fallback are the same function, and parts of a softmax add up."""

from __future__ import annotations

import pytest
import torch

from dualroute.attention.backends.torch import tile_attention as kernels


def _tiles(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 4, 6, 8), (3, 2, 6, 8), (3, 2, 6, 8), (3, 4, 6, 8)]
    return tuple(torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)


def _mask() -> torch.Tensor:
    mask = torch.zeros(3, 1, 6, 6, dtype=torch.float64)
    mask[0, 0, :, 4:] = -torch.inf
    mask[1, 0, 2, :5] = -torch.inf
    return mask


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"mask": _mask()}])
def test_fallback_equals_operator(options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value, grad = _tiles()
    out, lse = kernels.attend(query, key, value, **options)
    grads = kernels.attend_backward(grad, query, key, value, out, lse, **options)
    monkeypatch.setattr(kernels, "_HAS_FLASH", False)
    plain, plain_lse = kernels.attend(query, key, value, **options)
    torch.testing.assert_close(plain, out)
    torch.testing.assert_close(plain_lse, lse)
    for got, wanted in zip(
        kernels.attend_backward(grad, query, key, value, out, lse, **options), grads, strict=True
    ):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("flash", [True, False])
def test_parts_with_the_merged_result_give_the_joint_gradient(
    flash: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not flash:
        monkeypatch.setattr(kernels, "_HAS_FLASH", False)
    query, key, value, grad = (rows[:, :2].requires_grad_() for rows in _tiles())
    joint = torch.softmax(query @ key.mT / 8**0.5, -1) @ value
    wanted = torch.autograd.grad(joint, (query, key, value), grad)
    query, key, value, grad = (rows.detach() for rows in (query, key, value, grad))
    parts = [kernels.attend(query, key[:, :, cut], value[:, :, cut]) for cut in (slice(0, 2), slice(2, 6))]
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    out = sum(o * (part - lse).exp()[..., None] for o, part in parts)
    torch.testing.assert_close(out, joint.detach())
    got = [
        kernels.attend_backward(grad, query, key[:, :, cut], value[:, :, cut], out, lse)
        for cut in (slice(0, 2), slice(2, 6))
    ]
    torch.testing.assert_close(got[0][0] + got[1][0], wanted[0])
    torch.testing.assert_close(torch.cat([part[1] for part in got], 2), wanted[1])
    torch.testing.assert_close(torch.cat([part[2] for part in got], 2), wanted[2])


@pytest.mark.parametrize("flash", [True, False])
def test_half_precision_sums_in_float32(flash: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not flash:
        monkeypatch.setattr(kernels, "_HAS_FLASH", False)
    query, key, value, grad = _tiles(torch.bfloat16)
    out, lse = kernels.attend(query, key, value)
    exact, exact_lse = kernels.attend(query.double(), key.double(), value.double())
    assert out.dtype == lse.dtype == torch.float32
    torch.testing.assert_close(out.double(), exact, rtol=0.03, atol=0.03)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=0.03, atol=0.03)
    grads = kernels.attend_backward(grad, query, key, value, out, lse)
    wanted = kernels.attend_backward(*(t.double() for t in (grad, query, key, value)), exact, exact_lse)
    for got, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("scale", [2.0, 4.0])
def test_logits_and_sums_of_half_precision_are_not_rounded(
    scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the CPU's operator, against float64: rounded to bfloat16 are the weights and the gradients
    of logits, once. Logits in bfloat16 cost 0.01 and more, the more the larger they are."""
    generator = torch.Generator().manual_seed(0)
    query, key, value, grad = (
        (factor * torch.randn(8, 1, 64, 64, generator=generator)).bfloat16()
        for factor in (scale, scale, 1, 1)
    )
    exact = [rows.double().requires_grad_() for rows in (query, key, value)]
    logits = exact[0] @ exact[1].mT / 8
    wanted = logits.softmax(-1) @ exact[2]
    monkeypatch.setattr(kernels, "_HAS_FLASH", False)
    out, lse = kernels.attend(query, key, value)
    torch.testing.assert_close(lse.double(), logits.logsumexp(-1), rtol=0, atol=2e-5)
    assert (out.double() - wanted).norm() / wanted.norm() < 0.002
    got = [out, *kernels.attend_backward(grad, query, key, value, out, lse)]
    grads = torch.autograd.grad(wanted, exact, grad.double())
    for ours, theirs in zip(got, [wanted, *grads], strict=True):
        assert ours.dtype == torch.float32
        assert (ours.double() - theirs).norm() / theirs.norm() < 0.006
