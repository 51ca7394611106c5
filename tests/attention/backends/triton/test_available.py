"""What the kernels say they can take."""

from __future__ import annotations

import torch

from dualroute.attention.backends.triton import available
from tests.attention.backends.triton.helpers import DEVICE


def test_takes_what_fits_and_refuses_the_rest() -> None:
    query = torch.zeros(1, 8, 64, device=DEVICE, dtype=torch.float16)
    assert available(query)
    assert available(query, block=64)
    assert not available(query, block=256)
    assert not available(query, causal=False)
    assert not available(query.double())
    assert not available(torch.zeros(1, 8, 256, device=DEVICE, dtype=torch.float16))
    assert not available(query.to("meta"))
