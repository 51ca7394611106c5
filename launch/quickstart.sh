#!/usr/bin/env bash
# The whole main job on this machine, from a bare clone: install, prepare a corpus, pretrain, evaluate, report; then
# prune, recover, quantise and export what was trained.  Takes minutes on two CPU cores and downloads nothing but
# Python packages: the corpus is the text of the interpreter's own standard library.  Run again, it finds everything
# done and shows the report.
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/install.sh deepspeed,compress,export
export PATH="$PWD/.venv/bin:$PATH"

echo "== 1/5 text -> tokenizer -> shards"
dualroute prepare --config configs/prepare/stdlib.yaml
echo "== 2/5 shards -> model"
dualroute pretrain --config configs/pretrain/quickstart.yaml
echo "== 3/5 loss on all held-out files"
dualroute evaluate --checkpoint runs/quickstart --data data/stdlib
echo "== 4/5 report"
dualroute report --run runs/quickstart --prompt "def "
echo "== 5/5 a smaller model: pruned, recovered by distillation, int8, as a Hugging Face folder"
dualroute pipeline --config configs/pipeline/quickstart.yaml
