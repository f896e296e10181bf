#!/usr/bin/env bash
# Run the program end to end on real scans and print a SHA-256 of each file that depends on nothing but its input, so
# that two versions of the code can be compared: every line must be the same where a change should change no result.
#
#     scripts/same_outputs.sh PYTHON DATA OUT > before.txt
#
# PYTHON is the interpreter of the version's own environment, DATA holds Task04_Hippocampus (Medical Segmentation
# Decathlon), OUT is a new folder. The same day, the same computer: reports carry a date, and torch's sums the CPU.
set -euo pipefail
python="$(realpath -s "${1:?name a Python}")" data="$(realpath "${2:?name the folder of the data}")" out="${3:?name a new folder}"
mkdir "$out"
cd "$out"
export OMP_NUM_THREADS=1 XDG_CACHE_HOME="$PWD/cache"
tokenseg() { "$python" -m tokenseg "$@" >>log.txt 2>&1; }

# A part of the dataset as it is: every eighth case.
"$python" - "$data/Task04_Hippocampus" dataset <<'PYTHON'
import json, shutil, sys
from pathlib import Path

source, target = Path(sys.argv[1]), Path(sys.argv[2])
known = json.loads((source / "dataset.json").read_text())
known["training"] = known["training"][::8]
for entry in known["training"]:
    for kind in ("image", "label"):
        place = target / entry[kind]
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / entry[kind], place)
target.joinpath("dataset.json").write_text(json.dumps(known))
PYTHON
scan="$(find dataset/imagesTr -name '*.nii.gz' | sort | head -1)"
label="dataset/labelsTr/$(basename "$scan")"

for engine in torch openvino; do
    tokenseg segment dataset/imagesTr "masks-$engine" --model hippocampus --engine "$engine" --threads 1 \
        --report "masks-$engine.html" --probabilities --show-names
    tokenseg evaluate "masks-$engine" dataset --json "scores-$engine.json" --csv "scores-$engine.csv" \
        --report "scores-$engine.html"
done
tokenseg train dataset run --max-steps 20 --threads 1 --preset small
tokenseg segment "$scan" one.nii.gz --model run --engine torch --threads 1 --report one.html
tokenseg tokens "$scan" --model run --reference "$label" --json tokens.json --picture tokens.png
tokenseg tokens "$scan" --model hippocampus --json builtin-tokens.json --picture builtin-tokens.png
tokenseg check dataset --json check.json || true
tokenseg info run
tokenseg cohort exams --train 4 --test 2 --external 2
tokenseg train exams/train exam-run --max-steps 4 --threads 1 --preset tiny
tokenseg segment exams/test exam-masks --model exam-run --threads 1 --engine torch --report exam-masks.html

# Left out: what says how long it took, how much memory or which processor; caches; and what a run resumes from, whose
# header safetensors writes in an order that it draws.
find . -type f ! -path './cache/*' ! -path './dataset/*' ! -path '*/cache/*' ! -name log.txt ! -name log.csv \
    ! -name state.safetensors ! -name status.jsonl ! -name manifest.json ! -name '*_manifest.json' ! -path '*/tensorboard/*' |
    LC_ALL=C sort | xargs sha256sum
