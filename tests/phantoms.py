"""Tiny datasets on disk for tests: bright ellipsoids in noise, in each layout, the same ones for the same seed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np

Shape = tuple[int, int, int]
CUBE: Shape = (24, 24, 24)
ISOTROPIC_MM = (1.0, 1.0, 1.0)


def phantom(
    seed: int, *, shape: Shape = CUBE, num_channels: int = 1, values: Sequence[int] = (1,)
) -> tuple[np.ndarray, np.ndarray]:
    """An image (C, X, Y, Z) float32 and its mask (X, Y, Z) uint8: nested ellipsoids, `values` from outside to inside.

    The outermost ellipsoid fills about a tenth of the volume; each channel is brighter by another factor inside.
    """
    rng = np.random.default_rng(seed)
    centre = rng.uniform(0.42, 0.58, size=3)
    axes = [(np.arange(size) + 0.5) / size - middle for size, middle in zip(shape, centre, strict=True)]
    radius = np.sqrt(sum(axis**2 for axis in np.meshgrid(*axes, indexing="ij")))
    depth = np.zeros(shape, dtype=int)
    for step in range(len(values)):
        depth += radius < 0.3 * (1 - step / len(values))
    contrast = 1 + np.arange(num_channels)[:, None, None, None]
    image = 100 + 50 * contrast * depth + 10 * rng.standard_normal((num_channels, *shape))
    return image.astype(np.float32), np.array([0, *values], dtype=np.uint8)[depth]


def write_nifti(
    path: Path, array: np.ndarray, spacing_mm: Sequence[float] = ISOTROPIC_MM, affine: np.ndarray | None = None
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.diag([*spacing_mm, 1.0]) if affine is None else affine), path)
    return path


def write_msd(
    root: Path,
    num_cases: int = 6,
    *,
    shape: Shape = CUBE,
    spacing_mm: Sequence[float] = ISOTROPIC_MM,
    channels: Sequence[str] = ("MRI",),
    labels: Mapping[int, str] | None = None,
    num_test: int = 0,
    seed: int = 0,
    name: str = "case",
) -> Path:
    """Medical Segmentation Decathlon: `case_000`...; one channel is stored 3D, several 4D with the channel last."""
    labels = {1: "sphere"} if labels is None else labels
    for index in range(num_cases + num_test):
        image, mask = phantom(seed + index, shape=shape, num_channels=len(channels), values=sorted(labels))
        stored = image[0] if len(channels) == 1 else np.moveaxis(image, 0, -1)
        folder = "imagesTr" if index < num_cases else "imagesTs"
        write_nifti(root / folder / f"{name}_{index:03d}.nii.gz", stored, spacing_mm)
        if index < num_cases:
            write_nifti(root / "labelsTr" / f"{name}_{index:03d}.nii.gz", mask, spacing_mm)
    listed = [f"{name}_{index:03d}.nii.gz" for index in range(num_cases + num_test)]
    write_json(
        root / "dataset.json",
        {
            "name": "Phantom",
            "tensorImageSize": "3D" if len(channels) == 1 else "4D",
            "modality": {str(number): channel for number, channel in enumerate(channels)},
            "labels": {"0": "background"} | {str(value): label for value, label in labels.items()},
            "numTraining": num_cases,
            "numTest": num_test,
            "training": [{"image": f"./imagesTr/{file}", "label": f"./labelsTr/{file}"} for file in listed[:num_cases]],
            "test": [f"./imagesTs/{file}" for file in listed[num_cases:]],
        },
    )
    return root


def write_nnunet(
    root: Path,
    num_cases: int = 6,
    *,
    shape: Shape = CUBE,
    spacing_mm: Sequence[float] = ISOTROPIC_MM,
    channels: Sequence[str] = ("T1",),
    labels: Mapping[str, int | list[int]] | None = None,
    regions_class_order: list[int] | None = None,
    file_ending: str = ".nii.gz",
    num_test: int = 0,
    seed: int = 0,
) -> Path:
    """nnU-Net v2 raw: `case_000_0000.nii.gz`...; `labels` without background, lists for regions."""
    labels = {"sphere": 1} if labels is None else labels
    values = sorted({value for entry in labels.values() for value in (entry if isinstance(entry, list) else [entry])})
    for index in range(num_cases + num_test):
        image, mask = phantom(seed + index, shape=shape, num_channels=len(channels), values=values)
        folder = "imagesTr" if index < num_cases else "imagesTs"
        for number, channel in enumerate(image):
            write_nifti(root / folder / f"case_{index:03d}_{number:04d}{file_ending}", channel, spacing_mm)
        if index < num_cases:
            write_nifti(root / "labelsTr" / f"case_{index:03d}{file_ending}", mask, spacing_mm)
    manifest = {
        "channel_names": {str(number): channel for number, channel in enumerate(channels)},
        "labels": {"background": 0, **labels},
        "numTraining": num_cases,
        "file_ending": file_ending,
    }
    if regions_class_order is not None:
        manifest["regions_class_order"] = regions_class_order
    write_json(root / "dataset.json", manifest)
    return root


def write_mamamia(
    root: Path,
    num_cases: int = 6,
    *,
    shape: Shape = CUBE,
    spacing_mm: Sequence[float] = ISOTROPIC_MM,
    num_phases: Sequence[int] = (3,),
    test_cases: int | None = None,
    seed: int = 0,
) -> Path:
    """MAMA-MIA: patients `DUKE_001`...; phases cycle through `num_phases`; with `test_cases` a csv of splits."""
    patients = [f"DUKE_{index + 1:03d}" for index in range(num_cases)]
    for index, patient in enumerate(patients):
        phases = num_phases[index % len(num_phases)]
        image, mask = phantom(seed + index, shape=shape, num_channels=phases)
        # File names in lower case for every other patient: both are in circulation.
        stem = patient if index % 2 == 0 else patient.lower()
        for number, phase in enumerate(image):
            write_nifti(root / "images" / patient / f"{stem}_{number:04d}.nii.gz", phase, spacing_mm)
        write_nifti(root / "segmentations" / "expert" / f"{stem}.nii.gz", mask, spacing_mm)
    if test_cases is not None:
        train, test = patients[: num_cases - test_cases], patients[num_cases - test_cases :]
        rows = [f"{case},{test[row] if row < len(test) else ''}" for row, case in enumerate(train)]
        (root / "train_test_splits.csv").write_text("\n".join(["train_split,test_split", *rows]) + "\n")
    return root


def write_json(path: Path, values: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=1))
    return path


def change_json(path: Path, **changes: object) -> None:
    """Replace top-level keys of a JSON file; None removes a key."""
    values = json.loads(path.read_text()) | changes
    write_json(path, {key: value for key, value in values.items() if value is not None})
