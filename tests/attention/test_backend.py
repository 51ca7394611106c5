"""Which back end runs: configuration, environment, and the line that tells."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
import torch

from dualroute.attention import backend
from dualroute.attention.backends.cpp import build
from dualroute.attention.backends.cpp.backend import CPP

ROWS = torch.zeros(1, 1, 8)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(backend.VARIABLE, raising=False)
    monkeypatch.setattr(backend, "_default", "auto")
    backend._why_not_compiled.cache_clear()
    backend._warn_once.cache_clear()
    yield
    monkeypatch.undo()
    backend._why_not_compiled.cache_clear()
    build.load.cache_clear()


@pytest.fixture
def without_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    build.load.cache_clear()


def test_the_configuration_is_the_default_and_the_environment_overrides_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = backend._TORCH
    assert backend.choose(ROWS) is CPP
    backend.set_backend("torch")
    assert backend.choose(ROWS) is plain
    assert backend.token_kernels(ROWS) is None
    monkeypatch.setenv(backend.VARIABLE, "cpp")
    assert backend.choose(ROWS) is CPP
    assert backend.token_kernels(ROWS) is CPP.tokens
    with backend.plain_torch():
        assert backend.choose(ROWS) is plain
    monkeypatch.setenv(backend.VARIABLE, "")
    assert backend.choose(ROWS) is plain
    backend.set_backend("auto")
    assert backend.choose(ROWS) is CPP


def test_what_a_back_end_does_not_take_runs_in_torch() -> None:
    backend.set_backend("cpp")
    plain = backend._TORCH
    assert backend.choose(ROWS, causal=False, block=8) is CPP
    assert backend.choose(ROWS.to(torch.int8)) is plain
    assert backend.choose(ROWS.to("meta")) is plain


def test_an_unknown_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="attention back end=tritn is unknown: did you mean triton"):
        backend.set_backend("tritn")
    monkeypatch.setenv(backend.VARIABLE, "cutlass")
    for call in (lambda: backend.choose(ROWS), lambda: backend.describe("cpu")):
        with pytest.raises(ValueError, match="DUALROUTE_KERNELS=cutlass is unknown: set it to auto, torch"):
            call()


def test_the_line_says_what_runs_and_who_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    for size, name in ((64, "AVX-512"), (32, "AVX2"), (16, "vectors of 128 bits")):
        monkeypatch.setattr(build.load(), "vector_bytes", lambda size=size: size, raising=False)
        for unit, told in ((0, ""), (1, ""), (2, ", AMX for bfloat16")):
            monkeypatch.setattr(build.load(), "unit_number", lambda unit=unit: unit, raising=False)
            assert backend.describe("cpu") == f"attention: C++ kernels, {name}{told}"
    assert (
        backend.describe("cuda")
        == "attention: plain torch on cuda, where no other kernels were compared with it"
    )
    backend.set_backend("torch")
    assert backend.describe("cpu") == "attention: plain torch, as the configuration asks for"
    monkeypatch.setenv(backend.VARIABLE, "torch")
    assert backend.describe("cpu") == "attention: plain torch, as DUALROUTE_KERNELS asks for"


@pytest.mark.usefixtures("without_compiler")
@pytest.mark.filterwarnings("ignore:attention runs on plain torch")
def test_without_a_compiler_the_line_says_why_and_a_name_is_an_error() -> None:
    assert backend.describe("cpu").startswith(
        "attention: plain torch, slower: there is no C++ compiler: install g++"
    )
    backend.set_backend("cpp")
    for call in (lambda: backend.choose(ROWS), lambda: backend.describe("cpu")):
        with pytest.raises(
            ValueError,
            match="the attention back end is cpp, but the kernels cannot be compiled: there",
        ):
            call()
