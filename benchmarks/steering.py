"""Steered windows, the full sliding window and one pass over the whole scan, by the same weights, into steering.csv.

    python benchmarks/steering.py DATASET MODEL [--cases ID ...] [--threads N] [--csv FILE]
    python benchmarks/steering.py DATASET MODEL --sweep     thresholds on validation cases: prints, writes nothing

Each case is segmented in turn by the full sliding window, by steered windows and in one pass over the whole scan,
whatever limit for whole scans the model's plan has. A lesion is a piece of the reference (26-connected). It is found
where the prediction meets it, and lost where the full sliding window finds it and this way does not. False positives
are pieces of the prediction that meet no lesion. `network_s` runs from the prepared image to logits, coarse pass and
placing of windows included; `total_s` adds reading, preparation and the way back to the scan's grid. Dice is that of
all foreground; cases without any are left out of its mean. The row `all` adds up counts and averages times and Dice.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.ndimage import label

from tokenseg.benchmark.rows import Row, append
from tokenseg.datasets.cases import Case, Dataset
from tokenseg.datasets.layouts import load_case, open_dataset
from tokenseg.inference.steering import Steered, cover, kept_voxels, look_coarsely, predict_full, predict_steered
from tokenseg.inference.windows import num_windows, pad_rows
from tokenseg.plan_grid.preprocess import prepare_image, prepare_labels, rows_of
from tokenseg.plan_grid.restore import restore_logits
from tokenseg.saved_model.checkpoint import Model, load_model
from tokenseg.segmentation.provenance import commit
from tokenseg.shapes import ImageArray

COLUMNS = (
    *("date", "commit", "dataset", "model", "threads", "case", "mode", "windows_run", "windows_full"),
    *("network_s", "total_s", "dice", "lesions", "found", "lost", "false_positives", "largest_lost_vox"),
)
MODES: dict[str, Callable[[Model, ImageArray], Steered]] = {
    "full": lambda model, image: predict_full(_limited(model, 1), image),
    "steered": lambda model, image: predict_steered(_limited(model, 1), image),
    "whole": lambda model, image: predict_full(_limited(model, 1_000_000), image),
}
PROBABILITIES = (0.9, 0.5, 0.1, 0.05, 0.02, 0.01, 0.001)
PIECES = np.ones((3, 3, 3))


def main() -> None:
    """Measure every case in three ways, or sweep the threshold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--cases", nargs="+", help="ids; all if not given")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--csv", type=Path, default=Path(__file__).with_name("steering.csv"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, dataset = load_model(arguments.model), open_dataset(arguments.dataset)
    unknown = sorted({*(arguments.cases or ())} - {case.case_id for case in dataset.cases})
    if unknown:
        parser.error(f"not in {arguments.dataset}: {', '.join(unknown)}")
    cases = [case for case in dataset.cases if case.case_id in (arguments.cases or [case.case_id])]
    if arguments.sweep:
        sweep(model, dataset, cases)
        return
    common = {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "commit": commit(),
        "dataset": f"{arguments.dataset.resolve().parent.name}/{arguments.dataset.resolve().name}",
        "model": model.facts.name,
        "threads": str(arguments.threads),
    }
    rows = []
    for case in cases:
        rows += measure(model, dataset, case)
        for row in rows[-len(MODES) :]:
            print(row, flush=True)
    append(arguments.csv, COLUMNS, [common | _texts(row) for row in (*rows, *summary(rows))])


def _texts(row: dict[str, Any]) -> Row:
    return {name: f"{value:.4f}" if isinstance(value, float) else str(value) for name, value in row.items()}


def measure(model: Model, dataset: Dataset, case: Case) -> list[dict[str, Any]]:
    """Segment a case in every mode and compare with its reference: a row a mode."""
    plan, rows, found_by_full = model.facts.plan, [], np.zeros(0, dtype=bool)
    for mode, predict in MODES.items():
        started = time.perf_counter()
        loaded = load_case(dataset, case)
        prepared = prepare_image(loaded.volume, plan)
        begun = time.perf_counter()
        answer = predict(model, prepared.image)
        network_s = time.perf_counter() - begun
        mask = restore_logits(answer.logits, prepared.record, plan) != 0
        total_s = time.perf_counter() - started
        reference = loaded.mask.array > 0
        lesions, count = label(reference, PIECES)
        found = np.bincount(lesions[mask], minlength=count + 1)[1:] > 0
        found_by_full = found if mode == "full" else found_by_full
        lost = found_by_full & ~found
        sizes = np.bincount(lesions.ravel(), minlength=count + 1)[1:]
        rows.append(
            {
                "case": case.case_id,
                "mode": mode,
                "windows_run": answer.windows_run,
                "windows_full": answer.windows_full,
                "network_s": network_s,
                "total_s": total_s,
                "dice": dice(mask, reference) if reference.any() else "",
                "lesions": count,
                "found": int(found.sum()),
                "lost": int(lost.sum()),
                "false_positives": false_positives(mask, reference),
                "largest_lost_vox": int(sizes[lost].max(initial=0)),
            }
        )
    return rows


def _limited(model: Model, limit_vox: int) -> Model:
    """The model with another limit, the same for each axis, up to which scans run whole."""
    plan = model.facts.plan.model_copy(update={"whole_limit_vox": (limit_vox,) * 3})
    return replace(model, facts=model.facts.model_copy(update={"plan": plan}))


def dice(mask: np.ndarray, reference: np.ndarray) -> float:
    """Overlap of two masks, the reference not empty."""
    return 2 * float((mask & reference).sum()) / float(mask.sum() + reference.sum())


def false_positives(mask: np.ndarray, reference: np.ndarray) -> int:
    """Pieces of the prediction that meet no lesion."""
    pieces, count = label(mask, PIECES)
    return count - len(np.unique(pieces[mask & reference]))


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a mode over all cases."""
    result = []
    for mode in MODES:
        own = [row for row in rows if row["mode"] == mode]
        sums = {
            name: sum(row[name] or 0 for row in own)
            for name in ("windows_run", "windows_full", "lesions", "found", "lost", "false_positives")
        }
        means = {
            name: float(np.mean([row[name] for row in own if row[name] != ""] or [np.nan]))
            for name in ("network_s", "total_s", "dice")
        }
        largest = max(row["largest_lost_vox"] for row in own)
        result.append({"case": "all", "mode": mode, **sums, **means, "largest_lost_vox": largest})
        print(result[-1])
    return result


def sweep(model: Model, dataset: Dataset, cases: list[Case]) -> None:
    """For each threshold: windows that would run, and lesions (their voxels) that no kept voxel meets."""
    plan = _limited(model, 1).facts.plan
    if plan.coarse_factor is None:
        sys.exit(f"{model.facts.name} was trained without coarse views")
    windows = dict.fromkeys(PROBABILITIES, 0)
    missed = {probability: list[int]() for probability in PROBABILITIES}
    num_full, num_lesions = 0, 0
    for case in cases:
        loaded = load_case(dataset, case)
        prepared = prepare_image(loaded.volume, plan, covering=loaded.mask)
        padded = pad_rows(rows_of(prepared.image), plan.window_vox).rows
        size = padded.shape
        start = [(length - own) // 2 for length, own in zip(size, prepared.record.grid_shape, strict=True)]
        logits = look_coarsely(model, padded)
        reference = prepare_labels(loaded.mask, prepared.record, plan).max(axis=0) > 0
        lesions, count = label(reference, PIECES)
        num_lesions += count
        full = num_windows(prepared.image, plan)
        num_full += full
        for probability in PROBABILITIES:
            kept = kept_voxels(logits, plan, probability)
            windows[probability] += min(full, len(cover(kept, size, plan.window_vox, plan.coarse_factor)))
            whole = np.kron(kept, np.ones(plan.coarse_factor, dtype=bool))[tuple(slice(length) for length in size)]
            inner = tuple(slice(a, a + b) for a, b in zip(start, reference.shape, strict=True))
            met = np.bincount(lesions[whole[inner]], minlength=count + 1)[1:] > 0
            missed[probability] += np.bincount(lesions.ravel(), minlength=count + 1)[1:][~met].tolist()
        print(case.case_id, count, "lesions", flush=True)
    print(f"{len(cases)} cases, {num_lesions} lesions, {num_full} windows in the full sliding window")
    for probability, run in windows.items():
        lost = sorted(missed[probability])
        print(f"probability {probability:<6} windows {run:5d} = {run / num_full:.3f}, missed {lost}")


if __name__ == "__main__":
    sys.exit(main())
