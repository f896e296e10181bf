"""DICOM in: any orientation, order and compression gives the same scan in the same place; what is no scan is named."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom import Dataset, dcmread
from pydicom.sequence import Sequence as DicomSequence
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
    SecondaryCaptureImageStorage,
    generate_uid,
)

from dicom_phantoms import (
    CORONAL,
    NUM_SLICES,
    ORIENTATIONS,
    SIZE,
    SPACING_MM,
    STEP_MM,
    image_dataset,
    intensity,
    ras_of,
    set_pixels,
    write_enhanced,
    write_series,
)
from plans import make_plan
from tokenseg.errors import ConfigError, DataError, FileError, GeometryError, TokenSegError
from tokenseg.imaging.dicom.exam import list_exams, phase_table, read_exam
from tokenseg.imaging.dicom_files import may_be_dicom
from tokenseg.imaging.volume import Volume


def plan_of(channels, sources=None, *, joint=False):
    names = {"channels": channels, "source_channels": sources or channels, "joint_zscore": joint}
    return make_plan(channels=len(channels)).model_copy(update=names)


PLAN = plan_of(("MRI",))
DCE = plan_of(("phase1", "phase1 - phase0"), ("phase0", "phase1"), joint=True)


def read(path: Path, wanted: str = "", plan=PLAN) -> Volume:
    (exam,) = list_exams(path, wanted)
    return read_exam(exam, plan)


def check_in_place(volume: Volume, add: float = 0) -> None:
    """Every voxel has the intensity of the place where the affine says it is."""
    expected = intensity(ras_of(volume.affine, volume.array.shape[1:]).round(6)).astype(np.float32)
    assert np.abs(volume.array[0] - add - expected).max() <= 1  # rounding of .5
    assert (volume.array[0] - add == expected).mean() > 0.99


def negated(orientation: tuple[float, ...], row: bool, column: bool) -> tuple[float, ...]:
    signs = [-1 if row else 1] * 3 + [-1 if column else 1] * 3
    return tuple(value * sign for value, sign in zip(orientation, signs, strict=True))


@pytest.mark.parametrize("numbering", ["up", "down", "shuffled"])
@pytest.mark.parametrize("negate", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("plane", ORIENTATIONS)
def test_every_orientation_and_order(tmp_path, plane, negate, numbering):
    orientation = negated(ORIENTATIONS[plane], *negate)
    numbers = {"up": range(1, 9), "down": range(8, 0, -1), "shuffled": [4, 1, 8, 2, 6, 3, 7, 5]}[numbering]
    write_series(tmp_path / "exam", orientation=orientation, numbers=list(numbers))
    volume = read(tmp_path / "exam")
    assert volume.array.shape == (1, SIZE[1], SIZE[0], NUM_SLICES)
    assert volume.spacing_mm == pytest.approx((SPACING_MM[1], SPACING_MM[0], STEP_MM), abs=1e-6)
    check_in_place(volume)


@pytest.mark.parametrize("order", [None, [3, 0, 7, 1, 5, 2, 6, 4]])
@pytest.mark.parametrize("plane", ORIENTATIONS)
def test_enhanced_multi_frame(tmp_path, plane, order):
    path = write_enhanced(tmp_path / "exam.dcm", orientation=ORIENTATIONS[plane], order=order)
    check_in_place(read(path))
    (exam,) = list_exams(path)
    assert exam.name == "exam"


def test_agrees_with_simpleitk_on_real_exams(real_data):
    import SimpleITK as sitk  # noqa: N813

    for folder in ("breast_dce_dicom/2_pre", "brain_dicom/oblique_T1post", "brain_dicom/hippocampus_crop"):
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(real_data / folder)))
        theirs, ours = reader.Execute(), read(real_data / folder)
        np.testing.assert_array_equal(ours.array[0], sitk.GetArrayFromImage(theirs).transpose(2, 1, 0))
        np.testing.assert_allclose(ours.affine[:3, 3] * (-1, -1, 1), theirs.GetOrigin(), atol=1e-6)
        np.testing.assert_allclose(ours.spacing_mm, theirs.GetSpacing(), rtol=1e-3)


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLosslessSV1, JPEGLSLossless, JPEG2000Lossless])
def test_compressed_slices_are_the_same(real_data, tmp_path, syntax):
    source = real_data / "breast_dce_dicom" / "2_pre"
    packed, plain = tmp_path / "packed", tmp_path / "plain"
    packed.mkdir()
    plain.mkdir()
    for path in sorted(source.iterdir())[:4]:
        if syntax in (JPEG2000Lossless, JPEGLosslessSV1):
            recompress_by_gdcm(path, packed / path.name, syntax)
        else:
            dataset = dcmread(path)
            dataset.compress(syntax)
            dataset.save_as(packed / path.name)
        written = dcmread(packed / path.name)
        assert written.file_meta.TransferSyntaxUID == syntax
        assert len(written.PixelData) < written.Rows * written.Columns * 2
        shutil.copy(path, plain / path.name)
    np.testing.assert_array_equal(read(packed).array, read(plain).array)
    assert read(plain).array.max() > 100


def recompress_by_gdcm(source: Path, target: Path, syntax: str) -> None:
    import gdcm

    names = {JPEGLosslessSV1: "JPEGLosslessProcess14_1", JPEG2000Lossless: "JPEG2000Lossless"}
    reader = gdcm.ImageReader()
    reader.SetFileName(str(source))
    assert reader.Read()
    change = gdcm.ImageChangeTransferSyntax()
    change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, names[syntax])))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer = gdcm.ImageWriter()
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    writer.SetFileName(str(target))
    assert writer.Write()


def test_slope_and_intercept_of_each_slice(tmp_path):
    def rescale(index: int, dataset: Dataset) -> None:
        dataset.RescaleSlope, dataset.RescaleIntercept = ("2", "-1024") if index % 2 else ("0.5", "3")

    write_series(tmp_path / "exam", change=rescale)
    volume = read(tmp_path / "exam")
    stored = intensity(ras_of(volume.affine, volume.array.shape[1:]).round(6)).astype(np.float32)
    np.testing.assert_allclose(volume.array[0, :, :, ::2], stored[..., ::2] * 0.5 + 3, atol=0.5)
    np.testing.assert_allclose(volume.array[0, :, :, 1::2], stored[..., 1::2] * 2 - 1024, atol=2)


def test_nested_folders_zip_and_other_files(tmp_path):
    study = {"StudyInstanceUID": generate_uid()}
    tags = study | {"SeriesInstanceUID": generate_uid()}
    root = tmp_path / "patient"
    for part in range(2):
        heights = [STEP_MM * index for index in range(4 * part, 4 * part + 4)]
        write_series(root / "a" / f"part{part}", heights_mm=heights, tags=tags)
    (root / "readme.txt").write_text("not an image")
    (root / ".hidden").write_bytes(bytes(200))
    (root / "a" / "loop").symlink_to(root, target_is_directory=True)
    whole = read(root)
    check_in_place(whole)
    assert whole.array.shape[-1] == NUM_SLICES
    with zipfile.ZipFile(tmp_path / "patient.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(root.rglob("*")):
            if path.is_file() and "loop" not in path.parts:
                archive.write(path, path.relative_to(tmp_path))
    (exam,) = list_exams(tmp_path / "patient.zip")
    assert exam.name == "patient"
    np.testing.assert_array_equal(read_exam(exam, PLAN).array, whole.array)


def test_what_is_no_scan_is_passed_over(tmp_path):
    study = {"StudyInstanceUID": generate_uid()}
    write_series(tmp_path / "exam" / "scan", tags=study)
    localizer = write_series(tmp_path / "exam" / "scout", heights_mm=[0], tags=study | {"SeriesDescription": "scout"})
    for index, orientation in enumerate((CORONAL, ORIENTATIONS["sagittal"])):
        dataset = dcmread(localizer[0])
        dataset.ImageOrientationPatient, dataset.SOPInstanceUID = list(orientation), generate_uid()
        dataset.save_as(tmp_path / "exam" / "scout" / f"{index}.dcm")
    colours = image_dataset(SecondaryCaptureImageStorage, study)
    set_pixels(colours, np.zeros((4, 6), np.int16))
    colours.SamplesPerPixel = 3
    colours.save_as(tmp_path / "exam" / "screenshot", enforce_file_format=True)
    seg = image_dataset(SecondaryCaptureImageStorage, study | {"Modality": "SEG"})
    seg.save_as(tmp_path / "exam" / "seg", enforce_file_format=True)
    check_in_place(read(tmp_path / "exam"))


def test_the_list_of_series_is_the_message(tmp_path):
    study = {"StudyInstanceUID": generate_uid()}
    write_series(tmp_path / "exam" / "1", tags=study | {"SeriesDescription": "T1 fl3d", "SeriesNumber": 4}, add=7)
    uid = generate_uid()
    write_series(tmp_path / "exam" / "2", tags=study | {"SeriesDescription": "T2 tse", "SeriesInstanceUID": uid})
    with pytest.raises(DataError, match="exam has 2 series that could be 'MRI'; name one with --series") as fault:
        read(tmp_path / "exam")
    assert f"T2 tse, MR, 8 slices of 12 x 10, {uid}" in str(fault.value)
    assert "series 4: T1 fl3d" in str(fault.value)
    check_in_place(read(tmp_path / "exam", "t1"), add=7)
    check_in_place(read(tmp_path / "exam", uid))
    with pytest.raises(DataError, match="has no series 'flair'"):
        read(tmp_path / "exam", "flair")
    two = plan_of(("T2", "T1"))
    both = read(tmp_path / "exam", plan=two)
    assert both.channels == ("T2", "T1")
    np.testing.assert_array_equal(both.array[1], both.array[0] + 7)
    with pytest.raises(DataError, match="no series for 'FLAIR', other than computed tomography"):
        read(tmp_path / "exam", plan=plan_of(("T2", "FLAIR")))


def test_two_studies_are_two_exams(tmp_path):
    for name in ("anna", "bob"):
        write_series(tmp_path / name / "scan")
    assert sorted(exam.name for exam in list_exams(tmp_path)) == ["anna-scan", "bob-scan"]
    mixed = tmp_path / "mixed"
    for _ in range(2):
        write_series(mixed, numbers=[*range(len(list(mixed.glob("*"))), len(list(mixed.glob("*"))) + NUM_SLICES)])
    names = {exam.name: exam.series[0].study_uid for exam in list_exams(mixed)}
    assert set(names) == {f"mixed-{hashlib.sha256(uid.encode()).hexdigest()[:8]}" for uid in names.values()}
    write_series(mixed, numbers=[*range(100, 100 + NUM_SLICES)])
    later = {exam.name: exam.series[0].study_uid for exam in list_exams(mixed)}
    assert len(later) == 3
    assert names.items() <= later.items(), "another study changes no name"


@pytest.mark.parametrize("kind", ["LOCALIZER", "SCOUT_IMAGE"])
def test_a_localizer_of_parallel_slices_is_passed_over(tmp_path, kind):
    study = {"StudyInstanceUID": generate_uid()}
    write_series(tmp_path / "exam" / "scan", tags=study | {"SeriesDescription": "T1 fl3d"}, add=7)
    loc = {"ImageType": ["ORIGINAL", "PRIMARY", kind], "SeriesDescription": "MRI LOC 3PL"}
    write_series(tmp_path / "exam" / "loc", tags=study | loc)
    check_in_place(read(tmp_path / "exam"), add=7)
    check_in_place(read(tmp_path / "exam", "LOC"))  # named by the user
    with pytest.raises(DataError, match=r"with parallel slices that is no localizer: \n.*LOC 3PL"):
        read(tmp_path / "exam" / "loc")


EVEN = [STEP_MM * index for index in range(NUM_SLICES)]


@pytest.mark.parametrize(
    ("heights", "said"),
    [
        ([*EVEN[:3], *EVEN[4:]], r"1 slice\(s\) are missing \(between -1.00 and 5.00 mm"),
        ([*EVEN[:2], *EVEN[5:]], r"3 slice\(s\) are missing"),
        ([*EVEN[:5], EVEN[4] + 4.5, EVEN[4] + 9], "distances between slices differ: 3.000 to 4.500 mm, mostly 3.000"),
        ([*EVEN, EVEN[2]], "1 of 8 positions hold several slices .first at -1.00 mm along"),
    ],
)
def test_gaps_and_doubles_are_named(tmp_path, heights, said):
    write_series(tmp_path / "exam", heights_mm=heights)
    with pytest.raises(TokenSegError, match=said):
        read(tmp_path / "exam")


def test_duplicated_files_are_named(tmp_path):
    paths = write_series(tmp_path / "exam")
    for path in paths:
        shutil.copy(path, path.with_name(f"copy-{path.name}"))
    with pytest.raises(DataError, match=r"8 of 8 positions hold several slices.*duplicated"):
        read(tmp_path / "exam")


def test_gantry_tilt_is_named_with_its_angle(tmp_path):
    def tilt(index: int, dataset: Dataset) -> None:
        x, y, z = (float(value) for value in dataset.ImagePositionPatient)
        dataset.ImagePositionPatient = [x, y + index * STEP_MM * np.tan(np.deg2rad(15.0)), z]

    write_series(tmp_path / "exam", change=tilt)
    with pytest.raises(GeometryError, match=r"gantry tilted by 15\.0 degrees"):
        read(tmp_path / "exam")


@pytest.mark.parametrize(
    ("tag", "value", "said"),
    [
        ("PixelSpacing", [1.5, 2.1], r"mixed spacings in mm \(1.5 x 2, 1.5 x 2.1\)"),
        ("ImageOrientationPatient", list(CORONAL), r"mixed orientations \(7 axial, 1 coronal\)"),
        ("ImageOrientationPatient", [1, 0, 0, 1, 0, 0], "mixed orientations"),
    ],
)
def test_mixed_slices_are_named(tmp_path, tag, value, said):
    def change(index: int, dataset: Dataset) -> None:
        if index == 5:
            setattr(dataset, tag, value)

    write_series(tmp_path / "exam", change=change)
    with pytest.raises(GeometryError, match=said):
        read(tmp_path / "exam", "phantom")


@pytest.mark.parametrize(
    ("tag", "value", "said"),
    [
        ("ImageOrientationPatient", [1, 0, 0, 1, 0, 0], "no two perpendicular directions"),
        ("PixelSpacing", [0, 1], "not a number above 0"),
        ("ImagePositionPatient", None, r"slice\(s\) do not say where they are \(ImagePositionPatient, Image"),
    ],
)
def test_slices_without_a_place_are_named(tmp_path, tag, value, said):
    def change(_: int, dataset: Dataset) -> None:
        delattr(dataset, tag)
        if value is not None:
            setattr(dataset, tag, value)

    write_series(tmp_path / "exam", change=change)
    with pytest.raises(GeometryError, match=said):
        read(tmp_path / "exam", "phantom")


def test_rounded_positions_are_even_enough(tmp_path):
    def rounded(_: int, dataset: Dataset) -> None:
        dataset.ImagePositionPatient = [round(float(value), 2) for value in dataset.ImagePositionPatient]

    heights = [0.703125 * index for index in range(20)]
    write_series(tmp_path / "exam", orientation=ORIENTATIONS["oblique"], heights_mm=heights, change=rounded)
    assert read(tmp_path / "exam").spacing_mm[2] == pytest.approx(0.703125, abs=1e-3)


def write_phases(root: Path, numbers=(0, 1, 2), **shared) -> None:
    study = {"StudyInstanceUID": generate_uid()}
    for number in numbers:
        times = {"AcquisitionTime": f"10{20 + number:02d}30.5", "SeriesNumber": 9 - number}
        description = {"SeriesDescription": f"dyn {number}"}
        write_series(root / f"{9 - number}", tags=study | times | description | shared, add=100 * number)


def test_phases_of_one_series_each_by_time(tmp_path):
    write_phases(tmp_path / "exam")
    volume = read(tmp_path / "exam", plan=DCE)
    assert volume.channels == ("phase0", "phase1", "phase2")
    for number in range(3):
        np.testing.assert_array_equal(volume.array[number], volume.array[0] + 100 * number)
    check_in_place(volume)
    (exam,) = list_exams(tmp_path / "exam")
    assert phase_table(exam, DCE) == (
        "phase0: series 9 (dyn 0), 8 slices, 0 s after the first",
        "phase1: series 8 (dyn 1), 8 slices, 60 s after the first",
        "phase2: series 7 (dyn 2), 8 slices, 120 s after the first",
    )
    assert phase_table(exam, PLAN) == ()


@pytest.mark.parametrize("tag", ["TemporalPositionIdentifier", "TriggerTime", "AcquisitionNumber", "AcquisitionTime"])
def test_phases_within_one_series(tmp_path, tag):
    tags = {"StudyInstanceUID": generate_uid(), "SeriesInstanceUID": generate_uid()}
    values = {"AcquisitionTime": ["102000", "102130", "102300"]}
    for number in (2, 0, 1):
        value = values.get(tag, [1, 2, 10])[number]
        write_series(tmp_path / "exam" / str(number), tags=tags | {tag: value}, add=100 * number)
    volume = read(tmp_path / "exam", plan=DCE)
    assert [int(array.mean() - volume.array[0].mean()) for array in volume.array] == [0, 100, 200]
    check_in_place(volume)
    with pytest.raises(DataError, match="holds 3 phases; the model takes one"):
        read(tmp_path / "exam")


def test_enhanced_file_of_all_phases(tmp_path):
    path = write_enhanced(tmp_path / "exam.dcm", phases=3, order=[3, 0, 7, 1, 5, 2, 6, 4])
    volume = read(path, plan=DCE)
    assert [int(array.mean() - volume.array[0].mean()) for array in volume.array] == [0, 100, 200]
    check_in_place(volume)


def test_other_series_are_no_phases(tmp_path):
    write_phases(tmp_path / "exam")
    study = {"StudyInstanceUID": dcmread(next((tmp_path / "exam" / "9").iterdir())).StudyInstanceUID}
    write_series(tmp_path / "exam" / "t2", tags=study | {"EchoTime": 90.0, "SeriesDescription": "T2"})
    derived = {"ImageType": ["DERIVED", "PRIMARY", "SUBTRACT"], "SeriesDescription": "sub", "AcquisitionTime": "1100"}
    write_series(tmp_path / "exam" / "sub", tags=study | derived)
    assert read(tmp_path / "exam", plan=DCE).channels == ("phase0", "phase1", "phase2")
    (exam,) = list_exams(tmp_path / "exam")
    unused = {line.split(",")[0] for line in phase_table(exam, DCE)[3:]}
    assert unused == {"not used: series 3: T2", "not used: series 3: sub"}


def test_inconsistent_phases_are_refused(tmp_path):
    write_phases(tmp_path / "one", numbers=(1,))
    with pytest.raises(DataError, match="no group of series with at least 2 phases"):
        read(tmp_path / "one", plan=DCE)
    write_phases(tmp_path / "same", AcquisitionTime="102000")
    with pytest.raises(DataError, match="two phases have the same time of acquisition"):
        read(tmp_path / "same", plan=DCE)
    write_phases(tmp_path / "none", AcquisitionTime=None)
    for path in (tmp_path / "none").rglob("IM*"):
        dataset = dcmread(path)
        dataset.AcquisitionTime = ""
        dataset.save_as(path)
    with pytest.raises(DataError, match="has no time of acquisition, so that the phases cannot be ordered"):
        read(tmp_path / "none", plan=DCE)
    write_phases(tmp_path / "short")
    next((tmp_path / "short" / "8").glob("*-7")).unlink()
    with pytest.raises(GeometryError, match="not on one grid: 10 x 12 x 8 against 10 x 12 x 7"):
        read(tmp_path / "short", "dyn", plan=DCE)


def test_a_phase_that_lacks_a_slice_within_a_series(tmp_path):
    tags = {"StudyInstanceUID": generate_uid(), "SeriesInstanceUID": generate_uid()}
    for number in range(2):
        write_series(tmp_path / "exam" / str(number), tags=tags | {"TemporalPositionIdentifier": number + 1})
    next((tmp_path / "exam" / "1").glob("*-3")).unlink()
    with pytest.raises(DataError, match=r"7 of 8 positions hold several slices.*phases are incomplete"):
        read(tmp_path / "exam", plan=DCE)


def test_real_breast_exam(real_data):
    """Instance number and height run in opposite orders here; the annotated box must hold the enhancing lesion."""
    root = real_data / "breast_dce_dicom"
    volume = read(root, plan=DCE)
    assert volume.channels == ("phase0", "phase1", "phase2")
    box = json.loads((root / "tumour_box.json").read_text())
    slices = {int(dcmread(path).InstanceNumber): path for path in (root / "2_pre").iterdir()}
    to_index = np.linalg.inv(volume.affine)

    def height(number: int) -> int:
        position = [float(value) for value in dcmread(slices[number]).ImagePositionPatient]
        return round((to_index @ [-position[0], -position[1], position[2], 1])[2])

    low, high = sorted((height(box["start_slice"]), height(box["end_slice"])))
    assert height(min(slices)) > height(max(slices))
    enhancement = volume.array[1] - volume.array[0]
    columns = slice(box["start_column"] - 1, box["end_column"])
    rows = slice(box["start_row"] - 1, box["end_row"])
    inside = enhancement[columns, rows, low : high + 1]
    mirrored = enhancement[::-1][columns, rows, low : high + 1]
    assert np.percentile(inside, 95) > 2 * np.percentile(enhancement, 95)
    assert np.percentile(inside, 95) > 2 * np.percentile(mirrored, 95)


def test_every_truncation_of_the_last_slice_is_refused(tmp_path):
    """Cut anywhere, the end of a scan must not be missing without a word."""
    path = max(write_series(tmp_path / "exam"))
    content = path.read_bytes()
    for length in [*range(1, 140, 9), *range(140, len(content), 23), len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(TokenSegError) as fault:
            read(tmp_path / "exam")
        named = (path.name, "is truncated", "do not say where they are", "which study")
        assert any(text in str(fault.value) for text in named), (length, str(fault.value))


def test_absurd_sizes_are_refused(tmp_path):
    paths = write_series(tmp_path / "exam")
    huge = dcmread(paths[0])
    huge.Rows = huge.Columns = 65535
    huge.save_as(paths[0])
    with pytest.raises(FileError, match="declares 65535 x 65535 pixels; a slice has at most 8192 a side"):
        read(tmp_path / "exam")


def test_deep_nesting_is_refused(tmp_path):
    dataset = image_dataset(SecondaryCaptureImageStorage, {})
    dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    dataset.save_as(tmp_path / "deep.dcm", enforce_file_format=True)
    # (0008,1140) and an item, both of undefined length, again and again
    nested = bytes.fromhex("08004011ffffffff" + "feff00e0ffffffff")
    (tmp_path / "deep.dcm").write_bytes((tmp_path / "deep.dcm").read_bytes() + nested * 20000)
    with pytest.raises(FileError, match=r"deep\.dcm is a damaged DICOM file"):
        list_exams(tmp_path / "deep.dcm")


def test_a_deflated_file_is_not_inflated(tmp_path):
    dataset = image_dataset(SecondaryCaptureImageStorage, {})
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    dataset.save_as(tmp_path / "x.dcm", enforce_file_format=True)
    with pytest.raises(FileError, match="deflated DICOM file, which is not read"):
        list_exams(tmp_path / "x.dcm")


def test_broken_and_absurd_archives(tmp_path):
    write_series(tmp_path / "exam")
    with zipfile.ZipFile(tmp_path / "whole.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted((tmp_path / "exam").iterdir()):
            archive.write(path, f"../../{path.name}")  # nothing is unpacked, so there is nowhere to escape to
    check_in_place(read(tmp_path / "whole.zip"))
    content = bytearray((tmp_path / "whole.zip").read_bytes())
    content[60:400] = bytes(340)
    (tmp_path / "damaged.zip").write_bytes(content)
    with pytest.raises(FileError, match=r"damaged\.zip"):
        list_exams(tmp_path / "damaged.zip")
    (tmp_path / "cut.zip").write_bytes(content[: len(content) // 2])
    assert not may_be_dicom(tmp_path / "cut.zip")
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w") as archive:
        archive.writestr("a", b"")
    bomb = (tmp_path / "bomb.zip").read_bytes()
    place = bomb.index(b"PK\x01\x02") + 24
    (tmp_path / "bomb.zip").write_bytes(bomb[:place] + (2**31).to_bytes(4, "little") + bomb[place + 4 :])
    with pytest.raises(FileError, match="a member of 2 GiB or more"):
        list_exams(tmp_path / "bomb.zip")


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 1100), value=st.integers(0, 255))
def test_no_byte_brings_down_the_reader(tmp_path, place, value):
    """Any one byte of a file may be wrong: the exam is read, or refused with a message of ours."""
    folder = tmp_path / "exam"
    if not folder.exists():
        write_series(folder, heights_mm=[0.0, 3.0])
    path = sorted(folder.iterdir())[1]
    content = bytearray(path.read_bytes())
    changed = content.copy()
    changed[place % len(content)] = value
    path.write_bytes(changed)
    try:
        for exam in list_exams(folder):
            read_exam(exam, PLAN)
    except TokenSegError as fault:
        assert str(fault)  # noqa: PT017
    finally:
        path.write_bytes(content)


def test_without_the_extra_one_line_says_what_to_do(tmp_path, monkeypatch):
    write_series(tmp_path / "exam")
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(ConfigError, match=r"pip install 'tokenseg\[dicom\]'"):
        list_exams(tmp_path / "exam")


# ---- what must not be taken for something else


@pytest.mark.parametrize("times", [("102000", "092130"), ("235900", "000100")])
def test_phases_over_midnight_and_time_zones(tmp_path, times):
    study = {"StudyInstanceUID": generate_uid(), "AcquisitionDate": None, "AcquisitionTime": None}
    if times[0] == "235900":
        moments = ["20250102235900", "20250103000100"]
    else:
        moments = ["20250102102000+0100", "20250102092130+0000"]  # the second is 90 s later
    for number, moment in enumerate(moments):
        write_series(tmp_path / "exam" / str(number), tags=study | {"AcquisitionDateTime": moment}, add=100 * number)
    volume = read(tmp_path / "exam", plan=DCE)
    np.testing.assert_array_equal(volume.array[1], volume.array[0] + 100)


@pytest.mark.parametrize(
    ("dates", "times"),
    [
        ((None, None), ("235900", "000100")),
        (("20250102", None), ("102000", "102130")),
        (("20250102", "20250102"), ("102000", None)),
    ],
)
def test_times_that_give_no_order_are_refused(tmp_path, dates, times):
    study = {"StudyInstanceUID": generate_uid(), "ContentTime": "1000", "SeriesTime": "1000"}
    for number, (date, time) in enumerate(zip(dates, times, strict=True)):
        tags = study | {"AcquisitionDate": date, "AcquisitionTime": time}
        write_series(tmp_path / "exam" / str(number), tags=tags)
    with pytest.raises(DataError, match="cannot be ordered"):
        read(tmp_path / "exam", plan=DCE)


def test_protocols_are_numbers(tmp_path):
    write_phases(tmp_path / "exam", numbers=(1, 2), EchoTime="2.30")
    study = {"StudyInstanceUID": dcmread(next((tmp_path / "exam" / "8").iterdir())).StudyInstanceUID}
    pre = study | {"EchoTime": "2.3", "AcquisitionTime": "101000", "SeriesDescription": "pre"}
    write_series(tmp_path / "exam" / "pre", tags=pre)
    assert len(read(tmp_path / "exam", plan=DCE).channels) == 3


@pytest.mark.parametrize(
    "tags", [{"EchoTime": 2.4}, {"FlipAngle": 25.0}, {"ScanOptions": "FS"}, {"RepetitionTime": 900.0}]
)
def test_what_may_be_a_phase_is_not_left_out(tmp_path, tags):
    write_phases(tmp_path / "exam", FlipAngle=10.0, RepetitionTime=4.0, ScanOptions="PFP")
    study = {"StudyInstanceUID": dcmread(next((tmp_path / "exam" / "8").iterdir())).StudyInstanceUID}
    usual = {
        "FlipAngle": 10.0,
        "RepetitionTime": 4.0,
        "ScanOptions": "PFP",
        "AcquisitionTime": "101000",
        "SeriesDescription": "pre",
    }
    write_series(tmp_path / "exam" / "pre", tags=study | usual | tags)
    with pytest.raises(DataError, match=r"pre, MR, .* may be a phase or not: same place as the others"):
        read(tmp_path / "exam", plan=DCE)
    assert len(read(tmp_path / "exam", "dyn", plan=DCE).channels) == 3


def test_computed_series_are_no_phases(tmp_path):
    write_phases(tmp_path / "exam")
    study = {"StudyInstanceUID": dcmread(next((tmp_path / "exam" / "8").iterdir())).StudyInstanceUID}
    for number, kind in enumerate(
        (["DERIVED", "SECONDARY", "PEI"], ["ORIGINAL", "PRIMARY", "SUB1"], ["DERIVED", "PRIMARY"])
    ):
        tags = {
            "ImageType": kind,
            "SeriesDescription": f"{'dyn' if number < 2 else 'map'} {number}",
            "AcquisitionTime": f"1100{number:02d}",
        }
        write_series(tmp_path / "exam" / f"x{number}", tags=study | tags)
    assert len(read(tmp_path / "exam", plan=DCE).channels) == 3
    assert len(read(tmp_path / "exam", "dyn", plan=DCE).channels) == 3


def test_an_unrelated_series_that_cannot_be_split_does_no_harm(tmp_path):
    write_phases(tmp_path / "exam")
    study = {"StudyInstanceUID": dcmread(next((tmp_path / "exam" / "8").iterdir())).StudyInstanceUID}
    paths = write_series(tmp_path / "exam" / "dwi", tags=study | {"EchoTime": 80.0, "SeriesDescription": "DWI"})
    for path in paths[:5]:
        shutil.copy(path, path.with_name(f"b{path.name}"))
    assert len(read(tmp_path / "exam", plan=DCE).channels) == 3


def test_words_and_modalities_choose(tmp_path):
    study = {"StudyInstanceUID": generate_uid()}
    write_series(tmp_path / "exam" / "1", tags=study | {"Modality": "CT", "SeriesDescription": "Abdomen"}, add=5)
    write_series(tmp_path / "exam" / "2", tags=study | {"Modality": "PT", "SeriesDescription": "WB CTAC"})
    check_in_place(read(tmp_path / "exam", plan=plan_of(("CT",))), add=5)
    write_series(tmp_path / "exam" / "3", tags=study | {"Modality": "CT", "SeriesDescription": "Cor reconstruction"})
    with pytest.raises(DataError, match="2 series that could be 'CT'"):
        read(tmp_path / "exam", plan=plan_of(("CT",)))
    mr = {"StudyInstanceUID": generate_uid()}
    write_series(tmp_path / "mr" / "1", tags=mr | {"SeriesDescription": "T1c sag"})
    write_series(tmp_path / "mr" / "2", tags=mr | {"SeriesDescription": "FLAIR"})
    with pytest.raises(DataError, match="no series for 'T1'"):
        read(tmp_path / "mr", plan=plan_of(("T1", "T1c")))


def test_a_series_with_one_bad_slice_is_still_the_one_that_is_meant(tmp_path):
    study = {"StudyInstanceUID": generate_uid()}

    def lose(index: int, dataset: Dataset) -> None:
        if index == 3:
            del dataset.ImagePositionPatient

    write_series(tmp_path / "exam" / "1", tags=study | {"SeriesDescription": "T1"}, change=lose)
    write_series(tmp_path / "exam" / "2", tags=study | {"SeriesDescription": "DWI"})
    with pytest.raises(GeometryError, match=r"T1, .*1 slice\(s\) do not say where they are \(ImagePositionPatient"):
        read(tmp_path / "exam", plan=plan_of(("T1",)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"PhotometricInterpretation": "MONOCHROME1"}, "its pixels are MONOCHROME1, not MONOCHROME2"),
        ({"ModalityLUTSequence": DicomSequence([Dataset()])}, "go through a table"),
        ({"NumberOfFrames": 3}, "declares 3 frames and describes 1"),
        ({"SeriesInstanceUID": ""}, "does not say which study and series"),
    ],
)
def test_values_that_are_no_plain_slices_are_named(tmp_path, change, said):
    def put(_: int, dataset: Dataset) -> None:
        for name, value in change.items():
            setattr(dataset, name, value)

    write_series(tmp_path / "exam", change=put)
    with pytest.raises(FileError, match=said):
        read(tmp_path / "exam")


def test_slices_aside_or_adding_up_are_named(tmp_path):
    def aside(index: int, dataset: Dataset) -> None:
        if index == 4:
            x, y, z = (float(value) for value in dataset.ImagePositionPatient)
            dataset.ImagePositionPatient = [x + 20, y, z]

    write_series(tmp_path / "aside", change=aside)
    with pytest.raises(GeometryError, match=r"slice 5 of 8 lies 20\.00 mm from its place in an even grid"):
        read(tmp_path / "aside")
    heights = np.concatenate([np.arange(0, 90, 3.0), 87 + 3.055 * np.arange(1, 31)])
    write_series(tmp_path / "adding", heights_mm=list(heights))
    with pytest.raises(GeometryError, match="from its place in an even grid"):
        read(tmp_path / "adding")


def test_two_patients_with_one_series_uid_are_two_exams(tmp_path):
    uid = {"SeriesInstanceUID": generate_uid()}
    write_series(tmp_path / "a", tags=uid, heights_mm=[0, 6, 12])
    write_series(tmp_path / "b", tags=uid, heights_mm=[3, 9, 15])
    assert [exam.name for exam in list_exams(tmp_path)] == ["a", "b"]


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
    write_phases(tmp_path / "exam")
    list_folder = Path.iterdir

    def denied(path: Path):
        if path.name == "7":
            raise PermissionError(13, "Permission denied", str(path))
        return list_folder(path)

    monkeypatch.setattr(Path, "iterdir", denied)
    with pytest.raises(FileError, match="7 cannot be read: Permission denied"):
        list_exams(tmp_path / "exam")


def test_a_deflated_file_behind_a_long_header_is_not_inflated(tmp_path):
    dataset = image_dataset(SecondaryCaptureImageStorage, {})
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    dataset.file_meta.PrivateInformationCreatorUID = "1.2.3"
    dataset.file_meta.ImplementationVersionName = "x"
    dataset.file_meta.PrivateInformation = bytes(4000)
    dataset.save_as(tmp_path / "x.dcm", enforce_file_format=True)
    with pytest.raises(FileError, match="deflated DICOM file"):
        list_exams(tmp_path / "x.dcm")


def write_one_series(root: Path, number_of_phases: int, tags_of) -> None:
    """All phases in one series; `tags_of(phase, slice)` gives the tags of a file."""
    shared = {"StudyInstanceUID": generate_uid(), "SeriesInstanceUID": generate_uid()}
    for phase in range(number_of_phases):

        def change(index: int, dataset: Dataset, phase: int = phase) -> None:
            for name, value in tags_of(phase, index).items():
                setattr(dataset, name, value)

        write_series(root / str(phase), tags=shared, add=100 * phase, change=change)


@pytest.mark.parametrize(
    "tags_of",
    [
        lambda phase, index: {"TriggerTime": 10 * phase + 0.1 * index},
        lambda phase, index: {"AcquisitionTime": f"10{20 + 2 * phase}{10 + index}.25"},
        lambda phase, index: {"TemporalPositionIdentifier": phase + 1, "TriggerTime": 5.0},
    ],
)
def test_slices_of_a_phase_may_differ_in_time(tmp_path, tags_of):
    write_one_series(tmp_path / "exam", 3, tags_of)
    volume = read(tmp_path / "exam", plan=DCE)
    assert [int(array.mean() - volume.array[0].mean()) for array in volume.array] == [0, 100, 200]
    check_in_place(volume)


@pytest.mark.parametrize(
    ("tags_of", "said"),
    [
        (lambda phase, index: {"AcquisitionTime": "1020", "ContentTime": f"10{20 + phase}"}, "tells them apart"),
        (lambda phase, _: {"AcquisitionDate": "", "AcquisitionTime": ["235900", "000100"][phase]}, "around midnight"),
        (lambda phase, index: {"TriggerTime": 2 * index + phase}, "tells them apart"),
        (lambda phase, _: {"EchoTime": [2.0, 4.6][phase]}, "several echo times"),
    ],
)
def test_phases_of_one_series_that_have_no_order(tmp_path, tags_of, said):
    write_one_series(tmp_path / "exam", 2, tags_of)
    with pytest.raises(DataError, match=said):
        read(tmp_path / "exam", plan=DCE)


@pytest.mark.parametrize("fault", ["short", "shifted", "echo"])
def test_a_phase_on_another_grid_is_not_left_out(tmp_path, fault):
    write_phases(tmp_path / "exam", numbers=(0, 2, 3))
    study = {"StudyInstanceUID": dcmread(next((tmp_path / "exam" / "9").iterdir())).StudyInstanceUID}
    heights = [STEP_MM * index + (1.5 if fault == "shifted" else 0) for index in range(7 if fault == "short" else 8)]
    echo = {"EchoTime": 4.0} if fault == "echo" else {}
    tags = study | echo | {"AcquisitionTime": "102130", "SeriesDescription": "second"}
    write_series(tmp_path / "exam" / "second", tags=tags, heights_mm=heights)
    with pytest.raises(DataError, match=r"second, MR, .*may be a phase or not"):
        read(tmp_path / "exam", plan=DCE)


def test_phases_that_the_user_names_may_be_derived(tmp_path):
    write_phases(tmp_path / "exam", numbers=(0, 1))
    study = {"StudyInstanceUID": dcmread(next((tmp_path / "exam" / "9").iterdir())).StudyInstanceUID}
    registered = {"ImageType": ["DERIVED", "PRIMARY", "M"], "AcquisitionTime": "102530", "SeriesDescription": "dyn 2"}
    write_series(tmp_path / "exam" / "registered", tags=study | registered)
    assert len(read(tmp_path / "exam", "dyn", plan=DCE).channels) == 3


def test_diffusion_beside_a_dce_exam(tmp_path):
    write_phases(tmp_path / "exam")
    study = {"StudyInstanceUID": dcmread(next((tmp_path / "exam" / "9").iterdir())).StudyInstanceUID}
    uid = {"SeriesInstanceUID": generate_uid(), "EchoTime": 60.0, "SeriesDescription": "DWI"}
    for number in range(3):
        tags = study | uid | {"TemporalPositionIdentifier": number + 1, "AcquisitionTime": f"11{number:02d}00"}
        write_series(tmp_path / "exam" / f"dwi{number}", tags=tags)
    assert len(read(tmp_path / "exam", plan=DCE).channels) == 3


@pytest.mark.parametrize("content", [b"", bytes(2000), b"\x08\x00\x05\x00CS\x0a\x00ISO_IR 100" + bytes(500)])
def test_files_that_lost_their_beginning_are_refused(tmp_path, content):
    path = max(write_series(tmp_path / "exam"))
    path.write_bytes(content)
    with pytest.raises(FileError, match="is empty or has lost its beginning, among DICOM files"):
        read(tmp_path / "exam")


def test_an_archive_of_macos_and_films_of_pictures(tmp_path):
    study = {"StudyInstanceUID": generate_uid()}
    paths = write_series(tmp_path / "exam", tags=study)
    film = image_dataset(SecondaryCaptureImageStorage, study | {"SeriesDescription": "CAD"})
    set_pixels(film, np.zeros((5, 4, 6), np.int16))
    film.NumberOfFrames = 5
    film.save_as(tmp_path / "exam" / "film", enforce_file_format=True)
    with zipfile.ZipFile(tmp_path / "exam.zip", "w") as archive:
        for path in [*paths, tmp_path / "exam" / "film"]:
            archive.write(path, path.name)
            archive.writestr(f"__MACOSX/._{path.name}.dcm", b"\x00\x05\x16\x07")
    check_in_place(read(tmp_path / "exam.zip"))
