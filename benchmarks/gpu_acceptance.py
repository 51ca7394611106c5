"""Acceptance of a machine's GPUs in one Markdown table; see benchmarks/gpu_acceptance.sh, which starts it.

    python benchmarks/gpu_acceptance.py [--toy] [--only kernels speed] [--output FOLDER] [--minutes 10]

Each part is a process with a time limit of its own: one that fails, hangs or is killed is a row, and the next
part goes on. Written: OUTPUT/acceptance.md (the table), OUTPUT/PART.log (what the part printed).
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from acceptance.rows import Row, markdown, read

HERE = Path(__file__).parent
#: parts in their order, the module of each, and its share of the time; zero3 needs the text of training,
#: quantized its model
PARTS = {
    "kernels": ("acceptance.attention", 0.3),
    "speed": ("acceptance.attention", 0.15),
    "training": ("acceptance.training", 0.25),
    "zero3": ("acceptance.training", 0.15),
    "decode": ("acceptance.attention", 0.05),
    "quantized": ("acceptance.training", 0.1),
}


def run_part(part: str, command: Sequence[str], rows: Path, log: Path, seconds: float) -> list[Row]:
    """The rows of a part; its end, if it is a bad one, is a row, too."""
    began = time.monotonic()
    with log.open("w", encoding="utf-8") as stream:
        process = subprocess.Popen(
            command, env=_environment(), stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _end_group(process)
    found = read(rows)
    spent = time.monotonic() - began
    if status is None:
        found.append(Row(part, "the whole part", f"not finished after {seconds:.0f} s", "", False))
    elif status:
        how = f"signal {-status}" if status < 0 else f"exit status {status}"
        found.append(Row(part, "the whole part", f"{how} after {spent:.0f} s: {_last_line(log)}", "", False))
    elif not found:
        found.append(Row(part, "the whole part", "it ended well and found nothing", "", False))
    return found


def _environment() -> dict[str, str]:
    """With the project and the benchmarks to be found."""
    paths = [str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End what the part has started, ranks included."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["it printed nothing"]
    return lines[-1][:300]


def machine(device: str) -> str:
    """Versions and card: the heading of the table."""
    import torch

    from dualroute.doctor.machine import installed, nvidia_driver

    versions = {"Python": platform.python_version(), "torch": torch.__version__, "CUDA": torch.version.cuda}
    versions |= {package: installed(package) for package in ("triton", "deepspeed", "lightning", "torchao")}
    lines = [", ".join(f"{name} {version or 'none'}" for name, version in versions.items())]
    if device == "cuda":
        for index in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(index)
            memory = f"{card.total_memory / 2**30:.0f} GiB, compute capability {card.major}.{card.minor}"
            lines.append(f"cuda:{index} {card.name}, {memory}")
        lines.append(f"driver {nvidia_driver() or 'unknown'}")
    else:
        lines.append(f"no GPU: {os.cpu_count()} CPU cores, {platform.machine()}")
    return "\n".join(f"- {line}" for line in [*lines, f"commit {_commit()}"]) + "\n"


def _commit() -> str:
    told = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True, check=False
    )
    return told.stdout.strip() or "unknown"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--toy", action="store_true", help="the same rows in miniature, on the CPU")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--output", type=Path, default=Path("runs/acceptance"))
    parser.add_argument("--minutes", type=float, default=10.0, help="for all parts together")
    options = parser.parse_args()
    import torch

    toy = options.toy or not torch.cuda.is_available()
    device = "cpu" if toy else "cuda"
    options.output.mkdir(parents=True, exist_ok=True)
    heading = f"# Acceptance, {'toy size on the CPU' if toy else 'GPU'}\n\n{machine(device)}\n"
    print(heading, flush=True)
    found: list[Row] = []
    began = time.monotonic()
    work = Path(tempfile.mkdtemp(prefix="dualroute-acceptance-"))
    parts = [part for part in PARTS if part in options.only]
    if "training" not in parts and {"zero3", "quantized"} & set(parts):
        parts.insert(0, "training")
    try:
        for part in parts:
            module, share = PARTS[part]
            rows = work / f"{part}.jsonl"
            command = [sys.executable, "-m", module, part, "--device", device]
            command += ["--rows", str(rows), "--work", str(work / "work"), *(["--toy"] if toy else [])]
            log = options.output / f"{part}.log"
            of_part = run_part(part, command, rows, log, 60 * share * options.minutes)
            print(*of_part, sep="\n", flush=True)
            found += of_part
    finally:
        shutil.rmtree(work, ignore_errors=True)
    failed = [row for row in found if row.passed is False]
    spent = f"{time.monotonic() - began:.0f} s, {len(found)} rows, {len(failed)} failed"
    text = f"{heading}\n{markdown(found)}\n{spent}\n"
    (options.output / "acceptance.md").write_text(text, encoding="utf-8")
    print(f"\n{markdown(found)}\n{spent}: {options.output / 'acceptance.md'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
