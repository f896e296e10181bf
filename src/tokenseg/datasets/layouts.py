"""Dataset folders of every known layout: told apart, opened, and their cases loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tokenseg.datasets.cases import Case, Dataset, LayoutName
from tokenseg.datasets.dataset_json import read_json
from tokenseg.datasets.mamamia import is_mamamia, list_mamamia_images, read_mamamia
from tokenseg.datasets.msd import list_msd_images, read_msd
from tokenseg.datasets.nnunet import list_nnunet_images, read_nnunet
from tokenseg.errors import DataError, FileError
from tokenseg.imaging.volume import Mask, Volume, check_same_grid, read_channels, read_mask, read_volume
from tokenseg.messages import first_few

_LOOKED_FOR = (
    "dataset.json with 'modality' and 'training' (Medical Segmentation Decathlon), "
    "dataset.json with 'channel_names' and 'file_ending' (nnU-Net v2 raw), "
    "images/ and segmentations/expert/ (MAMA-MIA)"
)


@dataclass(frozen=True, slots=True)
class LabelledCase:
    """Image and reference mask of a case, on one grid, as stored on disk."""

    volume: Volume
    mask: Mask


@dataclass(frozen=True, slots=True)
class _Layout:
    name: LayoutName
    manifest: object


def open_dataset(path: Path) -> Dataset:
    """Open a training dataset; the layout is found from what is in the folder, and `reason` says why.

    Raises:
        FileError: The folder is not there.
        DataError: No layout fits, or one fits and its content cannot be used.
    """
    if not path.is_dir():
        raise FileError(f"dataset {path} is not a folder; give the folder that holds dataset.json or images/")
    layout = _detect(path)
    if layout is None:
        inner = [each.name for each in sorted(path.iterdir()) if is_mamamia(each) or (each / "dataset.json").is_file()]
        hint = f". Datasets in it: {first_few(inner)}; give one of them" if inner else ""
        raise DataError(f"{path} has no known dataset layout; looked for {_LOOKED_FOR}{hint}")
    if layout.name == "msd":
        return read_msd(path, layout.manifest)
    if layout.name == "nnunet":
        return read_nnunet(path, layout.manifest)
    return read_mamamia(path)


def list_dataset_images(path: Path) -> tuple[Case, ...] | None:
    """List all images of a dataset folder, training and test, without labels; None where no layout fits.

    Raises:
        DataError: A layout fits and its content cannot be used.
    """
    layout = _detect(path)
    if layout is None:
        return None
    if layout.name == "msd":
        return list_msd_images(path, layout.manifest)
    if layout.name == "nnunet":
        return list_nnunet_images(path, layout.manifest)
    return list_mamamia_images(path)


def load_case(dataset: Dataset, case: Case) -> LabelledCase:
    """Read image and reference mask of a training case.

    Raises:
        FileError: A file is missing or not a medical image.
        DataError: The case has no label file, or voxels that cannot be used.
        GeometryError: Image and label are not on one grid.
    """
    if case.label is None:
        raise DataError(f"case {case.case_id} has no label file; training and evaluation need one")
    volume = load_image(dataset, case)
    mask = read_mask(case.label)
    check_same_grid(volume, mask, what=(f"image of {case.case_id}", f"label {case.label.name}"))
    return LabelledCase(volume=volume, mask=mask)


def load_image(dataset: Dataset, case: Case) -> Volume:
    """Read all channels of a case (all phases where the layout has phases).

    Raises:
        FileError: A file is missing or not a medical image.
        DataError: The number of channels is wrong, or voxels cannot be used.
        GeometryError: The channels are not on one grid.
    """
    return read_images(case, case.channels or dataset.source_channels)


def read_images(case: Case, channels: tuple[str, ...]) -> Volume:
    """Read the image files of a case, naming its channels."""
    if len(case.images) == 1:
        return read_volume(case.images[0], channels)
    return read_channels(case.images, channels)


def _detect(path: Path) -> _Layout | None:
    manifest_path = path / "dataset.json"
    if manifest_path.is_file():
        values = read_json(manifest_path)
        if not isinstance(values, dict):
            raise DataError(f"{manifest_path} holds a JSON {type(values).__name__}; it must be an object with keys")
        if "channel_names" in values or "file_ending" in values:
            return _Layout("nnunet", values)
        if "modality" in values or "training" in values:
            return _Layout("msd", values)
        raise DataError(f"{manifest_path} has the keys {', '.join(values) or '(none)'}; looked for {_LOOKED_FOR}")
    return _Layout("mamamia", None) if is_mamamia(path) else None
