"""The kernels' C++ compiled for this machine, once, into the user's cache.

In: the folder `sources` and a C++ compiler ($CXX, or c++, g++, clang++). Out: `load` gives the
functions; where they cannot be built, its error says why.

A library is called attention-FINGERPRINT-CHECKSUM.so. The fingerprint is of sources, compiler and processor:
a home folder that is shared by different nodes holds one library for each kind, and none is ever loaded where
its instructions do not exist. The checksum is that of the file itself. So it is published by one rename,
whoever else compiles at the same time; one that was cut short or damaged is not loaded, which would end the
process with SIGBUS, but compiled anew. The `KEPT` libraries that were used last stay, older ones are removed.

Where the user's cache cannot be used, a private folder for temporary files is, with a warning.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

CACHE = "DUALROUTE_CACHE"  # folder of what is compiled; ~/.cache/dualroute by default
FLAGS = (
    "-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden", "-fopenmp",
    "-fno-math-errno", "-w",
)  # fmt: skip
SOURCES = Path(__file__).parent / "sources"
SECONDS = 600  # a compiler that takes longer hangs
KEPT = 8  # libraries in a cache: other processors, compilers and versions of torch
CHECKSUM = 16  # digits of a library's name
COMPILING = "compiling-"  # beginning of the folders that are compiled in


class BuildError(RuntimeError):
    """The kernels cannot be compiled or loaded here."""


class CacheError(BuildError):
    """They cannot be in this folder, but may be in another one."""


@functools.cache
def load() -> ctypes.CDLL:
    """The library, compiled if need be.

    Raises:
        BuildError: there is no compiler, it fails, or no folder can hold the library.
    """
    compiler = _compiler()
    name = f"attention-{_fingerprint(compiler)}"
    reasons: list[str] = []
    for folder in cache_folders(reasons):
        try:
            library = _load(_find(folder, name) or _compile(compiler, folder, name))
        except CacheError as error:
            reasons.append(str(error))
            continue
        if reasons:
            warnings.warn(f"kernels are kept in {folder}: {'; '.join(reasons)}", stacklevel=2)
        return library
    raise BuildError("; ".join(reasons))


def _load(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)  # compiled programs call it by name
    except OSError as error:
        raise CacheError(f"{path} cannot be loaded ({error}): name another folder in {CACHE}") from error


def _compiler() -> str:
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        found = shutil.which(name) if name else None
        if found:
            return found
    raise BuildError("there is no C++ compiler: install g++, or name one in CXX")


def cache_folders(reasons: list[str]) -> Iterator[Path]:
    """Folders that may hold what was made for this machine, the best first.

    Why one is not tried goes to `reasons`. A folder that the user has named is the only one.
    """
    if os.environ.get(CACHE):
        yield Path(os.environ[CACHE])
        return
    if os.environ.get("XDG_CACHE_HOME"):
        yield Path(os.environ["XDG_CACHE_HOME"]) / "dualroute"
    else:
        try:
            yield Path.home() / ".cache" / "dualroute"
        except RuntimeError:
            reasons.append(f"this user has no home folder: name a folder in {CACHE}")
    try:
        yield _private_folder()
    except OSError as error:
        reasons.append(f"nor is there a folder for temporary files ({error})")


def _private_folder() -> Path:
    """A folder for temporary files into which nobody else can write what this user then runs."""
    folder = Path(tempfile.gettempdir()) / f"dualroute-{os.geteuid()}"
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
            raise PermissionError(f"{folder} belongs to somebody else") from None
    return folder


def _sources() -> list[Path]:
    return sorted(path for path in SOURCES.iterdir() if path.suffix in (".h", ".cpp"))


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


def _find(folder: Path, name: str) -> Path | None:
    """The library in a cache, if there is an undamaged one."""
    try:
        for path in sorted(folder.glob(f"{name}-*.so")):
            if path.is_file() and path.stem == f"{name}-{_checksum(path)}":
                _mark_as_used(path)
                return path
    except OSError as error:
        raise CacheError(f"{folder} cannot be read ({error}): name a folder in {CACHE}") from error
    return None


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:CHECKSUM]


def _mark_as_used(path: Path) -> None:
    with contextlib.suppress(OSError):  # of another user, or in a file system that is only read
        os.utime(path)


def _compile(compiler: str, folder: Path, name: str) -> Path:
    """Compile in a folder of its own, make the file durable and move it to its name."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=COMPILING, dir=folder) as inside:
            made = Path(inside) / "library.so"
            _run([compiler, *FLAGS, str(SOURCES / "kernels.cpp"), *_torch(), "-o", str(made)])
            with made.open("rb") as stream:
                os.fsync(stream.fileno())
            target = folder / f"{name}-{_checksum(made)}.so"
            os.replace(made, target)
    except OSError as error:
        raise CacheError(f"{folder} cannot be written ({error}): name a folder in {CACHE}") from error
    _tidy(folder, target)
    return target


def _tidy(folder: Path, made: Path) -> None:
    """Remove damaged forms of this library, all but the last used ones, and what killed compilers left."""
    with contextlib.suppress(OSError):
        libraries = [path for path in folder.glob("attention-*.so") if path.is_file() and path != made]
        others = sorted(libraries, key=lambda path: -path.stat().st_mtime)
        replaced = made.stem[:-CHECKSUM]
        for number, path in enumerate(others, start=1):
            damaged = path.stem.startswith(replaced) and not path.stem.endswith(_checksum(path))
            if number >= KEPT or damaged:
                path.unlink(missing_ok=True)
        for path in folder.glob(f"{COMPILING}*"):
            if time.time() - path.stat().st_mtime > 2 * SECONDS:
                shutil.rmtree(path, ignore_errors=True)


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=True, timeout=SECONDS
        )
    except subprocess.CalledProcessError as error:
        raise BuildError(f"{' '.join(command)} failed:\n{error.stderr[-2000:]}") from error
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run: {error}") from error
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{' '.join(command)} did not end in {SECONDS} seconds") from error
    return done.stdout
