"""What the kernels say they can take."""

from __future__ import annotations

import torch

from dualroute.attention.backends.triton import why_not
from tests.attention.backends.triton.helpers import DEVICE


def test_takes_what_fits_and_refuses_the_rest() -> None:
    query = torch.zeros(1, 8, 64, device=DEVICE, dtype=torch.float16)
    assert why_not(query) is None
    assert why_not(torch.zeros(1, 8, 256, device=DEVICE, dtype=torch.float16), block=256) is None
    assert why_not(query, block=257)
    assert why_not(query.double())
    assert why_not(torch.zeros(1, 8, 257, device=DEVICE, dtype=torch.float16))
    assert why_not(query.to("meta"))
