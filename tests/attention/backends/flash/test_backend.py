"""What flash attention takes, and the reason why not where it does not."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dualroute.attention import backend
from dualroute.attention.backends import flash
from dualroute.attention.backends.flash.backend import FLASH


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    flash._why_not_here.cache_clear()
    backend._warn_once.cache_clear()
    yield
    flash._why_not_here.cache_clear()
    backend._warn_once.cache_clear()


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def _rows(dim: int = 64, dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> Any:
    return SimpleNamespace(shape=(4, 100, dim), dtype=dtype, device=torch.device(device))


@pytest.mark.usefixtures("a_gpu")
def test_what_it_takes() -> None:
    for rows in (_rows(), _rows(128, torch.float16), _rows(256), _rows(8)):
        assert FLASH.supports(rows)
        assert FLASH.supports(rows, block=512)
        assert FLASH.supports(rows, causal=False, block=64)


@pytest.mark.usefixtures("a_gpu")
@pytest.mark.parametrize(
    ("rows", "options", "reason"),
    [
        (_rows(device="cpu"), {}, "for CUDA devices, not for cpu"),
        (_rows(dtype=torch.float32), {}, "bfloat16 and float16 only, not float32"),
        (_rows(dim=264), {}, "at most 256, a multiple of 8, not 264"),
        (_rows(dim=20), {}, "at most 256, a multiple of 8, not 20"),
    ],
)
def test_what_it_does_not_take_has_a_reason(rows: Any, options: dict[str, Any], reason: str) -> None:
    assert reason in str(FLASH.why_not(rows, **options))
    assert not FLASH.supports(rows, **options)


def test_what_the_machine_lacks_has_a_reason(a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "compute capability 8.0, not (7, 5)" in str(FLASH.why_not(_rows()))
    flash._why_not_here.cache_clear()
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    assert "built without flash attention" in str(FLASH.why_not(_rows()))
    flash._why_not_here.cache_clear()
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert "ROCm" in str(FLASH.why_not(_rows()))


def test_plain_torch_takes_its_place_and_a_line_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backend.VARIABLE, "flash")
    assert "plain torch: flash attention's operators are for CUDA" in backend.describe("cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        chosen = backend.choose(torch.zeros(1, 1, 8))
    assert chosen is not FLASH
    assert chosen.supports(torch.zeros(1, 1, 8, dtype=torch.float64))
