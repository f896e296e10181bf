"""Reader of MAMA-MIA: breast DCE-MRI, one file a phase, one primary tumour (`images/ID/id_000X.nii.gz`).

`_000X` is the phase (0 before contrast), not a channel; the number of phases varies, and so does the case of names.
The network sees the first post-contrast phase and its difference to the phase before contrast, after a z-score over
all phases of the exam.
"""

from __future__ import annotations

import csv
from pathlib import Path

from tokenseg.config import Code, Coding, Label
from tokenseg.datasets.cases import Case, Dataset, check_case_ids, check_cases
from tokenseg.datasets.folders import group_channels, image_files
from tokenseg.errors import DataError
from tokenseg.imaging.channel_names import phase_name
from tokenseg.imaging.formats import image_ending, image_stem
from tokenseg.messages import first_few

SOURCE_CHANNELS = ("phase0", "phase1")
CHANNELS = ("phase1", "phase1 - phase0")
LESIONS_NAME = "lesions.json"
"""Beside synthetic exams, whose figures must not pass for those of patients."""
_BREAST_TUMOUR = Coding(
    category=Code(value="49755003", meaning="Morphologically Abnormal Structure"),
    type=Code(value="108369006", meaning="Neoplasm"),
    region=Code(value="76752008", meaning="Breast"),
)
_SPLITS_NAME = "train_test_splits.csv"


def is_mamamia(root: Path) -> bool:
    """Whether a folder has MAMA-MIA's `images/` of patient folders and `segmentations/expert/`."""
    return (root / "images").is_dir() and (root / "segmentations" / "expert").is_dir()


def read_mamamia(root: Path) -> Dataset:
    """Read the dataset for training: the patients of `train_split` where `train_test_splits.csv` is there, else all.

    Patients of the split that are not on disk are left out and counted in `reason`, since the collection is often
    downloaded in part.

    Raises:
        DataError: Phases 0 or 1 or expert masks are missing, the csv is not usable, or fewer than two cases.
    """
    patients = list_mamamia_images(root)
    masks = {image_stem(path).casefold(): path for path in image_files(root / "segmentations" / "expert")}
    chosen = patients
    reason = (
        f"MAMA-MIA: images/ has {len(patients)} patients with numbered DCE phases, segmentations/expert/ their masks"
    )
    if (root / _SPLITS_NAME).is_file():
        train = _train_split(root / _SPLITS_NAME)
        chosen = tuple(case for case in patients if case.case_id.casefold() in train)
        reason += f"; {len(chosen)} of the {len(train)} patients of train_split in {_SPLITS_NAME} are there and train"
    if (root / LESIONS_NAME).is_file():
        reason += f"; the exams are synthetic ({LESIONS_NAME})"
    _check_phases(chosen, root)
    expert = root / "segmentations" / "expert"
    labelled = [
        Case(
            case.case_id,
            case.patient_id,
            case.images,
            masks.get(case.case_id.casefold(), expert / f"{case.case_id}.nii.gz"),
            case.channels,
        )
        for case in chosen
    ]
    cases = check_cases(labelled, root)
    return Dataset(
        root=root,
        layout="mamamia",
        reason=reason,
        cases=cases,
        source_channels=SOURCE_CHANNELS,
        channels=CHANNELS,
        joint_zscore=True,
        ct_channels=(False, False),
        labels=(Label(name="tumour", values=(1,), output_value=1, coding=_BREAST_TUMOUR),),
        regions=False,
        file_ending=image_ending(cases[0].images[0]),
    )


def list_mamamia_images(root: Path) -> tuple[Case, ...]:
    """List all patients, test split included, with the phases that each has; no labels.

    Raises:
        DataError: Ids that differ only in upper and lower case.
    """
    cases: list[Case] = []
    for folder in sorted(path for path in (root / "images").iterdir() if path.is_dir() and path.name[0] != "."):
        phases = _phases(folder)
        cases.append(Case(folder.name, folder.name, tuple(phases.values()), channels=tuple(map(phase_name, phases))))
    check_case_ids([case.case_id.casefold() for case in cases], root)
    return tuple(cases)


def _check_phases(cases: tuple[Case, ...], root: Path) -> None:
    lacking = [case.case_id for case in cases if not set(SOURCE_CHANNELS) <= set(case.channels)]
    if lacking:
        raise DataError(
            f"dataset {root}: {len(lacking)} patients have no phase 0 or 1 (images/ID/ID_0000.nii.gz before contrast "
            f"and ID_0001.nii.gz after): {first_few(lacking)}; complete them or take them out"
        )


def _phases(folder: Path) -> dict[int, Path]:
    groups = group_channels(image_files(folder))
    return {
        number: path
        for case_id, files in groups.items()
        if case_id.casefold() == folder.name.casefold()
        for number, path in files.items()
    }


def _train_split(path: Path) -> set[str]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            values = [row.get("train_split") or "" for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as csv: {error}") from error
    if not {"train_split", "test_split"} <= set(columns):
        raise DataError(
            f"{path} has the columns {', '.join(columns) or '(none)'}; it needs train_split and test_split, or remove "
            "the file to train on all patients"
        )
    # The columns differ in length: the shorter one is padded with nothing, or with nan by some exports.
    return {value.strip().casefold() for value in values} - {"", "nan"}
