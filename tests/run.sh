#!/usr/bin/env bash
# Installs dualroute with its development tools into .venv and runs every check: style, types, direction of
# imports, tests.  Arguments go to pytest: bash tests/run.sh tests/attention -k causal
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/install.sh deepspeed,dev
export PATH="$PWD/.venv/bin:$PATH" VIRTUAL_ENV="$PWD/.venv"
export DUALROUTE_DATA="${DUALROUTE_DATA:-$PWD/../shared/data}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"
[ -d "$DUALROUTE_DATA" ] || echo "no folder $DUALROUTE_DATA: tests on real data will be skipped (set DUALROUTE_DATA)"
ruff check .
ruff format --check .
mypy
lint-imports
exec pytest "$@"
