"""Every kernel becomes machine code for GPUs that need not be there, within a budget of what these have.

The interpreter accepts more than the compiler does; this is what stands between the two.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[4]
SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes, of A100, H100 and B200
PREFILL = {
    "select_kernel", "pairs_kernel", "bits_kernel", "tokens_kernel", "far_kernel", "blocks_kernel",
    "delta_kernel", "poison_kernel", "forward_kernel", "query_gradient_kernel", "key_gradient_kernel",
}  # fmt: skip
DECODING = {"score_kernel", "choose_kernel", "read_kernel"}
# For H100 by head_dim: registers of a kernel, and instructions of its longest loop, at most
BUDGETS = {
    64: {
        "select_kernel": (168, 330),
        "pairs_kernel": (200, 720),
        "bits_kernel": (48, 90),
        "tokens_kernel": (255, 640),
        "far_kernel": (255, 590),
        "forward_kernel": (168, 620),
        "query_gradient_kernel": (168, 560),
        "key_gradient_kernel": (255, 760),
        "poison_kernel": (56, 0),
    },
    128: {
        "select_kernel": (255, 390),
        "pairs_kernel": (255, 1080),
        "bits_kernel": (48, 90),
        "tokens_kernel": (255, 850),
        "far_kernel": (255, 560),
        "forward_kernel": (255, 770),
        "query_gradient_kernel": (200, 440),
        "key_gradient_kernel": (255, 560),
        "poison_kernel": (56, 0),
    },
}


SIZES = {
    "H100": "90 bfloat16 64 64 1 512 1",
    "H100, wide": "90 bfloat16 128 64 1 512 0",
    "A100, wide": "80 float16 128 64 2 512 0",
    "A100, smallest": "80 float16 16 1 1 1 1",
    "B200": "100 bfloat16 64 64 1 512 0",
}


DAILY = {"H100", "A100, smallest"}  # the other sizes take minutes
MOST_KEPT = 300 << 20  # bytes


@pytest.fixture(scope="module")
def kernels(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """Of all sizes that are asked for, from one process. pytest's cache keeps what was compiled of the same
    sources."""
    mine = [item for item in request.session.items if item.path == request.path]
    devices = [device for device in SIZES if any(item.name.endswith(f"[{device}]") for item in mine)]
    cache = request.config.cache.mkdir("triton")
    if sum(path.stat().st_size for path in cache.rglob("*") if path.is_file()) > MOST_KEPT:
        shutil.rmtree(cache)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    script = "tests.attention.backends.triton.compile_kernels"
    done = subprocess.run(
        [sys.executable, "-m", script, *(SIZES[device] for device in devices)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1180, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "device",
    [pytest.param(device, marks=[] if device in DAILY else pytest.mark.nightly) for device in SIZES],
)
def test_every_kernel_compiles_within_its_budget(kernels: list[dict[str, Any]], device: str) -> None:
    capability, _, dim, *_, decode = SIZES[device].split()
    used = [kernel for kernel in kernels if kernel["sizes"] == SIZES[device]]
    assert {kernel["name"] for kernel in used} == (PREFILL | DECODING if decode == "1" else PREFILL)
    for kernel in used:
        assert kernel["spills"] == 0, kernel
        assert kernel["shared"] <= SHARED_MEMORY[int(capability)], kernel
    for kernel in used if capability == "90" else []:
        # a step of decoding has one row per head: too few for wgmma
        assert kernel["wgmma"] > 0 or not kernel["matrix"] or kernel["name"] in DECODING, kernel
        if kernel["name"] in BUDGETS[int(dim)]:
            registers, loop = BUDGETS[int(dim)][kernel["name"]]
            assert kernel["registers"] <= registers, kernel
            assert max(kernel["loops"], default=0) <= loop, kernel
