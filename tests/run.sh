#!/usr/bin/env bash
# Installs dualroute with its development tools into .venv and runs every check: style, types, direction of
# imports, tests.  Arguments go to pytest: bash tests/run.sh tests/attention -k causal.  Without the slow ones:
# bash tests/run.sh -m "not slow"; those that show once more, elsewhere or larger, what another one shows:
# bash tests/run.sh -m nightly.  The time stands at the end; the budget is in tests/budget.py.
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/install.sh deepspeed,compress,eval,export,gguf,tasks,audio,lora,control,prepare,remote,serve,chat,wandb,mlflow,docs,dev
export PATH="$PWD/.venv/bin:$PATH" VIRTUAL_ENV="$PWD/.venv"
export DUALROUTE_DATA="${DUALROUTE_DATA:-$PWD/../shared/data}"
# Three tests at a time, one thread each, since some wait (for Slurm above all); DUALROUTE_TEST_WORKERS=0 runs one after
# the other in this process
workers="${DUALROUTE_TEST_WORKERS:-3}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$([ "$workers" -gt 1 ] && echo 1 || echo 2)}"
# A Slurm for tests/slurm, an sshd and pdsh for tests/training/parallel/test_hostfile.py; where they cannot be had, those
# tests are skipped and say why
export PATH="$PATH:/usr/sbin"
packages=()
command -v slurmctld >/dev/null || packages+=(slurm-wlm slurmctld slurmd slurm-client munge)
command -v sshd >/dev/null && command -v pdsh >/dev/null || packages+=(openssh-server openssh-client pdsh)
# DUALROUTE_NVME=1 also runs tests/training/parallel/test_nvme.py, for which DeepSpeed compiles an op (minutes, once)
[ -z "${DUALROUTE_NVME:-}" ] || [ -f /usr/include/libaio.h ] || packages+=(libaio-dev)
if [ ${#packages[@]} -gt 0 ]; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "installing ${packages[*]} ..."  # RUNLEVEL=1: without starting their services
        get() { RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get "$@" >/dev/null; }
        get install -y --no-install-recommends "${packages[@]}" 2>/dev/null ||
            { get update && get install -y --no-install-recommends "${packages[@]}"; } ||
            echo "apt-get could not install ${packages[*]}: their tests will be skipped"
    else
        echo "no ${packages[*]}, and no root with apt-get to install them: their tests will be skipped"
    fi
fi
[ -d "$DUALROUTE_DATA" ] || echo "no folder $DUALROUTE_DATA: tests on real data will be skipped (set DUALROUTE_DATA)"
ruff check .
ruff format --check .
clang-format --dry-run --Werror dualroute/attention/backends/cpp/sources/*.{h,cpp}
mypy
lint-imports
exec pytest -n "$workers" "$@"
