"""How far the best fixed threshold on the subtraction image gets on synthetic exams, written to threshold.csv.

Usage: python benchmarks/threshold.py EXAMS   (from `tokenseg synthetic EXAMS`)

Of all thresholds the one with the highest mean Dice over the exams with a lesion is taken, references in hand.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

import numpy as np

from tokenseg.datasets.layouts import load_case, open_dataset

COLUMNS = ("part", "n", "dice_stored", "dice_zscored")
PARTS = ("train", "test", "external")
NUM_THRESHOLDS = 300


def main() -> None:
    """Measure every part, write the rows anew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("exams", type=Path)
    parser.add_argument("--csv", type=Path, default=Path(__file__).with_name("threshold.csv"))
    arguments = parser.parse_args()
    with arguments.csv.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for part in PARTS:
            exams = subtractions(arguments.exams / part)
            stored = best_dice([(image, mask) for image, _, mask in exams])
            zscored = best_dice([(image / deviation, mask) for image, deviation, mask in exams])
            writer.writerow((part, len(exams), f"{stored:.3f}", f"{zscored:.3f}"))


def subtractions(root: Path) -> list[tuple[np.ndarray, float, np.ndarray]]:
    """For each exam with a lesion: first phase after contrast less the one before, deviation of all phases, mask."""
    dataset, exams = open_dataset(root), []
    for case in dataset.cases:
        loaded = load_case(dataset, case)
        mask = loaded.mask.array > 0
        if mask.any():
            phases = loaded.volume.array
            exams.append((phases[1] - phases[0], float(phases.std()), mask))
    return exams


def best_dice(exams: list[tuple[np.ndarray, np.ndarray]]) -> float:
    """Highest mean Dice that one threshold reaches."""
    thresholds = np.linspace(0, max(float(image.max()) for image, _ in exams), NUM_THRESHOLDS)
    curves = []
    for image, mask in exams:
        everywhere, inside = np.sort(image, axis=None), np.sort(image[mask])
        above = everywhere.size - np.searchsorted(everywhere, thresholds)
        hits = inside.size - np.searchsorted(inside, thresholds)
        curves.append(2 * hits / (above + inside.size))
    return float(np.mean(curves, axis=0).max())


if __name__ == "__main__":
    sys.exit(main())
