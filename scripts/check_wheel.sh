#!/usr/bin/env bash
# Build the wheel, install it into a clean environment without any extra, and segment a scan with what is there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
unset PYTHONPATH

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

.venv/bin/python -m build --wheel --no-isolation --outdir "$work/dist" .
.venv/bin/python -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    --constraint requirements.lock "$work"/dist/tokenseg-*.whl

cd "$work" # away from the sources
PATH="$work/venv/bin:$PATH"

python - <<'PYTHON'
"""The environment holds the runtime dependencies only; a scan and a model of random weights are made with them."""

import importlib.util
from pathlib import Path

import nibabel
import numpy as np
import torch

import tokenseg
from tokenseg.saved_model.checkpoint import ModelFacts, save_model
from tokenseg.config import PRESETS, ChannelNormalisation, Label, Plan
from tokenseg.model.network import TokenSeg

if not Path(tokenseg.__file__).is_relative_to(Path.cwd()):
    raise SystemExit(f"tokenseg comes from {tokenseg.__file__}, not from the wheel")
if not (Path(tokenseg.__file__).parent / "py.typed").is_file():
    raise SystemExit("the wheel has no py.typed: its types are not used")
for name in ("monai", "lightning_fabric", "beartype", "pytest"):
    if importlib.util.find_spec(name):
        raise SystemExit(f"{name} is installed: inference must not need it")

plan = Plan(
    channels=("MRI",),
    source_channels=("MRI",),
    normalisation=(ChannelNormalisation(kind="zscore"),),
    labels=(Label(name="front", values=(1,), output_value=1), Label(name="back", values=(2,), output_value=2)),
    spacing_mm=(1.0, 1.0, 1.0),
    window_vox=(32, 32, 32),
    whole_limit_vox=(64, 64, 64),
    strides=((2, 2, 2),) * 4,
    grid=(4, 5, 5),
    batch_size=1,
    steps=1,
)
torch.manual_seed(0)
network = TokenSeg(PRESETS["tiny"], plan)
save_model(Path("model"), network, ModelFacts(name="wheel check", plan=plan, network=PRESETS["tiny"]))

turn = np.deg2rad(10.0)
affine = np.array([[np.cos(turn), -np.sin(turn), 0, -9], [np.sin(turn), np.cos(turn), 0, 4], [0, 0, 1.5, 7], [0, 0, 0, 1]])
intensities = np.random.default_rng(0).normal(100.0, 20.0, size=(33, 40, 24)).astype(np.float32)
nibabel.save(nibabel.Nifti1Image(intensities, affine), "in.nii.gz")
PYTHON

tokenseg --version
tokenseg segment in.nii.gz out.nii.gz --model model --report report.html
test -s report.html
tokenseg segment in.nii.gz builtin.nii.gz --model hippocampus

python - <<'PYTHON'
import nibabel
import numpy as np

scan = nibabel.load("in.nii.gz")
for name in ("out.nii.gz", "builtin.nii.gz"):
    mask = nibabel.load(name)
    if mask.shape != scan.shape:
        raise SystemExit(f"{name} has shape {mask.shape}, the scan {scan.shape}")
    if not np.array_equal(mask.affine, scan.affine):
        raise SystemExit(f"{name} has the affine {mask.affine.tolist()}, the scan {scan.affine.tolist()}")
    values = set(np.unique(np.asarray(mask.dataobj)).tolist())
    if not values <= {0, 1, 2}:
        raise SystemExit(f"{name} holds {values}, the model's labels are 1 and 2")
print(f"wheel check passed: masks of shape {mask.shape} by a new and by the built-in model")
PYTHON
