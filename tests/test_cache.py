from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from phantoms import phantom, write_msd, write_nifti, write_nnunet
from tokenseg.config import Plan
from tokenseg.datasets.cases import Dataset
from tokenseg.datasets.layouts import load_case, open_dataset
from tokenseg.errors import DataError, FileError
from tokenseg.plan_grid.coarse import coarse_image, coarse_labels
from tokenseg.plan_grid.preprocess import prepare_image, prepare_labels
from tokenseg.planning.fingerprint import take_fingerprint
from tokenseg.planning.planner import make_plan as plan_dataset
from tokenseg.progress import Silent
from tokenseg.training import cache
from tokenseg.training.cache import POINTS_PER_LABEL, PreparedCase, prepare_cases

SHAPE = (20, 18, 16)


class Told(Silent):
    """Keeps what it was told."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, int]] = []
        self.notes: list[str] = []

    def stage(self, name: str, total: int, done: int = 0) -> None:
        self.stages.append((name, total))

    def advance(self, note: str = "") -> None:
        self.notes.append(note)


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return open_dataset(write_msd(tmp_path / "data", 2, shape=SHAPE, labels={1: "outer", 2: "inner"}))


def plan_of(dataset: Dataset, **changes: object) -> Plan:
    return plan_dataset(dataset, take_fingerprint(dataset)).model_copy(update=changes)


def prepared(dataset: Dataset, folder: Path, **changes: object) -> dict[str, PreparedCase]:
    return prepare_cases(dataset, dataset.cases, plan_of(dataset, **changes), folder, Silent())


def no_reading(*_: object) -> None:
    raise AssertionError("a case was read again")


def test_arrays_are_those_of_preprocessing_memory_mapped_and_read_only(dataset: Dataset, tmp_path: Path) -> None:
    plan = plan_of(dataset, spacing_mm=(1.5, 1.5, 1.5))
    cases = prepare_cases(dataset, dataset.cases, plan, tmp_path / "cache", Silent())
    assert list(cases) == ["case_000", "case_001"]
    for case in dataset.cases:
        loaded, found = load_case(dataset, case), cases[case.case_id]
        expected = prepare_image(loaded.volume, plan, covering=loaded.mask)
        assert np.array_equal(found.image, expected.image)
        assert np.array_equal(found.labels, prepare_labels(loaded.mask, expected.record, plan))
        assert found.image.shape == (1, 13, 12, 11)
        for array in (found.image, found.labels, found.points):
            assert isinstance(array, np.memmap)
            with pytest.raises(ValueError, match="read-only"):
                array[(0,) * array.ndim] = 0


def test_points_are_foreground_voxels_with_their_label(dataset: Dataset, tmp_path: Path) -> None:
    for case in prepared(dataset, tmp_path / "cache").values():
        label, x, y, z = case.points.T
        assert np.array_equal(case.labels[0, x, y, z], label)
        # Fewer voxels than the limit: each one is there, once.
        assert len(np.unique(case.points, axis=0)) == len(case.points) == np.count_nonzero(case.labels)


def test_large_labels_are_sampled_across_their_whole_extent(tmp_path: Path) -> None:
    root = write_msd(tmp_path / "data", 2, shape=(32, 32, 32))
    mask = np.zeros((32, 32, 32), dtype=np.uint8)
    mask[4:28, 4:28, 4:28] = 1
    write_nifti(root / "labelsTr" / "case_000.nii.gz", mask)
    points = prepared(open_dataset(root), tmp_path / "cache")["case_000"].points
    assert len(points) == len(np.unique(points, axis=0)) == POINTS_PER_LABEL < 24**3
    assert points[:, 1:].min(axis=0).tolist() == [4, 4, 4]
    assert points[:, 1:].max(axis=0).tolist() == [27, 27, 27]


def test_points_of_regions_are_numbered_by_region(tmp_path: Path) -> None:
    root = write_nnunet(
        tmp_path / "data", 2, shape=SHAPE, labels={"whole": [1, 2], "core": [2]}, regions_class_order=[1, 2]
    )
    case = prepared(open_dataset(root), tmp_path / "cache")["case_000"]
    region, x, y, z = case.points.T
    assert set(region.tolist()) == {0, 1}
    assert case.labels[region, x, y, z].all()
    assert [int((region == number).sum()) for number in (0, 1)] == [np.count_nonzero(each) for each in case.labels]


def test_a_case_without_foreground_has_no_points(tmp_path: Path) -> None:
    root = write_msd(tmp_path / "data", 2, shape=SHAPE)
    write_nifti(root / "labelsTr" / "case_001.nii.gz", np.zeros(SHAPE, dtype=np.uint8))
    assert prepared(open_dataset(root), tmp_path / "cache")["case_001"].points.shape == (0, 4)


def test_what_is_prepared_is_not_prepared_again(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, told = plan_of(dataset), Told()
    first = prepare_cases(dataset, dataset.cases, plan, tmp_path, told)
    monkeypatch.setattr(cache, "load_case", no_reading)
    again = prepare_cases(dataset, dataset.cases, plan, tmp_path, told)
    assert all(np.array_equal(first[name].image, again[name].image) for name in first)
    # What does not change the content does not change the place either.
    other_window = plan.model_copy(update={"window_vox": (8, 8, 8), "batch_size": 1, "steps": 9})
    prepare_cases(dataset, dataset.cases, other_window, tmp_path, told)
    assert told.stages == [("preparing", 2)] * 3
    assert told.notes == ["case_000", "case_001"] * 3


def test_a_case_that_a_kill_left_half_prepared_is_prepared_again(dataset: Dataset, tmp_path: Path) -> None:
    before = prepared(dataset, tmp_path / "cache")["case_000"]
    expected = before.image.copy()
    folder = next((tmp_path / "cache").glob("*/case_000"))
    (folder / "points.npy").unlink()
    (folder / "image.npy").unlink()
    after = prepared(dataset, tmp_path / "cache")["case_000"]
    assert np.array_equal(after.image, expected)
    assert np.array_equal(after.points, before.points)


def test_another_grid_or_another_dataset_is_prepared_apart(dataset: Dataset, tmp_path: Path) -> None:
    folder, moved = tmp_path / "cache", tmp_path / "moved"
    coarse = prepared(dataset, folder, spacing_mm=(2.0, 2.0, 2.0))["case_000"]
    fine = prepared(dataset, folder)["case_000"]
    assert (coarse.image.shape, fine.image.shape) == ((1, 10, 9, 8), (1, *SHAPE))
    shutil.copytree(dataset.root, moved)
    write_nifti(moved / "imagesTr" / "case_000.nii.gz", phantom(9, shape=SHAPE, values=(1, 2))[0][0])
    other = prepared(open_dataset(moved), folder)["case_000"]
    assert not np.array_equal(other.image, fine.image)
    assert len(list(folder.iterdir())) == 3


def test_a_broken_case_is_named_and_leaves_nothing_that_looks_complete(dataset: Dataset, tmp_path: Path) -> None:
    plan = plan_of(dataset)
    dataset.cases[1].images[0].write_bytes(b"")
    with pytest.raises(FileError, match=r"^case case_001: .*case_001\.nii\.gz"):
        prepare_cases(dataset, dataset.cases, plan, tmp_path / "cache", Silent())
    assert [path.parent.name for path in (tmp_path / "cache").rglob("points.npy")] == ["case_000"]


def test_the_kind_of_error_is_kept(dataset: Dataset, tmp_path: Path) -> None:
    unlabelled = replace(dataset.cases[0], label=None)
    with pytest.raises(DataError, match=r"^case case_000: case case_000 has no label file"):
        prepare_cases(dataset, (unlabelled,), plan_of(dataset), tmp_path / "cache", Silent())


def test_a_damaged_array_says_what_to_delete(dataset: Dataset, tmp_path: Path) -> None:
    prepared(dataset, tmp_path / "cache")
    path = next((tmp_path / "cache").glob("*/case_001")) / "image.npy"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(FileError, match=r"prepared case .*case_001 is damaged: .*; delete this folder and resume"):
        prepared(dataset, tmp_path / "cache")


def test_a_folder_that_cannot_be_written_is_named(dataset: Dataset, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(FileError, match=r"cannot write .*image\.npy: Not a directory"):
        prepared(dataset, tmp_path / "cache")


def test_a_coarse_view_is_prepared_beside_its_case(dataset: Dataset, tmp_path: Path) -> None:
    fine = prepared(dataset, tmp_path / "cache")["case_000"]
    assert fine.coarse is None
    both = prepared(dataset, tmp_path / "cache", coarse_factor=(2, 3, 2))["case_000"]
    coarse = both.coarse
    assert coarse is not None
    assert np.array_equal(both.image, fine.image)
    assert np.array_equal(coarse.image, coarse_image(fine.image, (2, 3, 2)))
    assert np.array_equal(coarse.labels, coarse_labels(fine.labels, (2, 3, 2)))
    assert coarse.image.shape == (1, 10, 6, 8)
    assert isinstance(coarse.image, np.memmap)
    label, x, y, z = coarse.points.T
    assert np.array_equal(coarse.labels[0, x, y, z], label)
    assert len(coarse.points) == np.count_nonzero(coarse.labels)
    assert coarse.coarse is None


def test_a_coarse_view_is_not_prepared_again(dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepared(dataset, tmp_path, coarse_factor=(2, 2, 2))
    other = prepared(dataset, tmp_path, coarse_factor=(3, 2, 2))
    monkeypatch.setattr(cache, "coarse_image", no_reading)
    again = prepared(dataset, tmp_path, coarse_factor=(2, 2, 2))
    assert np.array_equal(first["case_001"].coarse.image, again["case_001"].coarse.image)
    assert other["case_001"].coarse.image.shape != again["case_001"].coarse.image.shape


def test_a_coarse_view_that_a_kill_left_half_prepared_is_prepared_again(dataset: Dataset, tmp_path: Path) -> None:
    before = prepared(dataset, tmp_path, coarse_factor=(2, 2, 2))["case_000"].coarse.image.copy()
    folder = next(tmp_path.glob("*/case_000/coarse_2x2x2"))
    (folder / "points.npy").unlink()
    (folder / "image.npy").write_bytes(b"")
    assert np.array_equal(prepared(dataset, tmp_path, coarse_factor=(2, 2, 2))["case_000"].coarse.image, before)
