"""Segmenting DICOM as a user does: study in, segmentation out; and one DCE exam by every route there is."""

from __future__ import annotations

import csv
import json
import shutil
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from pydicom import dcmread
from pydicom.uid import generate_uid

from dicom_phantoms import NUM_SLICES, SIZE, write_enhanced, write_series
from plans import make_plan
from tokenseg.cli import main
from tokenseg.datasets.inputs import list_inputs, read_written_mask
from tokenseg.errors import ConfigError, FileError
from tokenseg.imaging.dicom.exam import list_exams, read_exam
from tokenseg.imaging.dicom.seg import read_seg
from tokenseg.imaging.dicom_files import DicomFile
from tokenseg.imaging.volume import read_mask, write_volume
from tokenseg.options import SegmentOptions
from tokenseg.saved_model.checkpoint import load_model
from tokenseg.segmentation.segment import segment_files
from toy_models import as_stored, constant, job_of, labels_of, nearest_level, save_untrained, toy_model, untrained

DCE = make_plan(channels=2).model_copy(
    update={"channels": ("phase1", "phase1 - phase0"), "source_channels": ("phase0", "phase1"), "joint_zscore": True}
)
TUMOUR = as_stored(make_plan(), labels=labels_of(tumour=1))


ALWAYS = ("manifest.json", "status.jsonl", "summary.csv")


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_dce(root: Path) -> Path:
    study = {"StudyInstanceUID": generate_uid()}
    for number in range(3):
        times = {
            "AcquisitionTime": f"10{20 + number}30",
            "SeriesNumber": 9 - number,
            "SeriesDescription": f"dyn {number}",
        }
        write_series(root / f"{9 - number}", tags=study | times | {"SeriesNumber": 9 - number}, add=100 * number)
    return root


def test_a_study_becomes_an_object_and_a_summary(tmp_path, capsys):
    write_series(tmp_path / "exam")
    model = save_untrained(tmp_path / "model")
    report = tmp_path / "report.html"
    words = ["segment", str(tmp_path / "exam"), str(tmp_path / "out"), "--model", str(model), "--report", str(report)]
    assert main(words) == 0
    assert names_in(tmp_path / "out") == ["exam_qc.json", "exam_seg.dcm", *ALWAYS]
    assert "exam: l0 " in capsys.readouterr().out
    assert report.stat().st_size > 10_000
    # Again, over what this program wrote; and into one file of another format, with the same voxels.
    assert main(words) == 0
    assert main([*words[:2], str(tmp_path / "mask.nii.gz"), *words[3:5]]) == 0
    (case,) = list_inputs(tmp_path / "exam", make_plan())
    seg = read_written_mask(case, tmp_path / "out" / "exam_seg.dcm", make_plan())
    np.testing.assert_array_equal(seg.array, read_mask(tmp_path / "mask.nii.gz").array)
    assert 0 < np.count_nonzero(seg.array) < seg.array.size


def test_every_route_of_a_dce_exam_gives_the_same_mask(tmp_path):
    model = untrained(DCE)
    dicom = write_dce(tmp_path / "dicom" / "exam")
    (exam,) = list_exams(dicom)
    scan = read_exam(exam, DCE)
    expected = segment_files(job_of([model]), dicom, tmp_path / "a.nii.gz")
    mask = read_mask(tmp_path / "a.nii.gz").array
    assert expected[0].notes[1] == "phase1: series 8 (dyn 1), 8 slices, 60 s after the first"
    assert 0 < np.count_nonzero(mask) < mask.size

    phases = [type(scan)(scan.array[n : n + 1], scan.affine, (f"phase{n}",)) for n in range(3)]
    for number, phase in enumerate(phases):  # a list of 3D files, and the MAMA-MIA folder
        write_volume(tmp_path / "list" / f"exam_{number:04d}.nii.gz", phase)
        write_volume(tmp_path / "mamamia" / "images" / "exam" / f"exam_{number:04d}.nii.gz", phase)
    (tmp_path / "mamamia" / "segmentations" / "expert").mkdir(parents=True)
    words = ["case,phase2,phase0,Phase1", "exam,exam_0002.nii.gz,exam_0000.nii.gz,exam_0001.nii.gz"]
    (tmp_path / "list" / "table.csv").write_text("\n".join(words))
    (tmp_path / "4d").mkdir()
    stored = np.moveaxis(scan.array, 0, -1).astype(np.int16)
    nib.save(nib.Nifti1Image(stored, scan.affine), tmp_path / "4d" / "exam.nii.gz")
    with zipfile.ZipFile(tmp_path / "exam.zip", "w") as archive:
        for path in sorted(dicom.rglob("IM*")):
            archive.write(path, path.relative_to(dicom))
    one_series = {"StudyInstanceUID": generate_uid(), "SeriesInstanceUID": generate_uid()}
    for number in (2, 0, 1):
        tags = one_series | {"TemporalPositionIdentifier": number + 1}
        write_series(tmp_path / "one" / "exam" / str(number), tags=tags, add=100 * number)
    write_enhanced(tmp_path / "exam.dcm", phases=3)

    for route in ("list", "mamamia", "4d", "list/table.csv"):
        segment_files(job_of([model]), tmp_path / route, tmp_path / f"{route}-out")
        np.testing.assert_array_equal(read_mask(tmp_path / f"{route}-out" / "exam.nii.gz").array, mask)
    for route in (tmp_path / "exam.zip", tmp_path / "one" / "exam", tmp_path / "exam.dcm"):
        segment_files(job_of([model]), route, tmp_path / "again.nii.gz")
        np.testing.assert_array_equal(read_mask(tmp_path / "again.nii.gz").array, mask)
    segment_files(job_of([model]), dicom, tmp_path / "seg")
    np.testing.assert_array_equal(read_seg(tmp_path / "seg" / "exam_seg.dcm", DCE.labels, scan).array, mask)


def test_real_dce_exam_by_two_routes(real_data, tmp_path):
    model = untrained(DCE.model_copy(update={"spacing_mm": (3.0, 3.0, 3.0)}))
    (exam,) = list_exams(real_data / "breast_dce_dicom")
    scan = read_exam(exam, DCE)
    for number in range(3):
        phase = type(scan)(scan.array[number : number + 1], scan.affine, (f"phase{number}",))
        write_volume(tmp_path / "list" / f"exam_{number:04d}.nii.gz", phase)
    segment_files(job_of([model]), real_data / "breast_dce_dicom", tmp_path / "a_seg.dcm")
    segment_files(job_of([model]), tmp_path / "list", tmp_path / "out")
    mask = read_mask(tmp_path / "out" / "exam.nii.gz").array
    assert 0 < np.count_nonzero(mask) < mask.size
    np.testing.assert_array_equal(read_seg(tmp_path / "a_seg.dcm", DCE.labels, scan).array, mask)


def test_no_findings(tmp_path):
    write_series(tmp_path / "exam")
    none = toy_model(constant(1.0, 0.0), TUMOUR)
    (result,) = segment_files(job_of([none]), tmp_path / "exam", tmp_path / "out")
    assert result.mask == tmp_path / "out" / "exam_seg.json"
    assert json.loads(result.mask.read_text())["looked_for"] == ["tumour"]
    assert result.volumes_ml == {"tumour": 0.0}
    (case,) = list_inputs(tmp_path / "exam", TUMOUR)
    assert not read_written_mask(case, result.mask, TUMOUR).array.any()
    # What is found later replaces it, and the other way round.
    all_of_it = toy_model(constant(0.0, 1.0), TUMOUR)
    segment_files(job_of([all_of_it]), tmp_path / "exam", tmp_path / "out")
    assert names_in(tmp_path / "out") == ["exam_qc.json", "exam_seg.dcm", *ALWAYS]
    assert dcmread(tmp_path / "out" / "exam_seg.dcm").NumberOfFrames == NUM_SLICES
    segment_files(job_of([none]), tmp_path / "exam", tmp_path / "out")
    assert names_in(tmp_path / "out") == ["exam_qc.json", "exam_seg.json", *ALWAYS]
    segment_files(job_of([none], options=SegmentOptions(empty_seg=True)), tmp_path / "exam", tmp_path / "out")
    assert names_in(tmp_path / "out") == ["exam_qc.json", "exam_seg.dcm", *ALWAYS]
    assert not dcmread(tmp_path / "out" / "exam_seg.dcm").pixel_array.any()


def test_one_broken_study_does_not_stop_the_others(tmp_path):
    write_series(tmp_path / "in" / "anna")
    study = {"StudyInstanceUID": generate_uid()}
    for description in ("T1", "T2"):
        write_series(tmp_path / "in" / "bob" / description, tags=study | {"SeriesDescription": description})
    write_series(tmp_path / "in" / "carl", heights_mm=[0, 3, 6, 12, 15])
    model = toy_model(nearest_level(2), TUMOUR)
    results = {result.case_id: result for result in segment_files(job_of([model]), tmp_path / "in", tmp_path / "out")}
    assert sorted(results) == ["anna", "bob", "carl"]
    assert results["anna"].mask == tmp_path / "out" / "anna_seg.dcm"
    assert "2 series that could be 'c0'; name one with --series" in results["bob"].error
    assert "1 slice(s) are missing" in results["carl"].error
    with (tmp_path / "out" / "summary.csv").open(newline="") as file:
        assert [bool(row["error"]) for row in csv.DictReader(file)] == [False, True, True]


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("length", [0, 100, 700])
def test_a_damaged_file_stops_its_study_alone(tmp_path, length, zipped):
    for name in ("anna", "bob"):
        path = max(write_series(tmp_path / "in" / name / "scan"))
    path.write_bytes(path.read_bytes()[:length])
    given = tmp_path / "in"
    if zipped:  # around the folder, as many programs do
        given = Path(shutil.make_archive(str(tmp_path / "in"), "zip", tmp_path, "in"))
    good, bad = segment_files(job_of([toy_model(constant(0.0, 1.0), TUMOUR)]), given, tmp_path / "out")
    assert good.mask is not None
    assert path.name in bad.error
    lines = [json.loads(line) for line in (tmp_path / "out" / "status.jsonl").read_text().splitlines()]
    assert [bool(line["error"]) for line in lines] == [False, True]
    assert path.name not in str(lines), "what a file is called may name a patient"


def test_a_slice_that_comes_later_and_is_damaged(tmp_path, monkeypatch):
    """The mask without it is of no use any more, unless nobody can tell: then it stays, and the case fails."""
    for name in ("anna", "bob"):
        path = max(write_series(tmp_path / "in" / name / "scan"))
    content = path.read_bytes()
    path.unlink()
    model = load_model(save_untrained(tmp_path / "model"))

    def masks() -> list[str]:
        results = segment_files(job_of([model]), tmp_path / "in", tmp_path / "out")
        assert [bool(result.error) for result in results] == [False, path.exists()]
        return sorted(mask.name for mask in (tmp_path / "out").glob("*_seg.dcm"))

    both = ["anna-scan_seg.dcm", "bob-scan_seg.dcm"]
    assert masks() == both
    path.write_bytes(content)
    start = DicomFile.opened

    def unreadable(file: DicomFile):
        if file.path == path:
            raise FileError(f"{file} cannot be read: Input/output error")
        return start(file)

    with monkeypatch.context() as patched:
        patched.setattr(DicomFile, "opened", unreadable)
        assert masks() == both
    path.write_bytes(content[:700])
    assert masks() == both[:1]


def test_a_damaged_file_that_may_be_of_any_study_stops_all(tmp_path):
    study = {"StudyInstanceUID": generate_uid()}
    write_series(tmp_path / "across" / "a", tags=study)
    cut = write_series(tmp_path / "across" / "b", tags=study)
    write_series(tmp_path / "across" / "c")
    for name in ("a", "b"):
        flat = write_series(tmp_path / "flat" / name)
        flat += [path.rename(tmp_path / "flat" / f"{name}-{path.name}") for path in flat]
        write_series(tmp_path / "alone" / name)
        inner = write_series(tmp_path / "inner" / name / "scan")
    alone = write_series(tmp_path / "alone" / "c", heights_mm=[0.0])
    (tmp_path / "inner" / "b" / "other").mkdir()
    inner += [inner[0].rename(tmp_path / "inner" / "b" / "other" / "slice")]
    for name, path in (("across", cut[0]), ("flat", flat[-1]), ("alone", alone[0]), ("inner", inner[-1])):
        list_exams(tmp_path / name)
        path.write_bytes(path.read_bytes()[:700])
        with pytest.raises(FileError, match=path.name):
            list_exams(tmp_path / name)


def test_what_is_there_is_not_overwritten(tmp_path):
    write_series(tmp_path / "exam")
    model = toy_model(constant(0.0, 1.0), TUMOUR)
    for name in ("exam_seg.dcm", "exam_seg.json"):
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        (folder / name).write_text("of somebody")
        with pytest.raises(FileError, match=rf"already holds {name}, not written by"):
            segment_files(job_of([model]), tmp_path / "exam", folder)
        assert (folder / name).read_text() == "of somebody"


def test_series_is_for_dicom_only(tmp_path):
    write_series(tmp_path / "exam")
    model = toy_model(constant(0.0, 1.0), TUMOUR)
    segment_files(job_of([model]), tmp_path / "exam", tmp_path / "scan.nrrd")
    with pytest.raises(ConfigError, match=r"--series t1: .*scan\.nrrd is not DICOM; leave it out"):
        segment_files(job_of([model], options=SegmentOptions(series="t1")), tmp_path / "scan.nrrd", tmp_path / "b.nrrd")
    shutil.rmtree(tmp_path / "exam")
    (tmp_path / "exam").mkdir()
    with pytest.raises(FileError, match="no DICOM images below it"):
        segment_files(job_of([model]), tmp_path / "exam", tmp_path / "out")


def test_other_formats_keep_theirs(tmp_path):
    write_series(tmp_path / "exam")
    model = toy_model(constant(0.0, 1.0), TUMOUR)
    (exam,) = list_exams(tmp_path / "exam")
    scan = read_exam(exam, TUMOUR)
    for ending in (".nrrd", ".mha", ".nii"):
        write_volume(tmp_path / "in" / f"scan-{ending[1:]}{ending}", scan)
    results = segment_files(job_of([model]), tmp_path / "in", tmp_path / "out")
    assert sorted(result.mask.name for result in results) == ["scan-mha.mha", "scan-nii.nii", "scan-nrrd.nrrd"]
    for result in results:
        assert read_mask(result.mask).array.all()
        assert read_mask(result.mask).array.shape == (SIZE[1], SIZE[0], NUM_SLICES)


def test_nothing_is_written_among_the_slices(tmp_path):
    paths = write_series(tmp_path / "exam")
    before = paths[3].read_bytes()
    model = toy_model(constant(0.0, 1.0), TUMOUR)
    for output in (paths[3].with_suffix(".dcm"), tmp_path / "exam" / "mask.nii.gz", tmp_path / "exam" / "out"):
        with pytest.raises(FileError, match="lies among the DICOM files"):
            segment_files(job_of([model]), tmp_path / "exam", output)
    assert paths[3].read_bytes() == before


def test_one_file_out_is_never_stale(tmp_path):
    write_series(tmp_path / "exam")
    all_of_it, none = toy_model(constant(0.0, 1.0), TUMOUR), toy_model(constant(1.0, 0.0), TUMOUR)
    (found,) = segment_files(job_of([all_of_it]), tmp_path / "exam", tmp_path / "x.dcm")
    assert found.mask == tmp_path / "x.dcm"
    (nothing,) = segment_files(job_of([none]), tmp_path / "exam", tmp_path / "x.dcm")
    assert nothing.mask == tmp_path / "x_seg.json"
    assert not (tmp_path / "x.dcm").exists()
    segment_files(job_of([all_of_it]), tmp_path / "exam", tmp_path / "x.dcm")
    assert not (tmp_path / "x_seg.json").exists()
    (tmp_path / "y_seg.json").write_text('{"of": "somebody"}')
    with pytest.raises(FileError, match=r"y_seg\.json is in the way"):
        segment_files(job_of([none]), tmp_path / "exam", tmp_path / "y.dcm")


def test_an_archive_of_several_studies_prints_all(tmp_path, capsys):
    write_series(tmp_path / "in" / "anna")
    write_series(tmp_path / "in" / "bob", heights_mm=[0, 3, 9])
    shutil.make_archive(str(tmp_path / "in"), "zip", tmp_path / "in")
    model = save_untrained(tmp_path / "model")
    assert main(["segment", str(tmp_path / "in.zip"), str(tmp_path / "out"), "--model", str(model)]) == 1
    told = capsys.readouterr()
    assert "1 of 2 cases segmented" in told.out
    assert "1 slice(s) are missing" in told.err
    assert main(["segment", str(tmp_path / "in" / "bob"), str(tmp_path / "b.nii.gz"), "--model", str(model)]) == 2
    assert "summary.csv" not in capsys.readouterr().out
