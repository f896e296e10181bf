from __future__ import annotations

import csv
import json
import math
import re
import threading
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from phantoms import write_msd
from tokenseg.benchmark.accuracy import calibration
from tokenseg.benchmark.accuracy import run as accuracy
from tokenseg.benchmark.accuracy.budget import AccuracyOptions, Budget
from tokenseg.benchmark.accuracy.calibration import calibrate
from tokenseg.benchmark.accuracy.pipeline import Pipeline, Trained, Training, open_pipeline, prepare
from tokenseg.benchmark.accuracy.run import benchmark_accuracy
from tokenseg.benchmark.accuracy.table import accuracy_table
from tokenseg.benchmark.rows import (
    CASE_COLUMNS,
    CHOICE_COLUMNS,
    KEY_COLUMNS,
    ROW_COLUMNS,
    cases_path,
    read_rows,
    record,
)
from tokenseg.cli import main
from tokenseg.config import Label
from tokenseg.errors import ConfigError, FileError, TrainingError
from tokenseg.evaluation.lesions import LesionCounts
from tokenseg.evaluation.metrics import Interval, score_label
from tokenseg.evaluation.results import CaseLabelRow, Evaluation, LabelSummary
from tokenseg.progress import Progress, Silent
from tokenseg.training.loop import Fit
from tokenseg.training.train import TrainResult

# MONAI UNet cannot take this window: its deepest level is a single voxel, which instance norm refuses.
TINY_CONFIG = """
[plan]
window_vox = [16, 16, 16]
batch_size = 2
[network]
widths = [8, 12, 16, 24]
blocks = [1, 1, 1, 1]
token_width = 32
codebook_size = 64
mixer_layers = 1
"""
NETWORKS = ("tokenseg", "monai-unet", "tokenseg-no-tokens")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:monai")

ROW = dict.fromkeys(ROW_COLUMNS, "") | {
    "date": "2026-01-01", "commit": "abc", "dataset": "Phantom", "fold": "1", "seed": "0", "budget": "4 steps",
    "threads": "1", "precision": "fp32", "device": "cpu",
}  # fmt: skip


class Told(Silent):
    """Keeps messages; breaks off at a message, or at the second unit of the stage that follows it."""

    def __init__(self, break_at: str = "", *, stage: str = "") -> None:
        self.messages: list[str] = []
        self._break_at, self._stage, self._current, self._done = break_at, stage, "", 0

    def stage(self, name: str, total: int, done: int = 0) -> None:
        self._current, self._done = name, 0

    def advance(self, note: str = "") -> None:
        self._done += 1
        if self._stage and self._current == self._stage and self._done == 2 and self._armed():
            raise KeyboardInterrupt

    def message(self, text: str) -> None:
        self.messages.append(text)
        if not self._stage and self._armed():
            raise KeyboardInterrupt

    def _armed(self) -> bool:
        return bool(self._break_at) and any(self._break_at in text for text in self.messages)


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_msd(
        tmp_path_factory.mktemp("dataset") / "Phantom", 7, shape=(20, 20, 16), labels={1: "rim", 2: "core"}
    )


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> AccuracyOptions:
    path = tmp_path_factory.mktemp("config") / "config.toml"
    path.write_text(TINY_CONFIG)
    return AccuracyOptions(networks=NETWORKS, steps=4, config=path)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, dataset: Path, options: AccuracyOptions) -> Path:
    """A benchmark that nothing interrupted."""
    folder = tmp_path_factory.mktemp("benchmark") / "straight"
    benchmark_accuracy(dataset, folder, options)
    return folder


def rows_of(folder: Path) -> list[dict[str, str]]:
    return read_rows(folder / "accuracy.csv", ROW_COLUMNS)


def cases_of(folder: Path) -> list[dict[str, str]]:
    return read_rows(folder / "accuracy_cases.csv", CASE_COLUMNS)


def choices_of(folder: Path) -> list[dict[str, str]]:
    return read_rows(folder / "choices.csv", CHOICE_COLUMNS)


def without_time(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return [row | {"train_s": "", "date": "", "commit": ""} for row in rows]


def number_of_steps(run: Path) -> int:
    with (run / "log.csv").open() as file:
        return len(list(csv.DictReader(file)))


# A whole benchmark


def test_each_network_has_a_row_and_the_figures_are_those_of_its_run(straight: Path) -> None:
    rows = rows_of(straight)
    assert [row["network"] for row in rows] == list(NETWORKS)
    for row in (rows[0], rows[2]):
        run = straight / "runs" / f"{row['network']}-fold1-seed0-4-steps"
        with (run / "validation" / "scores.csv").open() as file:
            scores = list(csv.DictReader(file))
        by_case: dict[str, list[float]] = {}
        for score in scores:
            by_case.setdefault(score["case"], []).append(float(score["dice"]))
        assert float(row["dice"]) == pytest.approx(np.mean([np.mean(d) for d in by_case.values()]), abs=1e-4)
        assert float(row["dice_low"]) <= float(row["dice"]) <= float(row["dice_high"])
        labels = dict(part.split("=") for part in row["dice_labels"].split(";"))
        for label, text in labels.items():
            values = [float(score["dice"]) for score in scores if score["label"] == label]
            assert float(text) == pytest.approx(np.mean(values), abs=1e-4)
        assert set(labels) == {"rim", "core"}
        assert int(row["missed"]) == sum(score["status"] == "missed" for score in scores)
        assert float(row["hd95_mm"]) == pytest.approx(np.mean([float(s["hd95_mm"]) for s in scores]), abs=1e-3)
        assert int(row["n"]) == len(by_case)
        held_out = json.loads((run / "splits.json").read_text())[1]["val"]
        assert set(by_case) == set(held_out)
        assert (row["steps"], row["fold"], row["budget"], row["threads"]) == ("4", "1", "4 steps", "1")
        assert number_of_steps(run) == 4
        written = [case for case in cases_of(straight) if case["network"] == row["network"]]
        assert [(case["case"], case["label"]) for case in written] == [(s["case"], s["label"]) for s in scores]
        assert [float(case["dice"]) for case in written] == pytest.approx([float(s["dice"]) for s in scores], abs=1e-6)


def test_runs_differ_in_network_and_learning_rate_alone(straight: Path) -> None:
    configs = {}
    for row in rows_of(straight):
        if row["dice"]:
            path = straight / "runs" / f"{row['network']}-fold1-seed0-4-steps" / "config.toml"
            configs[row["network"]] = tomllib.loads(path.read_text())
            assert configs[row["network"]]["train"].pop("learning_rate") == float(row["learning_rate"])
    ours, variant = configs["tokenseg"], configs["tokenseg-no-tokens"]
    assert (ours["plan"], ours["train"]) == (variant["plan"], variant["train"])
    assert ours["plan"]["window_vox"] == [16, 16, 16]
    assert ours["network"] | {"tokens": False} == variant["network"]
    assert ours["network"]["tokens"]


def test_the_learning_rate_is_chosen_on_the_choosing_fold_by_a_quarter_of_the_steps(straight: Path) -> None:
    choices = [row for row in choices_of(straight) if row["network"] == "tokenseg"]
    assert [(row["learning_rate"], row["fold"], row["steps"]) for row in choices] == [
        ("0.002", "0", "1"), ("0.0005", "0", "1"),
    ]  # fmt: skip
    best = max(choices, key=lambda row: float(row["dice"]))
    assert [row["chosen"] for row in choices] == ["yes" if row is best else "no" for row in choices]
    assert rows_of(straight)[0]["learning_rate"] == best["learning_rate"]
    for row in choices:
        run = straight / "choosing" / f"tokenseg-rate{row['learning_rate']}-4-steps"
        scores = json.loads((run / "validation" / "scores.json").read_text())
        dice = [metrics["dice"] for case in scores["metric_per_case"] for metrics in case["metrics"].values()]
        assert float(row["dice"]) == pytest.approx(np.mean(dice), abs=1e-6)
        held_out = json.loads((run / "splits.json").read_text())[0]["val"]
        assert [case["case"] for case in scores["metric_per_case"]] == held_out


def test_a_network_that_fails_has_a_row_that_says_why_and_the_others_go_on(straight: Path) -> None:
    row = rows_of(straight)[1]
    assert row["error"].startswith("Expected more than 1 spatial element")
    assert (row["dice"], row["steps"]) == ("", "")
    table = accuracy_table(rows_of(straight), cases_of(straight))
    assert "| monai-unet | failed: Expected more than 1 spatial element" in table
    assert "Phantom, fold 1 (2 cases), 4 steps, 1 thread, cpu" in table


def test_again_nothing_is_trained_and_no_row_is_written_twice(
    straight: Path, dataset: Path, options: AccuracyOptions
) -> None:
    files = [*straight.glob("*.csv"), *straight.glob("runs/*/log.csv"), *straight.glob("choosing/*/log.csv")]
    trained = [path for path in files if "monai-unet" not in str(path)]
    before = {path: path.read_bytes() for path in trained}
    times = {path: path.stat().st_mtime_ns for path in trained if path.name == "log.csv"}
    result = benchmark_accuracy(dataset, straight, options)
    assert {path: path.read_bytes() for path in trained} == before
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert list(result.rows) == rows_of(straight)


def test_an_interrupted_benchmark_comes_to_the_same_rows(
    straight: Path, dataset: Path, options: AccuracyOptions, tmp_path: Path
) -> None:
    pair = replace(options, networks=("tokenseg", "tokenseg-no-tokens"))
    folder = tmp_path / "out"
    for told in (
        Told("tokenseg-no-tokens: trying learning rate 0.0005"),
        Told("tokenseg-no-tokens, seed 0", stage="training"),
        Told("tokenseg-no-tokens, seed 0", stage="segmenting"),
    ):
        with pytest.raises(KeyboardInterrupt):
            benchmark_accuracy(dataset, folder, pair, told)
        assert [row["network"] for row in rows_of(folder)] == ["tokenseg"]
    benchmark_accuracy(dataset, folder, pair)
    expected = [row for row in rows_of(straight) if row["network"] != "monai-unet"]
    assert without_time(rows_of(folder)) == without_time(expected)
    assert cases_of(folder) == cases_of(straight)
    chosen = [row for row in choices_of(straight) if row["network"] != "monai-unet"]
    assert without_time(choices_of(folder)) == without_time(chosen)


def test_a_row_that_a_kill_kept_from_the_file_is_written_by_the_next_call(
    straight: Path, dataset: Path, options: AccuracyOptions, tmp_path: Path
) -> None:
    elsewhere = replace(options, networks=("tokenseg",), csv=tmp_path / "rows.csv")
    benchmark_accuracy(dataset, straight, elsewhere)
    assert read_rows(tmp_path / "rows.csv", ROW_COLUMNS) == rows_of(straight)[:1]
    assert len(read_rows(tmp_path / "rows_cases.csv", CASE_COLUMNS)) == 4
    assert len(read_rows(tmp_path / "choices.csv", CHOICE_COLUMNS)) == 2


def test_the_command_times_the_networks_and_prints_the_table(
    dataset: Path, options: AccuracyOptions, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["benchmark", "accuracy", str(dataset), str(tmp_path / "out"), "--minutes", "0.003", "--networks"]
    assert main([*arguments, "tokenseg", "--seeds", "0", "1", "--config", str(options.config)]) == 0
    printed = capsys.readouterr().out
    rows = rows_of(tmp_path / "out")
    seconds = json.loads((tmp_path / "out" / "calibration.json").read_text())["reference_seconds"]
    assert [(row["seed"], row["steps"]) for row in rows] == [
        (seed, str(max(1, int(0.18 / seconds)))) for seed in ("0", "1")
    ]
    assert rows[0]["dice"] != rows[1]["dice"]
    mean = (float(rows[0]["dice"]) + float(rows[1]["dice"])) / 2
    shown = re.search(r"\| 2 \| (\d\.\d+) \(", printed)
    assert shown is not None
    assert float(shown[1]) == pytest.approx(mean, abs=2e-4)
    assert "0.003 minutes, 1 thread" in printed
    assert main([*arguments, "monai-unet", "--config", str(options.config)]) == 1
    assert "failed: Expected more than 1 spatial element" in capsys.readouterr().out
    assert rows_of(tmp_path / "out")[2]["error"]


# What is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"networks": ("tokenseg", "unet")}, r"--networks unet: no such network; choose from tokenseg, .*monai-unet"),
        ({"networks": ()}, r"--networks \(nothing\): give one or several, each once"),
        ({"networks": ("tokenseg", "tokenseg")}, r"--networks tokenseg tokenseg: give one or several, each once"),
        ({"seeds": (0, 0)}, r"--seeds 0 0: give one or several"),
        ({"seeds": (-1,)}, r"--seeds -1: must be at least 0"),
        ({"minutes": 5.0}, r"--minutes and --steps are both given; give one of them"),
        ({"steps": None, "minutes": 0.0}, r"--minutes 0.0: must be above 0"),
        ({"steps": 0}, r"--steps 0: must be at least 1"),
        ({"threads": 0}, r"--threads 0: must be at least 1"),
        ({"fold": 5}, r"--fold 5: the dataset has folds 0 to 4"),
        ({"choosing_fold": 7}, r"--choosing-fold 7: the dataset has folds 0 to 4"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    dataset: Path, options: AccuracyOptions, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        benchmark_accuracy(dataset, tmp_path / "out", replace(options, **change))


def test_results_of_other_settings_are_not_mixed(straight: Path, dataset: Path, options: AccuracyOptions) -> None:
    with pytest.raises(ConfigError, match=r"holds a benchmark with threads 1, now threads is 2; give the same"):
        benchmark_accuracy(dataset, straight, replace(options, threads=2))
    with pytest.raises(ConfigError, match=r"holds a benchmark with config \{'plan'"):
        benchmark_accuracy(dataset, straight, replace(options, config=None))


def test_a_folder_of_the_user_is_not_written_to(dataset: Path, options: AccuracyOptions, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds files that are not of a benchmark: notes.txt; name a new or empty"):
        benchmark_accuracy(dataset, tmp_path, options)
    assert {path.name for path in tmp_path.iterdir()} <= {"notes.txt", ".lock"}


def test_a_file_with_other_columns_is_not_appended_to(dataset: Path, options: AccuracyOptions, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match=r"rows.csv has other columns than this benchmark writes; name another file"):
        benchmark_accuracy(dataset, tmp_path / "out", replace(options, csv=path))
    path.write_bytes(b"\xff\xfe\n")
    with pytest.raises(FileError, match=r"rows.csv is not text; name another file"):
        benchmark_accuracy(dataset, tmp_path / "out", replace(options, csv=path))


@pytest.mark.parametrize("name", ["benchmark.json", "calibration.json"])
def test_a_damaged_file_of_the_benchmark_is_named(
    dataset: Path, options: AccuracyOptions, tmp_path: Path, name: str
) -> None:
    (tmp_path / "benchmark.json").write_text(
        json.dumps(
            {"dataset": "Phantom", "cases": 7, "threads": 1, "choosing_fold": 0}
            | {"config": tomllib.loads(TINY_CONFIG)}
        )
    )
    (tmp_path / name).write_text("[]")
    with pytest.raises(FileError, match=rf"{name} is damaged: .*; start again in a new folder"):
        benchmark_accuracy(dataset, tmp_path, replace(options, steps=None, minutes=0.01))


@pytest.mark.parametrize("kind", ["result", "choice"])
def test_a_damaged_result_is_named(
    dataset: Path, options: AccuracyOptions, tmp_path: Path, fake: dict[float, object], kind: str
) -> None:
    fake |= {2e-3: 0.6, 5e-4: 0.5}
    one = replace(options, networks=("tokenseg",))
    benchmark_accuracy(dataset, tmp_path / "out", one)
    path = tmp_path / "out" / "runs" / "tokenseg-fold1-seed0-4-steps" / "result.json"
    if kind == "choice":
        path.unlink()
        path = tmp_path / "out" / "choices" / "tokenseg-4-steps.json"
    path.write_text("{}")
    with pytest.raises(FileError, match=rf"{path.name} is damaged: .*; delete it"):
        benchmark_accuracy(dataset, tmp_path / "out", one)


# Budgets and step times


def test_a_time_becomes_steps_and_a_fifth_of_it_chooses_for_three_minutes_at_most() -> None:
    assert Budget(minutes=15.0).num_steps(0.3) == 3000
    assert Budget(minutes=15.0).num_choosing_steps(0.3) == 600
    assert Budget(minutes=25.0).num_choosing_steps(0.3) == 600
    assert Budget(minutes=5.0).num_choosing_steps(0.3) == 200
    assert Budget(minutes=15.0).num_choosing_steps(1000.0) == 1
    assert (Budget(steps=600).num_steps(None), Budget(steps=600).num_choosing_steps(None)) == (600, 150)
    assert [Budget(minutes=7.5).text, Budget(steps=600).text] == ["7.5 minutes", "600 steps"]
    assert AccuracyOptions().budget == Budget(minutes=15.0)
    with pytest.raises(ConfigError, match="a budget in minutes needs the time of a step"):
        Budget(minutes=15.0).num_steps(None)


@pytest.fixture(scope="module")
def fit(dataset: Path, options: AccuracyOptions, tmp_path_factory: pytest.TempPathFactory) -> Fit:
    folder, progress = tmp_path_factory.mktemp("fit"), Told()
    return prepare(open_pipeline(dataset, folder, options, progress), 0, progress)


class Timed(nn.Module):
    """A network that says its name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name


def calibrate_with(
    fit: Fit, path: Path, durations: dict[str, list[float]]
) -> tuple[calibration.Calibration, list[str]]:
    """Calibrate where each timing of a network takes the next of its durations; also gives the order of the timings.

    A network whose durations run out fails.
    """
    order: list[str] = []

    def measure(_: Fit, network: Timed) -> float:
        order.append(network.name)
        if not durations[network.name]:
            raise MemoryError("it does not fit\nat all")
        return durations[network.name].pop(0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "measure_step_seconds", measure)
        builders = {name: partial(Timed, name) for name in durations}
        return calibrate(fit, builders, path), order


def test_step_times_are_medians_of_rounds_in_turn(fit: Fit, tmp_path: Path) -> None:
    durations = {"tokenseg": [0.1, 0.1, 9.0], "a": [3.0, 0.2, 0.3], "b": [0.4, 0.4, 0.4]}
    found, order = calibrate_with(fit, tmp_path / "calibration.json", durations)
    assert order == ["tokenseg", "a", "b"] * 3
    assert found.step_seconds == pytest.approx({"tokenseg": 0.1, "a": 0.3, "b": 0.4})
    assert found.errors == {}


def test_a_network_added_later_is_measured_as_a_ratio_to_the_reference(fit: Fit, tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    calibrate_with(fit, path, {"tokenseg": [0.1] * 3, "a": [0.3] * 3})
    # The machine is half as fast now: b takes four times the reference.
    found, order = calibrate_with(fit, path, {"tokenseg": [0.2] * 3, "a": [9.0] * 3, "b": [0.8] * 3})
    assert order == ["tokenseg", "b"] * 3
    assert found.step_seconds == pytest.approx({"tokenseg": 0.1, "a": 0.3, "b": 0.4})
    found, order = calibrate_with(fit, path, {"tokenseg": [], "a": [], "b": []})
    assert order == []
    assert found.step_seconds == pytest.approx({"tokenseg": 0.1, "a": 0.3, "b": 0.4})


def test_a_network_that_cannot_be_timed_is_left_out_and_tried_again_later(fit: Fit, tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    found, order = calibrate_with(fit, path, {"tokenseg": [0.1] * 3, "a": [], "b": [0.5] * 3})
    assert order.count("a") == 1
    assert found.step_seconds == pytest.approx({"tokenseg": 0.1, "b": 0.5})
    assert found.errors == {"a": "it does not fit"}
    found, _ = calibrate_with(fit, path, {"tokenseg": [0.1] * 3, "a": [0.7] * 3, "b": []})
    assert found.step_seconds == pytest.approx({"tokenseg": 0.1, "a": 0.7, "b": 0.5})
    with pytest.raises(MemoryError):
        calibrate_with(fit, tmp_path / "other.json", {"tokenseg": []})


def test_unsteady_step_times_are_warned_of(fit: Fit, tmp_path: Path) -> None:
    told = Told()
    durations = {"tokenseg": [0.1, 0.11, 0.12], "a": [0.3, 0.3, 0.5]}
    calibrate_with(replace(fit, progress=told), tmp_path / "calibration.json", durations)
    assert len(told.messages) == 1
    assert told.messages[0].startswith("warning: a step of a took 0.300 to 0.500 s; other work on this machine")


# The choice of the learning rate


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> dict[float, object]:
    """Replaces training: what each learning rate comes to, a Dice or an error."""
    outcomes: dict[float, object] = {}

    def train_network(_: Pipeline, training: Training, run: Path, __: Progress) -> Trained:
        outcome = outcomes[training.learning_rate]
        if isinstance(outcome, Exception):
            raise outcome
        return trained_to(float(str(outcome)), training, run)

    monkeypatch.setattr(accuracy, "train_network", train_network)
    return outcomes


def trained_to(dice: float, training: Training, run: Path) -> Trained:
    """A training whose validation has two cases of this mean Dice; NaN where both masks are empty."""
    label = Label(name="rim", values=(1,), output_value=1)
    empty = np.zeros((2, 2, 2), dtype=bool)
    score = score_label(empty, empty, (1.0, 1.0, 1.0), 1.0)
    values = (dice - 0.1, dice + 0.1)
    rows = tuple(
        CaseLabelRow(f"case{number}", label, replace(score, dice=value), Path("reference"), None)
        for number, value in enumerate(values)
    )
    intervals = {name: Interval(dice, dice, dice) for name in ("dice", "hd95_mm", "nsd")}
    summary = LabelSummary(label, 2, 1, 0, 0, intervals, LesionCounts(0, 0, 0))
    evaluation = Evaluation(rows, (summary,), 1.0, ("case1",), (), (), ())
    return Trained(TrainResult(run, training.steps, evaluation), 5_150_000, 12.4)


@pytest.mark.parametrize(
    ("outcomes", "chosen"),
    [
        ({2e-3: 0.6, 5e-4: 0.5}, "0.002"),
        ({2e-3: 0.5, 5e-4: 0.6}, "0.0005"),
        ({2e-3: 0.5, 5e-4: 0.5}, "0.002"),
        ({2e-3: math.nan, 5e-4: 0.1}, "0.0005"),
    ],
    ids=["first", "second", "equal", "nothing was to be found"],
)
def test_the_rate_with_the_higher_dice_wins(
    dataset: Path,
    options: AccuracyOptions,
    tmp_path: Path,
    fake: dict[float, object],
    outcomes: dict[float, object],
    chosen: str,
) -> None:
    fake |= outcomes
    result = benchmark_accuracy(dataset, tmp_path / "out", replace(options, networks=("tokenseg",)))
    assert [row["learning_rate"] for row in result.rows] == [chosen]
    choices = choices_of(tmp_path / "out")
    assert {row["learning_rate"]: row["chosen"] for row in choices}[chosen] == "yes"
    assert [row["dice"] for row in choices] == ["" if math.isnan(d) else f"{d:.6f}" for d in outcomes.values()]
    row = result.rows[0]
    assert (row["dice"], row["parameters_m"], row["train_s"]) == (f"{outcomes[float(chosen)]:.4f}", "5.15", "12")
    assert row["error"] == "cases that could not be segmented and count as missed: 1"


def test_a_rate_that_breaks_down_loses(
    dataset: Path, options: AccuracyOptions, tmp_path: Path, fake: dict[float, object]
) -> None:
    fake |= {2e-3: TrainingError("the loss became nan\nlook here"), 5e-4: 0.1}
    result = benchmark_accuracy(dataset, tmp_path / "out", replace(options, networks=("tokenseg",)))
    assert result.rows[0]["learning_rate"] == "0.0005"
    assert [row["error"] for row in choices_of(tmp_path / "out")] == ["the loss became nan", ""]


def test_a_network_that_failed_is_tried_again_and_its_row_stands_once(
    dataset: Path, options: AccuracyOptions, tmp_path: Path, fake: dict[float, object]
) -> None:
    one = replace(options, networks=("tokenseg",))
    fake |= {2e-3: RuntimeError("can't allocate memory"), 5e-4: ImportError("")}
    for _ in range(2):
        result = benchmark_accuracy(dataset, tmp_path / "out", one)
        assert result.rows[0]["error"] == "can't allocate memory"
    assert len(rows_of(tmp_path / "out")) == 1
    fake |= {2e-3: 0.6, 5e-4: 0.5}
    result = benchmark_accuracy(dataset, tmp_path / "out", one)
    assert [row["dice"] for row in rows_of(tmp_path / "out")] == ["", "0.6000"]
    assert "failed" not in result.table


def test_a_full_disk_is_no_failure_of_the_network(
    dataset: Path, options: AccuracyOptions, tmp_path: Path, fake: dict[float, object]
) -> None:
    fake |= {2e-3: FileError("cannot write log.csv: No space left on device"), 5e-4: 0.5}
    with pytest.raises(FileError, match="No space left"):
        benchmark_accuracy(dataset, tmp_path / "out", options)
    assert rows_of(tmp_path / "out") == []


# Rows and tables


def row_of(network: str, dice: str = "", **values: str) -> dict[str, str]:
    measured = {"dice": dice, "parameters_m": "5.15", "steps": "4", "learning_rate": "0.002", "n": "2"}
    measured |= {"hd95_mm": "1.500", "nsd_1mm": "0.9000", "missed": "1"}
    return ROW | (measured if dice else {}) | {"network": network} | values


def cases_with(network: str, *dice: str, seed: str = "0") -> list[dict[str, str]]:
    key = {name: (ROW | {"network": network, "seed": seed})[name] for name in KEY_COLUMNS}
    return [key | {"case": f"case{number}", "label": "rim", "dice": value} for number, value in enumerate(dice)]


def test_the_table_is_made_from_the_rows() -> None:
    rows = [row_of("tokenseg", "0.1000"), row_of("worse", error="out of memory"), row_of("tokenseg", "0.6500")]
    rows += [row_of("unet", "0.8", steps="9", hd95_mm="2.000"), row_of("unet", "0.6", seed="1", learning_rate="0.0005")]
    cases = [*cases_with("tokenseg", "0.1", "0.1"), *cases_with("tokenseg", "0.600000", "0.700000", "")]
    cases += [*cases_with("unet", "0.70", "0.80"), *cases_with("unet", "0.60", "0.70", seed="1")]
    assert accuracy_table(rows, cases).splitlines() == [
        "Phantom, fold 1 (2 cases), 4 steps, 1 thread, cpu, fp32:",
        "",
        "| network | parameters | steps | learning rate | seeds | Dice (95 % interval) "
        "| less tokenseg, points (95 % interval) | HD95 | NSD 1 mm | missed |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| unet | 5.15 M | 9, 4 | 0.002, 0.0005 | 2 | 0.7000 (0.6500 to 0.7500) | +5.00 (+5.00 to +5.00) "
        "| 1.75 mm | 0.9000 | 2 |",
        "| tokenseg | 5.15 M | 4 | 0.002 | 1 | 0.6500 (0.6000 to 0.7000) |  | 1.50 mm | 0.9000 | 1 |",
        "| worse | failed: out of memory |  |  |  |  |  |  |  |  |",
    ]


def test_other_folds_and_budgets_have_tables_of_their_own() -> None:
    rows = [row_of("unet", "0.5"), row_of("unet", "0.5", fold="2", threads="2"), row_of("unet", error="gone", fold="3")]
    tables = accuracy_table(rows, cases_with("unet", "0.5")).split("\n\n")
    titles = [text for text in tables if text.startswith("Phantom")]
    assert [title.split(",")[1:4] for title in titles] == [
        [" fold 1 (1 cases)", " 4 steps", " 1 thread"],
        [" fold 2 (0 cases)", " 4 steps", " 2 threads"],
        [" fold 3 (0 cases)", " 4 steps", " 1 thread"],
    ]


def test_a_row_that_a_kill_cut_short_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    first, second = row_of("tokenseg", "0.5"), row_of("unet", "0.6")
    record(path, first, cases_with("tokenseg", "0.5"))
    path.write_bytes(path.read_bytes() + b"2026-01-01,abc,Phan")
    assert read_rows(path, ROW_COLUMNS) == [first]
    record(path, second, cases_with("unet", "0.6"))
    assert read_rows(path, ROW_COLUMNS) == [first, second]
    assert len(read_rows(cases_path(path), CASE_COLUMNS)) == 2


def test_many_writers_lose_no_row_and_write_one_header(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"

    def write(writer: int) -> None:
        for seed in range(10):
            record(path, row_of(f"network{writer}", "0.5", seed=str(seed)), cases_with("a", "0.5"))

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rows = read_rows(path, ROW_COLUMNS)
    assert {(row["network"], row["seed"]) for row in rows} == {
        (f"network{w}", str(s)) for w in range(6) for s in range(10)
    }
    assert len(rows) == 60
    assert path.read_text().count("network,") == 1
