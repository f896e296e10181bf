"""DICOM out: a segmentation lies where the scan lies, by its own words, and other readers find the same voxels."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import highdicom
import nibabel as nib
import numpy as np
import pytest
from pydicom import Dataset, dcmread
from pydicom.uid import generate_uid

from dicom_phantoms import NUM_SLICES, ORIENTATIONS, SIZE, write_enhanced, write_series
from plans import make_plan
from tokenseg.config import Code, Coding
from tokenseg.errors import ConfigError, DataError, FileError, GeometryError
from tokenseg.imaging.dicom.exam import list_exams, read_exam
from tokenseg.imaging.dicom.seg import Segment, read_seg, write_no_findings, write_seg
from tokenseg.imaging.volume import Volume, write_mask
from tokenseg.inference.predict import segment_volume
from tokenseg.saved_model.checkpoint import load_model

PLAN = make_plan(labels=2)
NEOPLASM = Coding(
    category=Code(value="49755003", meaning="Morphologically Abnormal Structure"),
    type=Code(value="108369006", meaning="Neoplasm"),
    region=Code(value="76752008", meaning="Breast"),
)
LABELS = (PLAN.labels[0].model_copy(update={"name": "tumour", "coding": NEOPLASM}), PLAN.labels[1])


def read(path: Path) -> Volume:
    (exam,) = list_exams(path)
    return read_exam(exam, PLAN)


def lopsided() -> np.ndarray:
    """A mask of two labels without any symmetry, on the phantoms' grid."""
    mask = np.zeros((SIZE[1], SIZE[0], NUM_SLICES), np.uint8)
    mask[1:4, 2:9, 1:3] = 1
    mask[2:9, 3:5, 5] = 2
    mask[7, 9, 6] = 1
    return mask


def write(path: Path, mask: np.ndarray, volume: Volume, labels=LABELS) -> None:
    segments = [Segment(label, mask == label.output_value) for label in labels]
    write_seg(path, segments, volume, model_name="phantoms", version="1.2.3")


def centroid_by_frames(path: Path) -> np.ndarray:
    """Mean place in RAS+ of all voxels, from nothing but the object's own geometry."""
    seg = dcmread(path)
    pixels = seg.pixel_array.reshape(-1, seg.Rows, seg.Columns)
    shared = seg.SharedFunctionalGroupsSequence[0]
    orientation = np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, float)
    rows_mm, columns_mm = (float(value) for value in shared.PixelMeasuresSequence[0].PixelSpacing)
    points = []
    for frame, groups in zip(pixels, seg.PerFrameFunctionalGroupsSequence, strict=True):
        corner = np.array(groups.PlanePositionSequence[0].ImagePositionPatient, float)
        for row, column in np.argwhere(frame):
            points.append(corner + column * columns_mm * orientation[:3] + row * rows_mm * orientation[3:])
    return np.mean(points, axis=0) * (-1, -1, 1)


def check_valid(path: Path) -> None:
    """The object passes a second implementation of the standard's rules."""
    if shutil.which("dciodvfy") is None:
        if os.environ.get("CI"):
            pytest.fail("dciodvfy is not installed (Debian: dicom3tools)")
        pytest.skip("dciodvfy is not installed (Debian: dicom3tools)")
    told = subprocess.run(["dciodvfy", str(path)], capture_output=True, text=True)
    assert "Error" not in told.stdout + told.stderr, told.stderr
    assert "Segmentation" in told.stderr


@pytest.mark.parametrize("numbering", ["up", "down", "shuffled"])
@pytest.mark.parametrize("negate", [(1, 1), (-1, 1), (1, -1), (-1, -1)])
@pytest.mark.parametrize("plane", ORIENTATIONS)
def test_the_object_lies_where_the_scan_lies(tmp_path, plane, negate, numbering):
    orientation = np.array(ORIENTATIONS[plane]) * np.repeat(negate, 3)
    numbers = {"up": range(1, 9), "down": range(8, 0, -1), "shuffled": [4, 1, 8, 2, 6, 3, 7, 5]}[numbering]
    write_series(tmp_path / "exam", orientation=tuple(orientation), numbers=list(numbers))
    volume = read(tmp_path / "exam")
    write(tmp_path / "a_seg.dcm", lopsided(), volume)
    # The same mask as NIfTI, read by nibabel, is the other opinion.
    write_mask(tmp_path / "mask.nii", lopsided(), volume)
    nifti = nib.load(tmp_path / "mask.nii")
    expected = nib.affines.apply_affine(nifti.affine, np.argwhere(nifti.get_fdata() > 0)).mean(axis=0)
    np.testing.assert_allclose(centroid_by_frames(tmp_path / "a_seg.dcm"), expected, atol=1e-4)
    np.testing.assert_array_equal(read_seg(tmp_path / "a_seg.dcm", LABELS, volume).array, lopsided())


@pytest.mark.parametrize("order", [None, [3, 0, 7, 1, 5, 2, 6, 4]])
def test_enhanced_scans(tmp_path, order):
    path = write_enhanced(tmp_path / "exam.dcm", orientation=ORIENTATIONS["oblique"], order=order)
    volume = read(path)
    write(tmp_path / "a_seg.dcm", lopsided(), volume)
    np.testing.assert_array_equal(read_seg(tmp_path / "a_seg.dcm", LABELS, volume).array, lopsided())
    check_valid(tmp_path / "a_seg.dcm")


@pytest.mark.parametrize("gap_mm", [0.2, 7.0])
@pytest.mark.parametrize("enhanced", [False, True])
def test_a_gap_that_the_scan_calls_spacing_is_not_carried_over(tmp_path, enhanced, gap_mm):
    def change(_: int, dataset: Dataset) -> None:
        dataset.SpacingBetweenSlices = gap_mm

    if enhanced:
        path = write_enhanced(tmp_path / "exam.dcm")
        dataset = dcmread(path)
        for groups in (dataset.SharedFunctionalGroupsSequence, dataset.PerFrameFunctionalGroupsSequence):
            for each in groups:
                for measures in each.get("PixelMeasuresSequence", ()):
                    measures.SpacingBetweenSlices = gap_mm
        dataset.save_as(path)
    else:
        path = tmp_path / "exam"
        write_series(path, change=change)
    volume = read(path)
    write(tmp_path / "a_seg.dcm", lopsided(), volume)
    seg = highdicom.seg.segread(tmp_path / "a_seg.dcm")
    told = seg.get_volume(combine_segments=True, relabel=True)
    assert told.spacing[0] == pytest.approx(volume.spacing_mm[2])
    np.testing.assert_allclose(centroid_by_frames(tmp_path / "a_seg.dcm"), _centroid(volume), atol=1e-4)
    check_valid(tmp_path / "a_seg.dcm")


def _centroid(volume: Volume) -> np.ndarray:
    return nib.affines.apply_affine(volume.affine, np.argwhere(lopsided() > 0)).mean(axis=0)


def test_another_reader_finds_the_same(tmp_path):
    write_series(tmp_path / "exam", orientation=ORIENTATIONS["coronal"], numbers=list(range(8, 0, -1)))
    volume = read(tmp_path / "exam")
    path = tmp_path / "a_seg.dcm"
    write(path, lopsided(), volume)
    check_valid(path)
    theirs = highdicom.seg.segread(path)
    found = theirs.get_volume(combine_segments=True)
    for value in (1, 2):
        indices = np.argwhere(found.array == value)
        lps = indices @ found.affine[:3, :3].T + found.affine[:3, 3]
        ours = nib.affines.apply_affine(volume.affine, np.argwhere(lopsided() == value)) * (-1, -1, 1)
        np.testing.assert_allclose(sorted(lps.tolist()), sorted(ours.tolist()), atol=1e-3)


def test_what_the_object_says(tmp_path):
    def strip(_: int, dataset: Dataset) -> None:
        for name in ("PatientID", "PatientName", "StudyDate", "StudyTime"):
            delattr(dataset, name)

    paths = write_series(tmp_path / "exam", change=strip)
    write(tmp_path / "a_seg.dcm", lopsided(), read(tmp_path / "exam"))
    seg = dcmread(tmp_path / "a_seg.dcm")
    assert seg.SeriesDescription == "TokenSeg, not for clinical use: phantoms"
    assert seg.ContentDescription == "Automatic segmentation, not for clinical use"
    assert (seg.Modality, seg.SegmentationType, seg.SeriesNumber) == ("SEG", "BINARY", 1003)
    assert (seg.StudyInstanceUID, seg.FrameOfReferenceUID) == tuple(
        dcmread(paths[0])[name].value for name in ("StudyInstanceUID", "FrameOfReferenceUID")
    )
    tumour, other = seg.SegmentSequence
    assert (tumour.SegmentLabel, other.SegmentLabel) == ("tumour", "l1")
    assert tumour.SegmentedPropertyTypeCodeSequence[0].CodeValue == "108369006"
    assert tumour.AnatomicRegionSequence[0].CodeMeaning == "Breast"
    assert other.SegmentedPropertyTypeCodeSequence[0].CodeMeaning == "Tissue"
    algorithm = tumour.SegmentationAlgorithmIdentificationSequence[0]
    assert (algorithm.AlgorithmName, algorithm.AlgorithmVersion) == ("TokenSeg phantoms", "1.2.3")
    # Only frames with a voxel: three of the tumour, one of the other.
    assert seg.NumberOfFrames == 4
    referenced = [
        groups.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        for groups in seg.PerFrameFunctionalGroupsSequence
    ]
    assert sorted(referenced) == sorted(dcmread(paths[index]).SOPInstanceUID for index in (1, 2, 5, 6))


def test_segments_may_overlap(tmp_path):
    write_series(tmp_path / "exam")
    volume = read(tmp_path / "exam")
    outer = lopsided() > 0
    inner = lopsided() == 2
    write_seg(
        tmp_path / "a_seg.dcm",
        [Segment(LABELS[0], outer), Segment(LABELS[1], inner)],
        volume,
        model_name="regions",
        version="1",
    )
    np.testing.assert_array_equal(
        read_seg(tmp_path / "a_seg.dcm", LABELS, volume).array, np.where(inner, 2, outer.astype(np.uint8))
    )
    check_valid(tmp_path / "a_seg.dcm")


def test_an_all_background_object(tmp_path):
    write_series(tmp_path / "exam")
    volume = read(tmp_path / "exam")
    write(tmp_path / "a_seg.dcm", np.zeros_like(lopsided()), volume)
    assert not read_seg(tmp_path / "a_seg.dcm", LABELS, volume).array.any()
    check_valid(tmp_path / "a_seg.dcm")


def test_no_findings_in_words(tmp_path):
    write_no_findings(tmp_path / "a_seg.json", LABELS, model_name="phantoms", version="1.2.3")
    told = json.loads((tmp_path / "a_seg.json").read_text())
    assert (told["findings"], told["looked_for"], told["model"]) == ("none", ["tumour", "l1"], "phantoms")
    assert "not a medical device" in told["note"]


def test_errors(tmp_path):
    write_series(tmp_path / "exam")
    volume = read(tmp_path / "exam")
    made = Volume(volume.array, volume.affine, volume.channels)
    with pytest.raises(DataError, match=r"scan was not read from DICOM; write the mask as \.nii\.gz"):
        write(tmp_path / "a_seg.dcm", lopsided(), made)
    write(tmp_path / "a_seg.dcm", lopsided(), volume)
    with pytest.raises(DataError, match="has the segments tumour; known are l0, l1"):
        read_seg(tmp_path / "a_seg.dcm", PLAN.labels, volume)
    elsewhere = volume.affine.copy()
    elsewhere[2, 3] += 0.5
    moved = Volume(volume.array, elsewhere, volume.channels)
    with pytest.raises(GeometryError, match="which is no slice of its scan"):
        read_seg(tmp_path / "a_seg.dcm", LABELS, moved)
    content = (tmp_path / "a_seg.dcm").read_bytes()
    (tmp_path / "a_seg.dcm").write_bytes(content[: len(content) // 2])
    with pytest.raises(FileError, match="damaged"):
        read_seg(tmp_path / "a_seg.dcm", LABELS, volume)


def test_without_the_extra_one_line_says_what_to_do(tmp_path, monkeypatch):
    write_series(tmp_path / "exam")
    volume = read(tmp_path / "exam")
    monkeypatch.setitem(sys.modules, "highdicom", None)
    with pytest.raises(ConfigError, match=r"pip install 'tokenseg\[dicom\]'"):
        write(tmp_path / "a_seg.dcm", lopsided(), volume)


def test_a_reference_of_another_toolkit(real_data):
    """The liver of dcmqi's test data: voxel counts by slice as its description gives them, and its own NRRD."""
    root = real_data / "dicom_seg_reference"
    (exam,) = list_exams(root / "dicom")
    volume = read_exam(exam, PLAN.model_copy(update={"channels": ("CT",), "source_channels": ("CT",)}))
    name = dcmread(root / "seg" / "liver.dcm").SegmentSequence[0].SegmentLabel
    liver = make_plan().labels[0].model_copy(update={"name": name})
    mask = read_seg(root / "seg" / "liver.dcm", (liver,), volume)
    assert sorted(np.count_nonzero(mask.array, axis=(0, 1))) == [35220, 35645, 36233]
    import SimpleITK as sitk  # noqa: N813

    nrrd = sitk.ReadImage(str(root / "nrrd" / "liver_seg.nrrd"))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(nrrd).transpose(2, 1, 0) > 0, mask.array > 0)


def test_a_real_crop_through_the_built_in_model(real_data, tmp_path):
    model = load_model("hippocampus")
    (exam,) = list_exams(real_data / "brain_dicom" / "hippocampus_crop")
    volume = read_exam(exam, model.facts.plan)
    mask = segment_volume(model, volume)
    segments = [Segment(label, mask == label.output_value) for label in model.facts.plan.labels]
    write_seg(tmp_path / "a_seg.dcm", segments, volume, model_name="hippocampus", version="1")
    check_valid(tmp_path / "a_seg.dcm")
    np.testing.assert_array_equal(read_seg(tmp_path / "a_seg.dcm", model.facts.plan.labels, volume).array, mask)
    assert (
        dcmread(tmp_path / "a_seg.dcm").SegmentSequence[0].SegmentedPropertyTypeCodeSequence[0].CodeMeaning
        == "Hippocampus"
    )
    voxels = np.bincount(mask.ravel(), minlength=3)
    assert 500 < voxels[1] < 5000  # a hippocampus has 3 to 5 ml, half of it in front
    assert 500 < voxels[2] < 5000


@pytest.mark.parametrize(
    "changes",
    [
        {"SpecificCharacterSet": ["", "ISO 2022 IR 87"], "PatientName": "Yamada^Tarou"},
        {"SpecificCharacterSet": "ISO_IR 100", "PatientName": "Müller^Jürgen"},
        {"PatientSex": "U", "PatientBirthDate": "unknown", "StudyTime": "noon"},
        {"SliceThickness": None, "FrameOfReferenceUID": None, "Modality": None},
        {"SliceThickness": "", "FrameOfReferenceUID": "", "SeriesNumber": 2147483647},
        {"SeriesNumber": -1000},
    ],
)
@pytest.mark.filterwarnings("ignore:Invalid value for VR")
def test_scans_with_unusual_headers(tmp_path, changes):
    def change(_: int, dataset: Dataset) -> None:
        for name, value in changes.items():
            if value is None:
                delattr(dataset, name)
            else:
                setattr(dataset, name, value)

    write_series(tmp_path / "exam", change=change)
    volume = read(tmp_path / "exam")
    write(tmp_path / "a_seg.dcm", lopsided(), volume)
    np.testing.assert_array_equal(read_seg(tmp_path / "a_seg.dcm", LABELS, volume).array, lopsided())
    check_valid(tmp_path / "a_seg.dcm")
    if "PatientName" in changes:
        assert dcmread(tmp_path / "a_seg.dcm").PatientName == changes["PatientName"]


def test_several_enhanced_files(tmp_path):
    tags = {name: generate_uid() for name in ("StudyInstanceUID", "SeriesInstanceUID")}
    for part, slots in enumerate(([0, 2, 4, 6], [1, 3, 5, 7])):
        write_enhanced(tmp_path / "exam" / f"{part}.dcm", order=slots, tags=tags)
    volume = read(tmp_path / "exam")
    write(tmp_path / "a_seg.dcm", lopsided(), volume)
    np.testing.assert_array_equal(read_seg(tmp_path / "a_seg.dcm", LABELS, volume).array, lopsided())
    check_valid(tmp_path / "a_seg.dcm")


def test_label_names_that_dicom_does_not_hold(tmp_path):
    write_series(tmp_path / "exam")
    volume = read(tmp_path / "exam")
    long = "structure of the left side of the body, as named by somebody thorough"
    for names in (("Tumör", "肿瘤"), ("a\\b", "a_b"), (long + " 1", long + " 2")):
        labels = [label.model_copy(update={"name": name}) for label, name in zip(LABELS, names, strict=True)]
        write(tmp_path / "a_seg.dcm", lopsided(), volume, labels)
        np.testing.assert_array_equal(read_seg(tmp_path / "a_seg.dcm", labels, volume).array, lopsided())
        check_valid(tmp_path / "a_seg.dcm")
    assert dcmread(tmp_path / "a_seg.dcm").SegmentSequence[0].SegmentLabel == (long + " 1")[:64]


@pytest.mark.parametrize("value", ["", "a\\b", "x" * 17])
def test_codes_that_dicom_does_not_hold(value):
    with pytest.raises(ValueError, match="value"):
        Code(value=value, meaning="x")


def test_what_highdicom_refuses_is_said_and_nothing_is_written(tmp_path, monkeypatch):
    write_series(tmp_path / "exam")
    volume = read(tmp_path / "exam")

    def refuse(**_: object) -> None:
        raise AttributeError("no such tag")

    monkeypatch.setattr(highdicom.seg, "Segmentation", refuse)
    with pytest.raises(DataError, match=r"with this scan's headers \(no such tag\); name the mask \.nii\.gz"):
        write(tmp_path / "a_seg.dcm", lopsided(), volume)
    assert not (tmp_path / "a_seg.dcm").exists()
