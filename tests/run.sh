#!/usr/bin/env bash
# Installs dualroute with its development tools into .venv and runs every check: style, types, direction of
# imports, tests.  Arguments go to pytest: bash tests/run.sh tests/attention -k causal
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/install.sh deepspeed,dev
export PATH="$PWD/.venv/bin:$PATH" VIRTUAL_ENV="$PWD/.venv"
export DUALROUTE_DATA="${DUALROUTE_DATA:-$PWD/../shared/data}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"
# A Slurm for tests/slurm; where it cannot be had, those tests are skipped and say why
if ! command -v slurmctld >/dev/null && [ ! -x /usr/sbin/slurmctld ]; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "installing Slurm for tests/slurm ..."
        slurm=(slurm-wlm slurmctld slurmd slurm-client munge)
        get() { DEBIAN_FRONTEND=noninteractive apt-get "$@" >/dev/null; }
        get install -y --no-install-recommends "${slurm[@]}" 2>/dev/null ||
            { get update && get install -y --no-install-recommends "${slurm[@]}"; } ||
            echo "apt-get could not install Slurm: tests/slurm will be skipped"
    else
        echo "no Slurm, and no root with apt-get to install it: tests/slurm will be skipped"
    fi
fi
[ -d "$DUALROUTE_DATA" ] || echo "no folder $DUALROUTE_DATA: tests on real data will be skipped (set DUALROUTE_DATA)"
ruff check .
ruff format --check .
mypy
lint-imports
exec pytest "$@"
