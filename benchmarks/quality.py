"""Whether quality signals tell failures: beside the true Dice of validation cases, a row a case.

    python benchmarks/quality.py DATASET MODEL [--fold N]

quality.csv has the cases as they are; quality_spoiled.csv has each of them once more with every fault of `FAULTS`, at a
strength drawn for it, so that some come out badly. The model must not have been trained on the fold's validation cases.
Its temperature is fitted on 20 of them, as a training does at its end; the calibration errors that are printed are of
each half by the temperature of the other. Printed too, for both files: Spearman's rank correlation of each signal with
the mean Dice over labels.
"""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import gaussian_filter, zoom
from scipy.stats import spearmanr

from tokenseg.benchmark.rows import Row, append
from tokenseg.datasets.layouts import LabelledCase, load_case, open_dataset
from tokenseg.datasets.splits import split_folds
from tokenseg.inference.predict import Manner, segment_scan
from tokenseg.inference.temperature import calibrate
from tokenseg.planning.suitability import check_input
from tokenseg.progress import Silent
from tokenseg.saved_model.checkpoint import Model, load_model
from tokenseg.saved_model.ensemble import Ensemble
from tokenseg.segmentation.provenance import commit

HERE = Path(__file__).parent
SIGNALS = ("expected_dice", "near_boundary", "entropy")
COLUMNS = ("date", "commit", "dataset", "model", "fold", "case", "dice", *SIGNALS)
SPOILED_COLUMNS = ("date", "commit", "dataset", "model", "fold", "case", "fault", "strength", "dice", *SIGNALS, "flags")


def noise(image: np.ndarray, strength: float, generator: np.random.Generator) -> np.ndarray:
    """Gaussian noise of up to three times the image's own deviation."""
    return image + 3 * strength * image.std() * generator.standard_normal(image.shape)


def blur(image: np.ndarray, strength: float, _: np.random.Generator) -> np.ndarray:
    """Gaussian blur of up to four voxels."""
    return gaussian_filter(image, 4 * strength)


def shading(image: np.ndarray, strength: float, generator: np.random.Generator) -> np.ndarray:
    """Receive field that falls along a random direction, by up to e to the fourth from end to end."""
    axes = np.meshgrid(*(np.linspace(-0.5, 0.5, length) for length in image.shape), indexing="ij")
    direction = generator.standard_normal(3)
    ramp = sum(weight * axis for weight, axis in zip(direction / np.abs(direction).sum(), axes, strict=True))
    return image * np.exp(4 * strength * ramp)


def thick_slices(image: np.ndarray, strength: float, _: np.random.Generator) -> np.ndarray:
    """Slices of up to ten voxels' thickness along the last axis, each repeated."""
    thickness = 1 + 9 * strength
    few = zoom(image, (1, 1, 1 / thickness), order=1)
    return zoom(few, tuple(new / old for new, old in zip(image.shape, few.shape, strict=True)), order=0)


def ghosts(image: np.ndarray, strength: float, _: np.random.Generator) -> np.ndarray:
    """Of motion: the image shifted by a quarter and by half of its second axis, laid over itself."""
    half, quarter = (np.roll(image, image.shape[1] // part, axis=1) for part in (2, 4))
    return image + strength * (half + quarter)


FAULTS: tuple[Callable[[np.ndarray, float, np.random.Generator], np.ndarray], ...]
FAULTS = (noise, blur, shading, thick_slices, ghosts)


def main() -> None:
    """Segment the validation cases, as they are and spoiled, and write their rows."""
    parser = argparse.ArgumentParser()
    parser.add_argument("dataset", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--fold", type=int, default=1)
    arguments = parser.parse_args()
    dataset = open_dataset(arguments.dataset)
    held_out = set(split_folds(dataset)[arguments.fold].val)
    cases = [case for case in dataset.cases if case.case_id in held_out]
    model = load_model(arguments.model, torch.device("cpu"))
    quality = calibrate(model, cases, dataset, Silent())
    print(f"temperature {quality.temperature}, calibration error {quality.calibration_error}")
    model = replace(model, facts=model.facts.model_copy(update={"quality": quality}))
    common = {"date": datetime.date.today().isoformat(), "commit": commit(), "dataset": arguments.dataset.name}
    common |= {"model": model.facts.name, "fold": str(arguments.fold)}
    rows, spoiled_rows = [], []
    for number, case in enumerate(cases):
        loaded = load_case(dataset, case)
        rows.append(common | {"case": case.case_id} | figures(model, loaded))
        for index, fault in enumerate(FAULTS):
            generator = np.random.default_rng([number, index])
            strength = generator.uniform()
            image = fault(loaded.volume.array[0].astype(np.float64), strength, generator).astype(np.float32)
            found = figures(model, replace(loaded, volume=replace(loaded.volume, array=image[None])))
            what = {"case": case.case_id, "fault": fault.__name__, "strength": f"{strength:.3f}"}
            spoiled_rows.append(common | what | found)
    append(HERE / "quality.csv", COLUMNS, [{name: row[name] for name in COLUMNS} for row in rows])
    append(HERE / "quality_spoiled.csv", SPOILED_COLUMNS, spoiled_rows)
    for name, some in (("as they are", rows), ("spoiled", spoiled_rows)):
        for signal in SIGNALS:
            known = [row for row in some if row[signal]]
            found = spearmanr([float(row["dice"]) for row in known], [float(row[signal]) for row in known])
            print(f"{name}: {signal}: rank correlation with Dice {found.statistic:.3f} ({len(known)} cases)")


def figures(model: Model, loaded: LabelledCase) -> Row:
    """Dice of a scan, its signals and how many flags it has."""
    plan = model.facts.plan
    done = segment_scan(Ensemble.of([model]), loaded.volume, Manner(num_slabs=1))
    voxel_ml = abs(np.linalg.det(loaded.volume.affine[:3, :3])) / 1000
    volumes_ml = {
        label.name: voxel_ml * np.count_nonzero(np.isin(done.mask, label.output_value)) for label in plan.labels
    }
    warnings = check_input(loaded.volume, model.facts.inputs)
    signals = done.meter.quality("", done.mask, model.facts, volumes_ml, warnings)
    dice = [
        _dice(np.isin(done.mask, label.output_value), np.isin(loaded.mask.array, label.values)) for label in plan.labels
    ]
    values = {"dice": float(np.mean(dice))} | {name: getattr(signals, name) for name in SIGNALS}
    texts = {name: "" if value is None else f"{value:.4f}" for name, value in values.items()}
    return texts | {"flags": str(len(signals.flags))}


def _dice(first: np.ndarray, second: np.ndarray) -> float:
    return 2 * np.count_nonzero(first & second) / max(1, np.count_nonzero(first) + np.count_nonzero(second))


if __name__ == "__main__":
    main()
