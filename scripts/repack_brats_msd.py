"""Repack two-channel BraTS cases, one folder a patient, as a Medical Segmentation Decathlon dataset with 4D images.

    python scripts/repack_brats_msd.py SOURCE TARGET [--regions]

SOURCE holds `images/PATIENT/{Flair,T1c}_subtrMeanDivStd.nii.gz` and `labels/PATIENT/OTMultiClass.nii.gz`. With
`--regions` the result is an nnU-Net v2 dataset with the three BraTS regions instead, since that layout can name them.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import nibabel as nib
import numpy as np

CHANNELS = {"FLAIR": "Flair_subtrMeanDivStd.nii.gz", "t1gd": "T1c_subtrMeanDivStd.nii.gz"}
LABELS = ["necrosis", "oedema", "non-enhancing tumour", "enhancing tumour"]
REGIONS = {"whole tumour": [1, 2, 3, 4], "tumour core": [1, 3, 4], "enhancing tumour": [4]}


def main() -> None:
    """Parse and repack."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--regions", action="store_true")
    arguments = parser.parse_args()
    repack = repack_regions if arguments.regions else repack_labels
    repack(arguments.source, arguments.target)


def repack_labels(source: Path, target: Path) -> None:
    """Write `imagesTr/CASE.nii.gz` (4D, channel last), `labelsTr/CASE.nii.gz` and `dataset.json`."""
    pairs = []
    for patient, channels, label in _patients(source):
        stacked = np.stack([np.asanyarray(channel.dataobj, dtype=np.float32) for channel in channels], axis=-1)
        pairs.append({"image": f"./imagesTr/{patient}.nii.gz", "label": f"./labelsTr/{patient}.nii.gz"})
        _write(target / "imagesTr" / f"{patient}.nii.gz", nib.Nifti1Image(stacked, channels[0].affine))
        _write(target / "labelsTr" / f"{patient}.nii.gz", label)
    _describe(
        target,
        {
            "name": target.name,
            "tensorImageSize": "4D",
            "modality": {str(number): name for number, name in enumerate(CHANNELS)},
            "labels": {"0": "background"} | {str(value): name for value, name in enumerate(LABELS, start=1)},
            "numTraining": len(pairs),
            "numTest": 0,
            "training": pairs,
            "test": [],
        },
    )


def repack_regions(source: Path, target: Path) -> None:
    """Write nnU-Net v2 files with `CASE_0000` a channel, and the regions WT, TC and ET."""
    count = 0
    for count, (patient, channels, label) in enumerate(_patients(source), start=1):  # noqa: B007 - counted for the json
        for number, channel in enumerate(channels):
            _write(target / "imagesTr" / f"{patient}_{number:04d}.nii.gz", channel)
        _write(target / "labelsTr" / f"{patient}.nii.gz", label)
    _describe(
        target,
        {
            "channel_names": {str(number): name for number, name in enumerate(CHANNELS)},
            "labels": {"background": 0} | REGIONS,
            # Later over earlier: oedema where only the whole tumour is, then the core, then what enhances.
            "regions_class_order": [2, 1, 4],
            "numTraining": count,
            "file_ending": ".nii.gz",
        },
    )


def _patients(source: Path) -> list[tuple[str, list[nib.Nifti1Image], nib.Nifti1Image]]:
    patients = []
    for folder in sorted((source / "images").iterdir()):
        channels = [nib.load(folder / name) for name in CHANNELS.values()]
        label = nib.load(source / "labels" / folder.name / "OTMultiClass.nii.gz")
        values = np.rint(label.get_fdata()).astype(np.uint8)
        patients.append((folder.name, channels, nib.Nifti1Image(values, label.affine)))
    return patients


def _write(path: Path, image: nib.Nifti1Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)


def _describe(target: Path, values: dict[str, object]) -> None:
    (target / "dataset.json").write_text(json.dumps(values, indent=1), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
