"""The comparison that `kernels: auto` makes finds this back end right, with the operators' stand-in."""

from __future__ import annotations

import pytest
import torch

from dualroute.attention.backends.flash.backend import FlashBackend
from dualroute.attention.verification import check
from dualroute.attention.verification.correctness import reference
from tests.attention.verification.test_correctness import CPU, problem


class OnCpu(FlashBackend):
    """Takes the CPU's tensors, which the stand-in computes."""

    def why_not(self, query: torch.Tensor, *, causal: bool = True, block: int | None = None) -> str | None:
        return None


@pytest.mark.usefixtures("flash")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_comparison_finds_it_right(dtype: torch.dtype, causal: bool) -> None:
    asked = problem(dtype, causal=causal)
    errors = check(OnCpu(), asked, reference(asked, CPU))
    assert errors.values < (1e-6 if dtype == torch.float32 else 4e-3)
