#!/usr/bin/env bash
# Makes .venv (once) and installs dualroute with the extras named in $1, for example "deepspeed,dev".
# Sourced or run by launch/quickstart.sh and tests/run.sh.  Environment: PYTHON, the interpreter to use
# (default: the first of python3.13 … python3.11, python3 that is at least 3.11).
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

# The stamp names everything the environment was installed from: unchanged, there is nothing to do.
stamp=".venv/.dualroute-$(cat pyproject.toml constraints.txt <(echo "$extras") | sha256sum | cut -c1-16)"
if [ ! -e "$stamp" ]; then
    [ -x .venv/bin/python ] || "$(find_python)" -m venv .venv
    echo "installing dualroute[$extras] into .venv (a few minutes the first time) ..."
    # torch first and pinned: an open range may pull another CUDA build, several gigabytes large
    .venv/bin/python -m pip install --quiet --disable-pip-version-check \
        "$(grep '^torch==' constraints.txt)" -c constraints.txt
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$extras]"
    touch "$stamp"
fi
