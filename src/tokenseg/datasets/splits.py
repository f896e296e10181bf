"""The folds of a dataset, for training and validation: its own, or five that are the same ones for everybody."""

from __future__ import annotations

import numpy as np

from tokenseg.datasets.cases import MIN_CASES, Dataset, Split
from tokenseg.errors import DataError

NUM_FOLDS = 5
_SEED = 12345


def split_folds(dataset: Dataset) -> tuple[Split, ...]:
    """Split a dataset's cases into folds: its own ones, or five that depend on the case ids alone.

    The latter are those of nnU-Net and scikit-learn: `KFold(5, shuffle=True, random_state=12345)` over the sorted
    patient ids (over the sorted case ids where each case is a patient). Cases of a patient stay together. With
    fewer patients than folds each patient is held out once.

    Returns:
        Folds whose `val` parts hold each case once (unless the dataset brings its own); ids are sorted.

    Raises:
        DataError: All cases are of one patient.
    """
    if dataset.splits is not None:
        return dataset.splits
    patients = sorted({case.patient_id for case in dataset.cases})
    if len(patients) < MIN_CASES:
        raise DataError(f"dataset {dataset.root} has {len(patients)} patient(s); splitting needs {MIN_CASES} or more")
    folds = []
    for held_out in _held_out(len(patients)):
        held = {patients[index] for index in held_out}
        train = tuple(case.case_id for case in dataset.cases if case.patient_id not in held)
        val = tuple(case.case_id for case in dataset.cases if case.patient_id in held)
        folds.append(Split(train=train, val=val))
    return tuple(folds)


def _held_out(num_patients: int) -> list[np.ndarray]:
    order = np.arange(num_patients)
    # The legacy generator is part of the contract: its shuffle is the one that published splits were made with.
    np.random.RandomState(_SEED).shuffle(order)
    return np.array_split(order, min(NUM_FOLDS, num_patients))
