"""Share of kept tokens near the reference boundary, over a run's validation cases, appended to a CSV.

Usage: python benchmarks/near_boundary.py DATASET RUN [--csv benchmarks/near_boundary.csv]
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import sys
from pathlib import Path

import numpy as np
import torch

from tokenseg.boundary import NearBoundary, near_boundary
from tokenseg.checkpoint import Model, load_model
from tokenseg.data.cases import Case, Dataset
from tokenseg.data.datasets import load_case, open_dataset
from tokenseg.data.preprocess import prepare_image, prepare_labels
from tokenseg.segment import pad_to_window

RADII_MM = (0.0, 2.0, 5.0)
COLUMNS = ("date", "dataset", "run", "n", "radius_mm", "kept", "share", "base_rate", "enrichment", "ceiling")


def main() -> None:
    """Measure every validation case, average, append a row a radius."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("--csv", type=Path, default=Path(__file__).with_name("near_boundary.csv"))
    arguments = parser.parse_args()
    model, dataset = load_model(arguments.run), open_dataset(arguments.dataset)
    facts = json.loads((arguments.run / "run.json").read_text())
    held_out = set(json.loads((arguments.run / "splits.json").read_text())[facts["fold"]]["val"])
    cases = [case for case in dataset.cases if case.case_id in held_out]
    measured = [measure(model, dataset, case) for case in cases]
    new = not arguments.csv.exists()
    with arguments.csv.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        for number, radius_mm in enumerate(RADII_MM):
            means = np.mean([each[number] for each in measured], axis=0)
            values = {name: f"{value:.4f}" for name, value in zip(NearBoundary._fields, means, strict=True)}
            row = {
                "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
                "dataset": arguments.dataset.name,
                "run": arguments.run.name,
                "n": len(cases),
                "radius_mm": radius_mm,
                "kept": model.facts.network.num_kept,
            }
            writer.writerow(row | values)
            print(row | values)


def measure(model: Model, dataset: Dataset, case: Case) -> list[NearBoundary]:
    """Run one whole case and measure its tokens at each radius."""
    loaded = load_case(dataset, case)
    plan = model.facts.plan
    prepared = prepare_image(loaded.volume, plan, covering=loaded.mask)
    labels = prepare_labels(loaded.mask, prepared.record, plan)
    image, _ = pad_to_window(torch.from_numpy(prepared.image), plan.window_vox)
    foreground, _ = pad_to_window(torch.from_numpy(labels.max(axis=0, keepdims=True)), plan.window_vox)
    with torch.inference_mode():
        tokens = model.network(image[None]).tokens
    return [near_boundary(tokens, foreground[0].numpy() > 0, plan.spacing_mm, radius_mm) for radius_mm in RADII_MM]


if __name__ == "__main__":
    sys.exit(main())
