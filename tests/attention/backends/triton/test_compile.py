"""Every kernel becomes machine code for GPUs that need not be there, and fits into their shared memory.

The interpreter accepts more than the compiler does; this is what stands between the two.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[4]
SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10}  # bytes, of A100 and H100
KERNELS = {
    "select_kernel", "pairs_kernel", "tokens_kernel", "far_kernel", "blocks_kernel", "delta_kernel",
    "forward_kernel", "query_gradient_kernel", "key_gradient_kernel",
    "score_kernel", "choose_kernel", "read_kernel",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "sizes"),
    [(90, "bfloat16 96 64 2 512"), (80, "float16 16 1 1 1")],
    ids=["H100", "A100, smallest"],
)
def test_every_kernel_compiles(capability: int, sizes: str, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    script = "tests.attention.backends.triton.compile_kernels"
    done = subprocess.run(
        [sys.executable, "-m", script, str(capability), *sizes.split()],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    used = [line.split() for line in done.stdout.splitlines()]
    assert {name for name, _ in used} == KERNELS
    assert max(int(size) for _, size in used) <= SHARED_MEMORY[capability]
