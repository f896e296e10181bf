from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from phantoms import change_json, phantom, write_mamamia, write_msd, write_nifti, write_nnunet
from tokenseg.datasets.layouts import open_dataset
from tokenseg.errors import DataError, GeometryError
from tokenseg.planning.fingerprint import Fingerprint, take_fingerprint, voxel_digest

SMALL = (12, 13, 14)


def test_numbers_of_a_case(tmp_path: Path):
    write_msd(tmp_path, 2, shape=SMALL, channels=("a", "b"), labels={1: "rim", 3: "core"})
    fingerprint = take_fingerprint(open_dataset(tmp_path))
    image, mask = phantom(1, shape=SMALL, num_channels=2, values=(1, 3))
    case = fingerprint.cases[1]
    assert case.case_id == "case_001"
    assert case.label_voxels == {value: int((mask == value).sum()) for value in (0, 1, 3)}
    assert len(case.intensities) == 2
    for stats, channel in zip(case.intensities, image, strict=True):
        inside = channel[mask > 0].astype(np.float64)
        assert stats.minimum == inside.min()
        assert stats.maximum == inside.max()
        assert stats.mean == pytest.approx(inside.mean(), rel=1e-6)
        assert stats.std == pytest.approx(inside.std(), rel=1e-6)
        assert stats.percentile_00_5 == pytest.approx(np.percentile(inside, 0.5), rel=1e-6)
        assert stats.percentile_99_5 == pytest.approx(np.percentile(inside, 99.5), rel=1e-6)


def test_dataset_intensities_pool_the_foreground(tmp_path: Path):
    write_msd(tmp_path, 3, shape=SMALL)
    fingerprint = take_fingerprint(open_dataset(tmp_path))
    phantoms = [phantom(index, shape=SMALL) for index in range(3)]
    inside = np.concatenate([image[0][mask > 0] for image, mask in phantoms]).astype(np.float64)
    assert fingerprint.intensities[0].mean == pytest.approx(inside.mean(), rel=1e-6)
    assert fingerprint.intensities[0].percentile_99_5 == pytest.approx(np.percentile(inside, 99.5), rel=1e-6)


def test_a_large_case_weighs_no_more_than_its_samples(tmp_path: Path):
    # 100 voxels of 0 beside 40 000 of 1: sampled to at most 10 000, evenly, the mean is 10000 / 10100.
    write_msd(tmp_path, 2)
    for index, (shape, value) in enumerate((((10, 10, 1), 0), ((40, 40, 25), 1))):
        write_nifti(tmp_path / "imagesTr" / f"case_{index:03d}.nii.gz", np.full(shape, value, np.float32))
        write_nifti(tmp_path / "labelsTr" / f"case_{index:03d}.nii.gz", np.ones(shape, np.uint8))
    assert take_fingerprint(open_dataset(tmp_path)).intensities[0].mean == pytest.approx(10_000 / 10_100)


def test_axes_are_canonical_whatever_the_stored_order(tmp_path: Path):
    write_msd(tmp_path, 2, shape=SMALL)
    # Stored axes run along superior-, right+, anterior+, 5, 2 and 3 mm apart.
    affine = np.array([[0, 2.0, 0, 0], [0, 0, 3.0, 0], [-5.0, 0, 0, 0], [0, 0, 0, 1]])
    for folder, array in zip(("imagesTr", "labelsTr"), phantom(0, shape=SMALL), strict=True):
        write_nifti(tmp_path / folder / "case_000.nii.gz", array.reshape(SMALL), affine=affine)
    case = take_fingerprint(open_dataset(tmp_path)).cases[0]
    assert case.shape_vox == (13, 14, 12)
    assert case.spacing_mm == (2.0, 3.0, 5.0)


def test_case_without_foreground_counts_all_its_voxels(tmp_path: Path):
    write_msd(tmp_path, 2, shape=SMALL)
    write_nifti(tmp_path / "labelsTr" / "case_000.nii.gz", np.zeros(SMALL, np.uint8))
    case = take_fingerprint(open_dataset(tmp_path)).cases[0]
    assert case.label_voxels == {0: 12 * 13 * 14}
    assert case.intensities[0].minimum == phantom(0, shape=SMALL)[0].min()


def test_no_foreground_anywhere(tmp_path: Path):
    write_msd(tmp_path, 2, shape=SMALL)
    for index in range(2):
        write_nifti(tmp_path / "labelsTr" / f"case_{index:03d}.nii.gz", np.zeros(SMALL, np.uint8))
    with pytest.raises(DataError, match="has no foreground: all 2 masks are zero everywhere; check that the label"):
        take_fingerprint(open_dataset(tmp_path))


def test_unlisted_value(tmp_path: Path):
    write_msd(tmp_path, 2, shape=SMALL, labels={1: "a", 2: "b", 4: "c"})
    change_json(tmp_path / "dataset.json", labels={"0": "background", "1": "a", "2": "b"})
    with pytest.raises(DataError) as caught:
        take_fingerprint(open_dataset(tmp_path))
    assert str(caught.value) == (
        "case case_000: case_000.nii.gz holds the label values 4, which the dataset does not list; it lists 0, 1, 2. "
        "Add these values with their names under labels of dataset.json, or change them in the file to listed ones. "
        f"1 more case(s) have faults; all of them: tokenseg check {tmp_path}"
    )


@pytest.mark.parametrize(("write", "fix"), [(write_msd, '"255": "sphere"'), (write_nnunet, '"sphere": 255')])
def test_0_255_masks_and_their_mend(tmp_path: Path, write, fix: str):
    write(tmp_path, 2, shape=SMALL)
    for path in (tmp_path / "labelsTr").iterdir():
        write_nifti(path, 255 * phantom(0, shape=SMALL)[1])
    with pytest.raises(DataError, match=f"0/255 mask: write {fix} under labels of dataset.json, or divide"):
        take_fingerprint(open_dataset(tmp_path))
    change_json(
        tmp_path / "dataset.json",
        labels={"0": "background", "255": "sphere"} if write is write_msd else {"background": 0, "sphere": 255},
    )
    assert set(take_fingerprint(open_dataset(tmp_path)).cases[0].label_voxels) == {0, 255}


def test_mamamia_counts_source_channels_only_and_knows_its_values(tmp_path: Path):
    write_mamamia(tmp_path, 2, shape=SMALL, num_phases=(4,))
    fingerprint = take_fingerprint(open_dataset(tmp_path))
    assert len(fingerprint.cases[0].intensities) == len(fingerprint.intensities) == 2
    write_nifti(tmp_path / "segmentations" / "expert" / "DUKE_001.nii.gz", 2 * phantom(0, shape=SMALL)[1])
    with pytest.raises(DataError, match="MAMA-MIA masks hold 0 and 1: write the tumour as 1 in the file"):
        take_fingerprint(open_dataset(tmp_path))


def test_every_file_is_checked_on_the_way(tmp_path: Path):
    write_msd(tmp_path, 3, shape=SMALL)
    image = phantom(2, shape=SMALL)[0][0]
    image[0, 0, 0] = np.nan
    write_nifti(tmp_path / "imagesTr" / "case_002.nii.gz", image)
    with pytest.raises(DataError, match=r"case_002.nii.gz.*NaN"):
        take_fingerprint(open_dataset(tmp_path))
    write_nifti(tmp_path / "labelsTr" / "case_001.nii.gz", np.ones((2, 3, 4), np.uint8))
    with pytest.raises(GeometryError, match="image of case_001"):
        take_fingerprint(open_dataset(tmp_path))


def test_digests_are_those_of_saved_fingerprints_and_of_values():
    values = (np.arange(24, dtype=np.float32) / 3).reshape(2, 3, 4)
    # By an earlier version, whose runs can be resumed.
    assert voxel_digest(values) == "fdd065b5662d40ba89029a1541f5c04c6a02bef5834b6370a4e10493f22189ce"
    for stored in (values.astype(np.float64), values.astype(">f4"), values.view("<f4"), np.asfortranarray(values)):
        assert voxel_digest(stored) == voxel_digest(values)
    assert voxel_digest(np.arange(3, dtype=np.int16)) == voxel_digest(np.arange(3, dtype=np.uint8))
    assert voxel_digest(values.reshape(4, 3, 2)) != voxel_digest(values)
    assert voxel_digest(values + 1) != voxel_digest(values)
    assert voxel_digest(np.full(2, 1e300)) == voxel_digest(np.full(2, np.inf))


def test_progress_and_json(tmp_path: Path):
    write_nnunet(tmp_path, 3, shape=SMALL, labels={"a": 1, "b": 2})
    calls: list[tuple[int, int]] = []
    fingerprint = take_fingerprint(open_dataset(tmp_path), lambda done, total: calls.append((done, total)))
    assert calls == [(1, 3), (2, 3), (3, 3)]
    assert Fingerprint.model_validate_json(fingerprint.model_dump_json()) == fingerprint


def test_hippocampus(real_data: Path):
    start_s = time.process_time()
    fingerprint = take_fingerprint(open_dataset(real_data / "Task04_Hippocampus"))
    assert time.process_time() - start_s < 5
    shapes = np.array([case.shape_vox for case in fingerprint.cases])
    assert len(shapes) == 200
    # The documented extremes are 31-43, 40-59 and 24-47.
    assert (shapes.min(axis=0) >= (31, 40, 24)).all()
    assert (shapes.max(axis=0) <= (43, 59, 47)).all()
    assert all(set(case.label_voxels) == {0, 1, 2} for case in fingerprint.cases)
    assert all(case.spacing_mm == (1.0, 1.0, 1.0) for case in fingerprint.cases)
