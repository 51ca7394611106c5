#!/usr/bin/env bash
# Submits sbatch scripts as a chain: each starts when the one before it has COMPLETED, and is cancelled when that
# one failed.  A stage that was pre-empted and requeued has done neither, so what follows waits for it.
#
#   bash slurm/pipeline.sh prepare.sbatch pretrain.sbatch evaluate.sbatch
#
# Prints "JOBID SCRIPT" for each.  If one cannot be submitted, those before it are cancelled.  `dualroute submit
# pipeline` writes the scripts of the stages and calls this.
set -euo pipefail
[ $# -gt 0 ] || { echo "usage: $0 SCRIPT..." >&2; exit 2; }

submitted=()
give_up() {
    [ ${#submitted[@]} -eq 0 ] || scancel "${submitted[@]}"
    echo "$0: $script could not be submitted; nothing of the chain is left in the queue" >&2
}
trap give_up ERR

after=()
for script in "$@"; do
    job="$(sbatch --parsable "${after[@]}" "$script")"
    job="${job%%;*}" # on a federation: ID;CLUSTER
    submitted+=("$job")
    after=("--dependency=afterok:$job" --kill-on-invalid-dep=yes)
    echo "$job $script"
done
