"""The work of `tokenseg benchmark accuracy`: several networks through one pipeline, under the same budget.

OUT/
  benchmark.json, config.toml   what all networks share; they differ in network and learning rate alone
  cache/                        prepared cases, shared
  calibration.json              step times: a budget in minutes is turned into steps once, for good
  choosing/, choices/           trainings on the choosing fold, and the learning rate that each network got from them
  runs/                         the trainings that are reported, each a run folder of `tokenseg train`
  accuracy.csv and others       the rows, unless they go to another file

The same command goes on where it was interrupted. Several processes may work on one folder, with different networks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from tokenseg.benchmark.accuracy.bootstrap import CaseScore, case_means, mean_interval
from tokenseg.benchmark.accuracy.budget import REFERENCE, AccuracyOptions
from tokenseg.benchmark.accuracy.calibration import FAULTS, Calibration, calibrate, network_fault
from tokenseg.benchmark.accuracy.pipeline import (
    Pipeline,
    Trained,
    Training,
    builder,
    device_name,
    open_pipeline,
    precision,
    prepare,
    train_network,
)
from tokenseg.benchmark.accuracy.table import accuracy_table
from tokenseg.benchmark.rows import (
    CASE_COLUMNS,
    CHOICE_COLUMNS,
    KEY_COLUMNS,
    ROW_COLUMNS,
    Row,
    append_missing,
    cases_path,
    locked,
    read_rows,
    record,
)
from tokenseg.errors import FileError, TrainingError
from tokenseg.evaluation.results import Evaluation
from tokenseg.files import write_atomically
from tokenseg.progress import Progress, Silent
from tokenseg.saved_model.run_folder import RunFolder
from tokenseg.segmentation.provenance import commit

LEARNING_RATES = (2e-3, 5e-4)
_CHOOSING_SEED = 0
_RESULT_NAME = "result.json"


@dataclass(frozen=True)
class AccuracyResult:
    """What a benchmark came to."""

    rows: tuple[Row, ...]
    """One a training of this call, in the order of the command line; failures have an `error`."""
    table: str
    """Markdown, of all rows with this dataset, fold and budget."""
    csv: Path


@dataclass(frozen=True)
class _Benchmark:
    pipeline: Pipeline
    options: AccuracyOptions
    calibration: Calibration
    csv: Path
    commit: str
    progress: Progress

    @property
    def slug(self) -> str:
        return self.options.budget.text.replace(" ", "-")


def benchmark_accuracy(
    dataset_path: Path, folder: Path, options: AccuracyOptions, progress: Progress | None = None
) -> AccuracyResult:
    """Train and validate every network asked for, and write its rows as soon as they are known.

    A network that cannot be made or trained gets a row that says why, and the others go on; it is tried again by the
    next call.

    Args:
        dataset_path: Dataset folder in a known layout.
        folder: OUT; new, empty, or of an earlier call, which is gone on with.
        options: As on the command line.
        progress: Told about the work.

    Raises:
        TokenSegError: Dataset, settings, folder or CSV file cannot be used.
    """
    progress = progress or Silent()
    options.check()
    csv = folder / "accuracy.csv" if options.csv is None else options.csv
    for path, columns in ((csv, ROW_COLUMNS), (cases_path(csv), CASE_COLUMNS), (_choices_path(csv), CHOICE_COLUMNS)):
        read_rows(path, columns)  # refuses other people's files now, and not after hours
    pipeline, calibration = _settle(dataset_path, folder, options, progress)
    benchmark = _Benchmark(pipeline, options, calibration, csv, commit(), progress)
    rows = tuple(_row_of(benchmark, network, seed) for seed in options.seeds for network in options.networks)
    return AccuracyResult(rows, _table(csv, rows), csv)


def _settle(
    dataset_path: Path, folder: Path, options: AccuracyOptions, progress: Progress
) -> tuple[Pipeline, Calibration]:
    """What is settled before the first training; another process waits meanwhile, and then finds it settled."""
    with locked(folder / ".lock"):
        pipeline = open_pipeline(dataset_path, folder, options, progress)
        run = prepare(pipeline, options.choosing_fold, progress)
        prepare(pipeline, options.fold, progress)
        if options.steps is not None:
            return pipeline, Calibration({}, {})
        builders = {name: builder(pipeline, name) for name in (REFERENCE, *options.networks)}
        calibration = calibrate(run, builders, folder / "calibration.json")
    for name, seconds in calibration.step_seconds.items():
        if name in options.networks:
            steps = options.budget.num_steps(seconds)
            progress.message(f"{name}: {seconds:.3f} s a step: {steps} steps in {options.budget.text}")
    return pipeline, calibration


def _row_of(benchmark: _Benchmark, network: str, seed: int) -> Row:
    try:
        if network in benchmark.calibration.errors:
            raise TrainingError(benchmark.calibration.errors[network])
        row, cases = _result(benchmark, network, seed)
    except FAULTS as error:
        fault = network_fault(error)
        benchmark.progress.message(f"{network}: failed: {fault}")
        shared = _shared(benchmark, network, benchmark.options.fold, seed)
        row, cases = dict.fromkeys(ROW_COLUMNS, "") | shared | {"error": fault}, []
    record(benchmark.csv, row, cases)
    return row


def _result(benchmark: _Benchmark, network: str, seed: int) -> tuple[Row, list[Row]]:
    """The rows of a training: of an earlier call, or made now."""
    options = benchmark.options
    run = benchmark.pipeline.folder / "runs" / f"{network}-fold{options.fold}-seed{seed}-{benchmark.slug}"
    path = run / _RESULT_NAME
    rate = _learning_rate(benchmark, network)
    if not path.exists():
        steps = options.budget.num_steps(benchmark.calibration.step_seconds.get(network))
        training = Training(network, options.fold, seed, steps, rate)
        benchmark.progress.message(f"{network}, seed {seed}: {steps} steps at {training.learning_rate:g}")
        trained = train_network(benchmark.pipeline, training, run, benchmark.progress)
        row, cases = _rows(benchmark, training, trained)
        write_atomically(path, (json.dumps({"row": row, "cases": cases}, indent=1) + "\n").encode())
        RunFolder(run).state.unlink(missing_ok=True)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return dict(found["row"]), list(found["cases"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileError(f"{path} is damaged: {error!r}; delete it and its folder, and start again") from error


def _learning_rate(benchmark: _Benchmark, network: str) -> float:
    """The rate that wins on the choosing fold; the first one where they are equal.

    Raises:
        TrainingError: Training broke down with each.
    """
    path = benchmark.pipeline.folder / "choices" / f"{network}-{benchmark.slug}.json"
    if not path.exists():
        tried = [_try_rate(benchmark, network, rate) for rate in LEARNING_RATES]
        if all(row["error"] for row in tried):
            raise TrainingError(tried[0]["error"])
        best = max(tried, key=lambda row: float(row["dice"] or "-inf"))
        rows = [row | {"chosen": "yes" if row is best else "no"} for row in tried]
        write_atomically(path, (json.dumps(rows, indent=1) + "\n").encode())
        for rate in LEARNING_RATES:
            RunFolder(_choosing_run(benchmark, network, rate)).state.unlink(missing_ok=True)
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        chosen = next(float(row["learning_rate"]) for row in rows if row["chosen"] == "yes")
    except (OSError, ValueError, KeyError, TypeError, StopIteration) as error:
        raise FileError(f"{path} is damaged: {error!r}; delete it, and start again") from error
    append_missing(_choices_path(benchmark.csv), CHOICE_COLUMNS, rows)
    return chosen


def _try_rate(benchmark: _Benchmark, network: str, rate: float) -> Row:
    options = benchmark.options
    steps = options.budget.num_choosing_steps(benchmark.calibration.step_seconds.get(network))
    training = Training(network, options.choosing_fold, _CHOOSING_SEED, steps, rate)
    benchmark.progress.message(f"{network}: trying learning rate {rate:g} for {steps} steps")
    found = {"steps": str(steps), "learning_rate": f"{rate:g}", "dice": "", "chosen": "", "error": ""}
    try:
        run = _choosing_run(benchmark, network, rate)
        trained = train_network(benchmark.pipeline, training, run, benchmark.progress)
        dice = mean_interval(case_means(_scores(trained.result.evaluation, _CHOOSING_SEED))).mean
        found["dice"] = "" if math.isnan(dice) else f"{dice:.6f}"
    except FAULTS as error:
        found["error"] = network_fault(error)
    return _shared(benchmark, network, options.choosing_fold, _CHOOSING_SEED) | found


def _choosing_run(benchmark: _Benchmark, network: str, rate: float) -> Path:
    return benchmark.pipeline.folder / "choosing" / f"{network}-rate{rate:g}-{benchmark.slug}"


def _rows(benchmark: _Benchmark, training: Training, trained: Trained) -> tuple[Row, list[Row]]:
    evaluation = trained.result.evaluation
    shared = _shared(benchmark, training.network, training.fold, training.seed)
    scores = _scores(evaluation, training.seed)
    means = case_means(scores)
    dice, summaries = mean_interval(means), evaluation.summaries
    hd95_mm, nsd = (_mean([each.intervals[name].mean for each in summaries]) for name in ("hd95_mm", "nsd"))
    failed = len(evaluation.missing_predictions)
    row = dict.fromkeys(ROW_COLUMNS, "") | shared
    row |= {
        "parameters_m": f"{trained.num_parameters / 1e6:.2f}",
        "steps": str(trained.result.steps),
        "learning_rate": f"{training.learning_rate:g}",
        "n": str(len(means)),
        "dice": f"{dice.mean:.4f}",
        "dice_low": f"{dice.low:.4f}",
        "dice_high": f"{dice.high:.4f}",
        "dice_labels": ";".join(f"{each.label.name}={each.intervals['dice'].mean:.4f}" for each in summaries),
        "hd95_mm": f"{hd95_mm:.3f}",
        "nsd_1mm": f"{nsd:.4f}",
        "missed": str(sum(each.n_missed for each in summaries)),
        "train_s": f"{trained.seconds:.0f}",
        "error": f"cases that could not be segmented and count as missed: {failed}" if failed else "",
    }
    key = {name: row[name] for name in KEY_COLUMNS}
    cases = [
        key | {"case": score.case, "label": score.label, "dice": "" if math.isnan(score.dice) else f"{score.dice:.6f}"}
        for score in scores
    ]
    return row, cases


def _shared(benchmark: _Benchmark, network: str, fold: int, seed: int) -> Row:
    return {
        "date": datetime.now(tz=UTC).date().isoformat(),
        "commit": benchmark.commit,
        "dataset": benchmark.pipeline.dataset.root.resolve().name,
        "network": network,
        "fold": str(fold),
        "seed": str(seed),
        "budget": benchmark.options.budget.text,
        "threads": str(benchmark.pipeline.threads),
        "precision": precision(benchmark.pipeline.device),
        "device": device_name(benchmark.pipeline.device),
    }


def _scores(evaluation: Evaluation, seed: int) -> list[CaseScore]:
    return [CaseScore(seed, row.case_id, row.label.name, row.score.dice) for row in evaluation.rows]


def _mean(values: Sequence[float]) -> float:
    present = [value for value in values if not math.isnan(value)]
    return math.fsum(present) / len(present) if present else math.nan


def _choices_path(csv: Path) -> Path:
    return csv.with_name("choices.csv")


def _table(csv: Path, rows: Sequence[Row]) -> str:
    """The table of all rows that belong beside those of this call."""
    wanted = {tuple(row[name] for name in ("dataset", "fold", "budget")) for row in rows}
    found = [row for row in read_rows(csv, ROW_COLUMNS) if (row["dataset"], row["fold"], row["budget"]) in wanted]
    return accuracy_table(found, read_rows(cases_path(csv), CASE_COLUMNS))
