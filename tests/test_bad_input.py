"""Whatever is wrong with the input: one clear line, exit code 2, nothing lost; and no other kind of error, ever."""

from __future__ import annotations

import contextlib
import errno
import gzip
import hashlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from phantoms import change_json, phantom, write_msd, write_nifti, write_nnunet
from plans import make_plan
from tokenseg.cli import main
from tokenseg.config import PRESETS, build_run_config, read_overrides
from tokenseg.datasets.layouts import list_dataset_images, open_dataset
from tokenseg.errors import TokenSegError
from tokenseg.saved_model.checkpoint import load_model
from tokenseg.segmentation.privacy import shown_name
from tokenseg.segmentation.segment import segment_files
from toy_models import as_stored, constant, job_of, save_untrained, toy_model

SMALL = (8, 9, 10)


def plan_of(*channels: str):
    return as_stored(make_plan(channels=len(channels)), channels=channels, source_channels=channels)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_untrained(tmp_path_factory.mktemp("one") / "model", plan_of("MRI"))


@pytest.fixture(scope="module")
def two_channel_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_untrained(tmp_path_factory.mktemp("two") / "model", plan_of("FLAIR", "t1gd"))


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must be refused; gives its error line."""

    def run(*arguments: str | Path) -> str:
        code = main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        assert code == 2, printed
        assert printed.out == ""
        assert "Traceback" not in printed.err
        *before, error = printed.err.splitlines()
        assert error.startswith("error: ")
        assert not any(line.startswith(("error", " ")) for line in before)
        return error.removeprefix("error: ")

    return run


@pytest.fixture
def segment_refused(refused, model, tmp_path):
    """Segment one file that cannot be; checks that nothing was written."""

    def run(scan: Path, with_model: Path = model) -> str:
        error = refused("segment", scan, tmp_path / "out" / "mask.nii.gz", "--model", with_model)
        assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []
        return error

    return run


@pytest.fixture
def train_refused(refused, tmp_path):
    """Train on a dataset that cannot be; checks that no model was made and the dataset is as it was."""
    pytest.importorskip("monai")

    def run(dataset: Path, *options: str | Path) -> str:
        before = contents(dataset)
        run_folder = tmp_path / "run"
        error = refused("train", dataset, run_folder, "--preset", "tiny", "--max-steps", "1", *options)
        assert contents(dataset) == before
        assert not (run_folder / "model").exists()
        return error

    return run


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write_scan(path: Path, array: np.ndarray | None = None) -> Path:
    return write_nifti(path, phantom(0, shape=SMALL)[0][0] if array is None else array)


def change_label(dataset: Path, change: Callable[[np.ndarray], np.ndarray], affine: np.ndarray | None = None) -> None:
    """Rewrite the mask of `case_001`."""
    path = dataset / "labelsTr" / "case_001.nii.gz"
    image = nib.load(path)
    write_nifti(path, change(np.asarray(image.dataobj)), affine=image.affine if affine is None else affine)


# ---- files


def test_missing_file(segment_refused, tmp_path):
    assert (
        segment_refused(tmp_path / "scan.nii.gz") == f"input {tmp_path / 'scan.nii.gz'} does not exist; check the path"
    )


@pytest.mark.parametrize("name", ["scan.nii.gz", "scan.nii"])
@pytest.mark.parametrize("length", [0, 1, 200, 0.5, 0.99])
def test_truncated_and_empty_files(segment_refused, tmp_path, name, length):
    scan = write_scan(tmp_path / name)
    content = scan.read_bytes()
    scan.write_bytes(content[: length if isinstance(length, int) else int(length * len(content))])
    error = segment_refused(scan)
    assert error.startswith(str(scan))
    assert "copy or download it again" in error


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("scan.nii.gz", b"I am not an image" * 40, "is not an intact gzip file"),
        ("scan.nii.gz", gzip.compress(b"I am not an image" * 40), "is not a NIfTI image, whatever its name says"),
        ("scan.nii", b"\x89PNG\r\n\x1a\n" + bytes(1000), "is not a NIfTI image, whatever its name says"),
        ("scan.nii", bytes(128) + b"DICM" + bytes(1000), "is not a NIfTI image, whatever its name says"),
        ("scan.png", b"\x89PNG\r\n\x1a\n", "is not named as an image: its name must end in .nii.gz, .nii, .nrrd, "),
        ("scan.dcm", bytes(128) + b"DICM", "is a damaged DICOM file"),
        ("scan.dcm", bytes(400), "is not named as an image: its name must end in"),
        ("scan.nrrd", bytes(400), "is not a .nrrd image, whatever its name says"),
        ("scan.zip", bytes(400), "is not named as an image: its name must end in"),
    ],
)
def test_non_medical_files(segment_refused, tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    error = segment_refused(tmp_path / name)
    assert error.startswith(f"{tmp_path / name} ")
    assert said in error


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinite_voxels(segment_refused, tmp_path, value):
    image = phantom(0, shape=SMALL)[0][0]
    image[3, 4, :2] = value
    error = segment_refused(write_scan(tmp_path / "scan.nii.gz", image))
    assert error == (
        f"{tmp_path / 'scan.nii.gz'}: 2 voxel(s) are NaN or infinite; replace them, for example by the background value"
    )


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((20, 20), "is 2D (20 x 20); expected is 3D"),
        ((8, 9, 10, 2), "model expects MRI; {} holds 2 channel(s)"),
        ((4, 4, 4, 2, 2), "is 5D (4 x 4 x 4 x 2 x 2); expected is 3D"),
    ],
)
def test_other_dimensions(segment_refused, tmp_path, shape, said):
    scan = write_scan(tmp_path / "scan.nii.gz", np.ones(shape, np.float32))
    assert said.format(scan) in segment_refused(scan)


def test_an_empty_folder(refused, model, tmp_path):
    (tmp_path / "in").mkdir()
    error = refused("segment", tmp_path / "in", tmp_path / "out", "--model", model)
    assert error.startswith(f"input {tmp_path / 'in'} has no images (.nii.gz, .nii, .nrrd, .mha, .mhd) directly in it")


# ---- channels


def test_missing_channel(segment_refused, refused, two_channel_model, tmp_path):
    scan = write_scan(tmp_path / "in" / "patient_0000.nii.gz")
    error = segment_refused(scan, two_channel_model)
    assert error.startswith(
        "model expects FLAIR, t1gd; patient has FLAIR (patient_0000.nii.gz): t1gd is missing. "
        "Numbers in file names mean: _0000 FLAIR, _0001 t1gd"
    )


def test_wrong_number_of_channels(segment_refused, two_channel_model, tmp_path):
    for count in (1, 3):
        shape = SMALL if count == 1 else (*SMALL, count)
        scan = write_scan(tmp_path / "scan.nii.gz", np.ones(shape, np.float32))
        error = segment_refused(scan, two_channel_model)
        assert f"model expects FLAIR, t1gd; {scan} holds {count} channel(s)" in error
        assert "Give one 3D file a channel, or one 4D file with these channels along its last axis" in error


def test_wrong_names_of_channels(refused, two_channel_model, tmp_path, capsys):
    dataset = write_nnunet(tmp_path / "ds", 2, channels=("FLAIR", "T2"))
    code = main(["segment", str(dataset), str(tmp_path / "out"), "--model", str(two_channel_model)])
    assert code == 1
    errors = capsys.readouterr().err.splitlines()[-2:]
    for index, error in enumerate(errors):
        name = shown_name(f"case_00{index}", show_names=False)
        assert error.startswith(f"error: {name}: model expects FLAIR, t1gd; {name} has FLAIR ({name}_0000.nii.gz)")
        assert "t1gd is missing" in error


def test_channels_on_different_grids(refused, two_channel_model, tmp_path, capsys):
    write_scan(tmp_path / "in" / "patient_0000.nii.gz")
    write_nifti(tmp_path / "in" / "patient_0001.nii.gz", phantom(0, shape=SMALL)[0][0], spacing_mm=(1, 1, 1.1))
    assert main(["segment", str(tmp_path / "in"), str(tmp_path / "out"), "--model", str(two_channel_model)]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    name = shown_name("patient", show_names=False)
    assert f"{name}_0000.nii.gz and {name}_0001.nii.gz are not on one grid" in error
    assert "differ in spacing by 0.1 mm, allowed 0.001. Resample one to the grid of the other" in error


# ---- training data


def test_image_and_label_of_different_shape(train_refused, tmp_path):
    dataset = write_msd(tmp_path / "ds", 3, shape=SMALL)
    change_label(dataset, lambda mask: mask[:-1])
    assert train_refused(dataset) == (
        "image of case_001 and label case_001.nii.gz are not on one grid: 8 x 9 x 10 against 7 x 9 x 10 voxels; "
        "resample one to the other"
    )


def test_image_and_label_of_different_geometry(train_refused, tmp_path):
    dataset = write_msd(tmp_path / "ds", 3, shape=SMALL)
    change_label(
        dataset, lambda mask: mask, affine=np.array([[1, 0, 0, 0.5], [0, 1, 0, 0], [0, 0, 2, 0], [0, 0, 0, 1.0]])
    )
    assert train_refused(dataset) == (
        "image of case_001 and label case_001.nii.gz are not on one grid: they differ in position of the first voxel "
        "by 0.5 mm, allowed 0.001; in spacing by 1 mm, allowed 0.001. Resample one to the grid of the other"
    )


def test_rounding_of_the_geometry_is_tolerated(tmp_path):
    pytest.importorskip("monai")
    dataset = write_msd(tmp_path / "ds", 3, shape=SMALL)
    change_label(dataset, lambda mask: mask, affine=np.diag([1, 1, 1.0004, 1]))
    arguments = ["train", str(dataset), str(tmp_path / "run"), "--preset", "tiny", "--max-steps", "1"]
    assert main(arguments) == 0


def test_unlisted_labels(train_refused, tmp_path):
    dataset = write_msd(tmp_path / "ds", 3, shape=SMALL)
    change_label(dataset, lambda mask: mask + 2 * (mask == 1).astype(np.uint8))
    assert train_refused(dataset) == (
        "case case_001: case_001.nii.gz holds the label values 3, which the dataset does not list; it lists 0, 1. "
        "Add these values with their names under labels of dataset.json, or change them in the file to listed ones"
    )


def test_0_255_masks(train_refused, tmp_path):
    dataset = write_msd(tmp_path / "ds", 3, shape=SMALL)
    change_label(dataset, lambda mask: mask * 255)
    error = train_refused(dataset)
    assert 'This looks like a 0/255 mask: write "255": "sphere" under labels of dataset.json, or divide' in error


def test_float_labels(train_refused, tmp_path):
    dataset = write_msd(tmp_path / "ds", 3, shape=SMALL)
    change_label(dataset, lambda mask: mask * np.float32(0.7))
    error = train_refused(dataset)
    assert error.startswith(f"{dataset / 'labelsTr' / 'case_001.nii.gz'}: ")
    assert "voxel(s) hold no whole number (first: 0.7); labels must be integers. Where rounding is right" in error
    command = shlex.split(error[error.index("python -c") :])
    subprocess.run([sys.executable, *command[1:]], check=True)
    mended = nib.load(dataset / "labelsTr" / "case_001-rounded.nii.gz")
    assert set(np.unique(np.asarray(mended.dataobj))) == {0, 1}


def test_negative_labels(train_refused, tmp_path):
    dataset = write_msd(tmp_path / "ds", 3, shape=SMALL)
    change_label(dataset, lambda mask: -mask.astype(np.int16))
    assert "case_001.nii.gz holds the label values -1, which the dataset does not list" in train_refused(dataset)


def test_4d_label(train_refused, tmp_path):
    dataset = write_msd(tmp_path / "ds", 3, shape=SMALL)
    change_label(dataset, lambda mask: np.stack([mask, mask], axis=-1))
    assert "case_001.nii.gz is 4D (8 x 9 x 10 x 2); a mask must be 3D" in train_refused(dataset)


def test_nan_in_a_training_image(train_refused, tmp_path):
    dataset = write_msd(tmp_path / "ds", 3, shape=SMALL)
    write_scan(dataset / "imagesTr" / "case_002.nii.gz", np.full(SMALL, np.nan, np.float32))
    assert "case_002.nii.gz: 720 voxel(s) are NaN or infinite" in train_refused(dataset)


def test_empty_dataset(train_refused, tmp_path):
    assert "has no training case; training needs at least 2" in train_refused(write_msd(tmp_path / "ds", 0))


def test_one_case_only(train_refused, tmp_path):
    dataset = write_msd(tmp_path / "ds", 1, shape=SMALL)
    assert train_refused(dataset) == (
        f"dataset {dataset} has one training case only (case_000); training needs at least 2, to hold one out"
    )


def test_no_foreground_anywhere(train_refused, tmp_path):
    dataset = write_msd(tmp_path / "ds", 3, shape=SMALL)
    for label in (dataset / "labelsTr").iterdir():
        write_nifti(label, np.zeros(SMALL, np.uint8))
    assert train_refused(dataset) == (
        f"dataset {dataset} has no foreground: all 3 masks are zero everywhere; "
        "check that the label files are the right ones"
    )


def test_a_dataset_that_is_none(train_refused, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "has no known dataset layout; looked for dataset.json with" in train_refused(tmp_path / "empty")
    assert train_refused(tmp_path / "nowhere").startswith(f"dataset {tmp_path / 'nowhere'} is not a folder; give the")


def test_files_missing_from_a_dataset(train_refused, tmp_path):
    dataset = write_msd(tmp_path / "ds", 3, shape=SMALL)
    (dataset / "labelsTr" / "case_002.nii.gz").unlink()
    assert "1 of 6 image and label files are missing: labelsTr/case_002.nii.gz" in train_refused(dataset)


def test_a_run_folder_that_is_taken(refused, tmp_path):
    dataset = write_msd(tmp_path / "ds", 3, shape=SMALL)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    error = refused("train", dataset, tmp_path / "run")
    assert error == (
        f"run folder {tmp_path / 'run'} holds a run already; add --resume to go on with it, or name another folder"
    )


# ---- settings


def test_all_faults_of_a_configuration_at_once(tmp_path, capsys):
    pytest.importorskip("monai")
    dataset = write_msd(tmp_path / "ds", 3, shape=SMALL)
    config = tmp_path / "config.toml"
    config.write_text("[plan]\nbatchsize = 4\nsteps = 0\n[train]\nlearning_rate = -1.0\n[network]\nwidth = 3\n")
    arguments = ["train", str(dataset), str(tmp_path / "run"), "--config", str(config)]
    assert main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("error: "))
    assert lines[first] == "error: config file has 4 fault(s):"
    faults = {line.split(":")[0].strip() for line in lines[first + 1 :]}
    assert faults == {"plan.batchsize", "plan.steps", "train.learning_rate", "network.width"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[plan\n", "is not valid TOML: "),
        (
            "[training]\nsteps = 3\n",
            "unknown top-level keys training; allowed are the tables [plan], [network]",
        ),
        ("steps = 3\n", "unknown top-level keys steps; allowed are the tables"),
        (None, "cannot be read: No such file or directory; check the path"),
    ],
)
def test_configuration_files_that_are_none(train_refused, tmp_path, text, said):
    config = tmp_path / "config.toml"
    if text is not None:
        config.write_text(text)
    error = train_refused(write_msd(tmp_path / "ds", 3, shape=SMALL), "--config", config)
    assert error.startswith(f"config file {config}")
    assert said in error


# ---- outputs


def test_output_below_a_regular_file(refused, model, tmp_path):
    pytest.importorskip("monai")
    (tmp_path / "file").write_text("mine")
    scan = write_scan(tmp_path / "in" / "scan.nii.gz")
    dataset = write_msd(tmp_path / "ds", 3, shape=SMALL)
    below = tmp_path / "file" / "out"
    file = below.with_suffix(".nii.gz")
    assert refused("segment", scan, file, "--model", model).startswith(f"output {file} cannot be written: ")
    error = refused("segment", tmp_path / "in", below, "--model", model)
    assert error == f"output {below} cannot be written: Not a directory; name another place"
    error = refused("train", dataset, below, "--preset", "tiny", "--max-steps", "1")
    assert error == f"output {below} cannot be written: Not a directory; name another place"
    assert (tmp_path / "file").read_text() == "mine"


@pytest.fixture
def scored(tmp_path: Path) -> Path:
    """A folder with a scan, its mask, and a folder of masks as `segment` leaves it."""
    scan, mask = phantom(0, shape=SMALL)
    folder = tmp_path / "mine"
    write_scan(folder / "scan.nii.gz", scan[0])
    write_nifti(folder / "mask.nii.gz", mask)
    write_nifti(folder / "masks" / "case.nii.gz", mask)
    (folder / "masks" / "summary.csv").write_text("case,sphere_ml,error\ncase,1,\n")
    (folder / "folder.html").mkdir()
    (folder / "dataset.json").write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("command", "option", "name", "said"),
    [
        ("tokens", "json", "scan.nii.gz", "the name must end in .json; name it so"),
        ("tokens", "json", "both.png", "the name must end in .json; name it so"),
        ("tokens", "json", "dataset.json", "a file of this name is there, and TokenSeg reads it; choose another name"),
        ("tokens", "picture", "tokens.jpg", "the name must end in .png; name it so"),
        ("tokens", "picture", "masks", "this is a folder; name a file ending in .png, such as {}/picture.png"),
        ("segment", "report", "scan.nii.gz", "the name must end in .html; name it so"),
        ("segment", "report", "new.nii.gz", "the name must end in .html; name it so"),
        ("segment", "report", "report", "the name must end in .html; name it so"),
        ("segment", "report", "folder.html", "this is a folder; name a file ending in .html, such as {}/report.html"),
        ("evaluate", "report", "mask.nii.gz", "the name must end in .html; name it so"),
        ("evaluate", "json", "masks", "this is a folder; name a file ending in .json, such as {}/json.json"),
        ("evaluate", "csv", "scores.json", "the name must end in .csv; name it so"),
        ("evaluate", "csv", "masks/summary.csv", "a file of this name is there, and TokenSeg reads it; choose another"),
    ],
)
def test_outputs_that_would_take_the_place_of_something(
    refused, scored, model, monkeypatch, command, option, name, said
):
    def work(*_: object, **__: object) -> None:
        pytest.fail("refused only after the work")

    monkeypatch.setattr("tokenseg.saved_model.checkpoint.load_model", work)
    monkeypatch.setattr("tokenseg.evaluation.evaluate.evaluate_folders", work)
    before = contents(scored)
    inputs = {
        "tokens": [scored / "scan.nii.gz", "--model", model],
        "segment": [scored / "scan.nii.gz", scored / "new.nii.gz", "--model", model],
        "evaluate": [scored / "mask.nii.gz", scored / "mask.nii.gz"],
    }
    error = refused(command, *inputs[command], f"--{option}", scored / name)
    assert error.startswith(f"--{option} {scored / name}: {said.format(scored / name)}")
    assert contents(scored) == before


@pytest.mark.parametrize("inner", ["report.html", "new/report.html"])
def test_a_report_below_a_regular_file(refused, scored, inner):
    (scored / "file").write_text("mine")
    report = scored / "file" / inner
    error = refused("evaluate", scored / "mask.nii.gz", scored / "mask.nii.gz", "--report", report)
    assert error == (
        f"output {report} cannot be written: {scored / 'file'} is a file, not a folder; name another place"
    )


def test_a_scan_that_cannot_be_segmented_gets_no_report(refused, model, tmp_path):
    scan = tmp_path / "scan.nii.gz"
    scan.write_bytes(b"")
    error = refused("segment", scan, tmp_path / "mask.nii.gz", "--model", model, "--report", tmp_path / "report.html")
    assert error == f"{scan} is truncated or empty; copy or download it again"
    assert sorted(tmp_path.iterdir()) == [scan]


@pytest.mark.parametrize("command", ["synthetic", "demo", "train"])
def test_a_file_where_a_folder_is_to_be_made(refused, tmp_path, command):
    pytest.importorskip("monai")
    file = tmp_path / "file"
    file.write_text("mine")
    error = refused(command, *([tmp_path] if command == "train" else []), file)
    assert error == f"{file} is a file; name a folder, which is made if it is not there"
    assert file.read_text() == "mine"


def test_a_demo_in_a_folder_of_the_users(refused, tmp_path):
    pytest.importorskip("monai")
    (tmp_path / "report.html").write_text("mine")
    (tmp_path / "tokenseg").mkdir()
    error = refused("demo", tmp_path)
    assert error == f"{tmp_path} holds files that are not of a demo: report.html, tokenseg; name a new or empty folder"
    assert contents(tmp_path) == {tmp_path / "report.html": b"mine"}
    assert list((tmp_path / "tokenseg").iterdir()) == []


def test_a_demo_in_a_folder_with_exams_of_another_seed(refused, tmp_path):
    pytest.importorskip("monai")
    (tmp_path / "cohort").mkdir()
    (tmp_path / "cohort" / "cohort.json").write_text('{"seed": 5, "version": 1}')
    assert "holds exams of seed 5, asked for is seed 0; name another folder" in refused("demo", tmp_path)
    assert len(contents(tmp_path)) == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--train", "0", "--test", "0", "--external", "0"], "--train, --test and --external are all 0; ask for at"),
        (["--train", "-1"], "--train -1: must be at least 0"),
        (["--seed", "-1"], "--seed -1: must be at least 0"),
    ],
)
def test_synthetic_exams_that_cannot_be(refused, tmp_path, options, said):
    assert refused("synthetic", tmp_path / "out", *options).startswith(said)
    assert not (tmp_path / "out").exists()


MANY_UNETS = """
import signal, sys, time
from pathlib import Path
from tokenseg.demo import DemoSize, _unet_beside

if __name__ == "__main__":
    # Shells start background jobs deaf to Ctrl-C, and the tests may be one.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with _unet_beside(Path(sys.argv[1]), Path(sys.argv[2]), DemoSize(steps=3000)):
            time.sleep(300)
    except KeyboardInterrupt:
        sys.exit(130)
"""


@pytest.mark.skipif(os.name != "posix", reason="signals and process groups are of POSIX systems")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_an_ended_demo_leaves_no_training_behind(tmp_path, number):
    """The pipe ends when the last process that holds it does."""
    pytest.importorskip("monai")
    dataset, run, script = write_msd(tmp_path / "ds", 2, shape=(32, 32, 32)), tmp_path / "run", tmp_path / "script.py"
    script.write_text(MANY_UNETS)
    command = [sys.executable, str(script), str(dataset), str(run)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, start_new_session=True, **pipes) as process:
        try:
            while not (run / "log.csv").exists():
                assert process.poll() is None
                time.sleep(0.05)
            if number == signal.SIGINT:
                os.killpg(process.pid, number)  # as a terminal does it
            else:
                process.send_signal(number)
            printed, _ = process.communicate(timeout=30)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    assert printed == ""


# ---- terminals and pipes


@pytest.mark.skipif(os.name != "posix", reason="pipes close so on POSIX systems")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["--help"], ["info", "{model}"]])
def test_a_reader_that_goes_away(model, arguments, unbuffered):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "tokenseg", *(argument.format(model=model) for argument in arguments)]
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    ended = subprocess.run(
        command, stdout=writer, stderr=subprocess.PIPE, env=environment, text=True, timeout=120, check=False
    )
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (141, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_results_that_cannot_be_printed(model, unbuffered):
    command = [sys.executable, "-m", "tokenseg", "info", str(model)]
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, env=environment, text=True, timeout=120, check=False
        )
    assert (ended.returncode, ended.stderr) == (2, "error: a file: No space left on device\n")


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion(capsys, shell):
    with pytest.raises(SystemExit) as ended:
        main(["--tyro-print-completion", shell])
    assert ended.value.code in (0, None)
    printed = capsys.readouterr()
    assert "synthetic" in printed.out
    assert printed.err == ""


def test_completion_that_needs_a_package(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    error = refused("--tyro-print-completion", "tcsh")
    assert error == "completion is for bash, zsh and fish; for tcsh, pip install shtab first"


@pytest.fixture
def full_disk(monkeypatch):
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)


def test_full_disk_while_segmenting(refused, full_disk, model, tmp_path):
    scan, output = write_scan(tmp_path / "scan.nii.gz"), tmp_path / "out" / "mask.nii.gz"
    error = refused("segment", scan, output, "--model", model)
    assert error == f"cannot write {output}: No space left on device; nothing was changed there"
    assert contents(output.parent) == {}


def test_full_disk_while_training(train_refused, full_disk, tmp_path):
    error = train_refused(write_msd(tmp_path / "ds", 3, shape=SMALL))
    assert error.startswith(f"cannot write {tmp_path / 'run'}")
    assert "No space left on device; nothing was changed there" in error
    assert contents(tmp_path / "run") == {}


def test_full_disk_while_evaluating(full_disk, tmp_path, capsys):
    dataset = write_msd(tmp_path / "ds", 2, shape=SMALL)
    scores = tmp_path / "scores.json"
    scores.write_text("earlier")
    assert main(["evaluate", str(dataset / "labelsTr"), str(dataset), "--json", str(scores)]) == 2
    printed = capsys.readouterr()
    assert "1.0000" in printed.out
    assert printed.err == f"error: cannot write {scores}: No space left on device; nothing was changed there\n"
    assert scores.read_text() == "earlier"


# ---- models


@pytest.mark.parametrize("command", ["info", "segment"])
@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda model: shutil.rmtree(model), "does not exist; check the path"),
        (lambda model: (model / "weights.safetensors").unlink(), "is incomplete: weights.safetensors is missing"),
        (lambda model: (model / "model.json").unlink(), "is incomplete: model.json is missing; copy the folder again"),
        (lambda model: (model / "weights.safetensors").write_bytes(b"\x80\x02c"), "is a pickle, which TokenSeg never"),
        (lambda model: os.truncate(model / "weights.safetensors", 1000), "does not match the SHA-256 in model.json"),
        (lambda model: os.truncate(model / "model.json", 1000), "model.json is damaged or not a TokenSeg model"),
        (lambda model: change_json(model / "model.json", schema_version=2), "schema version 2, this TokenSeg reads 1"),
    ],
    ids=["missing", "no weights", "no facts", "pickle", "cut weights", "cut facts", "newer"],
)
def test_unusable_models(refused, model, tmp_path, command, harm, said):
    harmed = Path(shutil.copytree(model, tmp_path / "model"))
    harm(harmed)
    scan = write_scan(tmp_path / "scan.nii.gz")
    arguments = {"info": [harmed], "segment": [scan, tmp_path / "mask.nii.gz", "--model", harmed]}
    error = refused(command, *arguments[command])
    assert str(harmed) in error
    assert said in error
    assert not (tmp_path / "mask.nii.gz").exists()


def test_a_checkpoint_file_of_another_program(refused, tmp_path):
    (tmp_path / "best.pth").write_bytes(b"PK\x03\x04")
    error = refused("info", tmp_path / "best.pth")
    assert error.startswith(
        f"{tmp_path / 'best.pth'} is a file; a model is a folder with weights.safetensors and model.json"
    )


# ---- evaluation


def test_masks_that_cannot_be_compared(refused, tmp_path):
    cube = np.zeros(SMALL, np.uint8)
    cube[2:5, 2:5, 2:5] = 1
    write_nifti(tmp_path / "a" / "x.nii.gz", cube)
    write_nifti(tmp_path / "b" / "x.nii.gz", cube, spacing_mm=(1, 1, 2))
    write_nifti(tmp_path / "c" / "y.nii.gz", cube)
    write_nifti(tmp_path / "d" / "x.nii.gz", cube * np.float32(0.5))
    (tmp_path / "e").mkdir()
    assert "differ in spacing by 1 mm, allowed 0.001" in refused("evaluate", tmp_path / "a", tmp_path / "b")
    assert "none of the 1 masks in" in refused("evaluate", tmp_path / "a", tmp_path / "c")
    assert "hold no whole number (first: 0.5)" in refused("evaluate", tmp_path / "d", tmp_path / "a")
    assert "hold no masks and are no usable dataset" in refused("evaluate", tmp_path / "a", tmp_path / "e")
    assert "predictions" in refused("evaluate", tmp_path / "nowhere", tmp_path / "a")
    assert "is a file and" in refused("evaluate", tmp_path / "a" / "x.nii.gz", tmp_path / "a")


# ---- tokens


def test_cases_whose_tokens_cannot_be_shown(refused, model, tmp_path):
    scan, mask = phantom(0, shape=SMALL)
    path = write_scan(tmp_path / "scan.nii.gz", scan[0])
    write_nifti(tmp_path / "mask.nii.gz", mask, spacing_mm=(1, 1, 3))
    dataset = write_msd(tmp_path / "ds", 3, shape=SMALL)
    before = contents(tmp_path)

    def said(case: Path, *options: str | Path, with_model: Path = model) -> str:
        return refused("tokens", case, "--model", with_model, "--json", tmp_path / "new" / "t.json", *options)

    assert said(tmp_path / "nowhere") == f"input {tmp_path / 'nowhere'} does not exist; check the path"
    assert said(dataset) == (
        f"{dataset} holds 3 cases (case_000, case_001, case_002); "
        "give one image file, or a folder with the files of one case"
    )
    assert said(path, "--reference", tmp_path / "nowhere.nii.gz").startswith(f"{tmp_path / 'nowhere.nii.gz'} does not")
    assert said(path, "--reference", tmp_path).startswith(f"{tmp_path} is not named as an image")
    assert "and its reference are not on one grid" in said(path, "--reference", tmp_path / "mask.nii.gz")
    assert said(path, with_model=tmp_path).startswith(f"{tmp_path} is not a model: model.json and weights")
    assert contents(tmp_path) == before


# ---- anything at all: a few bytes changed at random, and only a TokenSegError may come out


def mutations(content: bytes, count: int, seed: int, first: int = 0):
    """Copies with one to three bytes changed, cut or inserted at random, from byte `first` on."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        changed = bytearray(content)
        for _ in range(rng.integers(1, 4)):
            position = int(rng.integers(first, len(changed)))
            kind = rng.integers(4)
            if kind <= 1:
                changed[position] = rng.integers(256)
            elif kind == 2:
                del changed[position : position + int(rng.integers(1, 20))]
            else:
                changed[position:position] = rng.integers(256, size=4, dtype=np.uint8).tobytes()
        yield bytes(changed)


@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz"])
def test_changed_images(tmp_path, name):
    scan = write_scan(tmp_path / name, phantom(0, shape=(5, 5, 5))[0][0])
    content = scan.read_bytes()
    toy = toy_model(constant(0.0, 1.0), plan_of("MRI"))
    outcomes = []
    for changed in mutations(content[:500] if name.endswith(".nii") else content, 200, seed=1):
        scan.write_bytes(changed + (content[500:] if name.endswith(".nii") else b""))
        (result,) = segment_files(job_of([toy]), scan, tmp_path / "out" / "mask.nii.gz")
        outcomes.append(result.error)
    assert outcomes.count("") < 200
    assert all("scan" in error for error in outcomes if error)
    assert not any("\n" in error for error in outcomes)


def test_changed_model_descriptions(model, tmp_path):
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    content = (folder / "model.json").read_bytes()
    refusals = 0
    for changed in mutations(content, 200, seed=2):
        (folder / "model.json").write_bytes(changed)
        try:
            load_model(folder)
        except TokenSegError:
            refusals += 1
    assert refusals > 100


def test_changed_weights_with_a_matching_checksum(model, tmp_path):
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    content = (folder / "weights.safetensors").read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    refusals = 0
    for changed in mutations(content[:header], 200, seed=3):
        weights = changed + content[header:]
        (folder / "weights.safetensors").write_bytes(weights)
        change_json(folder / "model.json", weights_sha256=hashlib.sha256(weights).hexdigest())
        try:
            load_model(folder)
        except TokenSegError:
            refusals += 1
    assert refusals > 100


@pytest.mark.parametrize("layout", ["msd", "nnunet"])
def test_changed_manifests(tmp_path, layout):
    dataset = (write_msd if layout == "msd" else write_nnunet)(tmp_path / "ds", 2, shape=(4, 4, 4))
    content = (dataset / "dataset.json").read_bytes()
    refusals = 0
    for changed in mutations(content, 200, seed=4):
        (dataset / "dataset.json").write_bytes(changed)
        for reader in (open_dataset, list_dataset_images):
            try:
                reader(dataset)
            except TokenSegError:
                refusals += 1
    assert refusals > 100


def test_changed_configurations(tmp_path):
    path = tmp_path / "config.toml"
    content = b"[plan]\nsteps = 10\nspacing_mm = [1.0, 1.0, 1.0]\n[network]\nnum_kept = 100\n[train]\nclip_norm = 1.0\n"
    refusals = 0
    for changed in mutations(content, 200, seed=5):
        path.write_bytes(changed)
        try:
            build_run_config(make_plan(), PRESETS["tiny"], read_overrides(path))
        except TokenSegError:
            refusals += 1
    assert refusals > 100
