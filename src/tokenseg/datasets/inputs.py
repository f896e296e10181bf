"""Inputs of `segment`: files, folders, datasets or DICOM; each case read with named channels, and masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tokenseg.config import Plan
from tokenseg.datasets.case_table import is_case_table, read_case_table
from tokenseg.datasets.cases import Case, check_case_ids
from tokenseg.datasets.folders import group_channels, image_files, is_unnamed, name_channels
from tokenseg.datasets.layouts import list_dataset_images, read_images
from tokenseg.errors import ConfigError, DataError, FileError
from tokenseg.files import check_no_device, check_there
from tokenseg.imaging.channel_names import phase_name
from tokenseg.imaging.dicom.exam import exam_size, list_exams, phase_table, read_exam
from tokenseg.imaging.dicom.seg import NO_FINDINGS_ENDING, read_seg
from tokenseg.imaging.dicom_files import may_be_dicom
from tokenseg.imaging.formats import IMAGE_ENDINGS, image_ending, image_stem, is_named_as_image, voxel_bytes
from tokenseg.imaging.orientation import orientation, shape3
from tokenseg.imaging.volume import Mask, Volume, read_grid, read_mask
from tokenseg.shapes import Affine


def list_inputs(path: Path, plan: Plan, series: str = "") -> tuple[Case, ...]:
    """List the cases that an input path stands for; no voxel is read.

    A file is one case. A folder is a dataset in a known layout (all its images, training and test), or, where that
    lists none, flat: files
    named `CASE_0000.nii.gz`, `CASE_0001.nii.gz`... are the channels of a case where the number is one of the model's;
    every other file is a case of its own (4D where the model has several channels). A folder without images, a zip
    archive, and a DICOM file hold DICOM studies, each a case. A `.csv` file is a table of cases (`case_table.py`).

    Args:
        path: The input.
        plan: The model's plan, for the number and names of its channels.
        series: Which DICOM series is wanted, see `SegmentOptions.series`.

    Returns:
        Cases without labels, sorted by id. A case with missing channels is listed; `read_input` refuses it.

    Raises:
        FileError: The path is not there, is not named as an image, or is a folder without images.
        DataError: A dataset layout is recognised but its `dataset.json` cannot be used, two cases share an id, or a
            table cannot be used.
        ConfigError: A series is wanted of what is not DICOM, or the libraries for DICOM are not installed.
    """
    if not path.exists():
        raise FileError(f"input {path} does not exist; check the path")
    check_no_device(path)
    if is_case_table(path):
        return read_case_table(path, plan, series)
    cases = _image_cases(path, plan)
    if cases and series:
        raise ConfigError(f"--series {series}: {path} is not DICOM; leave it out")
    if not cases and may_be_dicom(path):
        cases = tuple(Case(exam.name, exam.name, (), exam=exam) for exam in list_exams(path, series))
    if not cases and path.is_file():
        image_ending(path)  # says which names are images
    if not cases:
        raise FileError(
            f"input {path} has no images ({', '.join(IMAGE_ENDINGS)}) directly in it, no DICOM images below it, and is "
            "no dataset folder; give a file, a folder of images, a DICOM study, or a dataset"
        )
    check_case_ids([case.case_id for case in cases], path)
    return cases


def _image_cases(path: Path, plan: Plan) -> tuple[Case, ...]:
    if path.is_file():
        return _flat_cases([path], plan) if is_named_as_image(path) else ()
    listed = list_dataset_images(path)
    # A dataset.json may lie beside loose images, as nnU-Net puts one where it predicts.
    if not listed:
        return _flat_cases(image_files(path), plan)
    return tuple(replace(case, channels=_model_names(case.channels, plan)) for case in listed)


def describe_input(case: Case, plan: Plan) -> tuple[str, ...]:
    """What was found and is used of a DCE exam in DICOM, a line each; else nothing.

    Raises:
        TokenSegError: The exam cannot be used, see `read_input`.
    """
    return () if case.exam is None else phase_table(case.exam, plan)


_DICOM_BYTES = 4
"""Of a voxel while it is decoded: as stored, and decoded."""


class InputSize(NamedTuple):
    """What is known of a scan before it is read."""

    shape: tuple[int, int, int]
    """Voxels along the stored axes."""
    affine: Affine
    num_channels: int
    bytes_while_read: int
    """Memory a voxel that reading takes beside the float32 intensities."""

    @property
    def ras_shape(self) -> tuple[int, int, int]:
        """Voxels along right, anterior, superior."""
        axes, _ = orientation(self.affine)
        return shape3(self.shape[stored] for stored in np.argsort(axes))

    @property
    def ras_spacing_mm(self) -> tuple[float, float, float]:
        """Spacing along right, anterior, superior."""
        axes, _ = orientation(self.affine)
        x, y, z = (float(np.linalg.norm(self.affine[:3, stored])) for stored in np.argsort(axes))
        return x, y, z


def input_size(case: Case, plan: Plan) -> InputSize:
    """Read of a case how large it is.

    Raises:
        TokenSegError: It cannot be read, see `read_input`.
    """
    if case.exam is not None:
        return InputSize(*exam_size(case.exam, plan), _DICOM_BYTES)
    _checked_channels(case, plan)
    grids = [read_grid(path) for path in case.images]
    shape, affine = grids[0].shape, grids[0].affine
    return InputSize(shape, affine, sum(grid.num_channels for grid in grids), voxel_bytes(case.images[0]))


def read_written_mask(case: Case, path: Path, plan: Plan) -> Mask:
    """Read back the mask that was written of a case, in whatever form it was: a file, a DICOM SEG, or no findings.

    Raises:
        TokenSegError: It, or the scan that its grid comes from, cannot be read any more.
    """
    if is_named_as_image(path):
        return read_mask(path)
    volume = read_input(case, plan)
    if path.name.endswith(NO_FINDINGS_ENDING):
        return Mask(np.zeros(volume.array.shape[1:], np.uint8), volume.affine)
    return read_seg(path, plan.labels, volume)


def read_input(case: Case, plan: Plan) -> Volume:
    """Read a case that `list_inputs` found, with its channels named as the model names them.

    The volume may bring more channels than the model needs (all phases of a DCE exam do); it never brings fewer.

    Raises:
        FileError: A file is missing, truncated or not a medical image.
        DataError: Channels are missing or too many, or voxels cannot be used.
        GeometryError: The channels are not on one grid.
    """
    if case.exam is not None:
        return read_exam(case.exam, plan)
    return read_images(case, _checked_channels(case, plan))


def _checked_channels(case: Case, plan: Plan) -> tuple[str, ...]:
    """Names of the channels of a case that is there, none missing and none unknown."""
    if case.problem:
        raise DataError(case.problem)
    for path in case.images:
        check_there(path)
    # A listed case knows its channels; a loose file's are in its header. A patient folder may be empty.
    channels = _file_channels(case.images[0], plan) if case.images and not case.channels else case.channels
    missing = [name for name in plan.source_channels if name not in channels]
    unknown = [name for name in channels if is_unnamed(name)]
    if missing or unknown:
        given = ", ".join(_described(case, channels)) or "no image"
        faults = ([f"{', '.join(missing)} is missing"] if missing else []) + (
            [f"{', '.join(unknown)} is none of them"] if unknown else []
        )
        files = ", ".join(f"_{number:04d} {name}" for number, name in enumerate(plan.source_channels))
        raise DataError(
            f"model expects {', '.join(plan.source_channels)}; {case.case_id} has {given}: {'; '.join(faults)}. "
            f"Numbers in file names mean: {files}"
        )
    return channels


def _flat_cases(paths: Sequence[Path], plan: Plan) -> tuple[Case, ...]:
    names = plan.source_channels
    groups = {case_id: files for case_id, files in group_channels(paths).items() if any(n < len(names) for n in files)}
    grouped = {path for files in groups.values() for path in files.values()}
    cases = [
        Case(case_id, case_id, tuple(files.values()), channels=name_channels(files, _known_names(plan, max(files))))
        for case_id, files in groups.items()
    ]
    cases += [Case(image_stem(path), image_stem(path), (path,)) for path in paths if path not in grouped]
    return tuple(sorted(cases, key=lambda case: case.case_id))


def _file_channels(path: Path, plan: Plan) -> tuple[str, ...]:
    if not plan.joint_zscore:
        return plan.source_channels
    count = read_grid(path).num_channels
    return _known_names(plan, count - 1)[:count]


def _known_names(plan: Plan, last_number: int) -> tuple[str, ...]:
    """Names by number: the model's channels, and in a DCE exam the later phases, which count in its z-score."""
    if not plan.joint_zscore:
        return plan.source_channels
    return plan.source_channels + tuple(map(phase_name, range(len(plan.source_channels), last_number + 1)))


def _model_names(channels: tuple[str, ...], plan: Plan) -> tuple[str, ...]:
    """Write a dataset's channel names as the model does: by name whatever the order, a single one as it is."""
    if len(channels) == len(plan.source_channels) == 1:
        return plan.source_channels
    spellings = {name.casefold(): name for name in plan.source_channels}
    return tuple(spellings.get(name.casefold(), name) for name in channels)


def _described(case: Case, channels: tuple[str, ...]) -> tuple[str, ...]:
    if len(case.images) != len(channels):
        return channels
    return tuple(f"{name} ({path.name})" for name, path in zip(channels, case.images, strict=True))
