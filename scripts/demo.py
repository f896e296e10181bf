"""The whole way in a few minutes, on scans that it draws itself: train, segment, evaluate.

The scans are synthetic (two textured ellipsoids in noise, anisotropic voxels): they show how the commands fit together,
and say nothing about accuracy on patients. `runs/demo` is made anew.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy.ndimage import gaussian_filter

from tokenseg.cli import main as tokenseg

NUM_TRAINING, NUM_NEW, SHAPE, SPACING_MM = 20, 4, (56, 56, 40), (1.0, 1.0, 1.5)


def main(folder: Path) -> int:
    """Draw the scans, then run the three commands as a user would."""
    shutil.rmtree(folder, ignore_errors=True)
    dataset, new, references = folder / "dataset", folder / "new", folder / "references"
    pairs = []
    for number in range(NUM_TRAINING + NUM_NEW):
        name, training = f"scan_{number:03d}.nii.gz", number < NUM_TRAINING
        image, label = draw_scan(np.random.default_rng(number))
        save((dataset / "imagesTr" if training else new) / name, image)
        save((dataset / "labelsTr" if training else references) / name, label)
        if training:
            pairs.append({"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"})
    labels = {"0": "background", "1": "bright", "2": "dark"}
    about = {"modality": {"0": "MRI"}, "labels": labels, "numTraining": len(pairs), "training": pairs, "test": []}
    (dataset / "dataset.json").write_text(json.dumps({"name": "Synthetic", "tensorImageSize": "3D", **about}))
    run, masks = folder / "run", folder / "masks"
    for command in (
        ["train", dataset, run, "--max-steps", "200"],
        ["segment", new, masks, "--model", run],
        ["evaluate", masks, references, "--json", folder / "scores.json"],
    ):
        arguments = [str(part) for part in command]
        print(f"\n$ tokenseg {' '.join(arguments)}", flush=True)
        code = tokenseg(arguments)
        if code:
            return code
    print("\nThe same with your own data (Medical Segmentation Decathlon, nnU-Net or MAMA-MIA folder):")
    print("  tokenseg train YOUR_DATASET runs/mine --max-minutes 60")
    print("  tokenseg segment YOUR_SCAN.nii.gz MASK.nii.gz --model runs/mine")
    return 0


def draw_scan(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two ellipsoids, one brighter and one darker than a textured background, and the labels 1 and 2."""
    grid = np.indices(SHAPE).astype(float)
    image = 100 + 60 * gaussian_filter(rng.normal(size=SHAPE), 3)
    label = np.zeros(SHAPE, dtype=np.uint8)
    for value, (contrast, where) in enumerate(((25, 0.3), (-25, 0.7)), start=1):
        centre = np.array(SHAPE) * (where + rng.uniform(-0.1, 0.1, 3))
        radius = rng.uniform(6, 10, 3)
        inside = (((grid - centre[:, None, None, None]) / radius[:, None, None, None]) ** 2).sum(axis=0) < 1
        image[inside] += contrast
        label[inside] = value
    return (gaussian_filter(image, 0.7) + rng.normal(0, 12, SHAPE)).astype(np.float32), label


def save(path: Path, array: np.ndarray) -> None:
    """Write NIfTI with anisotropic voxels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.diag([*SPACING_MM, 1.0])), path)


if __name__ == "__main__":
    sys.exit(main(Path("runs/demo")))
