from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.model_selection import KFold

from tokenseg.config import Label
from tokenseg.datasets.cases import Case, Dataset, Split
from tokenseg.datasets.layouts import open_dataset
from tokenseg.datasets.splits import split_folds
from tokenseg.errors import DataError


def dataset_of(cases: list[Case]) -> Dataset:
    return Dataset(
        root=Path("somewhere"),
        layout="msd",
        reason="made up",
        cases=tuple(sorted(cases, key=lambda case: case.case_id)),
        source_channels=("MRI",),
        channels=("MRI",),
        joint_zscore=False,
        ct_channels=(False,),
        labels=(Label(name="sphere", values=(1,), output_value=1),),
        regions=False,
        file_ending=".nii.gz",
    )


def one_exam_each(count: int) -> Dataset:
    return dataset_of([Case(f"c{index:03d}", f"c{index:03d}", ()) for index in range(count)])


def test_same_folds_as_scikit_learn_for_every_size():
    for count in range(5, 261):
        dataset = one_exam_each(count)
        ids = np.array([case.case_id for case in dataset.cases])
        expected = tuple(
            Split(train=tuple(ids[train].tolist()), val=tuple(ids[val].tolist()))
            for train, val in KFold(5, shuffle=True, random_state=12345).split(ids)
        )
        assert split_folds(dataset) == expected, count


@pytest.mark.parametrize("count", [2, 3, 4])
def test_fewer_cases_than_folds_leave_one_out(count: int):
    folds = split_folds(one_exam_each(count))
    assert sorted(fold.val for fold in folds) == [(f"c{index:03d}",) for index in range(count)]
    assert all(len(fold.train) == count - 1 and not set(fold.train) & set(fold.val) for fold in folds)


def test_cases_of_a_patient_stay_together():
    cases = [
        Case(f"p{patient}_exam{exam}", f"p{patient}", ()) for patient in range(7) for exam in range(patient % 3 + 1)
    ]
    folds = split_folds(dataset_of(cases))
    patients = np.array([f"p{patient}" for patient in range(7)])
    for fold, (_, val) in zip(folds, KFold(5, shuffle=True, random_state=12345).split(patients), strict=True):
        assert {case_id.split("_")[0] for case_id in fold.val} == set(patients[val])
        assert not {case_id.split("_")[0] for case_id in fold.val} & {case_id.split("_")[0] for case_id in fold.train}
    assert sorted(case_id for fold in folds for case_id in fold.val) == sorted(case.case_id for case in cases)


def test_one_patient_cannot_be_split():
    dataset = dataset_of([Case("a1", "a", ()), Case("a2", "a", ())])
    with pytest.raises(DataError, match=r"somewhere has 1 patient\(s\); splitting needs 2 or more"):
        split_folds(dataset)


def test_own_splits_are_kept():
    own = (Split(train=("c000",), val=("c001",)),)
    assert split_folds(replace(one_exam_each(6), splits=own)) == own


def test_hippocampus_folds(real_data: Path):
    folds = split_folds(open_dataset(real_data / "Task04_Hippocampus"))
    assert [len(fold.val) for fold in folds] == [40] * 5
    assert folds[0].val[:3] == ("hippocampus_025", "hippocampus_037", "hippocampus_038")
