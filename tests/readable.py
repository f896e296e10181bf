"""Small sound files of each kind that is read, and a function that reads one of any content."""

from __future__ import annotations

import gzip
import hashlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import torch

from dicom_phantoms import write_enhanced, write_series
from phantoms import phantom, write_json, write_msd, write_nifti, write_nnunet
from plans import make_plan
from test_itk import save
from tokenseg.config import PRESETS, Plan, TrainConfig
from tokenseg.datasets.inputs import input_size, list_inputs, read_input
from tokenseg.datasets.layouts import load_case, open_dataset
from tokenseg.errors import TokenSegError
from tokenseg.imaging.volume import Volume, read_grid, read_mask, read_volume, write_mask
from tokenseg.inference.memory import plan_memory
from tokenseg.plan_grid.preprocess import grid_shape
from tokenseg.progress import Silent
from tokenseg.saved_model.checkpoint import load_model
from tokenseg.segmentation.output_files import check_output_folder
from tokenseg.segmentation.segment import segment_files
from tokenseg.segmentation.status import read_statuses
from tokenseg.training.cache import prepare_cases
from tokenseg.training.csv_log import COLUMNS, CsvLog, read_log
from tokenseg.training.loop import build_optimizer
from tokenseg.training.state import SavedStep, load_state, save_state
from toy_models import as_stored, job_of, save_untrained, untrained

PLAN = as_stored(make_plan(), channels=("MRI",), source_channels=("MRI",))
SHAPE = (5, 6, 7)


class Readable(NamedTuple):
    """A file of one kind."""

    content: bytes
    """Sound."""
    read: Callable[[bytes], object]
    """Puts another content in its place, and reads all that reads such a file."""
    header_bytes: int | None = None
    """Where damage tells most."""
    text: bool = False
    """Whether numbers stand there as text."""
    forgiving: bool = False
    """Whether a part of it is as good as a file."""


def voxels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 50, SHAPE).astype(np.int16)


def all_of(*readers: Callable[[], object]) -> None:
    """Call each, whatever became of the others; raises the last `TokenSegError`."""
    fault: TokenSegError | None = None
    for reader in readers:
        try:
            reader()
        except TokenSegError as error:
            fault = error
    if fault is not None:
        raise fault


def read_image(path: Path, out: Path) -> None:
    """Read an image in all ways, plan its segmentation, and write a mask of it."""

    def write(volume: Volume) -> None:
        grid_shape(volume.array.shape[1:], volume.spacing_mm, PLAN)
        write_mask(out / f"mask{''.join(path.suffixes)}", np.zeros(volume.array.shape[1:], np.uint8), volume)

    all_of(lambda: read_mask(path), lambda: read_grid(path), lambda: write(read_volume(path, ("MRI",))))
    read_inputs(path)


def read_inputs(path: Path) -> None:
    """List what a path holds, look at its size, and read it."""
    for case in list_inputs(path, PLAN):
        all_of(lambda case=case: read_input(case, PLAN), lambda case=case: plan_of_memory(case))


def plan_of_memory(case: object) -> None:
    plan_memory(input_size(case, PLAN), PLAN, [PRESETS["tiny"]], limit_mib=None, compiled=False)


def image(folder: Path, name: str, **options: bool) -> Readable:
    path = folder / name
    if name.endswith((".nii", ".nii.gz")):
        kind = nib.Nifti2Image if name.startswith("two") else nib.Nifti1Image
        nib.save(kind(voxels(), np.diag([1, 1, 2, 1.0])), path)
    else:
        save(path, voxels(), **options)

    def read(content: bytes) -> None:
        path.write_bytes(content)
        read_image(path, folder)

    header = 540 if name.startswith("two") else 352 if name.endswith(".nii") else 420
    # What a gzip stream of NRRD or MetaImage lacks at its end is a checksum that SimpleITK does not miss.
    return Readable(path.read_bytes(), read, header, ".nii" not in name, forgiving=options.get("compressed", False))


def repacked(folder: Path) -> Readable:
    """A NIfTI file within an intact gzip file."""
    inner = image(folder, "inner.nii")
    outer = image(folder, "outer.nii.gz")
    return Readable(inner.content, lambda content: outer.read(gzip.compress(content, 1)), 352)


def dicom(folder: Path, kind: str) -> Readable:
    if kind == "enhanced":
        path = root = write_enhanced(folder / "enhanced.dcm", order=[0, 1, 2])
    else:
        paths = write_series(folder / "exam", heights_mm=[0.0, 3.0, 6.0])
        path, root = paths[1], folder / "exam"
    if kind == "zip":
        path = root = folder / "exam.zip"
        with zipfile.ZipFile(root, "w", zipfile.ZIP_DEFLATED) as archive:
            for each in paths:
                archive.write(each, f"study/{each.name}")

    def read(content: bytes) -> None:
        path.write_bytes(content)
        read_inputs(root)

    return Readable(path.read_bytes(), read, 1200 if kind == "slice" else None)


def model(folder: Path, name: str) -> Readable:
    """A file of a model folder, of which the other one does not say that it was changed."""
    place = save_untrained(folder / "model")
    facts = json.loads((place / "model.json").read_text())

    def read(content: bytes) -> None:
        (place / name).write_bytes(content)
        if name == "weights.safetensors":
            write_json(place / "model.json", facts | {"weights_sha256": hashlib.sha256(content).hexdigest()})
        load_model(place)

    content = (place / name).read_bytes()
    header = 8 + int.from_bytes(content[:8], "little") if name == "weights.safetensors" else None
    return Readable(content, read, header, text=True)


def state(folder: Path) -> Readable:
    path, network = folder / "state.safetensors", untrained().network
    optimizer = build_optimizer(network.train(), TrainConfig())
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    save_state(path, network, optimizer, SavedStep(3, 0.5))
    content = path.read_bytes()

    def read(changed: bytes) -> None:
        path.write_bytes(changed)
        load_state(path, network, optimizer)

    return Readable(content, read, 8 + int.from_bytes(content[:8], "little"), text=True)


def dataset(folder: Path, layout: str, name: str = "dataset.json") -> Readable:
    place = (write_msd if layout == "msd" else write_nnunet)(folder / "dataset", 2, shape=(4, 4, 4))
    if name != "dataset.json":
        write_json(place / name, [{"train": ["case_000"], "val": ["case_001"]}])

    def load() -> None:
        opened = open_dataset(place)
        for case in opened.cases:
            load_case(opened, case)

    def read(content: bytes) -> None:
        (place / name).write_bytes(content)
        all_of(
            load,
            lambda: read_inputs(place),
            lambda: check_output_folder(folder / "out", list_inputs(place, PLAN), wanted=True),
        )

    return Readable((place / name).read_bytes(), read, text=True)


def status(folder: Path) -> Readable:
    made = load_model(save_untrained(folder / "model", PLAN))
    for number in range(2):
        write_nifti(folder / "in" / f"scan{number}.nii.gz", phantom(number, shape=SHAPE)[0][0])
    segment_files(job_of([made]), folder / "in", folder / "out")
    masks = {path: path.read_bytes() for path in (folder / "out").glob("*.nii.gz")}
    path = folder / "out" / "status.jsonl"

    def read(content: bytes) -> None:
        path.write_bytes(content)
        read_statuses(folder / "out")
        assert not any(result.error for result in segment_files(job_of([made]), folder / "in", folder / "out"))
        assert {path: path.read_bytes() for path in (folder / "out").glob("*.nii.gz")} == masks

    return Readable(path.read_bytes(), read, text=True, forgiving=True)


def csv_log(folder: Path) -> Readable:
    path = folder / "log.csv"
    log = CsvLog(path)
    for step in range(1, 5):
        log.write({name: step if name == "step" else 0.5 for name in COLUMNS})
    log.close()

    def read(content: bytes) -> None:
        path.write_bytes(content)
        read_log(path)
        CsvLog(path, 3).close()

    return Readable(path.read_bytes(), read, text=True, forgiving=True)


def cached(folder: Path, name: str) -> Readable:
    opened = open_dataset(write_msd(folder / "dataset", 2, shape=(8, 8, 8)))
    plan = Plan.model_validate(PLAN.model_dump() | {"labels": [label.model_dump() for label in opened.labels]})

    def prepare() -> None:
        prepare_cases(opened, opened.cases, plan, folder / "cache", Silent())

    prepare()
    (path,) = (folder / "cache").glob(f"*/case_000/{name}.npy")

    def read(content: bytes) -> None:
        path.write_bytes(content)
        prepare()

    return Readable(path.read_bytes(), read, 128, text=True)


KINDS: dict[str, Callable[[Path], Readable]] = {
    "nifti": lambda folder: image(folder, "scan.nii"),
    "nifti-2": lambda folder: image(folder, "two.nii"),
    "nifti-gz": lambda folder: image(folder, "scan.nii.gz"),
    "nifti-in-gz": repacked,
    "nrrd": lambda folder: image(folder, "scan.nrrd", compressed=False),
    "nrrd-gz": lambda folder: image(folder, "scan.nrrd", compressed=True),
    "mha": lambda folder: image(folder, "scan.mha", compressed=False),
    "mha-gz": lambda folder: image(folder, "scan.mha", compressed=True),
    "dicom": lambda folder: dicom(folder, "slice"),
    "dicom-enhanced": lambda folder: dicom(folder, "enhanced"),
    "dicom-zip": lambda folder: dicom(folder, "zip"),
    "model.json": lambda folder: model(folder, "model.json"),
    "weights": lambda folder: model(folder, "weights.safetensors"),
    "state": state,
    "dataset-msd": lambda folder: dataset(folder, "msd"),
    "dataset-nnunet": lambda folder: dataset(folder, "nnunet"),
    "splits": lambda folder: dataset(folder, "nnunet", "splits_final.json"),
    "status": status,
    "log": csv_log,
    "cache-image": lambda folder: cached(folder, "image"),
    "cache-points": lambda folder: cached(folder, "points"),
}
"""What makes a file of each kind in a folder."""
