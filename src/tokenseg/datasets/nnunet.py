"""Reader of the nnU-Net version 2 raw layout: `imagesTr/CASE_0000.nii.gz`, `labelsTr/CASE.nii.gz`, `dataset.json`.

Labels map name to value, or name to several values for regions that overlap; `splits_final.json` is honoured.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from tokenseg.config import Label
from tokenseg.datasets.cases import (
    Case,
    Dataset,
    Split,
    check_case_ids,
    check_cases,
    check_channel_names,
    check_label_names,
)
from tokenseg.datasets.dataset_json import Manifest, parse_manifest, read_json
from tokenseg.datasets.folders import check_path_text, group_channels, image_files, name_channels
from tokenseg.errors import DataError
from tokenseg.imaging.channel_names import is_ct
from tokenseg.imaging.formats import IMAGE_ENDINGS, image_stem
from tokenseg.messages import first_few


class _Files(Manifest):
    images: Annotated[tuple[str, ...], Field(min_length=1)]
    label: str


class _SplitEntry(Manifest):
    train: Annotated[tuple[str, ...], Field(min_length=1)]
    val: Annotated[tuple[str, ...], Field(min_length=1)]


class _NnunetManifest(Manifest):
    channel_names: dict[int, str]
    labels: dict[str, int | tuple[int, ...]]
    file_ending: str
    regions_class_order: tuple[int, ...] | None = None
    dataset: dict[str, _Files] | None = None


def read_nnunet(root: Path, values: object) -> Dataset:
    """Read a dataset for training.

    Args:
        root: Folder that holds `dataset.json`.
        values: Parsed content of `dataset.json`.

    Raises:
        DataError: Keys are missing or of a wrong type, a feature is not supported (`ignore` label, other file
            endings), names of labels cannot be used, files are missing or too many, splits name unknown cases, or
            there are fewer than two cases.
    """
    source = root / "dataset.json"
    manifest, channels = _manifest(root, values)
    cases = check_cases(_training_cases(root, manifest, channels), root)
    regions = any(isinstance(value, tuple) for value in manifest.labels.values())
    splits = _splits(root / "splits_final.json", {case.case_id for case in cases})
    return Dataset(
        root=root,
        layout="nnunet",
        reason=f"nnU-Net v2 raw: dataset.json has channel_names and file_ending, {len(cases)} training cases"
        + (f", {len(splits)} folds from splits_final.json" if splits else ""),
        cases=cases,
        source_channels=channels,
        channels=channels,
        joint_zscore=False,
        ct_channels=tuple(map(is_ct, channels)),
        labels=_region_labels(manifest, source) if regions else _exclusive_labels(manifest, source),
        regions=regions,
        file_ending=manifest.file_ending,
        splits=splits,
    )


def list_nnunet_images(root: Path, values: object) -> tuple[Case, ...]:
    """List all images, for segmentation: those of `imagesTr/` (or of the key `dataset`) and `imagesTs/`; no labels.

    A case with too few or too many channels is listed with those that it has.

    Raises:
        DataError: `dataset.json` cannot be used, or two cases share an id.
    """
    manifest, channels = _manifest(root, values)
    listed = _listed_images(root, manifest)
    tests = _folder_images(root / "imagesTs", manifest)
    check_case_ids([*listed, *tests], root)
    return tuple(
        Case(case_id, case_id, tuple(files.values()), channels=name_channels(files, channels))
        for case_id, files in sorted((listed | tests).items())
    )


def _manifest(root: Path, values: object) -> tuple[_NnunetManifest, tuple[str, ...]]:
    source = root / "dataset.json"
    manifest = parse_manifest(_NnunetManifest, values, source)
    if manifest.file_ending not in IMAGE_ENDINGS:
        raise DataError(
            f"{source}, key file_ending, is {manifest.file_ending!r}; supported now are {', '.join(IMAGE_ENDINGS)}: "
            "convert the images and labels"
        )
    return manifest, check_channel_names(manifest.channel_names, f"{source}, key channel_names,")


def _training_cases(root: Path, manifest: _NnunetManifest, channels: tuple[str, ...]) -> list[Case]:
    images = _listed_images(root, manifest)
    if manifest.dataset is not None:
        labels = {case_id: _explicit(root, files.label) for case_id, files in manifest.dataset.items()}
    else:
        folder = root / "labelsTr"
        stems = {image_stem(path) for path in _with_ending(folder, manifest)} | set(images)
        labels = {stem: folder / f"{stem}{manifest.file_ending}" for stem in stems}
        # A label without images is listed as missing its files, rather than left out in silence.
        expected = root / "imagesTr"
        for stem in stems - set(images):
            images[stem] = {n: expected / f"{stem}_{n:04d}{manifest.file_ending}" for n in range(len(channels))}
    return [
        Case(case_id, case_id, _checked_channels(case_id, files, channels), labels[case_id], channels)
        for case_id, files in images.items()
    ]


def _listed_images(root: Path, manifest: _NnunetManifest) -> dict[str, dict[int, Path]]:
    if manifest.dataset is None:
        return _folder_images(root / "imagesTr", manifest)
    return {
        case_id: {number: _explicit(root, text) for number, text in enumerate(files.images)}
        for case_id, files in manifest.dataset.items()
    }


def _folder_images(folder: Path, manifest: _NnunetManifest) -> dict[str, dict[int, Path]]:
    return group_channels(_with_ending(folder, manifest))


def _with_ending(folder: Path, manifest: _NnunetManifest) -> list[Path]:
    return [path for path in image_files(folder) if path.name.lower().endswith(manifest.file_ending)]


def _explicit(root: Path, text: str) -> Path:
    # Explicit paths exist in this format so that files may lie elsewhere; the format expands variables in them.
    expanded = os.path.expandvars(text)
    check_path_text(expanded, root / "dataset.json")
    return root / expanded


def _checked_channels(case_id: str, files: Mapping[int, Path], channels: tuple[str, ...]) -> tuple[Path, ...]:
    if list(files) == list(range(len(channels))):
        return tuple(files.values())
    missing = [f"{name} (_{number:04d})" for number, name in enumerate(channels) if number not in files]
    extra = [f"_{number:04d}" for number in files if number >= len(channels)]
    faults = ([f"{', '.join(missing)} is missing"] if missing else []) + (
        [f"{', '.join(extra)} is not listed"] if extra else []
    )
    raise DataError(
        f"case {case_id} does not have the channels of dataset.json ({', '.join(channels)}): {'; '.join(faults)}"
    )


def _exclusive_labels(manifest: _NnunetManifest, source: Path) -> tuple[Label, ...]:
    pairs = sorted((value, name) for name, value in _foreground(manifest, source).items())
    values = [value for (value,), _ in pairs]
    if len(set(values)) != len(values):
        raise DataError(f"{source}, key labels, gives a value twice: {', '.join(map(str, values))}; each needs its own")
    return tuple(Label(name=name, values=value, output_value=value[0]) for value, name in pairs)


def _region_labels(manifest: _NnunetManifest, source: Path) -> tuple[Label, ...]:
    regions = _foreground(manifest, source)
    order = manifest.regions_class_order or ()
    if len(order) != len(regions) or len(set(order)) != len(order) or min(order) < 1:
        raise DataError(
            f"{source}, key regions_class_order, is {list(order)} for the regions {', '.join(regions)}; "
            "it must give each region, in their order, its own positive value for the written masks"
        )
    strange = [name for (name, values), output in zip(regions.items(), order, strict=True) if output not in values]
    if strange:
        raise DataError(
            f"{source}, key regions_class_order, gives {', '.join(strange)} a value that is none of its own; "
            "written masks are read back by the values of the regions, so each needs one of its own"
        )
    return tuple(
        Label(name=name, values=values, output_value=output)
        for (name, values), output in zip(regions.items(), order, strict=True)
    )


def _foreground(manifest: _NnunetManifest, source: Path) -> dict[str, tuple[int, ...]]:
    if "ignore" in manifest.labels:
        raise DataError(
            f"{source} has the label 'ignore', which is not supported yet; fill these voxels or leave out such cases"
        )
    values = {name: value if isinstance(value, tuple) else (value,) for name, value in manifest.labels.items()}
    foreground = {name: value for name, value in values.items() if set(value) != {0}}
    wrong = [name for name, value in foreground.items() if not value or min(value) < 1]
    if wrong or not foreground:
        raise DataError(
            f"{source}, key labels: {first_few(wrong) or 'no foreground label'}; it must map names to positive values "
            '(or lists of them), and "background" to 0'
        )
    check_label_names(tuple(foreground), source)
    return foreground


def _splits(path: Path, case_ids: set[str]) -> tuple[Split, ...] | None:
    if not path.is_file():
        return None
    try:
        entries = TypeAdapter(Annotated[list[_SplitEntry], Field(min_length=1)]).validate_python(read_json(path))
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"])) or "(whole)"
        raise DataError(
            f"{path}: {where}: {fault['msg']}; it must be a list of folds, each with lists of case ids in train and val"
        ) from error
    for number, entry in enumerate(entries):
        unknown = sorted({*entry.train, *entry.val} - case_ids)
        shared = sorted({*entry.train} & {*entry.val})
        if unknown or shared:
            what = (
                f"cases that the dataset does not have: {first_few(unknown)}"
                if unknown
                else (f"cases in both train and val: {first_few(shared)}")
            )
            raise DataError(f"{path}, fold {number}, names {what}; mend the file, or remove it to have folds made")
    return tuple(Split(train=tuple(sorted(entry.train)), val=tuple(sorted(entry.val))) for entry in entries)
