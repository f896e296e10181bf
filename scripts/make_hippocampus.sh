#!/usr/bin/env bash
# Train the built-in model `hippocampus` and the folds that give its figures, then pack it. Hours on a CPU.
# Runs that are there already are gone on with. Two of these may work side by side on different FOLDS; call it once more
# without FOLDS then, to pack.
#
#     scripts/make_hippocampus.sh DATASET RUNS [FOLDS, such as "0 2 4"]
set -euo pipefail
dataset="${1:?name the folder Task04_Hippocampus}" runs="${2:?name a folder for the runs}" folds="${3:-0 1 2 3 4 all}"
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
bin="$here/../.venv/bin"

for fold in $folds; do
    # The report is written last: a run without one is new or was interrupted.
    if [[ -f "$runs/$fold/report.html" ]]; then
        continue
    elif [[ -f "$runs/$fold/run.json" ]]; then
        "$bin/tokenseg" train "$dataset" "$runs/$fold" --resume --threads 1
    else
        "$bin/tokenseg" train "$dataset" "$runs/$fold" --fold "$fold" --threads 1 \
            --max-steps 3000 --config "$here/builtin/hippocampus-training.toml"
    fi
done
if [[ $# -lt 3 ]]; then
    "$bin/python" "$here/pack_builtin.py" "$runs/all" --folds "$runs"/{0,1,2,3,4} --name hippocampus
fi
