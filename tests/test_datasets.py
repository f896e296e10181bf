from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from phantoms import change_json, phantom, write_json, write_mamamia, write_msd, write_nifti, write_nnunet
from tokenseg.datasets.cases import Case, Split
from tokenseg.datasets.dataset_json import read_json
from tokenseg.datasets.layouts import list_dataset_images, load_case, load_image, open_dataset
from tokenseg.errors import DataError, FileError, GeometryError
from tokenseg.imaging.channel_names import is_ct

SMALL = (6, 7, 8)


def ids(cases: tuple[Case, ...] | None) -> list[str]:
    assert cases is not None
    return [case.case_id for case in cases]


# Medical Segmentation Decathlon


def test_msd_3d(tmp_path: Path):
    write_msd(tmp_path, 3, shape=SMALL, spacing_mm=(1, 2, 3), labels={2: "core", 1: "rim"})
    dataset = open_dataset(tmp_path)
    assert dataset.reason == "Medical Segmentation Decathlon: dataset.json lists 3 training pairs"
    assert dataset.layout == "msd"
    assert ids(dataset.cases) == ["case_000", "case_001", "case_002"]
    assert [(label.name, label.values, label.output_value) for label in dataset.labels] == [
        ("rim", (1,), 1),
        ("core", (2,), 2),
    ]
    assert (dataset.source_channels, dataset.channels, dataset.joint_zscore) == (("MRI",), ("MRI",), False)
    assert (dataset.regions, dataset.file_ending, dataset.splits) == (False, ".nii.gz", None)
    loaded = load_case(dataset, dataset.cases[1])
    image, mask = phantom(1, shape=SMALL, values=(1, 2))
    np.testing.assert_array_equal(loaded.volume.array, image)
    np.testing.assert_array_equal(loaded.mask.array, mask)
    np.testing.assert_allclose(loaded.volume.spacing_mm, (1, 2, 3))


def test_msd_4d_has_the_channel_last_and_a_3d_label(tmp_path: Path):
    write_msd(tmp_path, 2, shape=SMALL, channels=("FLAIR", "t1gd"))
    dataset = open_dataset(tmp_path)
    loaded = load_case(dataset, dataset.cases[0])
    assert loaded.volume.channels == ("FLAIR", "t1gd")
    np.testing.assert_array_equal(loaded.volume.array, phantom(0, shape=SMALL, num_channels=2)[0])
    assert loaded.mask.array.shape == SMALL


def test_msd_channels_follow_their_numbers_not_their_order_in_the_file(tmp_path: Path):
    write_msd(tmp_path, 2, shape=SMALL, channels=("a", "b", "c"))
    change_json(tmp_path / "dataset.json", modality={"2": "c", "0": "a", "1": "b"})
    assert open_dataset(tmp_path).source_channels == ("a", "b", "c")


def test_a_dataset_can_be_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_msd(tmp_path, 2, shape=SMALL)
    monkeypatch.chdir(tmp_path)
    dataset = open_dataset(Path())
    assert load_case(dataset, dataset.cases[0]).mask.array.shape == SMALL


def test_msd_skips_macos_junk(tmp_path: Path):
    write_msd(tmp_path, 2, shape=SMALL, num_test=1)
    (tmp_path / "imagesTr" / "._case_000.nii.gz").write_bytes(b"junk")
    (tmp_path / "imagesTs" / "._case_002.nii.gz").write_bytes(b"junk")
    manifest = json.loads((tmp_path / "dataset.json").read_text())
    junk = {"image": "./imagesTr/._case_000.nii.gz", "label": "./labelsTr/._case_000.nii.gz"}
    change_json(tmp_path / "dataset.json", training=[junk, *manifest["training"]])
    assert ids(open_dataset(tmp_path).cases) == ["case_000", "case_001"]
    assert ids(list_dataset_images(tmp_path)) == ["case_000", "case_001", "case_002"]


@pytest.mark.parametrize("image", ["../outside/x.nii.gz", "imagesTr/../../x.nii.gz", "/etc/x.nii.gz"])
@pytest.mark.parametrize("relative", [False, True])
def test_msd_paths_stay_in_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image: str, relative: bool):
    write_msd(tmp_path, 2, shape=SMALL)
    monkeypatch.chdir(tmp_path)
    change_json(tmp_path / "dataset.json", training=[{"image": image, "label": "./labelsTr/case_000.nii.gz"}])
    with pytest.raises(DataError, match=rf"dataset.json names '{image}', which is outside the dataset folder"):
        open_dataset(Path() if relative else tmp_path)


def test_msd_takes_nnunet_version_1_channel_files(tmp_path: Path):
    write_msd(tmp_path, 2, shape=SMALL, channels=("T1", "T2"), num_test=1)
    for folder in ("imagesTr", "imagesTs"):
        for path in (tmp_path / folder).iterdir():
            path.unlink()
    for index in range(3):
        folder = tmp_path / ("imagesTr" if index < 2 else "imagesTs")
        for number, channel in enumerate(phantom(index, shape=SMALL, num_channels=2)[0]):
            write_nifti(folder / f"case_{index:03d}_{number:04d}.nii.gz", channel)
    dataset = open_dataset(tmp_path)
    assert ids(dataset.cases) == ["case_000", "case_001"]
    np.testing.assert_array_equal(
        load_image(dataset, dataset.cases[1]).array, phantom(1, shape=SMALL, num_channels=2)[0]
    )
    assert ids(list_dataset_images(tmp_path)) == ["case_000", "case_001", "case_002"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": None}, r"dataset.json has 1 fault\(s\): labels: Field required"),
        ({"labels": None, "modality": ["MRI"]}, r"has 2 fault\(s\): modality: .*dictionary; labels: Field required"),
        ({"training": [{"image": "a.nii.gz"}]}, "training.0.label: Field required"),
        ({"training": []}, "has no training case; training needs at least 2"),
        ({"labels": {"background": "0"}}, r"labels.background.\[key\]: Input should be a valid integer"),
        ({"labels": {"0": "background"}}, "key labels, lists the values 0; it must map"),
        ({"labels": {"0": "background", "-1": "odd"}}, "key labels, lists the values 0, -1; it must map"),
        ({"modality": {"1": "MRI"}}, 'key modality, numbers its channels 1; they must be "0", "1"'),
        ({"modality": {}}, r"numbers its channels \(none\)"),
        ({"modality": {"0": "MRI", "1": "MRI "}}, "names its channels 'MRI', 'MRI'; give each its own name"),
        ({"modality": {"0": "post - pre"}}, "has the channel 'post - pre'; ' - ' means a difference"),
        ({"modality": None, "training": None}, "has the keys name, .*; looked for dataset.json with 'modality'"),
    ],
)
def test_msd_faults_name_file_and_key(tmp_path: Path, changes: dict[str, object], message: str):
    write_msd(tmp_path, 2, shape=SMALL)
    change_json(tmp_path / "dataset.json", **changes)
    with pytest.raises(DataError, match=message):
        open_dataset(tmp_path)


def test_json_that_is_none(tmp_path: Path):
    (tmp_path / "dataset.json").write_text('{"labels": ')
    with pytest.raises(DataError, match=r"dataset.json is not valid JSON: .*line 1.*mend it"):
        open_dataset(tmp_path)
    (tmp_path / "dataset.json").write_text("[]")
    with pytest.raises(DataError, match=r"dataset.json holds a JSON list; it must be an object"):
        open_dataset(tmp_path)
    with pytest.raises(DataError, match="cannot be read: Is a directory; check the file"):
        read_json(tmp_path)
    (tmp_path / "dataset.json").write_bytes(b"\xff\xfe\x00\x00")
    with pytest.raises(DataError, match=r"dataset.json is not valid JSON"):
        open_dataset(tmp_path)


def test_one_case_only(tmp_path: Path):
    write_msd(tmp_path, 1, shape=SMALL)
    with pytest.raises(DataError, match=r"one training case only \(case_000\); training needs at least 2"):
        open_dataset(tmp_path)


def test_missing_files_are_listed(tmp_path: Path):
    write_msd(tmp_path, 8, shape=SMALL)
    for index in range(7):
        (tmp_path / "labelsTr" / f"case_{index:03d}.nii.gz").unlink()
    with pytest.raises(DataError) as caught:
        open_dataset(tmp_path)
    assert "7 of 16 image and label files are missing: labelsTr/case_000.nii.gz, " in str(caught.value)
    assert "labelsTr/case_004.nii.gz and 2 more; complete the dataset" in str(caught.value)


def test_repeated_case_is_named(tmp_path: Path):
    write_msd(tmp_path, 2, shape=SMALL)
    pair = {"image": "./imagesTr/case_001.nii.gz", "label": "./labelsTr/case_001.nii.gz"}
    change_json(tmp_path / "dataset.json", training=[pair, pair])
    with pytest.raises(DataError, match="case ids must be unique; these are given more than once: case_001"):
        open_dataset(tmp_path)


def test_image_and_label_of_different_shape(tmp_path: Path):
    write_msd(tmp_path, 2, shape=SMALL)
    write_nifti(tmp_path / "labelsTr" / "case_001.nii.gz", np.zeros((6, 7, 9), np.uint8))
    dataset = open_dataset(tmp_path)
    with pytest.raises(GeometryError, match=r"image of case_001 and label case_001.nii.gz are not on one grid"):
        load_case(dataset, dataset.cases[1])


def test_case_without_label_cannot_be_loaded_with_one(tmp_path: Path):
    write_msd(tmp_path, 2, shape=SMALL)
    dataset = open_dataset(tmp_path)
    with pytest.raises(DataError, match="case loose has no label file"):
        load_case(dataset, Case("loose", "loose", dataset.cases[0].images))


# nnU-Net


def test_nnunet_exclusive_labels(tmp_path: Path):
    write_nnunet(tmp_path, 3, shape=SMALL, channels=("CT", "PET"), labels={"core": 2, "rim": 1}, file_ending=".nii")
    dataset = open_dataset(tmp_path)
    assert dataset.reason == "nnU-Net v2 raw: dataset.json has channel_names and file_ending, 3 training cases"
    assert [(label.name, label.output_value) for label in dataset.labels] == [("rim", 1), ("core", 2)]
    assert (dataset.layout, dataset.file_ending, dataset.regions) == ("nnunet", ".nii", False)
    assert dataset.ct_channels == (True, False)
    loaded = load_case(dataset, dataset.cases[2])
    np.testing.assert_array_equal(loaded.volume.array, phantom(2, shape=SMALL, num_channels=2, values=(1, 2))[0])
    assert loaded.volume.channels == ("CT", "PET")


def test_nnunet_regions_keep_their_order_and_output_values(tmp_path: Path):
    regions = {"whole": [1, 2, 3], "core": [2, 3], "enhancing": 3}
    write_nnunet(tmp_path, 2, shape=SMALL, labels=regions, regions_class_order=[1, 2, 3])
    dataset = open_dataset(tmp_path)
    assert dataset.regions
    assert [(label.name, label.values, label.output_value) for label in dataset.labels] == [
        ("whole", (1, 2, 3), 1),
        ("core", (2, 3), 2),
        ("enhancing", (3,), 3),
    ]


def test_nnunet_regions_are_written_in_a_value_of_their_own(tmp_path: Path):
    write_nnunet(tmp_path, 2, shape=SMALL, labels={"whole": [1, 2], "core": 2}, regions_class_order=[1, 3])
    with pytest.raises(DataError, match="gives core a value that is none of its own"):
        open_dataset(tmp_path)


def test_nnunet_explicit_paths_expand_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    elsewhere, root = write_nnunet(tmp_path / "elsewhere", 2, shape=SMALL, num_test=1), tmp_path / "Dataset001_X"
    monkeypatch.setenv("PHANTOM_FOLDER", str(elsewhere))
    files = {
        name: {
            "images": [f"$PHANTOM_FOLDER/imagesTr/case_{index:03d}_0000.nii.gz"],
            "label": f"../elsewhere/labelsTr/case_{index:03d}.nii.gz",
        }
        for index, name in enumerate(("b", "a"))
    }
    manifest = json.loads((elsewhere / "dataset.json").read_text())
    write_json(root / "dataset.json", manifest | {"dataset": files})
    dataset = open_dataset(root)
    assert ids(dataset.cases) == ["a", "b"]
    np.testing.assert_array_equal(load_case(dataset, dataset.cases[0]).volume.array, phantom(1, shape=SMALL)[0])
    assert ids(list_dataset_images(root)) == ["a", "b"]


def test_nnunet_case_ids_cannot_leave_the_output_folder(tmp_path: Path):
    write_nnunet(tmp_path, 2, shape=SMALL)
    files = {"images": ["imagesTr/case_000_0000.nii.gz"], "label": "labelsTr/case_000.nii.gz"}
    change_json(tmp_path / "dataset.json", dataset={"../evil": files, "good": files})
    with pytest.raises(DataError, match=r"case ids must be usable as file names; these are not: \.\./evil"):
        open_dataset(tmp_path)


def test_nnunet_own_splits(tmp_path: Path):
    write_nnunet(tmp_path, 3, shape=SMALL)
    write_json(tmp_path / "splits_final.json", [{"train": ["case_002", "case_000"], "val": ["case_001"]}])
    dataset = open_dataset(tmp_path)
    assert dataset.splits == (Split(train=("case_000", "case_002"), val=("case_001",)),)
    assert dataset.reason.endswith("3 training cases, 1 folds from splits_final.json")


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ([{"train": ["case_000"], "val": ["case_9"]}], "fold 0, names cases that the dataset does not have: case_9"),
        ([{"train": ["case_000"], "val": ["case_000"]}], "fold 0, names cases in both train and val: case_000"),
        ([{"train": ["case_000"]}], "0.val: Field required; it must be a list of folds"),
        ([], r"\(whole\): List should have at least 1 item"),
        ({"train": []}, r"\(whole\): Input should be a valid list"),
    ],
)
def test_nnunet_splits_that_do_not_fit(tmp_path: Path, splits: object, message: str):
    write_nnunet(tmp_path, 2, shape=SMALL)
    write_json(tmp_path / "splits_final.json", splits)
    with pytest.raises(DataError, match=message):
        open_dataset(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": {"background": 0, "a": 1, "ignore": 2}}, "label 'ignore', which is not supported yet"),
        ({"labels": {"background": 0}}, "key labels: no foreground label; it must map names to positive"),
        ({"labels": {"background": 0, "a": -1}}, "key labels: a; it must map names to positive values"),
        ({"labels": {"background": 0, "a": 1, "b": 1}}, "key labels, gives a value twice: 1, 1"),
        ({"labels": {"background": 0, "a": [1, 2], "b": 2}}, r"key regions_class_order, is \[\] for the regions a, b"),
        ({"labels": {"background": 0, "a": [0, 1]}, "regions_class_order": [1]}, "key labels: a; it must map"),
        ({"labels": {"background": 0, "a": [1]}, "regions_class_order": [0]}, r"regions_class_order, is \[0\]"),
        (
            {"file_ending": ".png"},
            "key file_ending, is '.png'; supported now are .nii.gz, .nii, .nrrd, .mha, .mhd: convert",
        ),
        ({"file_ending": None}, "file_ending: Field required"),
        ({"channel_names": {"0": "T1", "1": "T2"}}, r"case case_000 .*\(T1, T2\): T2 \(_0001\) is missing"),
    ],
)
def test_nnunet_faults(tmp_path: Path, changes: dict[str, object], message: str):
    write_nnunet(tmp_path, 2, shape=SMALL)
    change_json(tmp_path / "dataset.json", **changes)
    with pytest.raises(DataError, match=message):
        open_dataset(tmp_path)


def test_nnunet_extra_channel_file(tmp_path: Path):
    write_nnunet(tmp_path, 2, shape=SMALL, channels=("T1", "T2"))
    change_json(tmp_path / "dataset.json", channel_names={"0": "T1"})
    with pytest.raises(DataError, match=r"case case_000 .*channels of dataset.json \(T1\): _0001 is not listed"):
        open_dataset(tmp_path)


def test_nnunet_label_without_image(tmp_path: Path):
    write_nnunet(tmp_path, 2, shape=SMALL)
    (tmp_path / "imagesTr" / "case_001_0000.nii.gz").unlink()
    with pytest.raises(DataError, match=r"1 of 4 image and label files are missing: imagesTr/case_001_0000.nii.gz;"):
        open_dataset(tmp_path)


_LONG = "a" * 60


@pytest.mark.parametrize("write", [write_msd, write_nnunet])
@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("", "b"), "has names that cannot be used: ''; give each label a name of 1 to 60 characters on one line"),
        ((" ", "b"), "cannot be used: ' ';"),
        (("a\nb", "b"), r"cannot be used: 'a\nb';"),
        (("a\u2028b", "\x1b[31m"), r"cannot be used: 'a\u2028b', '\x1b[31m';"),
        (("a\ud800", "b"), r"cannot be used: 'a\ud800';"),
        ((f"{_LONG}a", "b"), f"cannot be used: '{_LONG}a';"),
        (("a", "a "), "gives a name to several labels: a; give each label its own name"),
        ((_LONG, "\u5de6\u80ba \u00a0(\u0633\u200c\u0628)"), ""),
    ],
)
def test_names_of_labels(tmp_path: Path, write: Callable[..., Path], names: tuple[str, str], said: str):
    write(tmp_path, 2, shape=SMALL)
    msd, nnunet = {"0": "", "1": names[0], "2": names[1]}, {"background": 0, names[0]: 1, names[1]: 2}
    change_json(tmp_path / "dataset.json", labels=msd if write is write_msd else nnunet)
    if not said:
        assert [label.name for label in open_dataset(tmp_path).labels] == list(names)
        return
    with pytest.raises(DataError) as caught:
        open_dataset(tmp_path)
    assert f"{tmp_path / 'dataset.json'}, key labels, " in str(caught.value)
    assert said in str(caught.value)
    assert str(caught.value).isprintable()


def test_two_labels_of_one_name(tmp_path: Path):
    write_msd(tmp_path, 2, shape=SMALL, labels={1: "hip", 2: "hip"})
    with pytest.raises(DataError, match="gives a name to several labels: hip; give each label its own name"):
        open_dataset(tmp_path)


# MAMA-MIA


def test_mamamia_without_csv_takes_all_patients(tmp_path: Path):
    write_mamamia(tmp_path, 4, shape=SMALL, num_phases=(2, 5))
    (tmp_path / "images" / "DUKE_001" / "notes_0000.nii.gz").write_bytes(b"another scan")
    (tmp_path / "images" / ".DS_Store").mkdir()
    dataset = open_dataset(tmp_path)
    assert dataset.reason.startswith("MAMA-MIA: images/ has 4 patients with numbered DCE phases")
    assert ids(dataset.cases) == ["DUKE_001", "DUKE_002", "DUKE_003", "DUKE_004"]
    assert dataset.source_channels == ("phase0", "phase1")
    assert dataset.channels == ("phase1", "phase1 - phase0")
    assert dataset.joint_zscore
    assert [label.values for label in dataset.labels] == [(1,)]
    loaded = load_case(dataset, dataset.cases[1])  # five phases, files in lower case
    assert loaded.volume.channels == ("phase0", "phase1", "phase2", "phase3", "phase4")
    np.testing.assert_array_equal(loaded.volume.array, phantom(1, shape=SMALL, num_channels=5)[0])
    np.testing.assert_array_equal(loaded.mask.array, phantom(1, shape=SMALL, num_channels=5)[1])


def test_mamamia_leaves_the_test_split_out(tmp_path: Path):
    write_mamamia(tmp_path, 5, shape=SMALL, test_cases=2)
    with (tmp_path / "train_test_splits.csv").open("a") as file:
        file.write("NACT_99,nan\nnan,\n")
    dataset = open_dataset(tmp_path)
    assert ids(dataset.cases) == ["DUKE_001", "DUKE_002", "DUKE_003"]
    assert "3 of the 4 patients of train_split in train_test_splits.csv are there and train" in dataset.reason
    assert ids(list_dataset_images(tmp_path)) == [f"DUKE_{index:03d}" for index in range(1, 6)]


def test_mamamia_csv_columns(tmp_path: Path):
    write_mamamia(tmp_path, 2, shape=SMALL)
    (tmp_path / "train_test_splits.csv").write_text("patient,split\nDUKE_001,train\n")
    with pytest.raises(DataError, match="has the columns patient, split; it needs train_split and test_split"):
        open_dataset(tmp_path)
    (tmp_path / "train_test_splits.csv").write_bytes(b"\xff\xff")
    with pytest.raises(DataError, match=r"train_test_splits.csv cannot be read as csv"):
        open_dataset(tmp_path)


def test_mamamia_missing_phase_and_mask(tmp_path: Path):
    write_mamamia(tmp_path, 3, shape=SMALL)
    (tmp_path / "segmentations" / "expert" / "DUKE_003.nii.gz").unlink()
    with pytest.raises(DataError, match=r"are missing: segmentations/expert/DUKE_003.nii.gz;"):
        open_dataset(tmp_path)
    (tmp_path / "images" / "DUKE_001" / "DUKE_001_0000.nii.gz").unlink()
    with pytest.raises(DataError, match=r"1 patients have no phase 0 or 1 .*: DUKE_001; complete them"):
        open_dataset(tmp_path)


def test_mamamia_patient_twice(tmp_path: Path):
    write_mamamia(tmp_path, 2, shape=SMALL)
    (tmp_path / "images" / "duke_001").mkdir()
    with pytest.raises(DataError, match="case ids must be unique; these are given more than once: duke_001"):
        open_dataset(tmp_path)


# Which layout


def test_no_layout_fits(tmp_path: Path):
    with pytest.raises(DataError, match=r"has no known dataset layout; looked for .*Decathlon.*nnU-Net.*MAMA-MIA"):
        open_dataset(tmp_path)
    assert list_dataset_images(tmp_path) is None


def test_a_folder_of_datasets_is_answered_with_their_names(tmp_path):
    write_msd(tmp_path / "b", 2)
    (tmp_path / "a" / "images").mkdir(parents=True)
    (tmp_path / "a" / "segmentations" / "expert").mkdir(parents=True)
    (tmp_path / "c").mkdir()
    with pytest.raises(DataError, match=r"no known dataset layout.*\. Datasets in it: a, b; give one of them$"):
        open_dataset(tmp_path)


def test_missing_folder(tmp_path: Path):
    with pytest.raises(FileError, match=r"nowhere is not a folder; give the folder that holds dataset.json"):
        open_dataset(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["CT", "ct", "CT_portal", "CTA", "CBCT", "abdominal CT scan", "PET/CT"])
def test_ct_names(name: str):
    assert is_ct(name)


@pytest.mark.parametrize("name", ["T1", "subtraction", "DCE_SUBTRACTION", "FLAIR", "MRI", "contrast", "vector"])
def test_names_that_only_contain_the_letters_ct(name: str):
    assert not is_ct(name)


def test_real_layouts(real_data: Path):
    hippocampus = open_dataset(real_data / "Task04_Hippocampus")
    assert len(hippocampus.cases) == 200
    assert [(label.name, label.values) for label in hippocampus.labels] == [("Anterior", (1,)), ("Posterior", (2,))]
    loaded = load_case(hippocampus, hippocampus.cases[0])
    assert set(np.unique(loaded.mask.array)) == {0, 1, 2}
    atrium = open_dataset(real_data / "LeftAtrium")
    assert [label.name for label in atrium.labels] == ["left atrium"]
    assert atrium.reason == "Medical Segmentation Decathlon: dataset.json lists 80 training pairs"
