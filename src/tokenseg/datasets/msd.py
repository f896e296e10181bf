"""Reader of the Medical Segmentation Decathlon layout, and of nnU-Net's version 1, which shares its `dataset.json`.

`dataset.json` lists pairs of image and label; images are 3D, or 4D with the channel last; labels map value to name.
Version 1 of nnU-Net lists `x.nii.gz` and stores `x_0000.nii.gz`, `x_0001.nii.gz`...
"""

from __future__ import annotations

from pathlib import Path

from tokenseg.config import Label
from tokenseg.datasets.cases import Case, Dataset, check_case_ids, check_cases, check_channel_names, check_label_names
from tokenseg.datasets.dataset_json import Manifest, parse_manifest
from tokenseg.datasets.folders import channel_file, group_channels, image_files, path_inside
from tokenseg.errors import DataError
from tokenseg.imaging.channel_names import is_ct
from tokenseg.imaging.formats import image_ending, image_stem


class _Pair(Manifest):
    image: str
    label: str


class _MsdManifest(Manifest):
    modality: dict[int, str]
    labels: dict[int, str]
    training: tuple[_Pair, ...]


def read_msd(root: Path, values: object) -> Dataset:
    """Read a dataset for training.

    Args:
        root: Folder that holds `dataset.json`.
        values: Parsed content of `dataset.json`.

    Raises:
        DataError: Keys are missing or of a wrong type, a path leads out of `root`, names of labels repeat or
            cannot be used, files are missing, or there are fewer than two cases.
    """
    source = root / "dataset.json"
    manifest = parse_manifest(_MsdManifest, values, source)
    channels = check_channel_names(manifest.modality, f"{source}, key modality,")
    cases = check_cases(_training_cases(root, manifest, channels), root)
    return Dataset(
        root=root,
        layout="msd",
        reason=f"Medical Segmentation Decathlon: dataset.json lists {len(cases)} training pairs",
        cases=cases,
        source_channels=channels,
        channels=channels,
        joint_zscore=False,
        ct_channels=tuple(map(is_ct, channels)),
        labels=_labels(manifest, source),
        regions=False,
        file_ending=image_ending(cases[0].images[0]),
    )


def list_msd_images(root: Path, values: object) -> tuple[Case, ...]:
    """List all images, for segmentation: those of the training list and those in `imagesTs/`; no labels.

    Raises:
        DataError: Keys are missing or of a wrong type, a path leads out of `root`, or two images share a name.
    """
    source = root / "dataset.json"
    manifest = parse_manifest(_MsdManifest, values, source)
    channels = check_channel_names(manifest.modality, f"{source}, key modality,")
    training = _training_cases(root, manifest, channels)
    listed = [(case.case_id, case.images) for case in training]
    tests = image_files(root / "imagesTs")
    if any(len(case.images) > 1 for case in training):
        listed += [(case_id, tuple(files.values())) for case_id, files in group_channels(tests).items()]
    else:
        listed += [(image_stem(path), (path,)) for path in tests]
    check_case_ids([case_id for case_id, _ in listed], root)
    return tuple(Case(case_id, case_id, images, channels=channels) for case_id, images in sorted(listed))


def _training_cases(root: Path, manifest: _MsdManifest, channels: tuple[str, ...]) -> list[Case]:
    source = root / "dataset.json"
    cases = []
    for pair in manifest.training:
        image = path_inside(root, pair.image, source)
        label = path_inside(root, pair.label, source)
        if image.name.startswith("._"):
            continue
        case_id = image_stem(image)
        cases.append(Case(case_id, case_id, _image_files(image, len(channels)), label, channels))
    return cases


def _image_files(image: Path, num_channels: int) -> tuple[Path, ...]:
    files = tuple(channel_file(image, number) for number in range(num_channels))
    return files if files[0].is_file() and not image.is_file() else (image,)


def _labels(manifest: _MsdManifest, source: Path) -> tuple[Label, ...]:
    foreground = {value: name for value, name in sorted(manifest.labels.items()) if value != 0}
    if not foreground or min(foreground) < 0:
        raise DataError(
            f"{source}, key labels, lists the values {', '.join(map(str, manifest.labels)) or '(none)'}; "
            'it must map "0" to the background and at least one positive value to a name'
        )
    check_label_names(tuple(foreground.values()), source)
    return tuple(Label(name=name, values=(value,), output_value=value) for value, name in foreground.items())
