from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from golden.regenerate import COLUMNS, CURVE, NUM_STEPS, train_shortly
from phantoms import phantom, write_json, write_mamamia, write_msd, write_nifti, write_nnunet
from tokenseg.config import NetworkConfig, Plan, TrainConfig
from tokenseg.errors import ConfigError, DataError, FileError, GeometryError, TokenSegError, TrainingError
from tokenseg.model.network import TokenSeg, TokenSegOutput
from tokenseg.options import TrainOptions
from tokenseg.progress import Silent
from tokenseg.saved_model.checkpoint import load_model
from tokenseg.training import loop
from tokenseg.training.csv_log import read_log
from tokenseg.training.train import train

SHAPE = (20, 20, 16)
OPTIONS = TrainOptions(preset="tiny", max_steps=6, device="cpu", threads=1)
RESUME = replace(OPTIONS, resume=True, max_steps=None)


class Told(Silent):
    """Keeps messages; can be told to break off when a stage begins or a number of units is done in it."""

    def __init__(self, break_at: str = "", after: int = 0) -> None:
        self.messages: list[str] = []
        self.stages: list[tuple[str, int, int]] = []
        self._break_at, self._left = break_at, after

    def stage(self, name: str, total: int, done: int = 0) -> None:
        self.stages.append((name, total, done))
        self._break_off()

    def advance(self, note: str = "") -> None:
        self._left -= self.stages[-1][0] == self._break_at
        self._break_off()

    def message(self, text: str) -> None:
        self.messages.append(text)

    def _break_off(self) -> None:
        if self.stages[-1][0] == self._break_at and self._left <= 0:
            raise KeyboardInterrupt


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_msd(tmp_path_factory.mktemp("dataset") / "Phantom", 5, shape=SHAPE)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "config.toml"
    path.write_text("[plan]\nwindow_vox = [16, 16, 16]\nbatch_size = 2\n")
    return path


@pytest.fixture
def options(config: Path) -> TrainOptions:
    return replace(OPTIONS, config=config)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, dataset: Path, config: Path) -> Path:
    """A run of 12 steps that nothing interrupted."""
    run = tmp_path_factory.mktemp("runs") / "straight"
    train(dataset, run, replace(OPTIONS, config=config, max_steps=12))
    return run


def interrupted(dataset: Path, run: Path, options: TrainOptions, stage: str, after: int = 0) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(dataset, run, options, Told(stage, after))


def losses(run: Path) -> list[str]:
    return [row["loss"] for row in read_log(run / "log.csv")]


def weights(run: Path) -> bytes:
    return (run / "model" / "weights.safetensors").read_bytes()


def tensors_are_finite(path: Path) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in load_file(path).values())


# The run folder


def test_the_run_folder_holds_what_is_promised(straight: Path) -> None:
    # TensorBoard is an extra.
    assert {path.name for path in straight.iterdir()} - {"tensorboard"} == {
        "config.toml", "run.json", "fingerprint.json", "splits.json", "cache", "log.csv", "state.safetensors",
        "report.html", "model", "validation",
    }  # fmt: skip
    assert {path.name for path in (straight / "model").iterdir()} == {"weights.safetensors", "model.json", "README.md"}
    held_out = json.loads((straight / "splits.json").read_text())[0]["val"]
    assert {path.name for path in (straight / "validation").iterdir()} == {
        *(f"{case_id}{ending}" for case_id in held_out for ending in (".nii.gz", "_qc.json")),
        "manifest.json", "summary.csv", "status.jsonl", "scores.json", "scores.csv",
    }  # fmt: skip
    facts = json.loads((straight / "run.json").read_text())
    assert {key: facts[key] for key in ("dataset", "preset", "fold", "seed", "total_steps", "threads")} == {
        "dataset": "Phantom", "preset": "tiny", "fold": 0, "seed": 0, "total_steps": 12, "threads": 1,
    }  # fmt: skip
    assert [int(row["step"]) for row in read_log(straight / "log.csv")] == list(range(1, 13))


def test_no_file_of_a_run_is_a_pickle(dataset: Path, options: TrainOptions, tmp_path: Path) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("something was pickled")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "save", forbidden)
        patch.setattr("pickle.dump", forbidden)
        patch.setattr("pickle.dumps", forbidden)
        train(dataset, tmp_path / "run", options)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    boards = [path for path in files if path.name.startswith("events.out.tfevents")]
    assert [path.parent.name for path in boards] == ["tensorboard"]
    files.remove(boards[0])
    named = [path for path in files if not path.name.startswith("events.out.tfevents.")]
    assert {"".join(path.suffixes) for path in named} == {
        ".json", ".jsonl", ".csv", ".toml", ".npy", ".safetensors", ".md", ".html", ".nii.gz",
    }  # fmt: skip
    assert not [path for path in files if path.read_bytes()[:2] in (b"\x80\x02", b"\x80\x04", b"\x80\x05", b"PK")]
    for path in files:
        if path.suffix == ".npy":
            np.load(path, allow_pickle=False)


def test_the_model_knows_its_training(straight: Path) -> None:
    facts = load_model(straight).facts
    assert facts.name == "Phantom"
    assert facts.plan.window_vox == (16, 16, 16)
    assert {key: facts.training[key] for key in ("training_cases", "validation_cases", "fold", "seed", "steps")} == {
        "training_cases": 4, "validation_cases": 1, "fold": 0, "seed": 0, "steps": 12,
    }  # fmt: skip
    assert "(" in facts.training["validation_dice_sphere"]


def test_the_model_knows_what_its_training_scans_were_like(
    dataset: Path, options: TrainOptions, tmp_path: Path
) -> None:
    # Facts are of the cases of the fold's training part: the held-out case is larger.
    data = Path(shutil.copytree(dataset, tmp_path / "data"))
    run = tmp_path / "run"
    train(data, run, replace(options, max_steps=1))
    (held_out,) = json.loads((run / "splits.json").read_text())[0]["val"]
    for folder, array in zip(("imagesTr", "labelsTr"), phantom(9, shape=(30, 30, 24)), strict=True):
        write_nifti(data / folder / f"{held_out}.nii.gz", array.reshape(30, 30, 24))
    shutil.rmtree(run)
    train(data, run, replace(options, max_steps=1))
    inputs = load_model(run).facts.inputs
    assert inputs is not None
    assert inputs.extent_mm == ((20, 20), (20, 20), (16, 16))
    assert inputs.spacing_mm == ((1, 1), (1, 1), (1, 1))
    assert [channel.name for channel in inputs.channels] == ["MRI"]
    # A resumed run says the same; one whose fingerprint is of another version goes on and says nothing.
    train(data, run, replace(RESUME, max_steps=2))
    assert load_model(run).facts.inputs == inputs
    (run / "fingerprint.json").write_text('{"cases": "other"}')
    train(data, run, replace(RESUME, max_steps=3))
    assert load_model(run).facts.inputs is None


def test_a_dataset_named_by_a_dot_keeps_its_name(
    dataset: Path, options: TrainOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(dataset)
    train(Path(), tmp_path / "run", replace(options, max_steps=1))
    assert load_model(tmp_path / "run").facts.name == "Phantom"


def test_the_result_is_the_score_of_the_held_out_cases(dataset: Path, options: TrainOptions, tmp_path: Path) -> None:
    told = Told()
    result = train(dataset, tmp_path / "run", replace(options, fold=2), told)
    held_out = json.loads((tmp_path / "run" / "splits.json").read_text())[2]["val"]
    assert (result.run, result.steps) == (tmp_path / "run", 6)
    assert [row.case_id for row in result.evaluation.rows] == held_out
    with (tmp_path / "run" / "validation" / "scores.csv").open() as file:
        assert [row["case"] if "case" in row else row["case_id"] for row in csv.DictReader(file)] == held_out
    mask = nib.load(tmp_path / "run" / "validation" / f"{held_out[0]}.nii.gz")
    assert mask.shape == SHAPE
    # What happened, in order.
    assert [stage[0] for stage in told.stages] == ["reading", "preparing", "training", "calibrating", "segmenting"]
    assert told.messages[0].startswith("Medical Segmentation Decathlon")
    assert any(text.startswith("plan: spacing_mm: median of 5 cases") for text in told.messages)


def test_what_shows_only_across_cases_is_said_before_the_training(
    dataset: Path, options: TrainOptions, tmp_path: Path
) -> None:
    twice = tmp_path / "twice"
    shutil.copytree(dataset, twice)
    shutil.copy(twice / "imagesTr" / "case_001.nii.gz", twice / "imagesTr" / "case_003.nii.gz")
    image = nib.load(twice / "imagesTr" / "case_004.nii.gz")
    affine = image.affine @ np.diag([5, 5, 5, 1])
    for folder in ("imagesTr", "labelsTr"):
        values = np.asanyarray(nib.load(twice / folder / "case_004.nii.gz").dataobj)
        nib.save(nib.Nifti1Image(values, affine), twice / folder / "case_004.nii.gz")
    told = Told("training", 1)
    with pytest.raises(KeyboardInterrupt):
        train(twice, tmp_path / "run", options, told)
    warnings = [text for text in told.messages if text.startswith("warning: ")]
    assert len(warnings) == 2
    assert warnings[0].startswith("warning: case_001: the same image as in case_003; keep one")
    assert warnings[1].startswith("warning: case_004: voxels of 5 x 5 x 5 mm, in the median case 1 x 1 x 1")


def test_all_cases_can_be_trained_on(dataset: Path, options: TrainOptions, tmp_path: Path) -> None:
    told = Told()
    result = train(dataset, tmp_path / "run", replace(options, fold="all", max_steps=1), told)
    assert result.evaluation.summaries[0].n == 5
    assert any(
        text.startswith("note: --fold all: the validation cases are the training cases") for text in told.messages
    )
    # By cases that it was trained on no network is found too sure of itself.
    quality = load_model(result.run).facts.quality
    assert quality is not None
    assert (quality.num_cases, quality.temperature, list(quality.volumes_ml)) == (0, 1.0, ["sphere"])


def regions(root: Path) -> Path:
    labels = {"whole": [1, 2], "core": [2]}
    return write_nnunet(root, 4, shape=SHAPE, channels=("T1", "FLAIR"), labels=labels, regions_class_order=[1, 2])


def one_slice(root: Path) -> Path:
    return write_msd(root, 4, shape=(20, 20, 1), spacing_mm=(1.0, 1.0, 5.0))


def dce(root: Path) -> Path:
    return write_mamamia(root, 4, shape=SHAPE, num_phases=(3, 4))


@pytest.mark.parametrize("write", [regions, one_slice, dce])
def test_other_layouts_train(write: Callable[[Path], Path], tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("[plan]\nbatch_size = 2\n")
    options = replace(OPTIONS, config=tmp_path / "c.toml", max_steps=2)
    result = train(write(tmp_path / "data"), tmp_path / "run", options)
    assert result.evaluation.summaries[0].n == 1
    assert tensors_are_finite(tmp_path / "run" / "state.safetensors")


# Repeating and resuming


def test_the_seed_decides_the_weights(dataset: Path, options: TrainOptions, tmp_path: Path) -> None:
    torch.manual_seed(7)
    train(dataset, tmp_path / "a", options)
    torch.manual_seed(8)
    train(dataset, tmp_path / "b", options)
    train(dataset, tmp_path / "c", replace(options, seed=1))
    assert weights(tmp_path / "a") == weights(tmp_path / "b") != weights(tmp_path / "c")


def test_training_leaves_the_global_random_state_alone(dataset: Path, options: TrainOptions, tmp_path: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    train(dataset, tmp_path / "run", replace(options, max_steps=1))
    assert torch.equal(torch.rand(3), expected)


def test_the_loss_curve_is_the_committed_one_and_repeats_bit_for_bit(tmp_path: Path) -> None:
    """After a deliberate change: cd tests && python -m golden.regenerate."""
    first, second = train_shortly(tmp_path / "a"), train_shortly(tmp_path / "b")
    assert [row | {"seconds": ""} for row in first] == [row | {"seconds": ""} for row in second]
    assert weights(tmp_path / "a" / "run") == weights(tmp_path / "b" / "run")
    with CURVE.open() as file:
        committed = list(csv.DictReader(file))
    assert len(committed) == NUM_STEPS
    for name in COLUMNS:
        expected = [float(row[name]) for row in committed]
        assert [float(row[name]) for row in first] == pytest.approx(expected, rel=1e-3), name


KILLED = """
import sys, time
from pathlib import Path
from tokenseg.options import TrainOptions
from tokenseg.progress import Silent
from tokenseg.training.train import train
from tokenseg.training import loop

class Slow(Silent):
    def advance(self, note=""):
        time.sleep(0.05)

loop.SAVE_SECONDS = 0.02  # about every second step
dataset, run, config = map(Path, sys.argv[1:])
train(dataset, run, TrainOptions(preset="tiny", max_steps=12, device="cpu", threads=1, config=config), Slow())
"""


@pytest.mark.slow
def test_a_killed_run_ends_bit_identical(dataset: Path, config: Path, straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with subprocess.Popen([sys.executable, "-c", KILLED, str(dataset), str(run), str(config)]) as process:
        deadline = time.monotonic() + 120
        while not (run / "state.safetensors").exists() or len(losses(run)) < 4:
            assert process.poll() is None, "the run ended before it was killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert 4 <= len(losses(run)) < 12
    assert not (run / "model").exists()
    told = Told()
    train(dataset, run, RESUME, told)
    assert told.messages[0] == f"resuming {run}; settings are those of its config.toml"
    done = next(stage[2] for stage in told.stages if stage[0] == "training")
    assert 1 <= done < 12
    assert losses(run) == losses(straight)
    assert weights(run) == weights(straight)
    states = [load_file(folder / "state.safetensors") for folder in (run, straight)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


@pytest.mark.parametrize(
    ("stage", "after", "message"),
    [
        ("reading", 0, "nothing to resume in"),
        ("reading", 3, "nothing to resume in"),
        ("preparing", 2, "resuming"),
        ("training", 0, "resuming"),
        ("training", 5, "resuming"),
        ("training", 12, "resuming"),
        ("segmenting", 0, "resuming"),
    ],
)
def test_a_run_goes_on_from_any_stage(
    dataset: Path, options: TrainOptions, straight: Path, tmp_path: Path, stage: str, after: int, message: str
) -> None:
    run, told = tmp_path / "run", Told()
    options = replace(options, max_steps=12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "SAVE_SECONDS", 0.0)
        interrupted(dataset, run, options, stage, after)
    train(dataset, run, replace(options, resume=True), told)
    assert told.messages[0].startswith(message)
    assert ("training", 12, after if stage == "training" else 12 * (stage == "segmenting")) in told.stages
    assert losses(run) == losses(straight)
    assert weights(run) == weights(straight)


def test_what_was_asked_for_first_counts_on_resuming(dataset: Path, options: TrainOptions, tmp_path: Path) -> None:
    run = tmp_path / "run"
    interrupted(dataset, run, replace(options, fold=1, seed=3), "preparing")
    before = json.loads((run / "run.json").read_text())
    result = train(dataset, run, TrainOptions(resume=True, max_minutes=9.0, preset="paper", threads=1, device="cpu"))
    assert result.steps == 6
    assert json.loads((run / "run.json").read_text()) == before
    assert load_model(run).facts.training["fold"] == 1


def test_a_finished_run_is_extended_and_never_shortened(dataset: Path, options: TrainOptions, tmp_path: Path) -> None:
    run, told = tmp_path / "run", Told()
    train(dataset, run, replace(options, max_steps=4))
    before = read_log(run / "log.csv")
    assert train(dataset, run, replace(options, resume=True, max_steps=7), told).steps == 7
    assert "extended from 4 to 7 steps; the learning rate follows the longer schedule" in told.messages
    after = read_log(run / "log.csv")
    assert after[:4] == before
    expected = [loop.learning_rate(TrainConfig(), step, 7) for step in (4, 5, 6)]
    assert [float(row["learning_rate"]) for row in after[4:]] == pytest.approx(expected)
    assert json.loads((run / "run.json").read_text())["total_steps"] == 7
    assert load_model(run).facts.training["steps"] == 7
    with pytest.raises(ConfigError, match=r"--max-steps 5: run .*run has 7; a run can be extended, not shortened"):
        train(dataset, run, replace(options, resume=True, max_steps=5))


def test_another_number_of_threads_is_noted(dataset: Path, options: TrainOptions, tmp_path: Path) -> None:
    interrupted(dataset, tmp_path / "run", options, "training")
    path = tmp_path / "run" / "run.json"
    write_json(path, json.loads(path.read_text()) | {"threads": 64})
    told = Told()
    train(dataset, tmp_path / "run", RESUME, told)
    assert "note: 64 threads before, 1 now: not bit-identical" in told.messages


def test_a_moved_dataset_can_be_resumed(options: TrainOptions, tmp_path: Path) -> None:
    dataset = write_msd(tmp_path / "here", 4, shape=SHAPE)
    interrupted(dataset, tmp_path / "run", options, "training", 2)
    dataset.rename(tmp_path / "there")
    assert train(tmp_path / "there", tmp_path / "run", RESUME).steps == 6


def test_minutes_become_steps_once(
    dataset: Path, options: TrainOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, told = tmp_path / "run", Told("training", 2)
    options = replace(options, max_steps=None, max_minutes=0.1)
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr("tokenseg.training.train.measure_step_seconds", lambda *_: 1.0)
    with pytest.raises(KeyboardInterrupt):
        train(dataset, run, options, told)
    assert told.messages[-1] == "1.000 s a step: 6 steps in 0.1 minutes"
    assert json.loads((run / "run.json").read_text())["total_steps"] == 6
    monkeypatch.setattr("tokenseg.training.train.measure_step_seconds", lambda *_: pytest.fail("timed again"))
    assert train(dataset, run, replace(options, resume=True)).steps == 6
    facts = json.loads((run / "run.json").read_text())
    assert (facts["total_steps"], facts["max_minutes"], facts["preset"]) == (6, 0.1, "tiny")
    # The timed steps left no trace in the weights.
    train(dataset, tmp_path / "steps", replace(options, max_minutes=None, max_steps=6))
    assert weights(run) == weights(tmp_path / "steps")


def test_a_run_killed_while_timing_is_timed_again(
    dataset: Path, options: TrainOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> float:
        raise KeyboardInterrupt

    options = replace(options, max_steps=None, max_minutes=0.05)
    monkeypatch.setattr("tokenseg.training.train.measure_step_seconds", killed)
    with pytest.raises(KeyboardInterrupt):
        train(dataset, tmp_path / "run", options)
    monkeypatch.setattr("tokenseg.training.train.measure_step_seconds", lambda *_: 1.0)
    assert train(dataset, tmp_path / "run", RESUME).steps == 3


def test_a_short_time_is_one_step_at_least(dataset: Path, options: TrainOptions, tmp_path: Path) -> None:
    assert train(dataset, tmp_path / "run", replace(options, max_steps=None, max_minutes=1e-6)).steps == 1


def test_without_a_limit_the_plan_says_how_many_steps(dataset: Path, options: TrainOptions, tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text("[plan]\nwindow_vox = [16, 16, 16]\nbatch_size = 2\nsteps = 3\n")
    assert train(dataset, tmp_path / "run", replace(options, max_steps=None, config=path)).steps == 3
    assert json.loads((tmp_path / "run" / "run.json").read_text())["total_steps"] == 3


# Run folders that cannot be used


def test_a_run_is_never_overwritten(dataset: Path, options: TrainOptions, straight: Path) -> None:
    before = weights(straight)
    with pytest.raises(
        ConfigError, match=r"run folder .*straight holds a run already; add --resume to go on with it, or name another"
    ):
        train(dataset, straight, options)
    assert weights(straight) == before


def test_a_state_without_its_description_is_not_taken_up(dataset: Path, options: TrainOptions, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(dataset, run, replace(options, max_steps=1))
    (run / "run.json").unlink()
    with pytest.raises(ConfigError, match="holds a run already"):
        train(dataset, run, options)
    with pytest.raises(ConfigError, match=r"run cannot be resumed: .*run\.json.*; start again in a new folder"):
        train(dataset, run, RESUME)


@pytest.mark.parametrize(
    ("name", "content"),
    [("run.json", "{"), ("run.json", "[]"), ("run.json", "{}"), ("splits.json", "[]"), ("splits.json", "[1]")],
)
def test_a_damaged_description_is_refused(
    dataset: Path, options: TrainOptions, tmp_path: Path, name: str, content: str
) -> None:
    interrupted(dataset, tmp_path / "run", options, "preparing")
    (tmp_path / "run" / name).write_text(content)
    with pytest.raises(ConfigError, match=r"run folder .*run cannot be resumed: .*; start again in a new folder"):
        train(dataset, tmp_path / "run", RESUME)


def test_a_damaged_state_is_refused(dataset: Path, options: TrainOptions, tmp_path: Path) -> None:
    train(dataset, tmp_path / "run", replace(options, max_steps=1))
    state = tmp_path / "run" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(
        FileError, match=r"training state .*state\.safetensors cannot be used: .*; start again in a new"
    ):
        train(dataset, tmp_path / "run", RESUME)


def test_other_scans_of_the_same_names_are_refused_on_resuming(
    dataset: Path, options: TrainOptions, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(dataset, other)
    path = other / "imagesTr" / "case_004.nii.gz"
    image = nib.load(path)
    nib.save(nib.Nifti1Image(np.asanyarray(image.dataobj) + 1, image.affine), path)
    interrupted(dataset, tmp_path / "run", options, "training")
    before = (tmp_path / "run" / "run.json").read_bytes()
    with pytest.raises(DataError, match=r"started on other scans: case_004 of .*other holds other voxels; give the da"):
        train(other, tmp_path / "run", RESUME)
    assert (tmp_path / "run" / "run.json").read_bytes() == before
    train(dataset, tmp_path / "run", RESUME)


def test_other_cases_are_refused_on_resuming(dataset: Path, options: TrainOptions, tmp_path: Path) -> None:
    other = write_msd(tmp_path / "other", 5, shape=SHAPE, name="patient")
    interrupted(dataset, tmp_path / "run", options, "training")
    with pytest.raises(
        DataError, match=r"was started on other cases: case_000, .*case_004 not in .*other; give the dataset it was"
    ):
        train(other, tmp_path / "run", RESUME)


def test_a_run_folder_that_is_a_file_is_refused(dataset: Path, options: TrainOptions, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(FileError, match=r"output .*run cannot be written"):
        train(dataset, tmp_path / "run", options)


# Settings


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"fold": 5}, r"--fold 5: the dataset has folds 0 to 4"),
        ({"fold": -1}, r"--fold -1: must be at least 0"),
        ({"max_minutes": 1.0}, r"--max-minutes and --max-steps are both given; give one of them"),
        ({"max_steps": 0}, r"--max-steps 0: must be at least 1"),
        ({"max_steps": None, "max_minutes": float("nan")}, r"--max-minutes nan: must be above 0"),
        ({"threads": 0}, r"--threads 0: must be at least 1"),
        ({"config": Path("nowhere.toml")}, r"config file nowhere\.toml cannot be read: No such file"),
    ],
)
def test_options_out_of_range_are_refused(
    dataset: Path, options: TrainOptions, tmp_path: Path, changes: dict[str, object], text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        train(dataset, tmp_path / "run", replace(options, **changes))
    assert not (tmp_path / "run" / "run.json").exists()


def test_all_faults_of_a_config_file_are_listed_at_once(dataset: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(
        "[plan]\nwindow_vox = [0, 16, 16]\n[network]\nmixer_layers = -1\ncolour = 'red'\n[train]\nlearning_rate = -1\n"
    )
    with pytest.raises(ConfigError, match=r"config file has 4 fault\(s\)") as caught:
        train(dataset, tmp_path / "run", replace(OPTIONS, config=path))
    for key in ("plan.window_vox.0", "network.mixer_layers", "network.colour", "train.learning_rate"):
        assert f"  {key}: " in str(caught.value)


def test_an_unknown_table_is_refused(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("[training]\nlearning_rate = 1\n")
    with pytest.raises(ConfigError, match=r"unknown top-level keys training; allowed are the tables \[plan\]"):
        train(dataset, tmp_path / "run", replace(OPTIONS, config=tmp_path / "bad.toml"))


class Watched(TokenSeg):
    """Remembers the sizes that it was trained on."""

    def __init__(self, config: NetworkConfig, plan: Plan) -> None:
        super().__init__(config, plan)
        self.sizes: set[tuple[int, ...]] = set()

    def forward(self, images: Tensor, num_kept: int | None = None) -> TokenSegOutput:
        if self.training:
            self.sizes.add(tuple(images.shape))
        return super().forward(images, num_kept)


def test_an_edited_config_is_honoured_when_passed_back(dataset: Path, straight: Path, tmp_path: Path) -> None:
    edited, made = tmp_path / "edited.toml", []
    text = (straight / "config.toml").read_text()
    values = tomllib.loads(text)
    old_window = "".join(text.partition("window_vox = ")[2].partition("]")[:2])
    text = text.replace(f"window_vox = {old_window}", "window_vox = [12, 20, 16]")
    edited.write_text(text.replace("learning_rate = 0.002", "learning_rate = 0.01"))
    assert tomllib.loads(edited.read_text()) != values

    def make(config: NetworkConfig, plan: Plan) -> Watched:
        made.append(Watched(config, plan))
        return made[0]

    train(dataset, tmp_path / "run", replace(OPTIONS, config=edited, max_steps=2), make_network=make)
    assert made[0].sizes == {(2, 1, 12, 20, 16)}
    # Warm-up over 0.1 steps: step 0 has 1 / 1.1 of the peak.
    assert float(read_log(tmp_path / "run" / "log.csv")[0]["learning_rate"]) == pytest.approx(0.01 / 1.1)
    values["plan"]["window_vox"], values["train"]["learning_rate"] = [12, 20, 16], 0.01
    assert tomllib.loads((tmp_path / "run" / "config.toml").read_text()) == values
    assert load_model(tmp_path / "run").facts.plan.window_vox == (12, 20, 16)


class Collector(TokenSeg):
    """Remembers the windows that it was trained on."""

    def __init__(self, config: NetworkConfig, plan: Plan) -> None:
        super().__init__(config, plan)
        self.windows: set[bytes] = set()

    def forward(self, images: Tensor, num_kept: int | None = None) -> TokenSegOutput:
        if self.training:
            self.windows |= {image.float().numpy().tobytes() for image in images}
        return super().forward(images, num_kept)


@pytest.mark.parametrize("augment", [True, False])
def test_without_augmentation_the_scans_are_learned_as_they_are(dataset: Path, tmp_path: Path, augment: bool) -> None:
    config, made = tmp_path / "config.toml", []
    config.write_text(
        f"[plan]\nwindow_vox = {list(SHAPE)}\nbatch_size = 2\n[train]\naugment = {str(augment).lower()}\n"
    )

    def make(config: NetworkConfig, plan: Plan) -> Collector:
        made.append(Collector(config, plan))
        return made[0]

    train(dataset, tmp_path / "run", replace(OPTIONS, config=config, max_steps=8), make_network=make)
    # Windows of the size of the scans: the four training scans as they are, or sixteen variants of them.
    assert (len(made[0].windows) > 4) is augment


# Training that goes wrong


def test_a_loss_that_is_nan_keeps_the_last_good_weights(
    dataset: Path, options: TrainOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, calls, original = tmp_path / "run", [], loop.training_loss

    def breaks_down(*arguments: object, **keywords: object) -> object:
        calls.append(1)
        parts = original(*arguments, **keywords)
        return parts._replace(total=parts.total * torch.nan) if len(calls) == 4 else parts

    monkeypatch.setattr(loop, "training_loss", breaks_down)
    with pytest.raises(
        TrainingError,
        match=r"the loss became nan on a window of case_00\d.*; the last good weights are kept\. Look at these cases",
    ):
        train(dataset, run, options)
    assert len(losses(run)) == 3
    assert tensors_are_finite(run / "state.safetensors")
    assert tensors_are_finite(run / "model" / "weights.safetensors")
    model, state = load_model(run).network.state_dict(), load_file(run / "state.safetensors")
    assert all(torch.equal(tensor, state[f"network.{name}"]) for name, tensor in model.items())


def test_a_network_that_predicts_background_only_is_noticed(
    dataset: Path, options: TrainOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "quick_dice", lambda *_: 0.0)
    told = Told()
    train(dataset, tmp_path / "run", options, told)
    assert [text for text in told.messages if "warning" in text] == [
        "warning: foreground Dice on validation cases is 0.000 (best so far 0.000): the network predicts background "
        "only. Raise foreground_fraction or lower learning_rate under [train] in a --config file"
    ]


def mask_of(value: float, dtype: type = np.uint8) -> np.ndarray:
    mask = np.zeros(SHAPE, dtype=dtype)
    mask[5:12, 5:12, 5:12] = value
    return mask


def set_mask(root: Path, mask: np.ndarray, *, every: bool = False) -> None:
    for path in sorted((root / "labelsTr").iterdir())[: None if every else 1]:
        write_nifti(path, mask)


def nan_voxel(root: Path) -> None:
    image = np.ones(SHAPE, dtype=np.float32)
    image[3, 3, 3] = np.nan
    write_nifti(root / "imagesTr" / "case_000.nii.gz", image)


@pytest.mark.parametrize(
    ("spoil", "kind", "text"),
    [
        (lambda root: set_mask(root, mask_of(0), every=True), DataError, r"has no foreground: all 3 masks are zero"),
        (
            lambda root: set_mask(root, mask_of(7)),
            DataError,
            r"case_000: case_000\.nii\.gz holds the label values 7, which the dataset does not list; it lists 0, 1",
        ),
        (lambda root: set_mask(root, mask_of(255), every=True), DataError, r"looks like a 0/255 mask: .* divide the"),
        (
            lambda root: set_mask(root, mask_of(0.5, np.float32)),
            DataError,
            r"case_000\.nii\.gz: 343 voxel\(s\) hold no whole number \(first: 0\.5\); labels must be integers",
        ),
        (nan_voxel, DataError, r"case_000\.nii\.gz: 1 voxel\(s\) are NaN or infinite; replace them"),
        (lambda root: set_mask(root, mask_of(1)[:-1]), GeometryError, r"image of case_000 and label case_000\.nii\.gz"),
        (lambda root: (root / "labelsTr" / "case_001.nii.gz").unlink(), DataError, r"1 of 6 image and label files are"),
        (lambda root: (root / "imagesTr" / "case_001.nii.gz").write_bytes(b""), FileError, r"case_001\.nii\.gz"),
    ],
)
def test_data_that_cannot_be_trained_on_are_refused(
    spoil: Callable[[Path], object], kind: type[TokenSegError], text: str, tmp_path: Path
) -> None:
    root = write_msd(tmp_path / "data", 3, shape=SHAPE)
    spoil(root)
    with pytest.raises(kind, match=text):
        train(root, tmp_path / "run", OPTIONS)
    assert not (tmp_path / "run").exists()


def test_float_masks_of_whole_numbers_are_fine(options: TrainOptions, tmp_path: Path) -> None:
    root = write_msd(tmp_path / "data", 3, shape=SHAPE)
    set_mask(root, mask_of(1, np.float32), every=True)
    assert train(root, tmp_path / "run", replace(options, max_steps=1)).evaluation.summaries[0].n == 1


@pytest.mark.parametrize(("num_cases", "text"), [(0, "no training case"), (1, r"one training case only \(case_000\)")])
def test_a_dataset_too_small_to_hold_one_out_is_refused(num_cases: int, text: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"{text}; training needs at least 2"):
        train(write_msd(tmp_path / "data", num_cases, shape=SHAPE), tmp_path / "run", OPTIONS)


def test_a_folder_that_is_no_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no known dataset layout; looked for"):
        train(tmp_path, tmp_path / "run", OPTIONS)


# Several processes


PARALLEL = """
import json, os, sys
from pathlib import Path
from tokenseg.options import TrainOptions
from tokenseg.progress import Silent
from tokenseg.training.train import train

dataset, runs, config = map(Path, sys.argv[1:])
said, rank = [], os.environ["RANK"]

class Talk(Silent):
    def message(self, text):
        said.append(text)

for name, limit in {"steps": {"max_steps": 3}, "minutes": {"max_minutes": 0.003}}.items():
    options = TrainOptions(preset="tiny", config=config, device="cpu", threads=1, **limit)
    result = train(dataset, runs / name, options, Talk())
    told = {"steps": result.steps, "n": result.evaluation.summaries[0].n, "said": said}
    (runs / f"{name}-{rank}.json").write_text(json.dumps(told))
"""


@pytest.mark.long
def test_two_processes_train_one_run(dataset: Path, config: Path, tmp_path: Path) -> None:
    script = tmp_path / "parallel.py"
    script.write_text(PARALLEL)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *launcher, str(script), str(dataset), str(tmp_path), str(config)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # Both come to the same end, the first one speaks, and no row is written twice.
    for name in ("steps", "minutes"):
        first, second = (json.loads((tmp_path / f"{name}-{rank}.json").read_text()) for rank in range(2))
        assert first["said"][0].startswith("Medical Segmentation Decathlon")
        assert second["said"] == []
        steps = first["steps"]
        assert (second["steps"], first["n"], second["n"]) == (steps, 1, 1)
        assert steps == 3 if name == "steps" else steps >= 1
        assert [int(row["step"]) for row in read_log(tmp_path / name / "log.csv")] == list(range(1, steps + 1))
        assert tensors_are_finite(tmp_path / name / "model" / "weights.safetensors")
        assert load_model(tmp_path / name).facts.training["steps"] == steps


def test_a_folder_of_the_users_is_not_made_a_run(dataset: Path, options: TrainOptions, tmp_path: Path) -> None:
    (tmp_path / "mine" / "model").mkdir(parents=True)
    (tmp_path / "mine" / "model" / "notes.txt").write_text("dear to me")
    with pytest.raises(ConfigError, match=r"holds files that are not a run's: model; name a new or empty folder"):
        train(dataset, tmp_path / "mine", options)
    assert (tmp_path / "mine" / "model" / "notes.txt").read_text() == "dear to me"


def test_a_run_is_scored_by_the_labels_of_its_plan(dataset: Path, options: TrainOptions, tmp_path: Path) -> None:
    labels = '[[plan.labels]]\nname = "merged"\nvalues = [1, 2]\noutput_value = 1\n'
    assert options.config is not None
    (tmp_path / "config.toml").write_text(options.config.read_text() + labels)
    merged = replace(options, config=tmp_path / "config.toml")
    evaluation = train(dataset, tmp_path / "run", merged).evaluation
    assert [summary.label.name for summary in evaluation.summaries] == ["merged"]
