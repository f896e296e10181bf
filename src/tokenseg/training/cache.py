"""Prepared cases on disk, memory-mapped: the dataset may be larger than memory, and a resumed run starts at once.

    cache/<plan and dataset hash>/<case>/image.npy     float32 (C, X, Y, Z) on the plan's grid
                                         labels.npy    uint8 (R, X, Y, Z)
                                         points.npy    int32 (n, 4): output label, x, y, z of foreground voxels
                                         coarse_3x3x2/ the same three of the coarse view, where the plan has one

Points are a fixed random sample of each label's voxels; training windows are centred on them.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int32, UInt8

from tokenseg.config import Plan
from tokenseg.datasets.cases import Case, Dataset
from tokenseg.datasets.layouts import load_case
from tokenseg.errors import FileError, TokenSegError
from tokenseg.files import DAMAGED_ARRAY, remove_leftovers, write_atomically
from tokenseg.outputs import Outputs, outputs_of
from tokenseg.plan_grid.coarse import coarse_image, coarse_labels
from tokenseg.plan_grid.preprocess import prepare_image, prepare_labels
from tokenseg.progress import Progress
from tokenseg.shapes import ImageArray

POINTS_PER_LABEL = 2000


@dataclass(frozen=True)
class PreparedCase:
    """One case, ready for training; arrays are memory-mapped and read-only."""

    case_id: str
    image: Float[np.ndarray, "C X Y Z"]
    labels: UInt8[np.ndarray, "R X Y Z"]
    points: Int32[np.ndarray, "n 4"]
    coarse: PreparedCase | None = None
    """Coarse view of the whole case, where the plan has a `coarse_factor`."""


def prepare_cases(
    dataset: Dataset, cases: tuple[Case, ...], plan: Plan, folder: Path, progress: Progress
) -> dict[str, PreparedCase]:
    """Prepare cases that are not in `folder` yet, and open all of them.

    Raises:
        TokenSegError: A case cannot be read or prepared; the message names it.
        FileError: The folder cannot be written, or holds a damaged file.
    """
    root = folder / _fingerprint(dataset, plan)
    progress.stage("preparing", len(cases))
    prepared = {}
    for case in cases:
        case_folder = root / case.case_id
        # `points.npy` is written last: where it is, the other two are complete.
        if not (case_folder / "points.npy").exists():
            _prepare(dataset, case, plan, case_folder)
        prepared[case.case_id] = _open_with_coarse(case.case_id, case_folder, plan)
        progress.advance(case.case_id)
    return prepared


def _fingerprint(dataset: Dataset, plan: Plan) -> str:
    """Hash of what decides the content: the plan's grid and intensities, and the dataset's place."""
    decides = plan.model_dump(mode="json", include={
        "channels", "source_channels", "joint_zscore", "normalisation", "labels", "regions", "spacing_mm",
    })  # fmt: skip
    text = json.dumps([decides, str(dataset.root.resolve())], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _prepare(dataset: Dataset, case: Case, plan: Plan, folder: Path) -> None:
    try:
        loaded = load_case(dataset, case)
        prepared = prepare_image(loaded.volume, plan, covering=loaded.mask)
        labels = prepare_labels(loaded.mask, prepared.record, plan)
    except TokenSegError as error:
        raise type(error)(f"case {case.case_id}: {error}") from error
    _save_all(folder, prepared.image, labels, outputs_of(plan))


def _open_with_coarse(case_id: str, folder: Path, plan: Plan) -> PreparedCase:
    case = _open(case_id, folder)
    if plan.coarse_factor is None:
        return case
    coarse_folder = folder / ("coarse_" + "x".join(str(factor) for factor in plan.coarse_factor))
    if not (coarse_folder / "points.npy").exists():
        image = coarse_image(case.image, plan.coarse_factor)
        labels = coarse_labels(case.labels, plan.coarse_factor)
        _save_all(coarse_folder, image, labels, outputs_of(plan))
    return replace(case, coarse=_open(case_id, coarse_folder))


def _save_all(folder: Path, image: ImageArray, labels: UInt8[np.ndarray, "R X Y Z"], outputs: Outputs) -> None:
    remove_leftovers(folder)
    _save(folder / "image.npy", image)
    _save(folder / "labels.npy", labels)
    _save(folder / "points.npy", _sample_points(labels, outputs))


def _sample_points(labels: UInt8[np.ndarray, "R X Y Z"], outputs: Outputs) -> Int32[np.ndarray, "n 4"]:
    rng = np.random.default_rng(0)
    samples = []
    for number, present in outputs.present(labels):
        places = np.argwhere(present)
        chosen = places[rng.permutation(len(places))[:POINTS_PER_LABEL]]
        samples.append(np.column_stack([np.full(len(chosen), number), chosen]))
    return np.concatenate(samples or [np.zeros((0, 4))]).astype(np.int32)


def _save(path: Path, array: np.ndarray) -> None:
    buffer = BytesIO()
    np.save(buffer, array, allow_pickle=False)
    write_atomically(path, buffer.getvalue())


def _open(case_id: str, folder: Path) -> PreparedCase:
    names = ("image", "labels", "points")
    try:
        with np.errstate(over="ignore"):  # of sizes in a damaged header
            image, labels, points = (np.load(folder / f"{n}.npy", mmap_mode="r", allow_pickle=False) for n in names)
        if image.shape[1:] != labels.shape[1:] or (image.ndim, labels.ndim, points.shape[1:]) != (4, 4, (4,)):
            raise ValueError("its arrays do not fit together")
        if (image.dtype, labels.dtype, points.dtype) != (np.float32, np.uint8, np.int32):
            raise ValueError("its arrays have other types")
    except DAMAGED_ARRAY as error:
        raise FileError(f"prepared case {folder} is damaged: {error}; delete this folder and resume") from error
    return PreparedCase(case_id, image, labels, points)
