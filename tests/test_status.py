"""Cohorts: a second run does no work, what changed is done again, and jobs side by side share a folder."""

from __future__ import annotations

import csv
import json
from hashlib import sha256
from pathlib import Path

import pytest

import tokenseg.segmentation.segment
from dicom_phantoms import write_series
from phantoms import phantom, write_nifti
from tokenseg.cli import main
from tokenseg.datasets.cases import Case
from tokenseg.errors import ConfigError, FileError
from tokenseg.imaging.volume import read_mask
from tokenseg.options import SegmentOptions
from tokenseg.saved_model.checkpoint import Model, load_model
from tokenseg.segmentation.privacy import shown_name
from tokenseg.segmentation.segment import segment_files
from tokenseg.segmentation.status import CaseStatus, append_status, case_digest, read_statuses
from toy_models import job_of, save_untrained, untrained


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Cases that were computed."""
    names: list[str] = []
    compute = tokenseg.segmentation.segment.compute_mask

    def count(work, *rest):
        names.append(work.to_do.case.case_id)
        return compute(work, *rest)

    monkeypatch.setattr(tokenseg.segmentation.segment, "compute_mask", count)
    return names


def saved_model(folder: Path, seed: int = 0) -> Model:
    return load_model(save_untrained(folder, seed=seed))


def scans(folder: Path, count: int) -> Path:
    for number in range(count):
        write_nifti(folder / f"scan{number}.nii.gz", phantom(number)[0][0])
    return folder


def lines(folder: Path, name: str = "status.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_a_second_run_does_no_work(tmp_path, computed):
    model, source, out = saved_model(tmp_path / "model"), scans(tmp_path / "in", 3), tmp_path / "out"
    first = segment_files(job_of([model]), source, out)
    assert computed == ["scan0", "scan1", "scan2"]
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.nii.gz")}
    second = segment_files(job_of([model]), source, out)
    assert len(computed) == 3
    assert [result.volumes_ml for result in second] == [result.volumes_ml for result in first]
    assert [result.mask for result in second] == [result.mask for result in first]
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("*.nii.gz")} == before
    assert len(lines(out)) == 3


@pytest.mark.parametrize("change", ["input", "mask", "gone", "weights", "plan", "setting"])
def test_what_changed_is_done_again(tmp_path, computed, change):
    model, source, out = saved_model(tmp_path / "model"), scans(tmp_path / "in", 2), tmp_path / "out"
    segment_files(job_of([model]), source, out)
    options = SegmentOptions()
    if change == "input":
        write_nifti(source / "scan1.nii.gz", phantom(7)[0][0])
    elif change == "mask":
        write_nifti(out / "scan1.nii.gz", phantom(7)[1])
    elif change == "gone":
        (out / "scan1.nii.gz").unlink()
    elif change == "weights":
        model = saved_model(tmp_path / "other", seed=1)
    elif change == "plan":  # the same weights, by a model description that somebody edited
        label = model.facts.plan.labels[0].model_copy(update={"values": (9,), "output_value": 9})
        facts = model.facts.model_copy(update={"plan": model.facts.plan.model_copy(update={"labels": (label,)})})
        model = Model(model.network, facts, model.device)
    else:
        options = SegmentOptions(full=True)
    computed.clear()
    segment_files(job_of([model], options=options), source, out)
    assert computed == (["scan0", "scan1"] if change in ("weights", "plan", "setting") else ["scan1"])
    assert read_mask(out / "scan1.nii.gz").array.shape == (24, 24, 24)


def test_lines_say_what_became_of_a_case(tmp_path):
    source = scans(tmp_path / "in", 2)
    (source / "scan1.nii.gz").write_bytes(b"broken")
    segment_files(job_of([saved_model(tmp_path / "model")]), source, tmp_path / "out")
    done, failed = lines(tmp_path / "out")
    names = [shown_name(f"scan{number}", show_names=False) for number in range(2)]
    assert (done["case"], done["state"], failed["case"]) == (names[0], "done", names[1])
    assert done["mask_sha256"] == sha256((tmp_path / "out" / "scan0.nii.gz").read_bytes()).hexdigest()
    assert (done["shape_vox"], done["slabs"]) == ([24, 24, 24], 1)
    assert set(done["seconds"]) == {"load", "resample", "network", "quality", "resample back", "save"}
    assert done["peak_mib"] > 100
    assert (failed["state"], failed["mask_sha256"]) == ("failed", "")
    assert "not an intact gzip file" in failed["error"]
    # Failed cases are tried again.
    write_nifti(source / "scan1.nii.gz", phantom(1)[0][0])
    segment_files(job_of([saved_model(tmp_path / "model")]), source, tmp_path / "out")
    assert [(line["case"], line["state"]) for line in lines(tmp_path / "out")[2:]] == [(names[1], "done")]


def test_a_model_that_was_never_saved_has_no_fingerprint(tmp_path, computed):
    model, source = untrained(), scans(tmp_path / "in", 1)
    for _ in range(2):
        segment_files(job_of([model]), source, tmp_path / "out")
    assert computed == ["scan0", "scan0"]


def test_a_mask_stays_where_its_input_is_away_for_a_time(tmp_path, computed):
    model, source, out = saved_model(tmp_path / "model"), scans(tmp_path / "in", 2), tmp_path / "out"
    table = tmp_path / "t.csv"
    table.write_text("case,image\na,in/scan0.nii.gz\nb,in/scan1.nii.gz\n")
    segment_files(job_of([model]), table, out)
    before = {path.name: path.read_bytes() for path in (out / "b.nii.gz", out / "b_qc.json")}
    (source / "scan1.nii.gz").rename(tmp_path / "moved.nii.gz")
    for _ in range(2):  # away for several calls
        assert [result.mask is None for result in segment_files(job_of([model]), table, out)] == [False, True]
        assert {name: (out / name).read_bytes() for name in before} == before
        assert lines(out)[-1]["state"] == "failed"
        assert "does not exist" in lines(out)[-1]["error"]
    (tmp_path / "moved.nii.gz").rename(source / "scan1.nii.gz")
    computed.clear()
    assert all(result.mask for result in segment_files(job_of([model]), table, out))
    assert computed == ["b"]
    assert lines(out)[-1]["state"] == "done"
    # A mask of another model would pass for one of this.
    (source / "scan1.nii.gz").unlink()
    segment_files(job_of([saved_model(tmp_path / "other", seed=1)]), table, out)
    assert not (out / "b.nii.gz").exists()
    assert lines(out)[-1]["key"] == ""


def test_half_a_line_of_a_killed_process_does_no_harm(tmp_path, computed):
    source, out = scans(tmp_path / "in", 3), tmp_path / "out"
    segment_files(job_of([saved_model(tmp_path / "model")]), source, out)
    content = (out / "status.jsonl").read_bytes()
    (out / "status.jsonl").write_bytes(content[:-40])
    computed.clear()
    segment_files(job_of([saved_model(tmp_path / "model")]), source, out)
    assert computed == ["scan2"]
    assert len(read_statuses(out)) == 3


def test_dicom_studies_are_not_done_again_either(tmp_path, computed):
    write_series(tmp_path / "in" / "anna")
    paths = write_series(tmp_path / "in" / "bob")
    model = saved_model(tmp_path / "model")
    for _ in range(2):
        segment_files(job_of([model]), tmp_path / "in", tmp_path / "out")
    assert computed == ["anna", "bob"]
    content = bytearray(paths[2].read_bytes())
    content[-50] ^= 1
    paths[2].write_bytes(content)
    segment_files(job_of([model]), tmp_path / "in", tmp_path / "out")
    assert computed == ["anna", "bob", "bob"]


def test_shards_share_a_folder(tmp_path, computed):
    model, source, out = saved_model(tmp_path / "model"), scans(tmp_path / "in", 5), tmp_path / "out"
    for number in (3, 1, 2):
        segment_files(job_of([model], options=SegmentOptions(shard=f"{number}/3")), source, out)
    assert computed == ["scan2", "scan0", "scan3", "scan1", "scan4"]
    assert sorted(path.name for path in out.glob("s*.csv")) == [f"summary.{n}-of-3.csv" for n in (1, 2, 3)]
    with (out / "summary.1-of-3.csv").open(newline="") as file:
        assert [row["case"] for row in csv.DictReader(file)] == ["scan0", "scan3"]
    # The whole cohort at once finds all of it done.
    results = segment_files(job_of([model]), source, out)
    assert len(computed) == 5
    assert [result.case_id for result in results] == [f"scan{number}" for number in range(5)]
    # More jobs than cases: the last has nothing to do.
    assert segment_files(job_of([model], options=SegmentOptions(shard="7/8")), source, out) == []


def test_shard_on_the_command_line(tmp_path, capsys):
    source, model = scans(tmp_path / "in", 3), save_untrained(tmp_path / "model")
    words = ["segment", str(source), str(tmp_path / "out"), "--model", str(model)]
    assert main([*words, "--shard", "2/2"]) == 0
    assert "1 of 1 cases segmented" in capsys.readouterr().out
    for shard in ("0/2", "3/2", "x", "1/0", "1/2/3"):
        assert main([*words, "--shard", shard]) == 2
        assert f"--shard {shard}: must be i/n with i from 1 to n" in capsys.readouterr().err


def test_options_check_their_shard():
    assert SegmentOptions().part() == (1, 1)
    assert SegmentOptions(shard="2/8").part() == (2, 8)
    with pytest.raises(ConfigError, match="--shard 9/8"):
        SegmentOptions(shard="9/8").part()


def test_a_status_in_a_folder_that_is_gone(tmp_path):
    with pytest.raises(FileError, match="cannot write"):
        append_status(tmp_path / "none" / "status.jsonl", CaseStatus(case="a", state="failed", key=""))


def test_voxels_beside_a_header_count_too(tmp_path):
    """A .mhd is a header; what it says where the voxels are belongs to the scan."""
    fields = "ObjectType = Image", "NDims = 3", "DimSize = 2 2 2", "ElementType = MET_UCHAR", "ElementDataFile = a.raw"
    (tmp_path / "a.mhd").write_text("\n".join(fields))
    digests = set()
    for content in (b"12345678", b"87654321"):
        (tmp_path / "a.raw").write_bytes(content)
        digests.add(case_digest(Case("a", "a", (tmp_path / "a.mhd",))))
    assert len(digests) == 2
    (tmp_path / "a.raw").unlink()
    assert case_digest(Case("a", "a", (tmp_path / "a.mhd",))) == ""


@pytest.mark.parametrize("name", ["mask_qc.json", "mask_manifest.json"])
def test_files_of_others_beside_a_mask_are_not_overwritten(tmp_path, name):
    write_nifti(tmp_path / "a.nii.gz", phantom(0)[0][0])
    (tmp_path / name).write_text('{"mine": 1}')
    model = saved_model(tmp_path / "model")
    with pytest.raises(FileError, match=f"{name} is in the way"):
        segment_files(job_of([model]), tmp_path / "a.nii.gz", tmp_path / "mask.nii.gz")
    assert (tmp_path / name).read_text() == '{"mine": 1}'
    (tmp_path / name).unlink()
    for _ in range(2):  # ours are replaced
        segment_files(job_of([model]), tmp_path / "a.nii.gz", tmp_path / "mask.nii.gz")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_text("[]")
    with pytest.raises(FileError, match=r"already holds manifest\.json"):
        segment_files(job_of([model]), scans(tmp_path / "in", 1), tmp_path / "out")
