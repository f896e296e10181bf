"""Pack a trained model, with the figures of its cross-validation, as a model that comes with the package.

    python scripts/pack_builtin.py RUN_ALL --folds RUN0 RUN1 RUN2 RUN3 RUN4 --name hippocampus

RUN_ALL is a run of `tokenseg train --fold all`, whose weights are packed in half precision; the others are runs of the
folds with the same settings, whose `validation/scores.json` give the figures, and `benchmarks/NAME_folds.csv`. What
runs cannot tell (data, licence, limits) stands in `scripts/builtin/NAME.toml` and `NAME.LICENSE`. The same runs give
the same bytes.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import shutil
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tokenseg.config import Coding
from tokenseg.errors import ModelError, TokenSegError
from tokenseg.evaluation.metrics import bootstrap_interval
from tokenseg.files import write_atomically
from tokenseg.saved_model.builtin import MODELS_FOLDER
from tokenseg.saved_model.card import CaseFigures, CrossValidation, Figure, LabelFigures, Publication
from tokenseg.saved_model.checkpoint import WEIGHTS_NAME, Model, QualityFacts, load_model, save_model

SOURCES = Path(__file__).with_name("builtin")
MEASUREMENTS = Path(__file__).parents[1] / "benchmarks"
NUM_WORST = 5
MAX_BYTES = 12_000_000


class Fold(NamedTuple):
    """A run that validated on cases it did not see."""

    run: Path
    model: Model
    tolerance_mm: float
    scores: dict[str, dict[str, dict[str, Any]]]
    """Measures by case and label."""


def main() -> None:
    """Parse and pack."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_all", type=Path)
    parser.add_argument("--folds", type=Path, nargs="+", required=True)
    parser.add_argument("--name", required=True)
    arguments = parser.parse_args()
    try:
        folder = pack(arguments.run_all, arguments.folds, arguments.name)
        write_atomically(MEASUREMENTS / f"{arguments.name}_folds.csv", case_rows(arguments.folds))
    except TokenSegError as error:
        sys.exit(f"error: {error}")
    print((folder / "README.md").read_text(encoding="utf-8"))
    print(f"{folder}: {(folder / WEIGHTS_NAME).stat().st_size / 1e6:.1f} MB of weights")


def pack(run_all: Path, runs: Sequence[Path], name: str, target: Path = MODELS_FOLDER) -> Path:
    """Write the model folder `target/name`; an existing one is replaced.

    Raises:
        TokenSegError: A run is incomplete, was trained with other settings or is not of the fold it should be of, or
            the weights are too large to ship.
    """
    model = load_model(run_all)
    if model.facts.training["fold"] != "all":
        raise ModelError(f"{run_all} was trained on fold {model.facts.training['fold']}; pack a run with --fold all")
    if model.facts.inputs is None:
        raise ModelError(f"{run_all} does not tell what its training scans were like; train it with this version")
    folds = [read_fold(run) for run in runs]
    check_folds(run_all, model, folds)
    about = tomllib.loads((SOURCES / f"{name}.toml").read_text(encoding="utf-8"))
    training, plan = model.facts.training, model.facts.plan
    coding = Coding.model_validate(about["coding"])
    labels = tuple(label.model_copy(update={"coding": coding}) for label in plan.labels)
    facts = model.facts.model_copy(
        update={
            "name": name,
            "plan": plan.model_copy(update={"labels": labels}),
            "inputs": model.facts.inputs.model_copy(update={"content": about["content"]}),
            "training": {
                "tokenseg_version": training["tokenseg_version"],
                "dataset": read_json(run_all / "run.json")["dataset"],
                **{key: training[key] for key in ("training_cases", "steps", "seed")},
                "precision": "weights stored with 16 bits a number",
            },
            "quality": quality_of_folds(model, folds),
            "publication": Publication(
                source=about["source"].strip(),
                licence=about["licence"].strip(),
                limits=tuple(about["limits"]),
                figures=cross_validation(folds, [label.name for label in plan.labels]),
            ),
        }
    )
    folder = target / name
    save_model(folder, model.network, facts, half=True)
    write_atomically(folder / "LICENSE", (SOURCES / f"{name}.LICENSE").read_bytes())
    size = (folder / WEIGHTS_NAME).stat().st_size
    if size >= MAX_BYTES:
        shutil.rmtree(folder)
        raise ModelError(f"{run_all}: {size / 1e6:.1f} MB of weights, at most {MAX_BYTES / 1e6:.0f} MB are shipped")
    return folder


def read_fold(run: Path) -> Fold:
    """Read model and scores of a run.

    Raises:
        ModelError: It has no model, or no scores yet.
    """
    model = load_model(run)
    values = read_json(run / "validation" / "scores.json")
    scores = {
        case["case"]: {measures["label"]: measures for measures in case["metrics"].values()}
        for case in values["metric_per_case"]
    }
    return Fold(run, model, values["tolerance_mm"], scores)


def check_folds(run_all: Path, model: Model, folds: Sequence[Fold]) -> None:
    """Refuse figures that would not be those of the packed model.

    Raises:
        ModelError: With the run that does not fit.
    """
    splits = read_json(run_all / "splits.json")
    wanted = list(range(len(splits)))
    given = [fold.model.facts.training["fold"] for fold in folds]
    if sorted(given, key=str) != wanted:
        raise ModelError(f"--folds are runs of the folds {given}; give one run of each of {wanted}")
    for fold in folds:
        settings = fold.model.facts.plan.model_dump(exclude={"reasons"}), fold.model.facts.network
        if settings != (model.facts.plan.model_dump(exclude={"reasons"}), model.facts.network):
            raise ModelError(f"{fold.run} was trained with another plan or network than {run_all}")
        held_out = splits[fold.model.facts.training["fold"]]["val"]
        if sorted(fold.scores) != sorted(held_out):
            raise ModelError(f"{fold.run} did not score the cases that its fold holds out; train it to the end")
        if fold.tolerance_mm != folds[0].tolerance_mm:
            raise ModelError(f"{fold.run} was scored with another tolerance of the surface Dice than {folds[0].run}")


def quality_of_folds(model: Model, folds: Sequence[Fold]) -> QualityFacts:
    """Volumes of the packed model's training, and the median temperature of the folds: it has none of its own."""
    known = [fold.model.facts.quality or QualityFacts() for fold in folds]
    known = [each for each in known if each.num_cases]
    volumes_ml = (model.facts.quality or QualityFacts()).volumes_ml
    if not known:
        return QualityFacts(volumes_ml=volumes_ml)
    errors = [each.calibration_error for each in known if each.calibration_error is not None]
    return QualityFacts(
        temperature=round(float(np.median([each.temperature for each in known])), 4),
        num_cases=sum(each.num_cases for each in known),
        calibration_error=tuple(np.mean(errors, axis=0).tolist()) if errors else None,
        volumes_ml=volumes_ml,
    )


def cross_validation(folds: Sequence[Fold], labels: Sequence[str]) -> CrossValidation:
    """Join the scores of all folds: means over cases with intervals, and the worst cases."""
    folds = sorted(folds, key=lambda fold: int(fold.model.facts.training["fold"]))
    scores = dict(sorted((case, of_labels) for fold in folds for case, of_labels in fold.scores.items()))
    means = {case: mean_dice(of_labels) for case, of_labels in scores.items()}
    worst = sorted((case for case in means if not math.isnan(means[case])), key=lambda case: (means[case], case))
    return CrossValidation(
        cases=len(scores),
        tolerance_mm=folds[0].tolerance_mm,
        fold_steps=tuple(int(fold.model.facts.training["steps"]) for fold in folds),
        fold_dice=tuple(figure([mean_dice(each) for each in fold.scores.values()]).mean for fold in folds),
        mean_dice=figure(list(means.values())),
        labels=tuple(label_figures(label, [of_labels[label] for of_labels in scores.values()]) for label in labels),
        worst=tuple(
            CaseFigures(
                case=case, dice={label: scores[case][label]["dice"] for label in labels if scored(scores[case][label])}
            )
            for case in worst[:NUM_WORST]
        ),
    )


def case_rows(runs: Sequence[Path]) -> bytes:
    """Measures of each case and label, as CSV; empty where a label is in neither reference nor prediction."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("fold", "case", "label", "dice", "hd95_mm", "nsd_1mm"))
    rows = [
        (fold.model.facts.training["fold"], case, label, *(measures[name] for name in ("dice", "hd95_mm", "nsd")))
        for fold in map(read_fold, runs)
        for case, of_labels in fold.scores.items()
        for label, measures in of_labels.items()
    ]
    for *names, dice, hd95_mm, nsd in sorted(rows, key=lambda row: row[1:3]):
        writer.writerow((*names, *("" if value is None else f"{value:.4f}" for value in (dice, hd95_mm, nsd))))
    return text.getvalue().encode()


def label_figures(label: str, measures: Sequence[dict[str, Any]]) -> LabelFigures:
    """Means of one label over the cases in which it is in the reference or the prediction."""
    kept = [each for each in measures if scored(each)]
    dice, hd95_mm, nsd = (figure([each[name] for each in kept]) for name in ("dice", "hd95_mm", "nsd"))
    return LabelFigures(label=label, cases=len(kept), dice=dice, hd95_mm=hd95_mm, nsd=nsd)


def mean_dice(of_labels: dict[str, dict[str, Any]]) -> float:
    """Mean Dice of the labels of a case; NaN where reference and prediction have none."""
    values = [measures["dice"] for measures in of_labels.values() if scored(measures)]
    return math.fsum(values) / len(values) if values else math.nan


def scored(measures: dict[str, Any]) -> bool:
    """Whether a label counts in a case: it is in the reference or in the prediction."""
    return measures["status"] != "both_empty"


def figure(values: Sequence[float]) -> Figure:
    """Mean and interval of the values that are numbers."""
    return Figure(**bootstrap_interval(np.array(values, dtype=np.float64))._asdict())


def read_json(path: Path) -> Any:  # noqa: ANN401 - JSON
    """Read a file of a run.

    Raises:
        ModelError: It is not there or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is missing or damaged; train the run to its end") from error


if __name__ == "__main__":
    main()
