"""Synthetic exams on disk: read like real exams, the same from the same seed, never over a user's files."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

from tokenseg.datasets.layouts import load_case, open_dataset
from tokenseg.errors import ConfigError, DataError, FileError
from tokenseg.options import SyntheticOptions
from tokenseg.synthetic import scanner
from tokenseg.synthetic.datasets import NOTICE, count_lesions, write_datasets
from tokenseg.synthetic.grid import ScanGrid

SMALL = SyntheticOptions(train=2, test=1, external=1, seed=3)


class Recorder:
    """Keeps what it is told."""

    def __init__(self):
        self.stages, self.notes = [], []

    def stage(self, name, total, done=0):
        self.stages.append((name, total, done))

    def advance(self, note=""):
        self.notes.append(note)

    def message(self, text):
        raise AssertionError(text)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder, recorder = tmp_path_factory.mktemp("synthetic") / "exams", Recorder()
    return write_datasets(folder, SMALL, recorder), recorder


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made[0].folder, tmp_path / "copy")


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def test_facts_and_progress_say_what_was_made(made):
    facts, recorder = made
    assert [(part.name, part.num_exams, part.num_made) for part in facts.parts] == [
        ("train", 2, 2),
        ("test", 1, 1),
        ("external", 1, 1),
    ]
    assert facts.seed == 3
    assert recorder.stages == [("synthetic exams", 4, 0)]
    assert recorder.notes == ["train/SYN_000", "train/SYN_001", "test/TST_000", "external/EXT_000"]


def test_the_reader_of_real_exams_reads_it(made):
    dataset = open_dataset(made[0].folder / "train")
    assert dataset.reason.endswith("; the exams are synthetic (lesions.json)")
    assert (dataset.layout, dataset.source_channels) == ("mamamia", ("phase0", "phase1"))
    assert [case.case_id for case in dataset.cases] == ["SYN_000", "SYN_001"]
    for case in dataset.cases:
        loaded = load_case(dataset, case)
        assert set(np.unique(loaded.mask.array)) <= {0, 1}
        assert loaded.volume.channels == ("phase0", "phase1", "phase2")
        assert nib.orientations.aff2axcodes(loaded.volume.affine) == ("L", "P", "S")


def test_files_are_stored_as_by_a_scanner(made):
    root = made[0].folder / "external"
    phases = [nib.load(root / "images" / "EXT_000" / f"EXT_000_{number:04d}.nii.gz") for number in range(3)]
    mask = nib.load(root / "segmentations" / "expert" / "EXT_000.nii.gz")
    assert {phase.get_data_dtype() for phase in phases} == {np.dtype(np.int16)}
    assert mask.get_data_dtype() == np.uint8
    assert {image.affine.tobytes() for image in (*phases, mask)} == {mask.affine.tobytes()}


def test_lesion_records_match_the_masks(made):
    for part in made[0].parts:
        listing = json.loads((part.folder / "lesions.json").read_text())
        assert listing["notice"] == NOTICE
        assert len(listing["exams"]) == part.num_exams
        assert sum(len(exam["lesions"]) for exam in listing["exams"]) == part.num_lesions
        for exam in listing["exams"]:
            mask = nib.load(part.folder / "segmentations" / "expert" / f"{exam['id']}.nii.gz")
            voxel_ml = np.prod(mask.header.get_zooms()) / 1000
            volume_ml = sum(lesion["volume_ml"] for lesion in exam["lesions"])
            assert np.asarray(mask.dataobj).sum() * voxel_ml == pytest.approx(volume_ml, rel=0.15, abs=0.02)
            assert exam["centre"] == ("external" if part.name == "external" else "internal")
            assert exam["spacing_mm"] == pytest.approx(mask.header.get_zooms(), abs=1e-4)
            assert exam["synthetic"] is True


@pytest.mark.parametrize("place", [".", "train", "test", "external"])
def test_readmes_say_that_it_is_synthetic(made, place):
    text = (made[0].folder / place / "README.txt").read_text()
    assert text.startswith("SYNTHETIC DATA")
    assert "seed 3" in text
    assert "not for any clinical conclusion" in text


def test_a_finished_folder_is_left_as_it_is(made, copy):
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*.nii.gz")}
    facts = write_datasets(copy, SMALL)
    assert [part.num_made for part in facts.parts] == [0, 0, 0]
    assert [part.num_lesions for part in facts.parts] == [part.num_lesions for part in made[0].parts]
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*.nii.gz")} == before
    assert contents(copy) == contents(made[0].folder)


def test_an_interrupted_call_goes_on_to_the_same_files(made, copy):
    (copy / "train" / "lesions.json").unlink()
    (copy / "train" / "patient_info_files" / "SYN_001.json").unlink()
    (copy / "train" / "images" / "SYN_001" / "SYN_001_0002.nii.gz").unlink()
    (copy / "test" / "images" / "TST_000" / ".partial-0000-TST_000_0000.nii.gz").write_bytes(b"half")
    facts = write_datasets(copy, SMALL)
    assert [part.num_made for part in facts.parts] == [1, 0, 0]
    assert contents(copy) == contents(made[0].folder)


def test_a_larger_part_begins_with_a_smaller_one(copy):
    smaller = contents(copy)
    facts = write_datasets(copy, SyntheticOptions(train=3, test=1, external=1, seed=3))
    assert [part.num_made for part in facts.parts] == [1, 0, 0]
    images = {name for name in smaller if name.endswith(".nii.gz")}
    larger = contents(copy)
    assert {name: larger[name] for name in images} == {name: smaller[name] for name in images}
    assert len(json.loads(larger["train/lesions.json"])["exams"]) == 3


def test_parts_with_no_exam_are_left_out(tmp_path):
    facts = write_datasets(tmp_path / "new" / "folder", SyntheticOptions(train=0, test=0, external=1, seed=3))
    assert [part.name for part in facts.parts] == ["external"]
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [
        "README.txt",
        "cohort.json",
        "external",
    ]


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "mine.nii.gz").write_bytes(b"precious")
    with pytest.raises(FileError, match=r"files that are not of these exams: images/mine.nii.gz; name an empty"):
        write_datasets(tmp_path, SMALL)
    assert contents(tmp_path) == {"images/mine.nii.gz": b"precious"}


def test_files_added_by_others_are_refused(copy):
    for number in range(7):
        (copy / "train" / f"note{number}.txt").write_text("mine")
    with pytest.raises(FileError, match=r"train/note0.txt, .*train/note4.txt and 2 more; name an empty folder"):
        write_datasets(copy, SMALL)


def test_fewer_exams_than_there_are_is_refused(copy):
    with pytest.raises(FileError, match=r"train/images/SYN_001/SYN_001_0000.nii.gz.* at least as many exams as it has"):
        write_datasets(copy, SyntheticOptions(train=1, test=1, external=1, seed=3))


def test_another_seed_is_refused(copy):
    with pytest.raises(ConfigError, match="holds exams of seed 3, asked for is seed 4; name another folder"):
        write_datasets(copy, SyntheticOptions(train=2, test=1, external=1, seed=4))


@pytest.mark.parametrize("marker", ['{"seed": 3, "version": 0}', "[]"])
def test_exams_of_another_version_are_not_mixed_in(copy, marker):
    (copy / "cohort.json").write_text(marker)
    with pytest.raises(ConfigError, match=r"holds exams of (version 0|seed None), asked for is"):
        write_datasets(copy, SMALL)


def test_a_broken_record_is_named(copy):
    record = copy / "test" / "patient_info_files" / "TST_000.json"
    record.write_text('{"id": "TST_000"}')
    with pytest.raises(FileError, match=r"TST_000.json is not the record of a synthetic exam; remove it"):
        write_datasets(copy, SMALL)
    record.write_text("{")
    with pytest.raises(DataError, match=r"TST_000.json is not valid JSON"):
        write_datasets(copy, SMALL)


def test_options_are_checked_before_anything_is_written(tmp_path):
    with pytest.raises(ConfigError, match="--train -1: must be at least 0"):
        write_datasets(tmp_path / "out", SyntheticOptions(train=-1))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", ["train", "test", "external"])
@pytest.mark.parametrize("seed", [0, 1, 99])
def test_rare_exams_come_in_proportion(part, seed):
    counts = [count_lesions(seed, part, number) for number in range(200)]
    assert counts.count(0) == pytest.approx(20, abs=2)
    assert counts.count(2) == pytest.approx(24, abs=2)
    assert counts.count(1) == 200 - counts.count(0) - counts.count(2)
    assert all(counts[start : start + 2].count(0) < 2 for start in range(199)), "never two without lesion in a row"


def test_whole_exams_take_a_folder_of_their_own(tmp_path, monkeypatch):
    grid = ScanGrid(shape_vox=(86, 84, 44), spacing_mm=(4.0, 4.0, 4.0))
    monkeypatch.setattr(scanner, "_whole_grid", lambda _: grid)
    options = SyntheticOptions(train=2, test=0, external=0, whole=True)
    write_datasets(tmp_path / "whole", options)
    dataset = open_dataset(tmp_path / "whole" / "train")
    assert load_case(dataset, dataset.cases[0]).mask.array.shape == (86, 84, 44)
    assert json.loads((tmp_path / "whole" / "cohort.json").read_text())["whole"] is True
    before = contents(tmp_path / "whole")
    assert write_datasets(tmp_path / "whole", options).parts[0].num_made == 0
    assert contents(tmp_path / "whole") == before
    with pytest.raises(
        ConfigError, match=r"holds exams of both breasts, asked for are exams of one; .* or add --whole"
    ):
        write_datasets(tmp_path / "whole", replace(options, whole=False))


def test_a_folder_of_single_breasts_takes_no_whole_exams(copy):
    with pytest.raises(
        ConfigError, match=r"holds exams of one breast, asked for are exams of both; .* or leave out --whole"
    ):
        write_datasets(copy, replace(SMALL, whole=True))
    assert "whole" not in (copy / "cohort.json").read_text()
