"""Results of an evaluation: a row a case and label, summaries, and both as JSON and CSV."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokenseg.config import Label
from tokenseg.evaluation.lesions import LESION_MIN_IOU, LesionCounts
from tokenseg.evaluation.metrics import (
    METRICS_VERSION,
    CaseLabelScore,
    Interval,
)
from tokenseg.files import write_atomically

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
