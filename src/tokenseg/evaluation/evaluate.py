"""Scores of predicted masks: every case and label, summed up with intervals, written as JSON and CSV.

What the measures mean, and what empty masks give, is frozen in `tokenseg.evaluation.metrics`. A case without a
prediction counts as an empty prediction: leaving a case out never raises a mean.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tokenseg.config import Label
from tokenseg.datasets.folders import image_files
from tokenseg.datasets.layouts import open_dataset
from tokenseg.errors import DataError, FileError
from tokenseg.evaluation.metrics import (
    LESION_MIN_IOU,
    METRICS_VERSION,
    CaseLabelScore,
    Interval,
    LesionCounts,
    bootstrap_interval,
    check_tolerance,
    score_label,
)
from tokenseg.files import write_atomically
from tokenseg.imaging.formats import image_stem
from tokenseg.imaging.volume import check_same_grid, read_mask
from tokenseg.shapes import BoolMask, MaskArray

MEASURES = ("dice", "iou", "hd95_mm", "nsd", "volume_error_ml", "relative_volume_error", "lesion_f1")
"""Fields of `CaseLabelScore` that a `LabelSummary` gives the mean and interval of."""

CSV_COLUMNS = (
    *("case", "label", "status", "dice", "iou", "hd95_mm", "nsd", "reference_ml", "prediction_ml"),
    *("volume_error_ml", "relative_volume_error", "lesion_f1"),
    *("lesions_true_positive", "lesions_false_positive", "lesions_false_negative"),
)

_COMPARABLE_KEYS = ("Dice", "IoU", "FP", "TP", "FN", "TN", "n_pred", "n_ref")


@dataclass(frozen=True)
class CaseLabelRow:
    """The score of one label of one case, and the files that it comes from."""

    case_id: str
    label: Label
    score: CaseLabelScore
    reference: Path
    prediction: Path | None
    """None where there is no prediction: scored as an empty mask."""


@dataclass(frozen=True)
class LabelSummary:
    """One label over all cases."""

    label: Label
    n: int
    """Cases in the means: all but those in which both masks are empty."""
    n_missed: int
    """Cases in which the prediction is empty and the reference is not; in the means with the worst value."""
    n_false_positive: int
    """Cases in which the reference is empty and the prediction is not; in the means with the worst value."""
    n_both_empty: int
    """Cases left out of the means."""
    intervals: dict[str, Interval]
    """Mean over cases and 95 % bootstrap interval, for each of `MEASURES`."""
    lesions: LesionCounts
    """Sum over cases. Its F1 weighs lesions, not cases, and may rise where a case full of inventions is emptied."""


@dataclass(frozen=True)
class Evaluation:
    """All rows, and what they come to."""

    rows: tuple[CaseLabelRow, ...]
    """By case id, then in the order of the labels."""
    summaries: tuple[LabelSummary, ...]
    """In the order of the labels."""
    tolerance_mm: float
    missing_predictions: tuple[str, ...]
    """Ids of reference cases without a prediction; they are in the rows, as empty predictions."""
    extra_predictions: tuple[str, ...]
    """Ids of predictions without a reference; they are not in the rows."""
    references_left_out: tuple[str, ...]
    """Ids of references without a prediction that the `summary.csv` of the predictions does not name."""
    unlisted_values: tuple[int, ...]
    """Values in predictions or references that belong to no label and so are scored as background."""

    def to_json(self) -> dict[str, Any]:
        """Give plain values for JSON, NaN as None.

        The keys `metric_per_case`, `mean` and `foreground_mean` are those of nnU-Net's `summary.json`, keyed by label
        value (regions by their values, such as "(1, 2)"), with our measures beside its own.
        """
        labels = [summary.label for summary in self.summaries]
        comparable = {_label_key(label): _comparable_mean(self._scores(label)) for label in labels}
        values = {
            "metrics_version": METRICS_VERSION,
            "tolerance_mm": self.tolerance_mm,
            "lesion_min_iou": LESION_MIN_IOU,
            "labels": {summary.label.name: _summary_values(summary) for summary in self.summaries},
            "missing_predictions": self.missing_predictions,
            "extra_predictions": self.extra_predictions,
            "references_left_out": self.references_left_out,
            "unlisted_values": self.unlisted_values,
            "metric_per_case": list(self._cases()),
            "mean": comparable,
            "foreground_mean": {key: _mean(means[key] for means in comparable.values()) for key in _COMPARABLE_KEYS},
        }
        return {key: _without_nan(value) for key, value in values.items()}

    def csv_rows(self) -> list[tuple[str, ...]]:
        """Give one row a case and label in the order of `CSV_COLUMNS`, NaN as an empty text."""
        return [
            (row.case_id, row.label.name, row.score.status, *map(_csv_number, _csv_values(row.score)))
            for row in self.rows
        ]

    def _scores(self, label: Label) -> list[CaseLabelScore]:
        return [row.score for row in self.rows if row.label == label]

    def _cases(self) -> Iterator[dict[str, Any]]:
        by_case: dict[str, list[CaseLabelRow]] = {}
        for row in self.rows:
            by_case.setdefault(row.case_id, []).append(row)
        for case_id, rows in by_case.items():
            yield {
                "case": case_id,
                "reference_file": str(rows[0].reference),
                "prediction_file": str(rows[0].prediction) if rows[0].prediction else None,
                "metrics": {
                    _label_key(row.label): _comparable(row.score) | {"label": row.label.name} | _score_values(row.score)
                    for row in rows
                },
            }


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


def write_json(path: Path, evaluation: Evaluation) -> None:
    """Write `Evaluation.to_json`, all or nothing.

    Raises:
        FileError: The file cannot be written.
    """
    write_atomically(path, (json.dumps(evaluation.to_json(), indent=2, allow_nan=False) + "\n").encode())


def write_csv(path: Path, evaluation: Evaluation) -> None:
    """Write the header and `Evaluation.csv_rows`, all or nothing.

    Raises:
        FileError: The file cannot be written.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    writer.writerows(evaluation.csv_rows())
    write_atomically(path, text.getvalue().encode())


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


def _label_key(label: Label) -> str:
    return str(label.values[0]) if len(label.values) == 1 else str(label.values)


def _summary_values(summary: LabelSummary) -> dict[str, Any]:
    return {
        "values": summary.label.values,
        "n": summary.n,
        "n_missed": summary.n_missed,
        "n_false_positive": summary.n_false_positive,
        "n_both_empty": summary.n_both_empty,
        **{name: interval._asdict() for name, interval in summary.intervals.items()},
        "lesions_pooled": summary.lesions._asdict() | {"f1": summary.lesions.f1},
    }


def _score_values(score: CaseLabelScore) -> dict[str, Any]:
    values = asdict(score)
    return values | {"lesions": score.lesions._asdict(), "voxels": score.voxels._asdict()}


def _comparable(score: CaseLabelScore) -> dict[str, float | int]:
    found, invented, overlooked, background = score.voxels
    counts = (invented, found, overlooked, background, found + invented, found + overlooked)
    return dict(zip(_COMPARABLE_KEYS, (score.dice, score.iou, *counts), strict=True))


def _comparable_mean(scores: list[CaseLabelScore]) -> dict[str, float]:
    cases = [_comparable(score) for score in scores]
    return {key: _mean(case[key] for case in cases) for key in _COMPARABLE_KEYS}


def _mean(values: Iterable[float | int]) -> float:
    present = [value for value in values if not math.isnan(value)]
    return math.fsum(present) / len(present) if present else float("nan")


def _without_nan(value: object) -> object:
    if isinstance(value, dict):
        return {key: _without_nan(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _csv_values(score: CaseLabelScore) -> tuple[float | int, ...]:
    names = CSV_COLUMNS[CSV_COLUMNS.index("status") + 1 : CSV_COLUMNS.index("lesions_true_positive")]
    return (*(getattr(score, name) for name in names), *score.lesions)


def _csv_number(value: float | int) -> str:
    return "" if math.isnan(value) else repr(value)
