#!/usr/bin/env bash
# Is this machine's GPU used rightly and well?  One Markdown table: kernels, speed against FlashAttention, training,
# memory, ZeRO-3, decoding, int4 and fp8.  On a machine with nothing but Python and a driver:
#     bash benchmarks/gpu_acceptance.sh                    # at most 10 minutes after the install
#     bash benchmarks/gpu_acceptance.sh --toy              # the same rows in miniature, on a CPU
# Other arguments go to benchmarks/gpu_acceptance.py (--only, --output, --minutes).  No network but pip's.  Without a GPU
# it takes the toy size by itself.  Exit status 1 where a row failed, 2 where nothing could be run.
# DUALROUTE_PYTHON=/path/to/python uses an environment that is there already and installs nothing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${DUALROUTE_PYTHON:-}"
if [ -z "$python" ]; then
    bash launch/install.sh deepspeed,compress,dev || exit 2
    export PATH="$PWD/.venv/bin:$PATH"
    python=.venv/bin/python
fi
PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" exec "$python" benchmarks/gpu_acceptance.py "$@"
