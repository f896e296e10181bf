"""Whether quality signals tell failures: beside the true Dice of validation cases, a row a case, into quality.csv.

    python benchmarks/quality.py DATASET MODEL [--fold N] [--csv FILE]

The model must not have been trained on the fold's validation cases. Its temperature is fitted on 20 of them, as a
training does at its end; the calibration errors that are printed are of each half by the temperature of the other.
Printed too: Spearman's rank correlation of each signal with the mean Dice over labels.
"""

from __future__ import annotations

import argparse
import csv
import datetime
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr

from tokenseg.checkpoint import load_model
from tokenseg.data.datasets import load_case, open_dataset
from tokenseg.data.splits import split_folds
from tokenseg.predict import segment_in_slabs
from tokenseg.progress import Silent
from tokenseg.provenance import commit
from tokenseg.stopwatch import Stopwatch
from tokenseg.temperature import calibrate

COLUMNS = ("date", "commit", "dataset", "model", "fold", "case", "dice", "expected_dice", "near_boundary", "entropy")
SIGNALS = ("expected_dice", "near_boundary", "entropy")


def main() -> None:
    """Segment the validation cases and write their rows."""
    parser = argparse.ArgumentParser()
    parser.add_argument("dataset", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--fold", type=int, default=1)
    parser.add_argument("--csv", type=Path, default=Path(__file__).parent / "quality.csv")
    arguments = parser.parse_args()
    dataset = open_dataset(arguments.dataset)
    held_out = set(split_folds(dataset)[arguments.fold].val)
    cases = [case for case in dataset.cases if case.case_id in held_out]
    model = load_model(arguments.model, torch.device("cpu"))
    quality = calibrate(model, cases, dataset, Silent())
    model = replace(model, facts=model.facts.model_copy(update={"quality": quality}))
    plan, rows = model.facts.plan, []
    for case in cases:
        loaded = load_case(dataset, case)
        done = segment_in_slabs([model], loaded.volume, Stopwatch(), full=False, num_slabs=1)
        volumes = {label.name: 0.0 for label in plan.labels}
        signals = done.meter.quality(case.case_id, done.mask, model.facts, volumes, ())
        dice = [
            _dice(np.isin(done.mask, label.output_value), np.isin(loaded.mask.array, label.values))
            for label in plan.labels
        ]
        rows.append({"case": case.case_id, "dice": np.mean(dice)} | {name: getattr(signals, name) for name in SIGNALS})
    _append(arguments, model.facts.name, rows)
    print(f"temperature {quality.temperature}, calibration error {quality.calibration_error}")
    for name in SIGNALS:
        found = spearmanr([row["dice"] for row in rows], [row[name] for row in rows])
        print(f"{name}: rank correlation with Dice {found.statistic:.3f} (p = {found.pvalue:.2g}, {len(rows)} cases)")


def _dice(first: np.ndarray, second: np.ndarray) -> float:
    return 2 * np.count_nonzero(first & second) / max(1, np.count_nonzero(first) + np.count_nonzero(second))


def _append(arguments: argparse.Namespace, name: str, rows: list[dict[str, object]]) -> None:
    common = {"date": datetime.date.today().isoformat(), "commit": commit(), "dataset": arguments.dataset.name}
    common |= {"model": name, "fold": arguments.fold}
    is_new = not arguments.csv.exists()
    with arguments.csv.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if is_new:
            writer.writeheader()
        for row in rows:
            writer.writerow(common | {key: f"{v:.4f}" if isinstance(v, float) else v for key, v in row.items()})


if __name__ == "__main__":
    main()
