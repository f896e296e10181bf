"""`tokenseg check`: each fault planted in a dataset is found, named, and mended in a copy that can be trained on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from phantoms import change_json, phantom, write_msd, write_nifti, write_nnunet
from tokenseg.checking.findings import Finding, check_dataset, check_files
from tokenseg.checking.mending import mend_dataset
from tokenseg.checking.pictures import draw_cases
from tokenseg.cli import main
from tokenseg.datasets.layouts import load_case, open_dataset
from tokenseg.errors import DataError, FileError
from tokenseg.imaging.grids import relate_grids, resample
from tokenseg.imaging.volume import Grid
from tokenseg.planning.fingerprint import take_fingerprint
from tokenseg.progress import Silent

SMALL = (12, 13, 14)
UPRIGHT = np.diag([1.0, 1.0, 2.0, 1.0])


def findings_of(root: Path) -> list[Finding]:
    return check_dataset(open_dataset(root), Silent())


def mended(root: Path, out: Path) -> Path:
    mend_dataset(open_dataset(root), findings_of(root), out, Silent())
    return out


def grid(affine: np.ndarray = UPRIGHT, shape: tuple[int, int, int] = (10, 10, 10)) -> Grid:
    return Grid(shape, 1, affine)


def moved(shift_mm: float = 0.0, stretch_mm: float = 0.0, turn: float = 0.0) -> np.ndarray:
    affine = UPRIGHT.copy()
    affine[0, 3] += shift_mm
    affine[2, 2] += stretch_mm
    rotation = np.eye(4)
    rotation[:3, :3] = nib.eulerangles.euler2mat(turn)
    return rotation @ affine


@pytest.mark.parametrize(
    ("second", "kind", "difference"),
    [
        (grid(), "identical", ""),
        (grid(moved(shift_mm=0.9e-3)), "rounding", ""),
        (grid(moved(stretch_mm=-0.9e-3)), "rounding", ""),
        (grid(moved(turn=0.9e-4)), "rounding", ""),
        (grid(moved(shift_mm=1.1e-3)), "other grid", "position of the first voxel by 0.0011 mm, allowed 0.001"),
        (grid(moved(stretch_mm=0.5)), "other grid", "spacing by 0.5 mm, allowed 0.001"),
        (grid(moved(turn=2e-4)), "other grid", "direction of the axes by 0.0002 (cosines), allowed 0.0001"),
        (grid(shape=(10, 10, 9)), "other grid", "10 x 10 x 9 voxels instead of 10 x 10 x 10"),
        (grid(moved(shift_mm=8.0)), "other grid", "position of the first voxel by 8 mm, allowed 0.001"),
        (grid(moved(shift_mm=9.5)), "disjoint", "position of the first voxel by 9.5 mm, allowed 0.001"),
        (grid(moved(shift_mm=300.0)), "disjoint", "position of the first voxel by 300 mm, allowed 0.001"),
    ],
)
def test_relations(second, kind, difference):
    assert relate_grids(grid(), second) == (kind, difference)


def centres(of: Grid) -> np.ndarray:
    indices = np.stack(np.meshgrid(*map(np.arange, of.shape), indexing="ij"), axis=-1)
    return indices @ of.affine[:3, :3].T + of.affine[:3, 3]


def test_resampling_keeps_things_where_they_are():
    """A ramp along the world, read at other voxels of a turned grid, is still that ramp."""
    source, target = grid(moved(turn=0.3), (30, 30, 30)), grid(moved(shift_mm=4.0, stretch_mm=-0.5), (8, 9, 10))
    ramp = np.array([1.0, 3.0, 7.0])
    in_source = (centres(target) - source.affine[:3, 3]) @ np.linalg.inv(source.affine[:3, :3]).T
    inside = ((in_source >= 0) & (in_source <= 29)).all(axis=-1)
    resampled = resample(centres(source) @ ramp, source, target, order=1)
    assert inside.mean() > 0.5
    np.testing.assert_allclose(resampled[inside], (centres(target) @ ramp)[inside], atol=0.01)


@pytest.mark.parametrize("flip", [(1, 1, -1), (-1, 1, 1), (-1, -1, -1)])
def test_the_same_voxels_stored_otherwise_come_back_whole(flip):
    rng = np.random.default_rng(0)
    values = rng.integers(0, 5, (5, 6, 7))
    first = grid(
        nib.affines.from_matvec(nib.eulerangles.euler2mat(0.3, -0.2, 0.5) @ np.diag([0.7, 1.2, 5.0]), [3, 4, 5]),
        (5, 6, 7),
    )
    turn = np.diag([*flip, 1.0])
    turn[:3, 3] = [(size - 1) if sign < 0 else 0 for sign, size in zip(flip, first.shape, strict=True)]
    stored = Grid(first.shape, 1, first.affine @ turn)
    kept = values[:: flip[0], :: flip[1], :: flip[2]]
    np.testing.assert_array_equal(resample(kept, stored, first, order=0), values)


def test_the_outer_half_voxel_is_inside():
    """5 mm slices of ones, read at 1 mm over the same box, are ones to the edge, and beyond it they are not."""
    thick = Grid((4, 4, 4), 1, np.diag([1.0, 1.0, 5.0, 1.0]))
    fine = np.diag([1.0, 1.0, 1.0, 1.0])
    fine[2, 3] = -2.0
    assert resample(np.ones((4, 4, 4), np.uint8), thick, Grid((4, 4, 20), 1, fine), order=0).all()
    assert resample(np.ones((4, 4, 4), np.uint8), thick, Grid((4, 4, 22), 1, fine), order=0).sum() == 4 * 4 * 20


def test_a_good_dataset_has_no_findings(tmp_path):
    write_msd(tmp_path / "d", 3)
    assert findings_of(tmp_path / "d") == []
    assert main(["check", str(tmp_path / "d")]) == 0


def test_real_datasets_have_no_errors(real_data):
    assert findings_of(real_data / "Task04_Hippocampus") == []


def replace(root: Path, folder: str, case: int, array: np.ndarray, affine: np.ndarray | None = None, ending="") -> None:
    write_nifti(root / folder / f"case_{case:03d}{ending}.nii.gz", array, affine=affine)


def test_planted_faults_are_found_and_mended(tmp_path):
    root = write_msd(tmp_path / "d", 8, shape=SMALL)
    image, mask = phantom(0, shape=SMALL)
    # 0: rounding; 1: label on a finer grid; 2: label elsewhere; 3: fractions; 4: NaN; 5: no foreground; 7: as 6
    replace(root, "labelsTr", 0, mask, moved(shift_mm=5e-4) @ np.diag([1, 1, 0.5, 1]))
    replace(root, "imagesTr", 0, image[0], np.diag([1.0, 1, 1, 1]))
    fine = np.kron(phantom(1, shape=SMALL)[1], np.ones((2, 2, 2), np.uint8))
    corner = np.diag([0.5, 0.5, 0.5, 1.0])
    corner[:3, 3] = -0.25
    replace(root, "labelsTr", 1, fine, corner)
    elsewhere = np.eye(4)
    elsewhere[0, 3] = 100
    replace(root, "labelsTr", 2, mask, elsewhere)
    replace(root, "labelsTr", 3, phantom(3, shape=SMALL)[1] * np.float32(0.9999))
    broken = phantom(4, shape=SMALL)[0][0]
    broken[2, 2, :3] = np.nan
    replace(root, "imagesTr", 4, broken)
    replace(root, "labelsTr", 5, np.zeros(SMALL, np.uint8))
    shutil.copy(root / "imagesTr" / "case_006.nii.gz", root / "imagesTr" / "case_007.nii.gz")
    found = {(each.case_id, each.severity, each.kind): each for each in findings_of(root)}
    assert sorted(found) == [
        ("case_000", "note", "grid"),
        ("case_001", "error", "grid"),
        ("case_002", "error", "grid"),
        ("case_003", "error", "label"),
        ("case_004", "error", "values"),
        ("case_005", "note", "label"),
        ("case_006", "warning", "duplicate"),
    ]
    assert "same place, other grid (24 x 26 x 28 voxels instead" in found["case_001", "error", "grid"].text
    assert (
        "in another place (position of the first voxel by 100 mm, allowed 0.001)"
        in found["case_002", "error", "grid"].text
    )
    assert "3 voxel(s) are NaN" in found["case_004", "error", "values"].text
    assert "the same image as in case_007" in found["case_006", "warning", "duplicate"].text
    with pytest.raises(DataError, match=rf"more case\(s\) have faults; all of them: tokenseg check {root}"):
        take_fingerprint(open_dataset(root))

    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    out = mended(root, tmp_path / "mended")
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before
    assert [(each.case_id, each.kind) for each in findings_of(out) if each.severity == "error"] == [
        ("case_002", "grid")
    ]
    dataset = open_dataset(out)
    for number in (1, 3):
        loaded = load_case(dataset, dataset.cases[number])
        np.testing.assert_array_equal(loaded.mask.array, phantom(number, shape=SMALL)[1])
    whole = load_case(dataset, dataset.cases[4]).volume.array[0]
    assert whole[2, 2, 0] == np.nanmin(broken)
    np.testing.assert_array_equal(whole[3:], broken[3:])


def test_channels_on_other_grids(tmp_path):
    root = write_nnunet(tmp_path / "d", 3, shape=SMALL, channels=("T1", "T2"))
    image = phantom(0, shape=SMALL, num_channels=2)[0][1]
    replace(root, "imagesTr", 0, image[:, :, ::2], np.diag([1.0, 1, 2, 1]), "_0001")
    (finding,) = findings_of(root)
    assert (finding.case_id, finding.kind, finding.fixable) == ("case_000", "grid", True)
    out = mended(root, tmp_path / "mended")
    assert findings_of(out) == []
    dataset = open_dataset(out)
    back = load_case(dataset, dataset.cases[0]).volume.array[1]
    np.testing.assert_allclose(back[:, :, ::2], image[:, :, ::2], rtol=1e-5)


@pytest.mark.parametrize("write", [write_msd, write_nnunet])
def test_a_0_255_mask_is_listed_and_comes_back_as_255(tmp_path, write):
    root = write(tmp_path / "d", 3, shape=SMALL)
    for case in range(3):
        replace(root, "labelsTr", case, phantom(case, shape=SMALL)[1] * np.uint8(255))
    assert {each.text.split(" holds")[1] for each in findings_of(root)} == {
        " the values 255, which the dataset does not list"
    }
    dataset = open_dataset(mended(root, tmp_path / "mended"))
    assert [(label.values, label.output_value) for label in dataset.labels] == [((255,), 255)]
    take_fingerprint(dataset)
    assert findings_of(tmp_path / "mended") == []


def test_one_0_255_mask_among_others_is_left_to_the_user(tmp_path):
    root = write_msd(tmp_path / "d", 3, shape=SMALL)
    replace(root, "labelsTr", 1, phantom(1, shape=SMALL)[1] * np.uint8(255))
    (finding,) = findings_of(root)
    assert not finding.fixable
    assert "divide the masks by 255" in finding.mend


def test_an_interpolated_mask_of_several_labels_is_not_rounded(tmp_path):
    """Between 0 and 2 lies 1, which is another label."""
    root = write_msd(tmp_path / "d", 2, shape=SMALL, labels={1: "a", 2: "b"})
    replace(root, "labelsTr", 0, phantom(0, shape=SMALL)[1] * np.float32(0.6))
    (finding,) = findings_of(root)
    assert not finding.fixable
    assert "interpolated" in finding.mend


@pytest.mark.parametrize(
    ("values", "divisor", "said"),
    [
        ((1, 2), 255, "it looks divided by 255: multiply it by 255 and round it"),
        ((1,), 255, "it looks divided by 255"),
        ((1,), 2, "it looks divided by 2: multiply it by 2 and"),
        ((1, 2), 65535, "it looks divided by 65535"),
        ((2, 4), 1000, "it looks divided by 1000"),
        # Of these, one is 1 when divided, and the other would vanish.
        ((1, 255), 255, "it looks divided by 255"),
        ((1, 100), 100, "it looks divided by 100"),
    ],
)
def test_a_mask_stored_as_fractions_is_not_emptied(tmp_path, values, divisor, said):
    root = write_msd(tmp_path / "d", 2, shape=SMALL, labels={value: f"label {value}" for value in values})
    stored = phantom(0, shape=SMALL, values=values)[1] / np.float32(divisor)
    replace(root, "labelsTr", 0, stored)
    (finding,) = findings_of(root)  # and none says that there is no foreground
    assert (finding.case_id, finding.severity, finding.fixable) == ("case_000", "error", False)
    assert finding.text.endswith("no whole numbers, and rounding would make background of labels")
    assert said in finding.mend
    image = phantom(0, shape=SMALL)[0][0]
    image[0, 0, 0] = np.nan  # for which the case is mended
    replace(root, "imagesTr", 0, image)
    out = mended(root, tmp_path / "mended")
    np.testing.assert_array_equal(nib.load(out / "labelsTr" / "case_000.nii.gz").dataobj, stored)


def test_a_mask_of_fractions_below_a_half_is_not_without_foreground(tmp_path):
    root = write_msd(tmp_path / "d", 3, shape=SMALL)
    for case in range(2):
        replace(root, "labelsTr", case, np.zeros(SMALL, np.uint8))
    soft = 0.4 * phantom(2, shape=SMALL)[1] * np.random.default_rng(0).uniform(size=SMALL)
    replace(root, "labelsTr", 2, soft.astype(np.float32))
    error, *notes = findings_of(root)
    assert (error.case_id, error.fixable) == ("case_002", False)
    assert "multiply it by what it was divided by" in error.mend
    assert [(note.severity, note.case_id) for note in notes] == [("note", "case_000"), ("note", "case_001")]


def test_one_mask_of_fractions_among_0_255_masks_lists_no_255(tmp_path):
    root = write_msd(tmp_path / "d", 2, shape=SMALL)
    replace(root, "labelsTr", 0, phantom(0, shape=SMALL)[1] / np.float32(255))
    replace(root, "labelsTr", 1, phantom(1, shape=SMALL)[1] * np.uint8(255))
    assert [(each.case_id, each.kind, each.fixable) for each in findings_of(root)] == [
        ("case_000", "label", False),
        ("case_001", "label", False),
    ]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda mask: mask + np.float32(0.001),  # an offset in the header
        lambda mask: np.where(mask == 0, np.float32(6e-8) * (np.indices(mask.shape).sum(0) % 2), mask),
        lambda mask: mask + np.random.default_rng(0).normal(0, 1e-3, mask.shape).astype(np.float32),
    ],
)
def test_noise_beside_0_is_rounded(tmp_path, spoil):
    root = write_msd(tmp_path / "d", 2, shape=SMALL, labels={1: "a", 2: "b"})
    mask = phantom(0, shape=SMALL, values=(1, 2))[1]
    replace(root, "labelsTr", 0, spoil(mask.astype(np.float32)))
    (finding,) = findings_of(root)
    assert finding.fixable
    dataset = open_dataset(mended(root, tmp_path / "mended"))
    np.testing.assert_array_equal(load_case(dataset, dataset.cases[0]).mask.array, mask)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_no_number_in_a_mask_is_background(tmp_path, value):
    root = write_msd(tmp_path / "d", 2, shape=SMALL)
    mask = phantom(0, shape=SMALL)[1].astype(np.float32)
    mask[0, 0, 0] = value
    replace(root, "labelsTr", 0, mask)
    (finding,) = findings_of(root)
    assert (finding.text, finding.fixable) == ("case_000.nii.gz holds values that are no whole numbers", True)
    dataset = open_dataset(mended(root, tmp_path / "mended"))
    np.testing.assert_array_equal(load_case(dataset, dataset.cases[0]).mask.array, phantom(0, shape=SMALL)[1])


def test_one_label_file_of_two_cases(tmp_path):
    root = write_msd(tmp_path / "d", 3, shape=SMALL)
    manifest = json.loads((root / "dataset.json").read_text())
    manifest["training"][1]["label"] = "labelsTr/./case_000.nii.gz"
    change_json(root / "dataset.json", training=manifest["training"])
    image = phantom(1, shape=(10, 13, 14))[0][0]
    image[0, 0, 0] = np.nan
    replace(root, "imagesTr", 1, image)
    with pytest.raises(DataError, match=r"case case_000: label file case_000.nii.gz is that of case_001 too; list for"):
        take_fingerprint(open_dataset(root))
    assert [
        (each.case_id, each.kind, each.text.removeprefix("label file "), each.fixable) for each in findings_of(root)
    ] == [
        ("case_000", "label", "case_000.nii.gz is that of case_001 too", False),
        ("case_001", "label", "case_000.nii.gz is that of case_000 too", False),
        ("case_001", "values", "case_001.nii.gz: 1 voxel(s) are NaN or infinite", True),
    ]
    before = (root / "labelsTr" / "case_000.nii.gz").read_bytes()
    out = mended(root, tmp_path / "mended")
    assert (out / "labelsTr" / "case_000.nii.gz").read_bytes() == before
    assert [each.kind for each in findings_of(out)] == ["label", "label"]


def test_a_lost_header_is_not_resampled(tmp_path):
    root = write_msd(tmp_path / "d", 2, shape=SMALL)
    image, mask = phantom(0, shape=SMALL)
    replace(root, "imagesTr", 0, image[0], nib.affines.from_matvec(np.diag([1.2, 1.2, 1.2]), [-3, -3, -3]))
    replace(root, "labelsTr", 0, mask, np.eye(4))
    (finding,) = findings_of(root)
    assert not finding.fixable
    assert "was a header lost?" in finding.mend


def test_a_transposed_mask_is_not_resampled(tmp_path):
    """Its header is that of the image, so resampling would cut it off and leave it transposed."""
    root = write_msd(tmp_path / "d", 2, shape=SMALL)
    turned = np.ascontiguousarray(phantom(0, shape=SMALL)[1].transpose(1, 0, 2))
    replace(root, "labelsTr", 0, turned)
    (finding,) = findings_of(root)
    assert (finding.case_id, finding.kind, finding.fixable) == ("case_000", "grid", False)
    assert "was it transposed?" in finding.mend
    image = phantom(0, shape=SMALL)[0][0]
    image[0, 0, 0] = np.nan  # for which the case is mended
    replace(root, "imagesTr", 0, image)
    out = mended(root, tmp_path / "mended")
    np.testing.assert_array_equal(nib.load(out / "labelsTr" / "case_000.nii.gz").dataobj, turned)


def test_wrong_numbers_of_channels_and_no_foreground_at_all(tmp_path):
    root = write_msd(tmp_path / "d", 2, shape=SMALL, channels=("a", "b"))
    replace(root, "imagesTr", 0, phantom(0, shape=SMALL)[0][0])
    for case in range(2):
        replace(root, "labelsTr", case, np.zeros(SMALL, np.uint8))
    errors = [each.text for each in findings_of(root) if each.severity == "error"]
    assert errors == ["no mask has any foreground", "case_000.nii.gz holds 1 channel(s), the dataset lists 2"]


def test_files_named_by_path_are_never_overwritten(tmp_path):
    root = write_nnunet(tmp_path / "d", 2, shape=SMALL)
    shutil.move(root / "labelsTr" / "case_000.nii.gz", tmp_path / "elsewhere.nii.gz")
    listed = {
        f"case_00{n}": {
            "images": [f"imagesTr/case_00{n}_0000.nii.gz"],
            "label": "../elsewhere.nii.gz" if n == 0 else "labelsTr/case_001.nii.gz",
        }
        for n in range(2)
    }
    change_json(root / "dataset.json", dataset=listed)
    write_nifti(tmp_path / "elsewhere.nii.gz", phantom(0, shape=SMALL)[1] * np.float32(0.999))
    before = (tmp_path / "elsewhere.nii.gz").read_bytes()
    with pytest.raises(DataError, match="names files by their paths; copy them"):
        mended(root, tmp_path / "mended")
    assert (tmp_path / "elsewhere.nii.gz").read_bytes() == before
    assert not (tmp_path / "mended").exists()


def test_what_cannot_be_mended_stays_as_it_is(tmp_path):
    root = write_nnunet(tmp_path / "d", 3, shape=SMALL, channels=("T1", "T2"))
    (root / "imagesTr" / "case_000_0001.nii.gz").write_bytes(b"nothing")
    replace(root, "labelsTr", 0, phantom(0, shape=SMALL)[1] * np.float32(0.999))
    (root / "notes.txt").write_text("kept")
    for path in root.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    out = mended(root, tmp_path / "mended")
    assert (out / "imagesTr" / "case_000_0001.nii.gz").read_bytes() == b"nothing"
    assert (out / "notes.txt").read_text() == "kept"
    assert [each.kind for each in findings_of(out)] == ["file"]
    for path in root.rglob("*"):
        path.chmod(0o755)


def test_nan_becomes_the_lowest_value_of_its_own_channel(tmp_path):
    root = write_msd(tmp_path / "d", 2, shape=SMALL, channels=("a", "b"))
    image = np.moveaxis(phantom(0, shape=SMALL, num_channels=2)[0], 0, -1).copy()
    image[..., 1] += 1000
    image[1, 1, 1, 1] = np.nan
    replace(root, "imagesTr", 0, image)
    dataset = open_dataset(mended(root, tmp_path / "mended"))
    back = load_case(dataset, dataset.cases[0]).volume.array
    assert back[1, 1, 1, 1] == np.nanmin(image[..., 1])


def test_pictures_that_cannot_be_written_are_an_error(tmp_path):
    root = write_msd(tmp_path / "d", 2, shape=SMALL)
    replace(root, "labelsTr", 1, phantom(1, shape=SMALL)[1] * np.float32(0.99))
    dataset = open_dataset(root)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(FileError, match="cannot write"):
        draw_cases(dataset, check_dataset(dataset, Silent()), tmp_path / "file" / "pictures", Silent())


def test_pictures_of_odd_cases(tmp_path):
    root = write_msd(tmp_path / "d", 2, shape=(12, 13, 1), name="a$_$b")
    for path in (root / "labelsTr").iterdir():
        write_nifti(path, nib.load(path).get_fdata().astype(np.float32) * 0.99)
    words = ["check", str(root), "--pictures", str(tmp_path / "pictures")]
    assert main(words) == 1
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 2
    assert main(words) == 2  # the folder is not empty


def test_unlisted_values_are_left_to_the_user(tmp_path):
    root = write_msd(tmp_path / "d", 2, shape=SMALL)
    replace(root, "labelsTr", 0, phantom(0, shape=SMALL)[1] * np.uint8(7))
    (finding,) = findings_of(root)
    assert "holds the values 7" in finding.text
    assert not finding.fixable


def test_the_same_image_in_another_type_is_a_duplicate(tmp_path):
    root = write_msd(tmp_path / "d", 3, shape=SMALL)
    replace(root, "imagesTr", 2, phantom(0, shape=SMALL)[0][0].astype(np.float64))
    (finding,) = findings_of(root)
    assert (finding.kind, finding.text) == ("duplicate", "the same image as in case_002")


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path):
    root = write_msd(tmp_path / "d", 2, shape=SMALL)
    replace(root, "labelsTr", 0, phantom(0, shape=SMALL)[1][:10])
    (finding,) = findings_of(root)
    assert finding.text.startswith("labelsTr/case_000.nii.gz against imagesTr/case_000.nii.gz: same place, other grid")


def test_odd_images(tmp_path):
    root = write_msd(tmp_path / "d", 6, shape=SMALL, channels=("CT",))
    for case in range(6):
        values = np.random.default_rng(case).normal(40, 20, SMALL).astype(np.float32)
        replace(root, "imagesTr", case, values + (1024 if case == 2 else 0))  # one of them is not in Hounsfield units
    replace(root, "imagesTr", 3, phantom(3, shape=SMALL)[1].astype(np.float32))
    replace(root, "imagesTr", 4, np.full(SMALL, 5, np.float32))
    sheared = np.eye(4)
    sheared[0, 1] = 0.2
    replace(root, "imagesTr", 5, np.random.default_rng(5).normal(40, 20, SMALL).astype(np.float32), sheared)
    replace(root, "labelsTr", 5, phantom(5, shape=SMALL)[1], sheared)
    told: dict[str, str] = {}
    for each in findings_of(root):
        told[each.case_id] = told.get(each.case_id, "") + each.text
    assert "CT: median intensity 106" in told["case_002"]
    assert "holds 2 distinct values, as a mask does" in told["case_003"]
    assert "is constant" in told["case_004"]
    assert "axes are not at right angles (off by a cosine of 0.196)" in told["case_005"]
    assert sorted(told) == ["case_002", "case_003", "case_004", "case_005"]


def test_a_strange_spacing(tmp_path):
    root = write_msd(tmp_path / "d", 4, shape=SMALL)
    for folder, array in zip(("imagesTr", "labelsTr"), phantom(1, shape=SMALL), strict=True):
        replace(root, folder, 1, array.reshape(SMALL), np.diag([10.0, 10, 10, 1]))
    (finding,) = findings_of(root)
    assert finding.text == "voxels of 10 x 10 x 10 mm, in the median case 1 x 1 x 1"


def test_files_that_cannot_be_read_are_named(tmp_path):
    root = write_msd(tmp_path / "d", 3, shape=SMALL)
    for folder, case in (("imagesTr", 0), ("labelsTr", 1)):
        (root / folder / f"case_{case:03d}.nii.gz").write_bytes(b"nothing")
    assert [(each.case_id, each.kind) for each in findings_of(root)] == [("case_000", "file"), ("case_001", "file")]


def test_files_against_the_first(tmp_path, capsys):
    array = phantom(0, shape=SMALL)[0][0]
    for name, affine in (("a", np.eye(4)), ("b", np.eye(4)), ("c", moved())):
        write_nifti(tmp_path / f"{name}.nii", array, affine=affine)
    assert check_files([tmp_path / "a.nii", tmp_path / "b.nii"]) == []
    paths = [str(tmp_path / f"{name}.nii") for name in "abc"]
    assert main(["check", *paths]) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith(
        "error: c.nii: c.nii against a.nii: same place, other grid (spacing by 1 mm, allowed 0.001). As"
    )
    assert out[1] == "3 files: 1 error(s), 0 warning(s), 0 note(s)"


def test_command(tmp_path, capsys):
    root = write_msd(tmp_path / "d", 3, shape=SMALL)
    replace(root, "labelsTr", 1, phantom(1, shape=SMALL)[1] * np.float32(0.99))
    words = ["check", str(root), "--fix", str(tmp_path / "fixed"), "--json", str(tmp_path / "found.json")]
    assert main([*words, "--pictures", str(tmp_path / "pictures")]) == 1
    told = capsys.readouterr()
    assert told.out.splitlines()[0] == (
        "error: case_001: case_001.nii.gz holds values that are no whole numbers. --fix OUT mends it in a copy"
    )
    assert "a copy, 1 file(s) of it mended" in told.err
    (finding,) = json.loads((tmp_path / "found.json").read_text())
    assert (finding["case_id"], finding["fixable"]) == ("case_001", True)
    picture = (tmp_path / "pictures" / "case_001.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 5000
    assert main(["check", str(tmp_path / "fixed")]) == 0
    assert main(words) == 2
    assert "is there already; name a new folder" in capsys.readouterr().err


def test_what_cannot_be_meant(tmp_path, capsys):
    root = write_msd(tmp_path / "d", 2, shape=SMALL)
    for words, said in (
        ([str(root / "imagesTr" / "case_000.nii.gz")], "give a dataset folder, or two or more files"),
        ([*map(str, sorted((root / "imagesTr").iterdir())), "--fix", "x"], "are for one dataset folder"),
        ([str(root), "--fix", str(root / "fixed")], "lies in the dataset itself"),
    ):
        assert main(["check", *words]) == 2
        assert said in capsys.readouterr().err


def test_a_copy_is_whole_or_not_there(tmp_path, monkeypatch):
    root = write_msd(tmp_path / "d", 3, shape=SMALL)
    replace(root, "labelsTr", 1, phantom(1, shape=SMALL)[1] * np.float32(0.99))

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tokenseg.checking.mending._mend_case", fail)
    with pytest.raises(FileError, match="No space left on device; nothing was changed there"):
        mended(root, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d"]


def to_mhd(path: Path, values: np.ndarray, voxels: str) -> None:
    """Put a .mhd whose voxels are in a file of this name in the place of a NIfTI file."""
    path.unlink()
    path.with_name(voxels).write_bytes(values.tobytes(order="F"))
    kind = {np.dtype(np.float32): "MET_FLOAT", np.dtype(np.uint8): "MET_UCHAR"}[values.dtype]
    size = " ".join(map(str, values.shape))
    path.with_name(path.name.replace(".nii.gz", ".mhd")).write_text(
        f"ObjectType = Image\nNDims = 3\nDimSize = {size}\nElementType = {kind}\nElementDataFile = {voxels}\n"
    )


def test_mhd_files_are_copied_whole_and_not_said_to_be_mended(tmp_path):
    root = write_nnunet(tmp_path / "d", 2, shape=SMALL)
    for case in range(2):
        image, mask = phantom(case, shape=SMALL)
        to_mhd(root / "imagesTr" / f"case_{case:03d}_0000.nii.gz", image[0], f"voxels of {case}")
        to_mhd(root / "labelsTr" / f"case_{case:03d}.nii.gz", mask[: 12 - case].astype(np.float32), f"{case}.bin")
    change_json(root / "dataset.json", file_ending=".mhd")
    (finding,) = findings_of(root)
    assert (finding.kind, finding.fixable) == ("grid", False)
    assert finding.mend == (
        "resample one to the other. --fix writes no .mhd: convert the dataset to .mha or .nii.gz, or mend it by hand"
    )
    broken, _ = phantom(0, shape=SMALL)
    broken[0, 0, 0, 0] = np.nan
    (root / "imagesTr" / "voxels of 0").write_bytes(broken[0].tobytes(order="F"))
    (root / "labelsTr" / "1.bin").write_bytes(np.full((11, 13, 14), 0.999, np.float32).tobytes())
    found = findings_of(root)
    assert [(each.kind, each.fixable) for each in found] == [("values", False), ("grid", False), ("label", False)]
    assert "--fix writes no .mhd" in found[0].mend
    out = mended(root, tmp_path / "mended")
    files = sorted(path.relative_to(root) for path in root.rglob("*") if path.is_file())
    assert sorted(path.relative_to(out) for path in out.rglob("*") if path.is_file()) == files
    assert all((out / path).read_bytes() == (root / path).read_bytes() for path in files)


def test_datasets_in_other_formats_are_checked_too(tmp_path):
    root = write_nnunet(tmp_path / "d", 2, shape=SMALL)
    from tokenseg.imaging.volume import read_volume, write_volume

    for folder in ("imagesTr", "labelsTr"):
        for path in sorted((root / folder).iterdir()):
            write_volume(path.with_name(path.name.replace(".nii.gz", ".nrrd")), read_volume(path, ("MR",)))
            path.unlink()
    change_json(root / "dataset.json", file_ending=".nrrd")
    assert findings_of(root) == []
    take_fingerprint(open_dataset(root))
