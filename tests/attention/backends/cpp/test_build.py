"""Compiling the kernels: once, into the cache, and what happens where that cannot be done."""

from __future__ import annotations

import platform
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dualroute.attention import Layout, Routing, backend, local_attention, routed_attention
from dualroute.attention.backends.cpp import build, fast_int8_product, int8_panels, int8_product


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, and nothing loaded yet."""
    monkeypatch.setenv(build.CACHE, str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv(backend.VARIABLE, raising=False)
    _forget()
    yield tmp_path
    monkeypatch.undo()
    _forget()


def _forget() -> None:
    build.load.cache_clear()
    backend._why_not_compiled.cache_clear()
    backend._warn_once.cache_clear()


def _attend() -> torch.Tensor:
    rows = torch.ones(1, 16, 4)
    return local_attention(rows, rows, rows, Layout.build(1, 16, 8).stream, window=3)


def _compiler(folder: Path, script: str) -> str:
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.slow
def test_compiled_once_and_nothing_else_is_left(fresh: Path) -> None:
    build.load()
    (made,) = (fresh / "cache").iterdir()
    stamp = made.stat().st_mtime_ns
    _forget()
    build.load()
    assert [path.stat().st_mtime_ns for path in (fresh / "cache").iterdir()] == [stamp]


def test_other_sources_make_another_library(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = build._compiler()
    name = build._fingerprint(compiler)
    changed = fresh / "local.h"
    changed.write_text("// changed\n")
    sources = [changed, *build._sources()[1:]]
    monkeypatch.setattr(build, "_sources", lambda: sources)
    assert build._fingerprint(compiler) != name


def test_without_a_compiler_torch_runs_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.warns(
        UserWarning, match="plain torch, which is slower: there is no C\\+\\+ compiler: install"
    ):
        assert torch.equal(_attend(), torch.ones(1, 16, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _attend()


def test_asked_for_by_name_they_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setenv(backend.VARIABLE, "cpp")
    with pytest.raises(
        ValueError, match="DUALROUTE_KERNELS=cpp, but the kernels cannot be compiled: there is"
    ):
        _attend()


def test_a_compiler_that_fails_is_quoted(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(
        "CXX", _compiler(fresh, 'case "$1" in --version) echo 1;; *) echo no such flag >&2; exit 1;; esac')
    )
    with pytest.raises(build.BuildError, match="failed:\nno such flag"):
        build.load()
    assert list((fresh / "cache").iterdir()) == []


def test_a_broken_library_is_named(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = fresh / "cache" / f"attention-{build._fingerprint(build._compiler())}.so"
    target.parent.mkdir()
    target.write_bytes(b"cut short")
    with pytest.raises(build.BuildError, match=f"{target.name} cannot be loaded"):
        build.load()


def test_a_cache_that_cannot_be_written_is_named(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (fresh / "file").write_text("")
    monkeypatch.setenv(build.CACHE, str(fresh / "file" / "cache"))
    with pytest.raises(build.BuildError, match=r"cannot be written .* name a folder in DUALROUTE_CACHE"):
        build.load()


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="names of processors are x86 ones")
@pytest.mark.parametrize("processor", ["x86-64", "x86-64-v3"])
def test_narrower_vectors_give_the_same(processor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """128-bit vectors, and the 256-bit ones of AVX2."""
    flags = tuple(flag.replace("native", processor) for flag in build.FLAGS)
    monkeypatch.setattr(build, "FLAGS", flags)
    rows = [torch.randn(2, 300, 24, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    stream = Layout.build(1, 300, 20).stream

    def run() -> list[torch.Tensor]:
        out = routed_attention(*rows, stream, Routing(2, "moment"))
        out = out + local_attention(*rows, stream, window=37)
        return [out, *torch.autograd.grad(out.square().sum(), rows)]

    actual = run()
    with backend.plain_torch():
        expected = run()
    for got, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    weight, scale = torch.randint(-128, 128, (70, 33), dtype=torch.int8), torch.rand(70, 1)
    row = torch.randn(1, 33)
    assert fast_int8_product() == (processor != "x86-64")
    out = int8_product(row, int8_panels(weight, scale), 70)  # of the library that was loaded last
    torch.testing.assert_close(out, row @ (weight * scale).t(), rtol=1e-5, atol=1e-3)


def test_no_home_folder_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv(build.CACHE)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", fail)
    with pytest.raises(build.BuildError, match="no home folder: name a folder in DUALROUTE_CACHE"):
        build.load()


def test_a_compiler_that_cannot_be_run_is_named(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Path(_compiler(fresh, ""))
    broken.write_bytes(b"\x7fELF no program")
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(build.BuildError, match="compiler cannot be run"):
        build.load()
