"""Compiling the kernels: once, into the cache, and what happens where that cannot be done."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


@pytest.fixture
def quick(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that makes a library without functions, at once; each call is a line of the file `calls`."""
    (fresh / "empty.c").write_text("")
    monkeypatch.setenv("CXX", _compiler(fresh, QUICK.format(folder=fresh, real=build._compiler())))
    return fresh


QUICK = """
if [ "$1" = --version ]; then echo 1; exit; fi
while [ "$1" != -o ]; do shift; done
echo "$2" >> {folder}/calls
{real} -shared -fPIC -o "$2" {folder}/empty.c
"""


def test_compiled_once_and_nothing_else_is_left(quick: Path) -> None:
    build.load()
    (made,) = (quick / "cache").iterdir()
    _forget()
    build.load()
    assert list((quick / "cache").iterdir()) == [made]
    assert _calls(quick) == 1


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


def _calls(folder: Path) -> int:
    return len((folder / "calls").read_text().splitlines())


@pytest.mark.parametrize("damage", ["cut", "emptied", "flipped", "fifo", "folder"])
def test_a_damaged_library_is_compiled_anew(quick: Path, damage: str) -> None:
    build.load()
    (made,) = (quick / "cache").iterdir()
    good = made.read_bytes()
    if damage == "fifo":
        made.unlink()
        os.mkfifo(made)
    elif damage == "folder":
        made.unlink()
        made.mkdir()
    else:
        spoilt = {"cut": good[: len(good) // 2], "emptied": b"", "flipped": good[:99] + b"!" + good[100:]}
        replaced = made.with_suffix(".new")  # the loaded file itself stays as it is
        replaced.write_bytes(spoilt[damage])
        replaced.replace(made)
    _forget()
    if damage == "folder":
        with pytest.raises(build.BuildError, match="name a folder in DUALROUTE_CACHE"):
            build.load()
        return
    build.load()
    assert _calls(quick) == 2
    assert [path.read_bytes() for path in (quick / "cache").iterdir()] == [good]


def test_one_of_another_name_is_not_mistaken(quick: Path) -> None:
    """The library of another processor stays; one that is damaged under this name goes."""
    build.load()
    (made,) = (quick / "cache").iterdir()
    (quick / "cache" / "attention-0123456789abcdef-0123456789abcdef.so").write_bytes(b"other")
    (quick / "cache" / f"{made.stem[:-16]}0123456789abcdef.so").write_bytes(b"cut short")
    _forget()
    build.load()
    assert _calls(quick) == 1
    made.unlink()
    _forget()
    build.load()
    assert sorted(path.name for path in (quick / "cache").iterdir()) == sorted(
        [made.name, "attention-0123456789abcdef-0123456789abcdef.so"]
    )


def test_the_libraries_used_last_are_kept(quick: Path) -> None:
    cache = quick / "cache"
    cache.mkdir()
    for number in range(12):
        path = cache / f"attention-{number:016x}-{number:016x}.so"
        path.write_bytes(b"")
        os.utime(path, (number, number))
    for name, age in (("compiling-killed", 2 * build.SECONDS + 9), ("compiling-now", 0)):
        (cache / name).mkdir()
        os.utime(cache / name, (time.time() - age,) * 2)
    (cache / "somebody's file").write_text("")
    build.load()
    kept = {path.name for path in cache.iterdir()}
    assert {"compiling-now", "somebody's file"} < kept
    assert "compiling-killed" not in kept
    libraries = sorted(name for name in kept if name.startswith("attention-"))
    assert len(libraries) == build.KEPT
    assert {f"attention-{number:016x}-{number:016x}.so" for number in range(5, 12)} < set(libraries)


def test_two_that_compile_at_once_load_the_same(quick: Path) -> None:
    """While this one compiles, another process publishes the same library."""
    compiler, published = build._compiler(), []
    run = build._run

    def meanwhile(command: list[str]) -> str:
        if "-o" in command and not published:
            published.append(None)
            published[0] = build._compile(
                compiler, quick / "cache", f"attention-{build._fingerprint(compiler)}"
            )
        return run(command)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "_run", meanwhile)
        build.load()
    assert list((quick / "cache").iterdir()) == published


@pytest.mark.parametrize("why", ["in the way", "not allowed", "no home"])
def test_where_the_cache_cannot_be_used_a_private_folder_is(
    quick: Path, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(build.CACHE)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(quick))
    home = quick / "home"
    monkeypatch.setenv("HOME", str(home))
    if why == "in the way":
        home.write_text("")
    elif why == "not allowed":
        plain_mkdir = Path.mkdir

        def refuse(path: Path, *arguments: Any, **options: Any) -> None:
            if home in path.parents:
                raise PermissionError(13, "Permission denied", str(path))
            plain_mkdir(path, *arguments, **options)

        monkeypatch.setattr(Path, "mkdir", refuse)
    else:
        monkeypatch.setattr(Path, "home", _no_home)
    private = quick / f"dualroute-{os.geteuid()}"
    with pytest.warns(UserWarning, match=f"kernels are kept in {private}: .*DUALROUTE_CACHE"):
        build.load()
    (made,) = private.iterdir()
    assert private.stat().st_mode & 0o777 == 0o700
    _forget()
    with pytest.warns(UserWarning, match="kernels are kept in"):
        build.load()
    assert _calls(quick) == 1
    assert made.exists()


def test_a_private_folder_that_others_may_write_to_is_not_trusted(
    quick: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(build.CACHE)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(quick))
    monkeypatch.setattr(Path, "home", _no_home)
    private = quick / f"dualroute-{os.geteuid()}"
    private.mkdir()
    private.chmod(0o777)
    with pytest.raises(build.BuildError, match=r"no home folder: .* belongs to somebody else"):
        build.load()
    assert list(private.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (fresh / "file").write_text("")
    monkeypatch.setenv(build.CACHE, str(fresh / "file" / "cache"))
    with pytest.raises(build.BuildError, match=r"cannot be written .* name a folder in DUALROUTE_CACHE"):
        build.load()


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="names of processors are x86 ones")
@pytest.mark.parametrize("processor", [pytest.param("x86-64", marks=pytest.mark.nightly), "x86-64-v3"])
def test_narrower_vectors_give_the_same(processor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """128-bit vectors, and the 256-bit ones of AVX2."""
    # the vectors are written out: what the compiler makes of loops besides takes it twice the time
    flags = tuple(flag.replace("native", processor).replace("-O3", "-O1") for flag in build.FLAGS)
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


def _no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


def test_a_compiler_that_cannot_be_run_is_named(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Path(_compiler(fresh, ""))
    broken.write_bytes(b"\x7fELF no program")
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(build.BuildError, match="compiler cannot be run"):
        build.load()
