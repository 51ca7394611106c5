#!/usr/bin/env bash
# Makes .venv (once) and installs dualroute with the extras named in $1, for example "deepspeed,dev".
# Sourced or run by launch/quickstart.sh and tests/run.sh.  Environment: PYTHON, the interpreter to use
# (default: the first of python3.13 … python3.11, python3 that is at least 3.11); pip's own variables, for example
# PIP_EXTRA_INDEX_URL for a torch that is built for an older driver.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extras="${1:-deepspeed}"

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "dualroute needs Python 3.11 or newer; set PYTHON=/path/to/python3.11" >&2
    exit 2
}

pip_install() { .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "$@"; }

# What pip took for torch, without the seconds of importing it: "2.13.0, CUDA 13.0" or "2.13.0+cpu, CPU only"
torch_build() {
    .venv/bin/python - <<'END'
import importlib.util
import runpy
from pathlib import Path

built = runpy.run_path(str(Path(importlib.util.find_spec("torch").origin).with_name("version.py")))
kinds = [(name, built.get(key)) for name, key in (("CUDA", "cuda"), ("ROCm", "hip"), ("XPU", "xpu"))]
print(built["__version__"], next((f"{name} {version}" for name, version in kinds if version), "CPU only"), sep=", ")
END
}

# The stamp names everything the environment was installed from: unchanged, there is nothing to do.
stamp=".venv/.dualroute-$(cat pyproject.toml constraints.txt launch/install.sh <(echo "$extras") | sha256sum | cut -c1-16)"
if [ ! -e "$stamp" ]; then
    [ -x .venv/bin/python ] || "$(find_python)" -m venv .venv
    echo "installing dualroute[$extras] into .venv (a few minutes the first time) ..."
    # torch first and pinned: an open range may pull another CUDA build, several gigabytes large
    pip_install "$(grep '^torch==' constraints.txt)"
    # A build for GPUs brings the only triton that it works with.  A build for CPUs brings none; the tests then run the
    # kernels in the interpreter of the version that goes with this torch on CUDA.
    needed=(-e ".[$extras]")
    [[ "$(torch_build)" != *"CPU only" || ",$extras," != *,dev,* ]] || needed+=("triton==3.7.1")
    pip_install "${needed[@]}"
    echo "torch $(torch_build)"
    if [[ "$(torch_build)" == *"CPU only" ]] && command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
        echo "this machine has an NVIDIA GPU, but pip took a torch that cannot use it: remove .venv and run this again" \
            "with PIP_EXTRA_INDEX_URL set to torch's index for your driver" >&2
    fi
    touch "$stamp"
fi
