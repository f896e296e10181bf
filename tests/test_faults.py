"""Killed at any moment, on a full disk, with files that vanish: nothing is lost, nothing half is taken for whole."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dicom_phantoms import write_series
from faults import KILLED, Server, hashes, leftovers, server_in
from phantoms import phantom, write_msd, write_nifti
from test_itk import save
from tokenseg.errors import TokenSegError
from tokenseg.files import remove_leftovers
from tokenseg.imaging.volume import read_mask
from tokenseg.options import TrainOptions
from tokenseg.progress import Silent
from tokenseg.saved_model.checkpoint import load_model
from tokenseg.segmentation.privacy import shown_name
from tokenseg.segmentation.segment import segment_files
from tokenseg.training.csv_log import read_log
from tokenseg.training.train import train
from toy_models import job_of, save_untrained

pytest.importorskip("monai")
pytestmark = pytest.mark.skipif(os.name != "posix", reason="kills and limits are of POSIX systems")

SHAPE = (16, 16, 16)
TRAIN = ("--preset", "tiny", "--max-steps", "8", "--device", "cpu", "--threads", "1")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with server_in(tmp_path_factory.mktemp("server")) as started:
        yield started


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The user's files: scans, a dataset, a configuration, two models."""
    place = tmp_path_factory.mktemp("mine")
    for number in range(3):
        write_nifti(place / "scans" / f"scan{number}.nii.gz", phantom(number, shape=SHAPE)[0][0])
    save(place / "scans" / "scan3.mha", phantom(3, shape=SHAPE)[0][0])
    write_msd(place / "dataset", 3, shape=SHAPE)
    (place / "config.toml").write_text("[plan]\nwindow_vox = [16, 16, 16]\nbatch_size = 1\n")
    for seed in (0, 1):
        save_untrained(place / f"model{seed}", seed=seed)
    return place


def segmenting(place: Path, out: Path, seed: int = 0) -> list[str | Path]:
    return ["segment", place / "scans", out, "--model", place / f"model{seed}", "--engine", "torch", "--threads", "1"]


def training(place: Path, run: Path) -> list[str | Path]:
    return ["train", place / "dataset", run, *TRAIN, "--config", place / "config.toml", "--resume"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the commands have: with other numbers of threads masks may differ in a voxel."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def segmented(place: Path, server: Server, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, float]:
    """Masks of either model that nothing disturbed, and how long it takes."""
    folder = tmp_path_factory.mktemp("segmented")
    begun = time.monotonic()
    for seed in (0, 1):
        assert server.run(segmenting(place, folder / str(seed), seed)) == 0, server.printed
    return folder / "0", folder / "1", (time.monotonic() - begun) / 2


@pytest.fixture(scope="module")
def trained(place: Path, server: Server, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A run that nothing disturbed, and how long it takes."""
    run = tmp_path_factory.mktemp("trained") / "run"
    begun = time.monotonic()
    assert server.run(training(place, run)) == 0, server.printed
    return run, time.monotonic() - begun


def kill_often(
    server: Server,
    kills: int,
    span_s: float,
    command: Callable[[Path], list[str | Path]],
    begin: Callable[[], Path],
    checks: tuple[Callable[[Path], None], Callable[[Path], None]],
) -> None:
    """Run a command again and again, killed at random moments, until it comes to its end; and all that anew.

    Args:
        server: Runs it.
        kills: How often in all.
        span_s: Kills come within so many seconds of the start.
        command: Of an output folder.
        begin: Makes a new output folder.
        checks: After each kill, and at each end.
    """
    rng, done, folder = np.random.default_rng(kills), 0, begin()
    while True:
        delay_s = rng.uniform(0, span_s) if done < kills else 300.0
        code = server.run(command(folder), kill_after_s=delay_s)
        if code == KILLED:
            done += 1
            checks[0](folder)
            continue
        assert code == 0, server.printed
        checks[1](folder)
        if done >= kills:
            return
        folder = begin()


def masks_in(folder: Path) -> dict[str, str]:
    return {name: digest for name, digest in hashes(folder).items() if name.startswith("scan")}


def check_statuses(folder: Path) -> None:
    """A mask that is said to be done is there, as it is said, unless a later call has begun it anew."""
    masks = {
        shown_name(path.name.split(".")[0], show_names=False) for path in folder.glob("scan*") if "_qc" not in path.name
    }
    for line in (folder / "status.jsonl").read_text().splitlines():
        if line.endswith("}"):
            assert json.loads(line)["case"] in masks


def kill_segmenting(server: Server, place: Path, segmented: tuple[Path, Path, float], work: Path, kills: int) -> None:
    """Over masks of another model, which are an earlier result until they are replaced."""
    fresh, earlier, span_s = segmented
    before, new, old = hashes(place), masks_in(fresh), masks_in(earlier)
    count = iter(range(10**6))

    def begin() -> Path:
        out = Path(shutil.copytree(earlier, work / f"out{next(count)}"))
        (out / "notes.txt").write_text("mine")
        return out

    def after_kill(out: Path) -> None:
        found = masks_in(out)
        assert found.keys() == old.keys()
        assert all(digest in (old[name], new[name]) for name, digest in found.items())
        assert (out / "notes.txt").read_text() == "mine"
        assert hashes(place) == before
        check_statuses(out)

    def at_end(out: Path) -> None:
        after_kill(out)
        assert masks_in(out) == new
        assert (out / "summary.csv").read_bytes() == (fresh / "summary.csv").read_bytes()
        assert leftovers(out) == []

    kill_often(server, kills, span_s, lambda out: segmenting(place, out), begin, (after_kill, at_end))


def test_segment_killed_a_few_times(server, place, segmented, tmp_path):
    kill_segmenting(server, place, segmented, tmp_path, 5)


@pytest.mark.long
def test_segment_killed_often(server, place, segmented, tmp_path):
    kill_segmenting(server, place, segmented, tmp_path, 60)


def results_of(run: Path) -> dict[str, object]:
    """All of a run that the time does not change."""
    names = ("model/weights.safetensors", "model/model.json", "config.toml", "run.json", "splits.json")
    kept = {name: (run / name).read_bytes() for name in (*names, "validation/summary.csv")}
    kept["scores"] = (run / "validation" / "scores.json").read_bytes().replace(bytes(run), b"")
    losses = [(row["step"], row["loss"], row["val_dice"]) for row in read_log(run / "log.csv")]
    masks = {name: digest for name, digest in hashes(run / "validation").items() if name.endswith(".nii.gz")}
    return kept | {"log": losses, "masks": masks}


def check_run(run: Path) -> None:
    """What is there of a run that was killed is whole."""
    if (run / "model").exists():
        load_model(run / "model")
    if (run / "state.safetensors").exists():
        load_file(run / "state.safetensors")
        read_log(run / "log.csv")
    for path in run.glob("validation/*.nii.gz"):
        assert read_mask(path).array.shape == SHAPE
    for path in run.glob("*.json"):
        json.loads(path.read_text())
    if (run / "report.html").exists():
        assert (run / "report.html").read_text().rstrip().endswith("</html>")


def kill_training(server: Server, place: Path, trained: tuple[Path, float], work: Path, kills: int) -> None:
    straight, span_s = trained
    before, expected, count = hashes(place), results_of(straight), iter(range(10**6))

    def after_kill(run: Path) -> None:
        assert hashes(place) == before
        check_run(run)

    def at_end(run: Path) -> None:
        after_kill(run)
        assert results_of(run) == expected
        ours, theirs = (load_file(folder / "state.safetensors") for folder in (run, straight))
        assert ours.keys() == theirs.keys()
        assert all(bool((tensor == theirs[name]).all()) for name, tensor in ours.items())
        assert leftovers(run) == []

    def begin() -> Path:
        return work / f"run{next(count)}"

    kill_often(server, kills, span_s, lambda run: training(place, run), begin, (after_kill, at_end))


def test_train_killed_a_few_times(server, place, trained, tmp_path):
    kill_training(server, place, trained, tmp_path, 4)


@pytest.mark.long
def test_train_killed_often(server, place, trained, tmp_path):
    kill_training(server, place, trained, tmp_path, 60)


# ---- full disks


@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".nrrd", ".mha"])
@pytest.mark.parametrize("file_bytes", [0, 60])
def test_a_mask_on_a_full_disk(server, place, tmp_path, ending, file_bytes):
    out = tmp_path / "out" / f"mask{ending}"
    scan = place / "scans" / "scan0.nii.gz"
    command = ["segment", scan, out, "--model", place / "model0", "--engine", "torch", "--threads", "1"]
    earlier = [place / "model1" if word == place / "model0" else word for word in command]
    assert server.run(earlier) == 0, server.printed
    before, mine = hashes(tmp_path / "out"), hashes(place)
    assert server.run(command, file_bytes=file_bytes) == 2
    assert f"error: cannot write {out}: " in server.printed
    assert "Traceback" not in server.printed
    assert hashes(tmp_path / "out") == before
    assert hashes(place) == mine
    assert server.run(command) == 0, server.printed
    assert read_mask(out).array.shape == SHAPE


@pytest.mark.parametrize("file_bytes", [0, 50, 200, 700])
def test_a_cohort_on_a_full_disk(server, place, segmented, tmp_path, file_bytes):
    fresh, earlier, _ = segmented
    out = Path(shutil.copytree(earlier, tmp_path / "out"))
    assert server.run(segmenting(place, out), file_bytes=file_bytes) in (1, 2)
    assert "cannot write " in server.printed
    assert "Traceback" not in server.printed
    old, new = masks_in(earlier), masks_in(fresh)
    # Of a case that failed, no mask stays: one of an earlier call would pass for its result.
    assert all(digest in (old[name], new[name]) for name, digest in masks_in(out).items())
    assert server.run(segmenting(place, out)) == 0, server.printed
    assert masks_in(out) == new
    assert leftovers(out) == []


def test_training_on_a_full_disk(server, place, trained, tmp_path):
    """More and more room: each time it ends elsewhere, and in the end it is as if nothing had been."""
    straight, _ = trained
    run, before = tmp_path / "run", hashes(place)
    sizes = sorted({path.stat().st_size for path in straight.rglob("*") if path.is_file()})
    for file_bytes in [0, *(size - 1 for size in sizes[1:-1:3])]:
        assert server.run(training(place, run), file_bytes=file_bytes) == 2
        assert "error: cannot write " in server.printed
        assert leftovers(run) == [] if run.exists() else True
        assert hashes(place) == before
    assert server.run(training(place, run)) == 0, server.printed
    assert results_of(run) == results_of(straight)


@pytest.mark.parametrize("command", ["segment", "train"])
def test_a_folder_where_nothing_can_be_made(server, place, command):
    """Not even by root."""
    if not Path("/proc/self").exists():
        pytest.skip("needs the folder /proc")
    folder = Path("/proc/tokenseg")
    words = segmenting(place, folder) if command == "segment" else training(place, folder)
    before = hashes(place)
    assert server.run(words) == 2
    assert f"error: output {folder} cannot be written: " in server.printed
    assert "Traceback" not in server.printed
    assert hashes(place) == before


# ---- files that vanish


class Vanishing(Silent):
    """Does something at the start of a stage, or after a case of it."""

    def __init__(self, stage: str, act: Callable[[], object], after: int = 0) -> None:
        self._wanted, self._act, self._left, self._on = stage, act, after, False

    def stage(self, name: str, total: int, done: int = 0) -> None:
        self._on = name == self._wanted
        if self._on and self._left == 0:
            self._act()

    def advance(self, note: str = "") -> None:
        if self._on:
            self._left -= 1
            if self._left == 0:
                self._act()


def test_a_scan_that_vanishes(place, segmented, tmp_path):
    fresh, out = segmented[0], tmp_path / "out"
    scans = Path(shutil.copytree(place / "scans", tmp_path / "scans"))
    model = load_model(place / "model0")
    # The one before it may have been read ahead.
    hide = Vanishing("segmenting", lambda: next(scans.glob("scan3.*")).rename(tmp_path / "hidden"), after=1)
    results = segment_files(job_of([model], progress=hide), scans, out)
    assert [bool(result.error) for result in results] == [False, False, False, True]
    assert "does not exist" in results[3].error
    assert not list(out.glob("scan3*"))
    (tmp_path / "hidden").rename(scans / next((place / "scans").glob("scan3.*")).name)
    assert not any(result.error for result in segment_files(job_of([model]), scans, out))
    assert masks_in(out) == masks_in(fresh)


def test_an_output_folder_that_vanishes(place, segmented, tmp_path):
    fresh, out = segmented[0], tmp_path / "out"
    model = load_model(place / "model0")
    try:
        segment_files(
            job_of([model], progress=Vanishing("segmenting", lambda: shutil.rmtree(out), after=2)), place / "scans", out
        )
    except TokenSegError as fault:
        assert str(out) in str(fault)  # noqa: PT017
    segment_files(job_of([model]), place / "scans", out)
    assert masks_in(out) == masks_in(fresh)


def test_a_slice_that_vanishes(place, tmp_path):
    paths = write_series(tmp_path / "exam")
    out = tmp_path / "out" / "mask_seg.dcm"
    model = load_model(place / "model0")
    # The list of slices is made before; of a single exam nothing is told until it is done.
    (result,) = segment_files(
        job_of([model], progress=Vanishing("segmenting", paths[3].unlink)), tmp_path / "exam", tmp_path / "many"
    )
    assert paths[3].name in result.error
    assert not (tmp_path / "many" / "exam_seg.dcm").exists()
    (result,) = segment_files(job_of([model]), tmp_path / "exam", out)
    assert "slice(s) are missing" in result.error
    assert not out.exists()


@pytest.mark.parametrize(("stage", "after"), [("reading", 1), ("preparing", 1), ("segmenting", 0)])
def test_a_training_case_that_vanishes(place, trained, tmp_path, stage, after):
    """The dataset, given back, is trained on to the same end."""
    dataset = Path(shutil.copytree(place / "dataset", tmp_path / "dataset"))
    before, run, images = hashes(dataset), tmp_path / "run", dataset / "imagesTr"
    options = TrainOptions(preset="tiny", max_steps=8, device="cpu", threads=1, config=place / "config.toml")

    def hide() -> None:
        images.rename(tmp_path / "hidden")

    with pytest.raises(TokenSegError):
        train(dataset, run, options, Vanishing(stage, hide, after))
    assert not (run / "report.html").exists()
    (tmp_path / "hidden").rename(images)
    train(dataset, run, TrainOptions(**(vars(options) | {"resume": True})))
    assert hashes(dataset) == before
    weights = "model/weights.safetensors"
    assert (run / weights).read_bytes() == (trained[0] / weights).read_bytes()


def test_leftovers_are_no_results(place, tmp_path):
    """A killed write beside scans is not taken for one."""
    scans = Path(shutil.copytree(place / "scans", tmp_path / "scans"))
    shutil.copy(scans / "scan0.nii.gz", scans / ".partial-01234567-scan9.nii.gz")
    results = segment_files(job_of([load_model(place / "model0")]), scans, tmp_path / "out")
    assert [result.case_id for result in results] == ["scan0", "scan1", "scan2", "scan3"]
    remove_leftovers(scans)
    assert hashes(scans) == hashes(place / "scans")
