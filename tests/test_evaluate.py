"""Evaluation of folders: matching, counting, the two file formats, and what is refused."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import nibabel
import numpy as np
import pytest

from tokenseg.config import Label
from tokenseg.errors import ConfigError, DataError, FileError, GeometryError
from tokenseg.evaluation.evaluate import MEASURES, evaluate_folders
from tokenseg.evaluation.results import CSV_COLUMNS, Evaluation, write_csv, write_json

AFFINE = np.diag([0.5, 1.0, 2.0, 1.0])  # one voxel is one mm3
SHAPE = (12, 10, 8)


def write(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array.astype(np.uint8), affine), path)


def blocks(**corners: int) -> np.ndarray:
    """Label map with a 3-cube for each `vVALUE=START`."""
    array = np.zeros(SHAPE, dtype=np.uint8)
    for name, start in corners.items():
        array[start : start + 3, 2:5, 2:5] = int(name.removeprefix("v"))
    return array


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Four cases: right, half right, missed, and empty with an invention; label 2 only where it says so."""
    predictions, references = tmp_path / "predictions", tmp_path / "references"
    write(references / "a.nii.gz", blocks(v1=1, v2=6))
    write(predictions / "a.nii.gz", blocks(v1=1, v2=6))
    write(references / "b.nii.gz", blocks(v1=1))
    write(predictions / "b.nii", blocks(v1=2))  # another ending is the same case
    write(references / "c.nii.gz", blocks(v1=1))
    write(predictions / "c.nii.gz", blocks())
    write(references / "d.nii.gz", blocks())
    write(predictions / "d.nii.gz", blocks(v2=4))
    return predictions, references


def row_of(evaluation: Evaluation, case_id: str, label: str):
    (row,) = [row for row in evaluation.rows if (row.case_id, row.label.name) == (case_id, label)]
    return row


def test_scores_of_each_case_by_hand(folders):
    evaluation = evaluate_folders(*folders)
    assert [row.case_id for row in evaluation.rows] == ["a", "a", "b", "b", "c", "c", "d", "d"]
    assert row_of(evaluation, "a", "1").score.dice == 1
    half = row_of(evaluation, "b", "1").score
    assert half.dice == pytest.approx(2 / 3)
    assert half.hd95_mm == pytest.approx(0.5)  # one voxel along the first axis
    assert half.nsd == 1  # within the tolerance of 1 mm
    assert half.reference_ml == pytest.approx(27 / 1000)
    assert row_of(evaluation, "c", "1").score.status == "missed"
    assert row_of(evaluation, "d", "1").score.status == "both_empty"
    assert row_of(evaluation, "d", "2").score.status == "false_positive"
    diagonal_mm = math.sqrt((12 * 0.5) ** 2 + 10**2 + (8 * 2) ** 2)
    assert row_of(evaluation, "d", "2").score.hd95_mm == pytest.approx(diagonal_mm)


def test_summary_counts_and_means(folders):
    one, two = evaluate_folders(*folders).summaries
    assert (one.n, one.n_missed, one.n_false_positive, one.n_both_empty) == (3, 1, 0, 1)
    assert (two.n, two.n_missed, two.n_false_positive, two.n_both_empty) == (2, 0, 1, 2)
    assert one.intervals["dice"].mean == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert one.intervals["volume_error_ml"].mean == pytest.approx(-0.027 / 3)
    assert one.lesions == (2, 0, 1)
    assert two.lesions == (1, 1, 0)
    for interval in one.intervals.values():
        assert interval.low <= interval.mean <= interval.high
    assert set(one.intervals) == set(MEASURES)


def test_tolerance_changes_the_surface_dice(folders):
    strict = row_of(evaluate_folders(*folders, tolerance_mm=0.0), "b", "1").score
    # Of the 26 surface voxels of a 3-cube, 16 lie on the surface of the cube one voxel on, 10 do not.
    assert strict.nsd == pytest.approx(16 / 26)


def test_missing_predictions_count_as_missed_and_extra_ones_are_listed(folders):
    predictions, references = folders
    before = evaluate_folders(predictions, references)
    (predictions / "b.nii").rename(predictions / "z.nii")
    after = evaluate_folders(predictions, references)
    assert before.missing_predictions == before.extra_predictions == before.references_left_out == ()
    assert (after.missing_predictions, after.extra_predictions) == (("b",), ("z",))
    row = row_of(after, "b", "1")
    assert (row.score.status, row.score.dice, row.prediction) == ("missed", 0, None)
    assert after.summaries[0].n == before.summaries[0].n
    assert after.summaries[0].intervals["dice"].mean < before.summaries[0].intervals["dice"].mean


def test_a_summary_of_segment_says_which_references_were_meant(folders):
    predictions, references = folders
    (predictions / "c.nii.gz").unlink()  # failed
    (predictions / "d.nii.gz").unlink()  # never asked for
    (predictions / "summary.csv").write_text("case,error\na,\nc,truncated\n")
    evaluation = evaluate_folders(predictions, references)
    assert sorted({row.case_id for row in evaluation.rows}) == [
        "a",
        "b",
        "c",
    ]  # b has a mask
    assert evaluation.missing_predictions == ("c",)
    assert evaluation.references_left_out == ("d",)
    assert row_of(evaluation, "c", "1").score.status == "missed"
    assert evaluation.to_json()["references_left_out"] == ["d"]


def test_another_summary_is_not_guessed_at(folders):
    (folders[0] / "summary.csv").write_text("patient,age\na,60\n")
    with pytest.raises(DataError, match=r"summary\.csv is not a summary of `tokenseg segment`: .*case.*; remove it"):
        evaluate_folders(*folders)


def test_values_that_belong_to_no_label_are_listed(folders):
    predictions, references = folders
    write(predictions / "c.nii.gz", blocks(v7=1))
    assert evaluate_folders(predictions, references).unlisted_values == (7,)
    only_one = (Label(name="one", values=(1,), output_value=1),)
    assert evaluate_folders(predictions, references, labels=only_one).unlisted_values == (2, 7)


def test_two_files_of_any_name(folders):
    predictions, references = folders
    evaluation = evaluate_folders(predictions / "b.nii", references / "c.nii.gz")
    (row,) = evaluation.rows
    assert row.case_id == "c"
    assert row.score.dice == pytest.approx(2 / 3)
    assert evaluation.extra_predictions == ()


# --- dataset layouts as references -----------------------------------------------------------------------------------


def write_dataset(root: Path, manifest: dict, masks: dict[str, np.ndarray], image_suffix: str) -> None:
    for case_id, mask in masks.items():
        write(root / "imagesTr" / f"{case_id}{image_suffix}.nii.gz", np.ones(SHAPE))
        write(root / "labelsTr" / f"{case_id}.nii.gz", mask)
    (root / "dataset.json").write_text(json.dumps(manifest))


def test_decathlon_layout_names_the_labels(tmp_path):
    training = [{"image": f"./imagesTr/{case}.nii.gz", "label": f"./labelsTr/{case}.nii.gz"} for case in ("p", "q")]
    manifest = {
        "name": "Blocks",
        "tensorImageSize": "3D",
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "head", "2": "tail"},
        "numTraining": 2,
        "numTest": 0,
        "training": training,
        "test": [],
    }
    masks = {"p": blocks(v1=1), "q": blocks(v1=3)}  # no voxel of the tail anywhere
    write_dataset(tmp_path / "Task99_Blocks", manifest, masks, image_suffix="")
    for case_id, mask in masks.items():
        write(tmp_path / "out" / f"{case_id}.nii.gz", mask)
    evaluation = evaluate_folders(tmp_path / "out", tmp_path / "Task99_Blocks")
    assert [summary.label.name for summary in evaluation.summaries] == ["head", "tail"]
    assert [summary.n_both_empty for summary in evaluation.summaries] == [0, 2]
    assert evaluation.summaries[0].intervals["dice"] == (1, 1, 1)
    assert math.isnan(evaluation.summaries[1].intervals["dice"].mean)


def test_regions_are_unions_of_values(tmp_path):
    manifest = {
        "channel_names": {"0": "T2"},
        "labels": {"background": 0, "whole": [1, 2], "core": [2]},
        "regions_class_order": [1, 2],
        "numTraining": 2,
        "file_ending": ".nii.gz",
    }
    masks = {"p": blocks(v1=1, v2=4), "q": blocks(v2=4)}
    write_dataset(tmp_path / "Dataset099_Blocks", manifest, masks, image_suffix="_0000")
    for case_id in masks:
        write(tmp_path / "out" / f"{case_id}.nii.gz", blocks(v2=4))
    evaluation = evaluate_folders(tmp_path / "out", tmp_path / "Dataset099_Blocks")
    assert row_of(evaluation, "p", "whole").score.dice == pytest.approx(2 * 27 / (54 + 27))
    assert row_of(evaluation, "q", "whole").score.dice == 1
    assert row_of(evaluation, "p", "core").score.dice == 1
    assert set(evaluation.to_json()["mean"]) == {"(1, 2)", "2"}


def test_real_dataset_against_its_own_labels(real_data: Path):
    root = real_data / "Task04_Hippocampus"
    evaluation = evaluate_folders(root / "labelsTr", root)
    assert [summary.label.values for summary in evaluation.summaries] == [(1,), (2,)]
    for summary in evaluation.summaries:
        assert summary.n == 200
        assert summary.intervals["dice"] == (1, 1, 1)
        assert summary.intervals["hd95_mm"] == (0, 0, 0)


# --- the files -------------------------------------------------------------------------------------------------------


def test_json_has_our_keys_and_those_of_nnunet(folders, tmp_path):
    evaluation = evaluate_folders(*folders)
    write_json(tmp_path / "deep" / "result.json", evaluation)
    text = (tmp_path / "deep" / "result.json").read_text()
    result = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert result == evaluation.to_json()
    assert result["labels"]["1"]["n_missed"] == 1
    assert result["labels"]["1"]["dice"]["mean"] == pytest.approx(5 / 9)
    assert result["labels"]["2"]["lesions_pooled"]["f1"] == pytest.approx(2 / 3)
    assert set(result["foreground_mean"]) == {"Dice", "IoU", "FP", "TP", "FN", "TN", "n_pred", "n_ref"}
    assert result["mean"]["1"]["Dice"] == pytest.approx(5 / 9)
    assert result["mean"]["2"]["Dice"] == pytest.approx(1 / 2)
    assert result["foreground_mean"]["Dice"] == pytest.approx((5 / 9 + 1 / 2) / 2)
    half = result["metric_per_case"][1]
    assert half["prediction_file"].endswith("predictions/b.nii")
    assert half["metrics"]["1"]["TP"] == 18
    assert half["metrics"]["1"]["FP"] == half["metrics"]["1"]["FN"] == 9
    assert half["metrics"]["1"]["TN"] == 12 * 10 * 8 - 36
    assert half["metrics"]["1"]["n_pred"] == half["metrics"]["1"]["n_ref"] == 27
    assert half["metrics"]["2"]["Dice"] is None
    assert half["metrics"]["2"]["status"] == "both_empty"


def test_csv_has_a_row_a_case_and_label(folders, tmp_path):
    evaluation = evaluate_folders(*folders)
    write_csv(tmp_path / "result.csv", evaluation)
    with (tmp_path / "result.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert tuple(rows[0]) == CSV_COLUMNS
    assert len(rows) == 8
    assert (rows[2]["case"], rows[2]["label"], rows[2]["status"]) == ("b", "1", "both_present")
    assert float(rows[2]["dice"]) == pytest.approx(2 / 3)
    assert rows[2]["lesions_true_positive"] == "1"
    assert rows[3]["dice"] == rows[3]["hd95_mm"] == ""
    assert float(rows[3]["volume_error_ml"]) == 0


def test_results_that_cannot_be_written_leave_the_old_file(folders, tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(FileError, match=r"cannot write .*file/result\.json"):
        write_json(tmp_path / "file" / "result.json", evaluate_folders(*folders))
    assert (tmp_path / "file").read_text() == "old"


# --- what is refused -------------------------------------------------------------------------------------------------


def test_grids_must_be_the_same(folders):
    predictions, references = folders
    write(predictions / "c.nii.gz", blocks(), np.diag([0.5, 1.0, 3.0, 1.0]))
    with pytest.raises(GeometryError, match=r"references/c\.nii\.gz and .*predictions/c\.nii\.gz .*spacing"):
        evaluate_folders(predictions, references)


def test_names_must_match_somewhere(folders, tmp_path):
    write(tmp_path / "others" / "x.nii.gz", blocks())
    message = r"none of the 1 masks in .*others has the name of one of the 4 references .*such as a\); name predictions"
    with pytest.raises(DataError, match=message):
        evaluate_folders(tmp_path / "others", folders[1])


def test_one_mask_a_case(folders):
    predictions, references = folders
    write(predictions / "b.nii.gz", blocks())
    with pytest.raises(DataError, match=r"holds both b\.nii and b\.nii\.gz for one case; remove one"):
        evaluate_folders(predictions, references)


def test_missing_paths_are_named(folders, tmp_path):
    with pytest.raises(FileError, match=r"predictions .*nowhere do not exist; check the path"):
        evaluate_folders(tmp_path / "nowhere", folders[1])
    with pytest.raises(FileError, match=r"references .*nowhere do not exist; check the path"):
        evaluate_folders(folders[0], tmp_path / "nowhere")


def test_a_file_goes_with_a_file(folders):
    with pytest.raises(FileError, match=r"a\.nii\.gz is a file and .*references a folder; give two files or two"):
        evaluate_folders(folders[0] / "a.nii.gz", folders[1])
    with pytest.raises(FileError, match=r"a\.nii\.gz is a file and .*predictions a folder; give two files or two"):
        evaluate_folders(folders[0], folders[1] / "a.nii.gz")


def test_references_must_be_masks_or_a_dataset(folders, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty hold no masks and are no usable dataset: .* no known dataset layout"):
        evaluate_folders(folders[0], tmp_path / "empty")


def test_references_without_any_label_are_refused(tmp_path):
    for folder in ("predictions", "references"):
        write(tmp_path / folder / "a.nii.gz", blocks())
    with pytest.raises(DataError, match=r"hold no voxel other than 0; .* give the dataset folder, which names the lab"):
        evaluate_folders(tmp_path / "predictions", tmp_path / "references")


def test_negative_labels_are_refused(tmp_path):
    array = np.full(SHAPE, -3, dtype=np.int16)
    nibabel.save(nibabel.Nifti1Image(array, AFFINE), tmp_path / "a.nii.gz")
    with pytest.raises(DataError, match=r"hold the negative value -3; labels must be positive whole numbers"):
        evaluate_folders(tmp_path / "a.nii.gz", tmp_path / "a.nii.gz")


def test_tolerance_is_checked_before_anything_is_read(tmp_path):
    with pytest.raises(ConfigError, match=r"surface tolerance is -1.0 mm"):
        evaluate_folders(tmp_path / "nowhere", tmp_path / "nowhere", tolerance_mm=-1.0)
