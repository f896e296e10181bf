"""Whether extremely small lesions are learnt, 0.01 % of the voxels: a row a training, into tiny_lesions.csv.

    python benchmarks/tiny_lesions.py FOLDER [--steps N] [--threads N] [--seed N] [--csv FILE]

Twenty synthetic scans of 96 x 96 x 96 voxels are made in FOLDER, each with one bright ball 5.5 voxels across in smooth
noise, beside three larger balls as bright, which are no lesions. The training is that of `tokenseg train` with nothing
set but the number of steps; Dice is that of its four validation cases.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from pathlib import Path

import nibabel
import numpy as np
from scipy.ndimage import gaussian_filter

from tokenseg.benchmark.rows import append
from tokenseg.commands.terminal import Terminal
from tokenseg.device import bfloat16_helps, choose_device
from tokenseg.options import TrainOptions
from tokenseg.segmentation.provenance import commit
from tokenseg.training.train import train

NUM_CASES, SIDE, RADIUS = 20, 96, 2.77
COLUMNS = (
    *("date", "commit", "cases", "foreground_percent", "steps", "seed", "threads", "precision", "train_s"),
    *("dice", "dice_low", "dice_high", "missed", "lesion_f1"),
)


def main() -> None:
    """Make the scans, train, and write the row."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--csv", type=Path, default=Path(__file__).with_suffix(".csv"))
    arguments = parser.parse_args()
    dataset = arguments.folder / "dataset"
    share = write_dataset(dataset)
    options = TrainOptions(
        max_steps=arguments.steps, threads=arguments.threads, seed=arguments.seed, device="cpu", resume=True
    )
    begun = time.monotonic()
    with Terminal() as terminal:
        result = train(dataset, arguments.folder / "run", options, terminal)
    (lesion,) = result.evaluation.summaries
    dice = lesion.intervals["dice"]
    row = {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "cases": NUM_CASES,
        "foreground_percent": f"{100 * share:.4f}",
        "steps": result.steps,
        "seed": arguments.seed,
        "threads": arguments.threads,
        "precision": "bf16" if bfloat16_helps(choose_device("cpu")) else "fp32",
        "train_s": round(time.monotonic() - begun),
        "dice": f"{dice.mean:.4f}",
        "dice_low": f"{dice.low:.4f}",
        "dice_high": f"{dice.high:.4f}",
        "missed": lesion.n_missed,
        "lesion_f1": f"{lesion.intervals['lesion_f1'].mean:.4f}",
    }
    append(arguments.csv, COLUMNS, [{name: str(value) for name, value in row.items()}])
    print(row)


def write_dataset(folder: Path) -> float:
    """Write the scans in the layout of the Medical Segmentation Decathlon; the share of voxels that are lesion."""
    shares = []
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number in range(NUM_CASES):
        image, lesion = make_scan(np.random.default_rng(number))
        for name, array in (("imagesTr", image.astype(np.int16)), ("labelsTr", lesion.astype(np.uint8))):
            nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), folder / name / f"tiny_{number:02d}.nii.gz")
        shares.append(lesion.mean())
    names = [f"tiny_{number:02d}.nii.gz" for number in range(NUM_CASES)]
    facts = {
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "lesion"},
        "training": [{"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"} for name in names],
        "test": [],
    }
    (folder / "dataset.json").write_text(json.dumps(facts))
    return float(np.mean(shares))


def make_scan(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Smooth noise with fine noise on it, a small ball that is the lesion, and three that are larger."""
    shape = (SIDE, SIDE, SIDE)
    smooth = gaussian_filter(rng.normal(size=shape), 6)
    image = 200 + 30 * smooth / smooth.std() + 15 * rng.normal(size=shape)
    grid = np.indices(shape)

    def distance(margin: int) -> np.ndarray:
        centre = rng.uniform(margin, SIDE - margin, 3)
        return np.sqrt(sum((along - at) ** 2 for along, at in zip(grid, centre, strict=True)))

    from_lesion = distance(12)
    lesion = from_lesion <= RADIUS
    for _ in range(3):
        image += 100 * (distance(10) < rng.uniform(6, 9)) * (from_lesion > RADIUS + 3)
    return image + 100 * gaussian_filter(lesion.astype(float), 0.6), lesion


if __name__ == "__main__":
    main()
