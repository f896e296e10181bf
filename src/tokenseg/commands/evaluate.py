"""The command `tokenseg evaluate`: scores of masks against reference masks."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from tokenseg.commands.preflight import check_outputs
from tokenseg.commands.terminal import print_evaluation, say_not_scored
from tokenseg.errors import TokenSegError

if TYPE_CHECKING:
    from tokenseg.datasets.cases import Dataset


@dataclass(frozen=True)
class Evaluate:
    """Score masks against reference masks."""

    predictions: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="PREDICTIONS")]
    """Mask file, or folder of masks."""
    references: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="REFERENCES")]
    """Reference mask file, folder of masks, or dataset folder."""
    json: Path | None = None
    """Write everything, per case and in summary, here."""
    csv: Path | None = None
    """Write one row a case and label here."""
    report: Path | None = None
    """Write scores and pictures as one HTML page here; images are shown where REFERENCES is a dataset folder."""
    tolerance_mm: float = 1.0
    """Tolerance of the normalised surface Dice."""

    def execute(self) -> int:
        """Score, print the table, write the files asked for."""
        from tokenseg.evaluation.evaluate import evaluate_folders
        from tokenseg.evaluation.results import write_csv, write_json

        check_outputs(json=self.json, csv=self.csv, report=self.report)
        evaluation = evaluate_folders(self.predictions, self.references, tolerance_mm=self.tolerance_mm)
        print_evaluation(evaluation)
        say_not_scored(evaluation)
        if self.json is not None:
            write_json(self.json, evaluation)
        if self.csv is not None:
            write_csv(self.csv, evaluation)
        if self.report is not None:
            from tokenseg.report.reports import evaluation_report

            title = f"Evaluation of {self.predictions.resolve().name}"
            dataset = _dataset_of(self.references)
            evaluation_report(self.report, evaluation, dataset, date.today().isoformat(), title=title)
        return 0


def _dataset_of(references: Path) -> Dataset | None:
    """The dataset that references belong to, for its images; None where they are bare masks."""
    from tokenseg.datasets.layouts import open_dataset

    try:
        return open_dataset(references)
    except TokenSegError:
        return None
