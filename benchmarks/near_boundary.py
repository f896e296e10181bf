"""Share of kept tokens near the reference boundary, over a run's validation cases, appended to a CSV.

Cases without a boundary (an empty reference) are left out of the means and of `n`. A run with `--fold all` was trained
on its validation cases; its row says so in `run`.

Usage: python benchmarks/near_boundary.py DATASET RUN [--csv benchmarks/near_boundary.csv]
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from pathlib import Path

import numpy as np

from tokenseg.benchmark.rows import append
from tokenseg.datasets.cases import Case, Dataset
from tokenseg.datasets.layouts import load_case, open_dataset
from tokenseg.saved_model.checkpoint import Model, load_model
from tokenseg.tokens.boundary import NearBoundary
from tokenseg.tokens.find import report_tokens

FIGURES = ("share", "base_rate", "enrichment", "ceiling")
COLUMNS = ("date", "dataset", "run", "n", "radius_mm", "kept", *FIGURES)


def main() -> None:
    """Measure every validation case, average, append a row a radius."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("--csv", type=Path, default=Path(__file__).with_name("near_boundary.csv"))
    arguments = parser.parse_args()
    model, dataset = load_model(arguments.run), open_dataset(arguments.dataset)
    fold, case_ids = validation_cases(arguments.run)
    measured = [near for case in dataset.cases if case.case_id in case_ids if (near := measure(model, dataset, case))]
    run = arguments.run.name + (" (its training cases)" if fold == "all" else "")
    for near in zip(*measured, strict=True):
        row = {
            "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
            "dataset": arguments.dataset.name,
            "run": run,
            "n": str(len(measured)),
            "radius_mm": str(near[0].radius_mm),
            "kept": str(model.facts.network.num_kept),
        }
        # Enrichment is not defined where no cell is near.
        row |= {name: f"{np.nanmean([getattr(each, name) for each in near]):.4f}" for name in FIGURES}
        append(arguments.csv, COLUMNS, [row])
        print(row)


def validation_cases(run: Path) -> tuple[int | str, set[str]]:
    """The fold of a run and the ids of its validation cases; with `all`, every case that its splits name."""
    fold = json.loads((run / "run.json").read_text())["fold"]
    splits = json.loads((run / "splits.json").read_text())
    if fold == "all":
        return fold, {case_id for split in splits for case_id in (*split["train"], *split["val"])}
    return fold, set(splits[fold]["val"])


def measure(model: Model, dataset: Dataset, case: Case) -> tuple[NearBoundary, ...]:
    """Run one case and measure its tokens at each radius; nothing where the reference has no boundary."""
    loaded = load_case(dataset, case)
    return report_tokens(model, loaded.volume, case.case_id, loaded.mask).summary.near


if __name__ == "__main__":
    sys.exit(main())
