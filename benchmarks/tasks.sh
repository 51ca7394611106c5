#!/usr/bin/env bash
# The table of docs/tasks.md; run again, it goes on where it was.  Arguments: those of benchmarks/tasks.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export DUALROUTE_DATA="${DUALROUTE_DATA:-$PWD/../shared/data}"
PATH="$PWD/.venv/bin:$PATH" exec python benchmarks/tasks.py "$@"
