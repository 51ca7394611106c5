"""Liger's loss in the place of ours, where Liger is installed; its arithmetic runs on a CPU too."""

import pytest
import torch

from dualroute.distillation.losses import Objective, chunked_distillation
from tests.distillation.test_losses import pair

pytest.importorskip("liger_kernel")


@pytest.mark.parametrize(
    "objective",
    [
        Objective("forward_kl", 1.0, 0.5, 0.7, 0.3),
        Objective("forward_kl", 2.0, 0.5, 1.0, 0.0),
        Objective("reverse_kl", 2.0, 0.5, 0.5, 0.5),
        Objective("jsd", 1.5, 0.5, 0.5, 0.5),
    ],
)
def test_liger_gives_our_loss_and_gradients(objective, monkeypatch):
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    from dualroute.distillation.liger import liger_distillation

    # compiling needs a C++ compiler on a CPU, and is not what is compared
    init = LigerFusedLinearJSDLoss.__init__
    monkeypatch.setattr(
        LigerFusedLinearJSDLoss, "__init__", lambda self, **more: init(self, compiled=False, **more)
    )
    hidden, weight, labels, teacher = pair(40, 50, dtype=torch.float32)
    ours = chunked_distillation(hidden, weight, labels, teacher, objective)
    theirs = liger_distillation(hidden, weight, labels, teacher, objective)
    for name in ("total", "loss_sum", "divergence_sum"):
        torch.testing.assert_close(getattr(theirs, name), getattr(ours, name), rtol=1e-4, atol=1e-4)
    assert theirs.count == ours.count
    with torch.no_grad():
        torch.testing.assert_close(
            liger_distillation(hidden, weight, labels, teacher, objective).total, theirs.total.detach()
        )
    expected = torch.autograd.grad(ours.total, (hidden, weight))
    for one, other in zip(torch.autograd.grad(theirs.total, (hidden, weight)), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
