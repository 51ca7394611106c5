"""The kernels' C++ compiled for this machine, once, into the user's cache.

In: the sources beside this file and a C++ compiler ($CXX, or c++, g++, clang++). Out: `load` gives the
functions; where they cannot be built, its error says why.

The result carries the processor in its name. A home folder that is shared by different
nodes holds one library for each kind, and none is ever loaded where its instructions do not exist.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

CACHE = "DUALROUTE_CACHE"  # folder of what is compiled; ~/.cache/dualroute by default
FLAGS = (
    "-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden", "-fopenmp",
    "-fno-math-errno", "-w",
)  # fmt: skip
SECONDS = 600  # a compiler that takes longer hangs


class BuildError(RuntimeError):
    """The kernels cannot be compiled or loaded here."""


@functools.cache
def load() -> ctypes.CDLL:
    """The library, compiled if need be.

    Raises:
        BuildError: there is no compiler, it fails, or the cache cannot be written.
    """
    compiler = _compiler()
    target = _cache() / f"attention-{_fingerprint(compiler)}.so"
    if not target.exists():
        _compile(compiler, target)
    try:
        return ctypes.CDLL(str(target), mode=ctypes.RTLD_GLOBAL)  # compiled programs call it by name
    except OSError as error:
        raise BuildError(
            f"{target} cannot be loaded ({error}): delete it, so that it is compiled anew"
        ) from error


def _compiler() -> str:
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        found = shutil.which(name) if name else None
        if found:
            return found
    raise BuildError("there is no C++ compiler: install g++, or name one in CXX")


def _cache() -> Path:
    for variable, inside in ((CACHE, "."), ("XDG_CACHE_HOME", "dualroute")):
        if os.environ.get(variable):
            return Path(os.environ[variable]) / inside
    try:
        return Path.home() / ".cache" / "dualroute"
    except RuntimeError as error:
        raise BuildError(f"this user has no home folder: name a folder in {CACHE}") from error


def _sources() -> list[Path]:
    return sorted(path for path in Path(__file__).parent.iterdir() if path.suffix in (".h", ".cpp"))


def _fingerprint(compiler: str) -> str:
    """Of the sources, the flags, the compiler, torch and the processor."""
    version = _run([compiler, "--version"])
    digest = hashlib.sha256(repr((FLAGS, version, torch.__version__, _torch(), _processor())).encode())
    for path in _sources():
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _torch() -> list[str]:
    """The flags that find the headers of torch's stable interface, and its library at run time as well."""
    folder = Path(torch.__file__).parent
    return [f"-I{folder / 'include'}", f"-L{folder / 'lib'}", f"-Wl,-rpath,{folder / 'lib'}", "-ltorch_cpu"]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    told = ("flags", "Features", "model name", "CPU part")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(told)))


def _compile(compiler: str, target: Path) -> None:
    """Compile to a file of its own and move it there: ranks that start together replace equal files."""
    source = Path(__file__).parent / "kernels.cpp"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made = Path(folder) / target.name
            _run([compiler, *FLAGS, str(source), *_torch(), "-o", str(made)])
            os.replace(made, target)
    except OSError as error:
        raise BuildError(f"{target.parent} cannot be written ({error}): name a folder in {CACHE}") from error


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=SECONDS)
    except subprocess.CalledProcessError as error:
        raise BuildError(f"{' '.join(command)} failed:\n{error.stderr[-2000:]}") from error
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run: {error}") from error
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{' '.join(command)} did not end in {SECONDS} seconds") from error
    return done.stdout
