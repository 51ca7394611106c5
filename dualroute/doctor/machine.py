"""What one machine has: versions, devices, memory, disk, DeepSpeed's compiled ops.

Reading a file back measures memory, not the disk, unless the kernel is told to forget
its copy first (`posix_fadvise`); network file systems may remember it all the same.
"""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import shutil
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import psutil
import torch

from dualroute.attention import backend
from dualroute.attention.backends.cpp import build
from dualroute.doctor.verdict import Verdict, fail, ok, warn
from dualroute.model.kernel_choice import nvidia_driver

MIB = 2**20
GIB = 2**30
_MALICIOUS_LIGHTNING = ("2.6.2", "2.6.3")


def installed(package: str) -> str | None:
    """Version of an installed package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def numbers(version: str) -> tuple[int, ...]:
    """(2, 13, 0) of "2.13.0+cpu"; stops at what is no number."""
    found = []
    for part in version.split("+")[0].split("."):
        if not part.isdigit():
            break
        found.append(int(part))
    return tuple(found)


def versions() -> Iterator[Verdict]:
    """Python, torch, Lightning and DeepSpeed against what the project needs."""
    yield ok("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield ok("torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'not built in'}")
    lightning = installed("lightning") or "none"
    if lightning in _MALICIOUS_LIGHTNING:
        yield fail(
            "lightning",
            f"{lightning}, a malicious upload",
            "pip install 'lightning>=2.6.6', and change every credential that this account can read",
        )
    elif numbers(lightning) < (2, 6, 6):
        yield fail("lightning", lightning, "pip install 'lightning>=2.6.6'")
    else:
        yield ok("lightning", lightning)
    deepspeed = installed("deepspeed")
    if deepspeed is None:
        yield warn("deepspeed", "not installed", "for several ranks with ZeRO: pip install -e '.[deepspeed]'")
    elif numbers(deepspeed) < (0, 19, 8):
        yield fail("deepspeed", deepspeed, "pip install 'deepspeed>=0.19.8'")
    else:
        yield ok("deepspeed", deepspeed)


def devices() -> Iterator[Verdict]:
    """GPUs and their driver, or the CPU."""
    driver = nvidia_driver()
    if not torch.cuda.is_available():
        cores = len(os.sched_getaffinity(0))
        if driver and torch.version.cuda is None:
            yield fail(
                "devices",
                f"NVIDIA driver {driver} is there, but this torch is built without CUDA",
                "install torch from the CUDA index of pytorch.org",
            )
        elif driver:
            yield fail(
                "devices",
                f"NVIDIA driver {driver}, but no GPU is visible to torch with CUDA {torch.version.cuda}",
                "ask Slurm for GPUs (--gpus-per-node), look at CUDA_VISIBLE_DEVICES and nvidia-smi",
            )
        else:
            yield ok(
                "devices", f"no GPU; {cores} CPU cores for this process, {torch.get_num_threads()} threads"
            )
        return
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        found = (
            f"cuda:{index} {torch.cuda.get_device_name(index)}, driver {driver or '?'}, "
            f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
        )
        if free < 0.9 * total:
            yield warn("devices", found, "another process holds memory there: see nvidia-smi")
        else:
            yield ok("devices", found)


def memory() -> Iterator[Verdict]:
    """Main memory, shared memory of the loaders' workers, open files."""
    state = psutil.virtual_memory()
    found = f"{state.available / GIB:.1f} of {state.total / GIB:.1f} GiB available"
    if state.available < 2 * GIB:
        yield warn("memory", found, "less than 2 GiB: end other processes, or use a smaller model")
    else:
        yield ok("memory", found)
    with contextlib.suppress(OSError):
        free = shutil.disk_usage("/dev/shm").free
        if free < 256 * MIB:
            yield warn(
                "shared mem",
                f"{free / MIB:.0f} MiB free in /dev/shm",
                "data.num_workers 0, or start the container with a larger --shm-size",
            )
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 4096:
        yield warn("open files", f"at most {soft}", f"ulimit -n {min(hard, 65536) if hard > 0 else 65536}")


def disk(folder: Path, mebibytes: int) -> Iterator[Verdict]:
    """Room and speed of the output folder, where checkpoints will be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        write, read = disk_speed(folder, min(mebibytes, max(1, free // MIB // 4)))
    except OSError as error:
        yield fail("disk", f"{folder}: {error.strerror}", "choose another --output, or make room there")
        return
    room = f"{folder}: {free / GIB:.1f} GiB free"
    if free < 2 * GIB:
        yield warn("disk room", room, "a checkpoint takes about 16 bytes a parameter, and several are kept")
    else:
        yield ok("disk room", room)
    found = f"{write / MIB:,.0f} MiB/s written and flushed, {read / MIB:,.0f} MiB/s read ({folder})"
    if write < 50 * MIB:
        yield warn(
            "disk speed",
            found,
            f"a checkpoint of 1 GiB takes {GIB / write:.0f} s: raise checkpoint.every_steps, or write "
            f"elsewhere",
        )
    else:
        yield ok("disk speed", found)


def disk_speed(folder: Path, mebibytes: int) -> tuple[float, float]:
    """(bytes written and flushed per second, bytes read per second) of a temporary file in ``folder``."""
    path = folder / f".doctor-{os.getpid()}"
    block = os.urandom(MIB)  # a file system that compresses must not look fast
    try:
        started = time.perf_counter()
        with path.open("wb") as stream:
            for _ in range(mebibytes):
                stream.write(block)
            stream.flush()
            os.fsync(stream.fileno())
        written = time.perf_counter() - started
        with path.open("rb", buffering=0) as stream:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            started = time.perf_counter()
            while stream.read(MIB):
                pass
            taken = time.perf_counter() - started
    finally:
        path.unlink(missing_ok=True)
    return mebibytes * MIB / max(written, 1e-9), mebibytes * MIB / max(taken, 1e-9)


def attention_kernels() -> Iterator[Verdict]:
    """Whether the C++ kernels of attention work here; compiles them where that was not done yet."""
    started = time.monotonic()
    try:
        build.load()
    except build.BuildError as error:
        yield warn("attention", str(error), "on CPUs attention runs several times slower without them")
    else:
        kernels = backend.load("cpp").description()
        yield ok("attention", f"{kernels}: ready ({time.monotonic() - started:.1f} s)")


def deepspeed_ops() -> Iterator[Verdict]:
    """Which of DeepSpeed's compiled ops are there, and whether the others can be built at first use."""
    if installed("deepspeed") is None:
        return
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.git_version_info import installed_ops

    ready = sorted(name for name, there in installed_ops.items() if there)
    tools = {"g++": "a C++ compiler", "ninja": "pip install ninja"}
    if torch.cuda.is_available():
        tools["nvcc"] = "the CUDA toolkit"
    missing = [f"{tool} ({remedy})" for tool, remedy in tools.items() if shutil.which(tool) is None]
    found = f"prebuilt: {', '.join(ready) or 'none'}"
    if missing:
        yield warn(
            "ops",
            f"{found}; the others cannot be built here",
            f"only offload_optimizer and DeepSpeed's own optimizers need them: install {', '.join(missing)}",
        )
    else:
        yield ok("ops", f"{found}; the others are built at first use (a minute, once)")
    locks = stale_locks()
    if locks:
        yield fail(
            "ops lock",
            f"{locks[0]}: a build that was cut off left it, and every later build would wait for it",
            "remove the file, unless a build is running right now",
        )


def stale_locks(older_than: float = 600.0) -> list[Path]:
    """Lock files of extension builds that have not been touched for ``older_than`` seconds."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    limit = time.time() - older_than
    return [path for path in Path(root).rglob("lock") if path.is_file() and path.stat().st_mtime < limit]
