from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from phantoms import change_json, phantom, write_mamamia, write_msd, write_nifti, write_nnunet
from tokenseg.config import ChannelNormalisation, Label, Plan
from tokenseg.datasets.inputs import list_inputs, read_input
from tokenseg.errors import DataError, FileError

SMALL = (6, 7, 8)


def plan_of(*channels: str, joint_zscore: bool = False) -> Plan:
    return Plan(
        channels=channels,
        source_channels=channels,
        joint_zscore=joint_zscore,
        normalisation=tuple(ChannelNormalisation(kind="zscore") for _ in channels),
        labels=(Label(name="sphere", values=(1,), output_value=1),),
        spacing_mm=(1, 1, 1),
        window_vox=(8, 8, 8),
        whole_limit_vox=(16, 16, 16),
        strides=((2, 2, 2),) * 4,
        grid=(5, 5, 4),
        batch_size=2,
        steps=10,
    )


MRI = plan_of("MRI")
TWO = plan_of("FLAIR", "t1gd")
DCE = plan_of("phase0", "phase1", joint_zscore=True)


def ids(path: Path, plan: Plan) -> list[str]:
    return [case.case_id for case in list_inputs(path, plan)]


def write_flat(folder: Path, *names: str) -> Path:
    """Each file's voxels are all equal to its place in `names`."""
    for index, name in enumerate(names):
        write_nifti(folder / name, np.full(SMALL, index, np.float32))
    return folder


def test_a_file_is_one_case(tmp_path: Path):
    write_flat(tmp_path, "scan.nii.gz", "other.nii.gz")
    (case,) = list_inputs(tmp_path / "other.nii.gz", MRI)
    assert (case.case_id, case.images, case.label) == ("other", (tmp_path / "other.nii.gz",), None)
    volume = read_input(case, MRI)
    assert volume.channels == ("MRI",)
    np.testing.assert_array_equal(volume.array, np.full((1, *SMALL), 1, np.float32))


def test_flat_folder_each_file_a_case(tmp_path: Path):
    write_flat(tmp_path, "b.nii", "a.nii.gz", "visit_2019.nii.gz", "._a.nii.gz")
    (tmp_path / "notes.txt").write_text("not an image")
    assert ids(tmp_path, MRI) == ["a", "b", "visit_2019"]


def test_one_channel_files_may_carry_their_number(tmp_path: Path):
    write_flat(tmp_path, "a_0000.nii.gz", "b_0000.nii.gz", "c.nii.gz")
    assert ids(tmp_path, MRI) == ["a", "b", "c"]


@pytest.mark.parametrize("write", [write_msd, write_nnunet])
def test_a_dataset_json_that_lists_no_image_does_not_hide_loose_ones(tmp_path: Path, write: Callable[..., Path]):
    write(tmp_path, 0)
    write_flat(tmp_path, "a_0000.nii.gz", "b.nii.gz")
    assert ids(tmp_path, MRI) == ["a", "b"]
    write_flat(tmp_path / "imagesTs", "c_0000.nii.gz" if write is write_nnunet else "c.nii.gz")
    assert ids(tmp_path, MRI) == ["c"]  # all that the dataset has


def test_channel_files_are_grouped_and_named(tmp_path: Path):
    write_flat(tmp_path, "a_0001.nii.gz", "a_0000.nii.gz")
    (case,) = list_inputs(tmp_path, TWO)
    volume = read_input(case, TWO)
    assert (case.case_id, volume.channels) == ("a", ("FLAIR", "t1gd"))
    assert volume.array[:, 0, 0, 0].tolist() == [1, 0]


def test_4d_files_hold_all_channels(tmp_path: Path):
    image = phantom(3, shape=SMALL, num_channels=2)[0]
    write_nifti(tmp_path / "a.nii.gz", np.moveaxis(image, 0, -1))
    (case,) = list_inputs(tmp_path, TWO)
    np.testing.assert_array_equal(read_input(case, TWO).array, image)
    three = plan_of("FLAIR", "t1gd", "T2")
    with pytest.raises(DataError, match=r"model expects FLAIR, t1gd, T2; .*a.nii.gz holds 2 channel\(s\)"):
        read_input(case, three)


def test_missing_channel_is_named_and_the_other_cases_stay(tmp_path: Path):
    write_flat(tmp_path, "a_0000.nii.gz", "b_0000.nii.gz", "b_0001.nii.gz")
    broken, whole = list_inputs(tmp_path, TWO)
    with pytest.raises(DataError) as caught:
        read_input(broken, TWO)
    assert str(caught.value) == (
        "model expects FLAIR, t1gd; a has FLAIR (a_0000.nii.gz): t1gd is missing. "
        "Numbers in file names mean: _0000 FLAIR, _0001 t1gd"
    )
    assert read_input(whole, TWO).array.shape == (2, *SMALL)


def test_too_many_channel_files(tmp_path: Path):
    write_flat(tmp_path, "a_0000.nii.gz", "a_0001.nii.gz", "a_0002.nii.gz")
    (case,) = list_inputs(tmp_path, TWO)
    with pytest.raises(DataError, match=r"a has FLAIR .*, _0002 \(a_0002.nii.gz\): _0002 is none of them"):
        read_input(case, TWO)


def test_repeated_case(tmp_path: Path):
    write_flat(tmp_path, "a.nii.gz", "a.nii")
    with pytest.raises(DataError, match="case ids must be unique; these are given more than once: a"):
        list_inputs(tmp_path, MRI)


def test_paths_that_hold_nothing(tmp_path: Path):
    with pytest.raises(FileError, match=r"input .*nowhere does not exist; check the path"):
        list_inputs(tmp_path / "nowhere", MRI)
    with pytest.raises(
        FileError, match=r"has no images \(.nii.gz, .nii, .*\) directly in it, no DICOM images below it, and is no"
    ):
        list_inputs(tmp_path, MRI)
    (tmp_path / "scan.png").write_bytes(b"")
    with pytest.raises(FileError, match=r"scan.png is not named as an image"):
        list_inputs(tmp_path / "scan.png", MRI)


def test_phases_of_a_dce_exam_all_count(tmp_path: Path):
    write_flat(tmp_path, *(f"p1_{number:04d}.nii.gz" for number in range(4)))
    write_nifti(tmp_path / "p2.nii.gz", np.zeros((*SMALL, 3), np.float32))
    write_nifti(tmp_path / "p3.nii.gz", np.zeros(SMALL, np.float32))
    first, second, third = list_inputs(tmp_path, DCE)
    assert read_input(first, DCE).channels == ("phase0", "phase1", "phase2", "phase3")
    assert read_input(second, DCE).channels == ("phase0", "phase1", "phase2")
    with pytest.raises(DataError, match=r"model expects phase0, phase1; p3 has phase0 .*: phase1 is missing"):
        read_input(third, DCE)


def test_msd_dataset_training_and_test_images(tmp_path: Path):
    write_msd(tmp_path, 2, shape=SMALL, num_test=1)
    (tmp_path / "labelsTr" / "case_000.nii.gz").unlink()
    cases = list_inputs(tmp_path, plan_of("T1"))
    assert [(case.case_id, case.label) for case in cases] == [
        ("case_000", None),
        ("case_001", None),
        ("case_002", None),
    ]
    assert read_input(cases[2], plan_of("T1")).channels == ("T1",)


def test_nnunet_dataset_is_matched_by_name_whatever_the_order(tmp_path: Path):
    write_nnunet(tmp_path, 2, shape=SMALL, channels=("T1GD", "T2", "flair"), num_test=1)
    cases = list_inputs(tmp_path, TWO)
    assert [case.case_id for case in cases] == ["case_000", "case_001", "case_002"]
    volume = read_input(cases[2], TWO)
    assert volume.channels == ("t1gd", "T2", "FLAIR")
    np.testing.assert_array_equal(volume.array, phantom(2, shape=SMALL, num_channels=3)[0])


def test_nnunet_dataset_without_the_channel(tmp_path: Path):
    write_nnunet(tmp_path, 2, shape=SMALL, channels=("FLAIR", "T2"))
    with pytest.raises(DataError, match=r"model expects FLAIR, t1gd; case_000 has FLAIR .*, T2 .*: t1gd is missing"):
        read_input(list_inputs(tmp_path, TWO)[0], TWO)


def test_4d_dataset_without_the_channel(tmp_path: Path):
    write_msd(tmp_path, 2, shape=SMALL, channels=("FLAIR", "T2"))
    with pytest.raises(DataError, match=r"model expects FLAIR, t1gd; case_000 has FLAIR, T2: t1gd is missing"):
        read_input(list_inputs(tmp_path, TWO)[0], TWO)


def test_dataset_whose_channels_are_not_listed(tmp_path: Path):
    write_nnunet(tmp_path, 2, shape=SMALL, channels=("FLAIR", "t1gd"))
    change_json(tmp_path / "dataset.json", channel_names={"0": "FLAIR"})
    with pytest.raises(DataError, match=r"_0001 \(case_000_0001.nii.gz\): t1gd is missing; _0001 is none of them"):
        read_input(list_inputs(tmp_path, TWO)[0], TWO)


def test_mamamia_lists_test_patients_and_patients_without_phases(tmp_path: Path):
    write_mamamia(tmp_path, 3, shape=SMALL, num_phases=(3,), test_cases=1)
    (tmp_path / "images" / "EMPTY_1").mkdir()
    cases = list_inputs(tmp_path, DCE)
    assert [case.case_id for case in cases] == ["DUKE_001", "DUKE_002", "DUKE_003", "EMPTY_1"]
    assert read_input(cases[2], DCE).channels == ("phase0", "phase1", "phase2")
    with pytest.raises(DataError, match="EMPTY_1 has no image: phase0, phase1 is missing"):
        read_input(cases[3], DCE)


def test_dataset_folder_without_any_image(tmp_path: Path):
    write_msd(tmp_path, 2, shape=SMALL)
    change_json(tmp_path / "dataset.json", training=[])
    with pytest.raises(FileError, match="has no images"):
        list_inputs(tmp_path, MRI)


def test_hippocampus_as_input(real_data: Path):
    cases = list_inputs(real_data / "Task04_Hippocampus", MRI)
    flat = list_inputs(real_data / "Task04_Hippocampus" / "imagesTr", MRI)
    assert len(cases) == 200
    assert [case.images for case in cases] == [case.images for case in flat]
    assert [case.case_id for case in cases] == [case.case_id for case in flat]
