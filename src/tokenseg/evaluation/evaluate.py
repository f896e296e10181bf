"""Scores of predicted masks: every case and label, summed up with intervals, written as JSON and CSV.

What the measures mean, and what empty masks give, is frozen in `tokenseg.evaluation.metrics`. A case without a
prediction counts as an empty prediction: leaving a case out never raises a mean.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tokenseg.config import Label
from tokenseg.datasets.folders import image_files
from tokenseg.datasets.layouts import open_dataset
from tokenseg.errors import DataError, FileError
from tokenseg.evaluation.lesions import LesionCounts
from tokenseg.evaluation.metrics import (
    CaseLabelScore,
    bootstrap_interval,
    check_tolerance,
    score_label,
)
from tokenseg.evaluation.results import CaseLabelRow, Evaluation, LabelSummary
from tokenseg.imaging.formats import image_stem
from tokenseg.imaging.volume import check_same_grid, read_mask
from tokenseg.shapes import BoolMask, MaskArray

MEASURES = ("dice", "iou", "hd95_mm", "nsd", "volume_error_ml", "relative_volume_error", "lesion_f1")
"""Fields of `CaseLabelScore` that a `LabelSummary` gives the mean and interval of."""


class _Pair(NamedTuple):
    case_id: str
    reference: Path
    prediction: Path | None


class _References(NamedTuple):
    paths: dict[str, Path]
    labels: tuple[Label, ...] | None


def evaluate_folders(
    predictions: Path, references: Path, *, tolerance_mm: float = 1.0, labels: tuple[Label, ...] | None = None
) -> Evaluation:
    """Score predicted masks against reference masks, matched by file name without ending.

    A reference without a prediction counts as missed: a case that failed must not improve a mean. Where `tokenseg
    segment` wrote the predictions, its `summary.csv` says which cases were meant; references beyond those (the
    training cases of a dataset, say) are left out, and listed.

    Args:
        predictions: A folder of masks, or one mask file.
        references: A folder of masks, a dataset in a known layout (its labels folder is used), or one mask file where
            `predictions` is one, too.
        tolerance_mm: Distance up to which two surfaces agree, for the normalised surface Dice.
        labels: What to score. Left out: the labels or regions of the dataset, or every value other than 0 that the
            references hold.

    Raises:
        FileError: A path is missing, is a folder where a file is expected, or a mask cannot be read.
        DataError: No prediction has the name of a reference, masks share a name, the references hold no label, or
            `summary.csv` cannot be used.
        GeometryError: Prediction and reference of a case are not on one grid.
        ConfigError: `tolerance_mm` is negative or not finite.
    """
    check_tolerance(tolerance_mm)
    found = _find_references(references)
    predicted = _find_predictions(predictions, references, found)
    attempted = _attempted(predictions)
    left_out = set() if attempted is None else found.paths.keys() - attempted - predicted.keys()
    pairs = [
        _Pair(case_id, path, predicted.get(case_id))
        for case_id, path in sorted(found.paths.items())
        if case_id not in left_out
    ]
    labels = labels or found.labels or _labels_of_values(pairs, references)
    rows: list[CaseLabelRow] = []
    values: set[int] = set()
    for pair in pairs:
        case_rows, case_values = _score_case(pair, labels, tolerance_mm)
        rows.extend(case_rows)
        values |= case_values
    return Evaluation(
        rows=tuple(rows),
        summaries=tuple(_summarise(label, [row.score for row in rows if row.label == label]) for label in labels),
        tolerance_mm=tolerance_mm,
        missing_predictions=tuple(pair.case_id for pair in pairs if pair.prediction is None),
        extra_predictions=tuple(sorted(predicted.keys() - found.paths.keys())),
        references_left_out=tuple(sorted(left_out)),
        unlisted_values=tuple(sorted(values - {0, *(value for label in labels for value in label.values)})),
    )


def _find_references(references: Path) -> _References:
    if references.is_file():
        return _References({image_stem(references): references}, None)
    if not references.is_dir():
        raise FileError(f"references {references} do not exist; check the path")
    masks = _by_case(references)
    if masks:
        return _References(masks, None)
    try:
        dataset = open_dataset(references)
    except DataError as error:
        raise DataError(f"references {references} hold no masks and are no usable dataset: {error}") from error
    return _References({case.case_id: case.label for case in dataset.cases if case.label}, dataset.labels)


def _find_predictions(predictions: Path, references: Path, found: _References) -> dict[str, Path]:
    """Predicted masks by case id; a single prediction goes with the single reference, whatever their names."""
    if not predictions.exists():
        raise FileError(f"predictions {predictions} do not exist; check the path")
    if predictions.is_file() != references.is_file():
        file, folder = (predictions, references) if predictions.is_file() else (references, predictions)
        raise FileError(f"{file} is a file and {folder} a folder; give two files or two folders")
    if predictions.is_file():
        return dict.fromkeys(found.paths, predictions)
    predicted = _by_case(predictions)
    if not predicted.keys() & found.paths.keys():
        raise DataError(
            f"none of the {len(predicted)} masks in {predictions} has the name of one of the {len(found.paths)} "
            f"references in {references} (such as {min(found.paths, default='none')}); name predictions like references"
        )
    return predicted


def _attempted(predictions: Path) -> set[str] | None:
    """Cases that `tokenseg segment` was asked for, failed ones included; None where it left no summary."""
    summary = predictions / "summary.csv"
    if not summary.is_file():
        return None
    try:
        rows = list(csv.DictReader(io.StringIO(summary.read_text(encoding="utf-8"))))
        return {row["case"] for row in rows}
    except (OSError, UnicodeDecodeError, csv.Error, KeyError) as error:
        raise DataError(f"{summary} is not a summary of `tokenseg segment`: {error!r}; remove it") from error


def _by_case(folder: Path) -> dict[str, Path]:
    paths: dict[str, Path] = {}
    for path in image_files(folder):
        other = paths.setdefault(image_stem(path), path)
        if other != path:
            raise DataError(f"{folder} holds both {other.name} and {path.name} for one case; remove one of them")
    return paths


def _labels_of_values(pairs: list[_Pair], references: Path) -> tuple[Label, ...]:
    values = sorted({value for pair in pairs for value in _values_of(read_mask(pair.reference).array)} - {0})
    if not values or values[0] < 0:
        given = "no voxel other than 0" if not values else f"the negative value {values[0]}"
        raise DataError(
            f"reference masks in {references} hold {given}; labels must be positive whole numbers. "
            "Where all references are empty, give the dataset folder, which names the labels"
        )
    return tuple(Label(name=str(value), values=(value,), output_value=value) for value in values)


def _score_case(pair: _Pair, labels: tuple[Label, ...], tolerance_mm: float) -> tuple[list[CaseLabelRow], set[int]]:
    reference = read_mask(pair.reference)
    predicted = np.zeros_like(reference.array)
    if pair.prediction is not None:
        prediction = read_mask(pair.prediction)
        check_same_grid(reference, prediction, (str(pair.reference), str(pair.prediction)))
        predicted = prediction.array
    rows = [
        CaseLabelRow(
            case_id=pair.case_id,
            label=label,
            score=score_label(
                _mask_of(reference.array, label), _mask_of(predicted, label), reference.spacing_mm, tolerance_mm
            ),
            reference=pair.reference,
            prediction=pair.prediction,
        )
        for label in labels
    ]
    return rows, _values_of(reference.array) | _values_of(predicted)


def _mask_of(array: MaskArray, label: Label) -> BoolMask:
    return np.isin(array, label.values)


def _values_of(array: MaskArray) -> set[int]:
    return {int(value) for value in np.unique(array)}


def _summarise(label: Label, scores: list[CaseLabelScore]) -> LabelSummary:
    scored = [score for score in scores if score.status != "both_empty"]
    return LabelSummary(
        label=label,
        n=len(scored),
        n_missed=sum(score.status == "missed" for score in scores),
        n_false_positive=sum(score.status == "false_positive" for score in scores),
        n_both_empty=len(scores) - len(scored),
        intervals={
            name: bootstrap_interval(np.array([getattr(score, name) for score in scored], dtype=np.float64))
            for name in MEASURES
        },
        lesions=LesionCounts(*(sum(counts) for counts in zip(*(score.lesions for score in scores), strict=True))),
    )
