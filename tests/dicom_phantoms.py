"""DICOM series for tests: intensities follow from the place in the world by a formula, to check any reader against."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.uid import UID, EnhancedMRImageStorage, ExplicitVRLittleEndian, MRImageStorage, generate_uid

SIZE = (12, 10)
"""Rows, columns."""
SPACING_MM = (1.5, 2.0)
"""Between rows, between columns."""
STEP_MM = 3.0
NUM_SLICES = 8
CORNER_MM = (-20.0, 31.0, -7.0)

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
SAGITTAL = (0.0, 1.0, 0.0, 0.0, 0.0, -1.0)
CORONAL = (1.0, 0.0, 0.0, 0.0, 0.0, -1.0)


def oblique() -> tuple[float, ...]:
    """Axial, turned about two axes; written with as many digits as DICOM takes."""
    turn_x, turn_z = np.deg2rad(20.0), np.deg2rad(-12.0)
    about_x = np.array([[1, 0, 0], [0, np.cos(turn_x), -np.sin(turn_x)], [0, np.sin(turn_x), np.cos(turn_x)]])
    about_z = np.array([[np.cos(turn_z), -np.sin(turn_z), 0], [np.sin(turn_z), np.cos(turn_z), 0], [0, 0, 1]])
    turn = about_z @ about_x
    return tuple(float(value) for value in np.concatenate([turn[:, 0], turn[:, 1]]))


ORIENTATIONS = {"axial": AXIAL, "sagittal": SAGITTAL, "coronal": CORONAL, "oblique": oblique()}


def intensity(ras_mm: np.ndarray) -> np.ndarray:
    """Stored value at points (..., 3): no two axes can be mixed up or mirrored without another value."""
    return np.rint(2000 + ras_mm @ np.array([11.0, 7.0, 3.0])).astype(np.int16)


def slice_positions(orientation: Sequence[float], heights_mm: Sequence[float]) -> list[np.ndarray]:
    """First pixels (LPS) of slices at these distances along the normal."""
    normal = np.cross(orientation[:3], orientation[3:])
    return [np.array(CORNER_MM) + height * normal for height in heights_mm]


def slice_pixels(orientation: Sequence[float], position: np.ndarray) -> np.ndarray:
    """Pixels (rows, columns) of the slice whose first pixel is there."""
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    lps = (
        position
        + columns[..., None] * SPACING_MM[1] * np.array(orientation[:3])
        + rows[..., None] * SPACING_MM[0] * np.array(orientation[3:])
    )
    return intensity(lps * (-1, -1, 1))


def write_series(
    folder: Path,
    *,
    orientation: Sequence[float] = AXIAL,
    heights_mm: Sequence[float] | None = None,
    numbers: Sequence[int] | None = None,
    tags: Mapping[str, Any] | None = None,
    add: int = 0,
    change: Callable[[int, Dataset], None] | None = None,
) -> list[Path]:
    """Write one classic series, a file a slice.

    Args:
        folder: Where; made if absent.
        orientation: ImageOrientationPatient.
        heights_mm: Place of each slice along the normal; evenly spaced if not given.
        numbers: InstanceNumber of each slice; counted upwards if not given.
        tags: Elements of all files, over the usual ones.
        add: To all intensities.
        change: Called with the index and dataset of each slice before it is written.
    """
    heights_mm = [STEP_MM * index for index in range(NUM_SLICES)] if heights_mm is None else heights_mm
    numbers = list(range(1, len(heights_mm) + 1)) if numbers is None else numbers
    folder.mkdir(parents=True, exist_ok=True)
    series = {"SeriesInstanceUID": generate_uid(), "StudyInstanceUID": generate_uid(), **(tags or {})}
    paths = []
    for index, position in enumerate(slice_positions(orientation, heights_mm)):
        dataset = image_dataset(MRImageStorage, series)
        dataset.ImagePositionPatient = [f"{value:.10g}" for value in position]
        dataset.ImageOrientationPatient = [f"{value:.10g}" for value in orientation]
        dataset.PixelSpacing = list(SPACING_MM)
        dataset.SliceThickness = STEP_MM
        dataset.InstanceNumber = numbers[index]
        set_pixels(dataset, slice_pixels(orientation, position) + np.int16(add))
        if change is not None:
            change(index, dataset)
        paths.append(folder / f"IM{numbers[index]:04d}-{index}")
        dataset.save_as(paths[-1], enforce_file_format=True)
    return paths


def write_enhanced(
    path: Path,
    *,
    orientation: Sequence[float] = AXIAL,
    order: Sequence[int] | None = None,
    phases: int = 1,
    tags: Mapping[str, Any] | None = None,
) -> Path:
    """Write one enhanced multi-frame file: slices in `order`, each with all its phases (brighter by 100 a phase)."""
    order = list(range(NUM_SLICES)) if order is None else order
    positions = slice_positions(orientation, [STEP_MM * index for index in range(NUM_SLICES)])
    dataset = image_dataset(EnhancedMRImageStorage, tags or {})
    frames, groups = [], []
    for slot in order:
        for phase in range(phases):
            frames.append(slice_pixels(orientation, positions[slot]) + np.int16(100 * phase))
            groups.append(_groups(positions[slot], slot, phase))
    shared = Dataset()
    shared.PlaneOrientationSequence = _item(ImageOrientationPatient=[f"{value:.10g}" for value in orientation])
    shared.PixelMeasuresSequence = _item(PixelSpacing=list(SPACING_MM), SliceThickness=STEP_MM)
    shared.PixelValueTransformationSequence = _item(RescaleSlope="1", RescaleIntercept="0", RescaleType="US")
    dataset.SharedFunctionalGroupsSequence = DicomSequence([shared])
    dataset.PerFrameFunctionalGroupsSequence = DicomSequence(groups)
    dataset.NumberOfFrames = len(frames)
    dataset.InstanceNumber = 1
    set_pixels(dataset, np.stack(frames))
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return path


def image_dataset(kind: UID, tags: Mapping[str, Any]) -> Dataset:
    """A dataset with what every image has; `tags` over the usual values."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = kind
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    values = {
        "StudyInstanceUID": generate_uid(),
        "SeriesInstanceUID": generate_uid(),
        "FrameOfReferenceUID": "1.2.826.0.1.3680043.8.498.1",
        "Modality": "MR",
        "SeriesNumber": 3,
        "SeriesDescription": "phantom",
        "PatientID": "P1",
        "PatientName": "Phantom^One",
        "StudyDate": "20250102",
        "StudyTime": "101500",
        "AcquisitionDate": "20250102",
        "AcquisitionTime": "102000",
        "EchoTime": 2.0,
        "ImageType": ["ORIGINAL", "PRIMARY"],
        **tags,
    }
    for name, value in values.items():
        if value is not None:
            setattr(dataset, name, value)
    return dataset


def set_pixels(dataset: Dataset, pixels: np.ndarray) -> None:
    """Store signed 16-bit pixels, (rows, columns) or (frames, rows, columns)."""
    dataset.Rows, dataset.Columns = pixels.shape[-2:]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit, dataset.PixelRepresentation = 15, 1
    dataset.PixelData = pixels.astype("<i2").tobytes()


def ras_of(affine: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """World coordinates (X, Y, Z, 3) of all voxels of a grid."""
    indices = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    return indices @ affine[:3, :3].T + affine[:3, 3]


def _groups(position: np.ndarray, slot: int, phase: int) -> Dataset:
    group = Dataset()
    group.PlanePositionSequence = _item(ImagePositionPatient=[f"{value:.10g}" for value in position])
    group.FrameContentSequence = _item(
        TemporalPositionIndex=phase + 1,
        DimensionIndexValues=[slot + 1, phase + 1],
        FrameAcquisitionDateTime=f"2025010210{20 + phase:02d}00",
    )
    return group


def _item(**values: Any) -> DicomSequence:
    item = Dataset()
    for name, value in values.items():
        setattr(item, name, copy.copy(value))
    return DicomSequence([item])
