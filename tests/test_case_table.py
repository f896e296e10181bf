"""Cohorts by a table of cases, and what overlaps in a cohort."""

from __future__ import annotations

import csv
import json
import threading
import time
import weakref
import zipfile

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tokenseg.segmentation.stages
from dicom_phantoms import write_series
from phantoms import phantom, write_nifti
from plans import make_plan
from tokenseg.cli import main
from tokenseg.datasets.case_table import read_case_table
from tokenseg.datasets.inputs import read_input
from tokenseg.errors import DataError, FileError
from tokenseg.imaging.volume import read_mask
from tokenseg.segmentation.segment import segment_files
from toy_models import Toy, as_stored, job_of, nearest_level, save_untrained, toy_model, untrained

ONE = make_plan(labels=1)
TWO = make_plan(channels=2, labels=1)
DCE = TWO.model_copy(
    update={"channels": ("phase1", "phase1 - phase0"), "source_channels": ("phase0", "phase1"), "joint_zscore": True}
)
NAME = "DOE^JANE"


def write_table(path, *rows: tuple[str, ...]):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def test_cases_from_anywhere(tmp_path):
    here = write_nifti(tmp_path / "a" / "scan.nii.gz", phantom(0)[0][0])
    write_nifti(tmp_path / "tables" / "near.nii", phantom(1)[0][0])
    write_series(tmp_path / "study")
    table = write_table(
        tmp_path / "tables" / "cohort.csv",
        ("case", "image", "note"),
        ("z", str(here), "x"),
        ("b", "near.nii", ""),
        ("d", "../study", ""),
    )
    cases = read_case_table(table, ONE)
    assert [case.case_id for case in cases] == ["z", "b", "d"]
    np.testing.assert_array_equal(read_input(cases[0], ONE).array[0], phantom(0)[0][0].astype(np.float32))
    assert cases[2].exam is not None
    model = save_untrained(tmp_path / "model")
    assert main(["segment", str(table), str(tmp_path / "out"), "--model", str(model)]) == 0
    assert {"z.nii.gz", "b.nii", "d_seg.dcm"} <= {path.name for path in (tmp_path / "out").iterdir()}
    assert len((tmp_path / "out" / "status.jsonl").read_text().splitlines()) == 3


def test_a_column_a_channel_by_name(tmp_path):
    for number in range(2):
        write_nifti(tmp_path / f"{number}.nii.gz", phantom(number)[0][0])
    table = write_table(tmp_path / "t.csv", ("C1", "case", "c0"), ("1.nii.gz", "a", "0.nii.gz"))
    (case,) = read_case_table(table, TWO)
    volume = read_input(case, TWO)
    order = [volume.channels.index(name) for name in ("c0", "c1")]
    for number, row in enumerate(order):
        np.testing.assert_array_equal(volume.array[row], phantom(number)[0][0].astype(np.float32))


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([("case",), ("a",)], "it needs `case`, and `image` or one a channel: c0"),
        ([("image",), ("a.nii",)], "it needs `case`"),
        ([("case", "image")], "lists no case"),
        ([("case", "image"), ("a", "")], r"cells are empty in line\(s\) 2"),
        ([("case", "image"), ("a", "x.nii"), ("a", "y.nii")], "case ids must be unique"),
        ([("case", "image"), ("../a", "x.nii")], "must be usable as file names"),
        ([("case", "image"), ("a", "x.nii", "y")], r"line\(s\) 2 have more cells than the header"),
        ([("case", "image"), (), ("", ""), ("a\n", "x.nii"), ("b", "")], r"cells are empty in line\(s\) 6"),
        ([("case", "image"), ("", "")], "lists no case"),
        ([("case", "image", "image"), ("a", "x.nii", "y.nii")], "more than one column image; rename or remove"),
        ([("case", "c0", "C0"), ("a", "x.nii", "y.nii")], "more than one column c0"),
        ([("case;image",), ("a;x.nii",)], "separates its columns by semicolons; save it as CSV with commas"),
        ([("case\timage",), ("a\tx.nii",)], "by tabs"),
        ([()], r"has the columns \(none\)"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path, rows, reason):
    with pytest.raises(DataError, match=reason):
        read_case_table(write_table(tmp_path / "t.csv", *rows), ONE)


def test_what_spreadsheets_write(tmp_path):
    """A mark at the beginning, capitals in the name, columns without a name, and rows without content."""
    write_nifti(tmp_path / "a.nii.gz", phantom(0)[0][0])
    table = tmp_path / "T.CSV"
    table.write_bytes(b"\xef\xbb\xbfcase,image,,\r\n a , a.nii.gz ,,\r\n\r\n,,,\r\n,\r\n")
    (result,) = segment_files(job_of([toy_model(nearest_level(2), as_stored(ONE))]), table, tmp_path / "out")
    assert result.mask == tmp_path / "out" / "a.nii.gz"


def test_all_phases_of_a_table_are_taken(tmp_path):
    rows = [("case", "phase0", "phase1", "phase2", "phase3"), ("a", "0", "1", "2", "3"), ("b", "0", "1", "2", "")]
    cases = read_case_table(write_table(tmp_path / "t.csv", *rows), DCE)
    assert [case.channels for case in cases] == [rows[0][1:], rows[0][1:4]]
    assert [[path.name for path in case.images] for case in cases] == [["0", "1", "2", "3"], ["0", "1", "2"]]


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([("case", "phase0", "phase1", "phase3"), ("a", "0", "1", "3")], "has the column phase3 and none phase2"),
        ([("case", "phase0", "phase1", "phase02"), ("a", "0", "1", "2")], "has the column phase02 and none phase2"),
        ([("case", "phase0", "phase1", "phase2", "phase3"), ("a", "0", "1", "", "3")], r"empty in line\(s\) 2"),
        ([("case", "phase0", "phase1", "phase2"), ("a", "0", "", "")], r"empty in line\(s\) 2"),
        ([("case", "phase0", "phase2"), ("a", "0", "2")], "one a channel: phase0, phase1"),
    ],
)
def test_phases_without_gaps(tmp_path, rows, reason):
    with pytest.raises(DataError, match=reason):
        read_case_table(write_table(tmp_path / "t.csv", *rows), DCE)


def test_what_is_no_table(tmp_path):
    (tmp_path / "t.csv").write_bytes(b"case,image\n\xff\xfe\x00")
    with pytest.raises(FileError, match="cannot be read as a table"):
        read_case_table(tmp_path / "t.csv", ONE)


def test_a_missing_file_fails_alone(tmp_path):
    write_nifti(tmp_path / "a.nii.gz", phantom(0)[0][0])
    missing = ("gone", "none.nii.gz"), ("lost", "study/exam7")
    table = write_table(tmp_path / "t.csv", ("case", "image"), *missing, ("a", "a.nii.gz"))
    model = toy_model(nearest_level(2), as_stored(ONE))
    gone, lost, done = segment_files(job_of([model]), table, tmp_path / "out")
    assert gone.error == f"{tmp_path / 'none.nii.gz'} does not exist; check the path"
    assert lost.error == f"{tmp_path / 'study/exam7'} does not exist; check the path"
    assert done.mask == tmp_path / "out" / "a.nii.gz"


def damaged_study(root):
    """A folder that holds one broken file, deep in it."""
    path = write_series(root / NAME)[1]
    path.write_bytes(path.read_bytes()[:300])
    return root


def damaged_archive(root):
    damaged_study(root)
    with zipfile.ZipFile(root.with_suffix(".zip"), "w") as archive:
        for path in sorted(root.rglob("IM*")):
            archive.write(path, path.relative_to(root))
    return root.with_suffix(".zip")


def two_studies(root):
    write_series(root / "one")
    write_series(root / "two")
    return root


def no_study(root):
    return write_nifti(root / "scan.nii.gz", phantom(0)[0][0]).parent


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (damaged_study, "export it again"),
        (damaged_archive, "export it again"),
        (two_studies, "holds 2 DICOM studies; name the folder of one"),
        (no_study, "is a folder without DICOM images; name a file"),
        (lambda root: root / ("x" * 300), "a path that none can be; correct its line"),
    ],
)
def test_a_bad_row_fails_alone_and_tells_no_name(tmp_path, make, reason):
    write_nifti(tmp_path / "a.nii.gz", phantom(0)[0][0])
    bad = make(tmp_path / f"{NAME} 1970")
    table = write_table(tmp_path / "t.csv", ("case", "image"), ("bad", str(bad)), ("a", "a.nii.gz"))
    failed, done = segment_files(job_of([toy_model(nearest_level(2), as_stored(ONE))]), table, tmp_path / "out")
    assert reason in failed.error
    assert done.mask == tmp_path / "out" / "a.nii.gz"
    told = (tmp_path / "out" / "status.jsonl").read_text()
    assert reason in told
    assert NAME not in told
    assert str(tmp_path) not in told


# ---- overlap


def test_the_next_scan_is_read_while_one_is_computed_and_written(tmp_path, monkeypatch):
    """Each step waits until its neighbour has begun: without overlap this would never end."""
    for number in range(3):
        write_nifti(tmp_path / "in" / f"{number}.nii.gz", phantom(number)[0][0])
    reading = [threading.Event() for _ in range(3)]
    read = tokenseg.segmentation.stages.read_input

    def note_reading(case, plan):
        reading[int(case.case_id)].set()
        return read(case, plan)

    computed = []

    def wait_for_next(images: torch.Tensor) -> torch.Tensor:
        number = len(computed)
        computed.append(number)
        assert number == 2 or reading[number + 1].wait(timeout=60)
        return torch.cat([0 * images, images - 50], dim=1)

    monkeypatch.setattr(tokenseg.segmentation.stages, "read_input", note_reading)
    plan = as_stored(ONE, whole_limit_vox=(64, 64, 64))
    results = segment_files(job_of([toy_model(Toy(wait_for_next), plan)]), tmp_path / "in", tmp_path / "out")
    assert [result.case_id for result in results] == ["0", "1", "2"]
    assert all(read_mask(result.mask).array.shape == (24, 24, 24) for result in results)
    states = [json.loads(line)["state"] for line in (tmp_path / "out" / "status.jsonl").read_text().splitlines()]
    assert states == ["done"] * 3


def test_a_slow_writer_holds_nothing_up_but_itself(tmp_path, monkeypatch):
    for number in range(2):
        write_nifti(tmp_path / "in" / f"{number}.nii.gz", phantom(number)[0][0])
    write, second = tokenseg.segmentation.stages.write_output, threading.Event()

    def slow(target, *rest):
        if target.name.startswith("0"):
            assert second.wait(timeout=60)
        return write(target, *rest)

    def answer(images: torch.Tensor) -> torch.Tensor:
        if answer.calls:
            second.set()
        answer.calls += 1
        return torch.cat([0 * images, images - 50], dim=1)

    answer.calls = 0
    monkeypatch.setattr(tokenseg.segmentation.stages, "write_output", slow)
    plan = as_stored(ONE, whole_limit_vox=(64, 64, 64))
    started = time.monotonic()
    results = segment_files(job_of([toy_model(Toy(answer), plan)]), tmp_path / "in", tmp_path / "out")
    assert [result.error for result in results] == ["", ""]
    assert time.monotonic() - started < 60


@pytest.mark.parametrize(("failures", "notes"), [(1, 1), (2, 2)])
def test_a_gpu_without_memory_ends_on_the_cpu_and_says_so(tmp_path, failures, notes):
    write_nifti(tmp_path / "in" / "a.nii.gz", phantom(0)[0][0])

    held = []

    def answer(images: torch.Tensor) -> torch.Tensor:
        assert all(reference() is None for reference in held), "what a failed pass had made is gone"
        answer.calls += 1
        if answer.calls <= failures:
            made = 2 * images
            held.append(weakref.ref(made))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.cat([0 * images, images - 50], dim=1)

    answer.calls = 0
    plan = as_stored(ONE, whole_limit_vox=(64, 64, 64))
    (result,) = segment_files(job_of([toy_model(Toy(answer), plan)]), tmp_path / "in", tmp_path / "out")
    assert result.mask is not None
    told = json.loads((tmp_path / "out" / "status.jsonl").read_text())["notes"]
    assert len(told) == notes
    assert told[0].startswith("the GPU ran out of memory: once more")
    assert notes == 1 or told[1] == "the GPU ran out of memory again: on the CPU"


class FullGpu(TorchDispatchMode):
    """Nothing is left: tensors may be looked at, and moved away, but no new one made."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket not in (torch.ops.aten.detach, torch.ops.aten.alias, torch.ops.aten._to_copy):
            raise torch.OutOfMemoryError(f"CUDA out of memory: {func}")
        return func(*args, **kwargs or {})


def test_moving_to_the_cpu_needs_nothing_on_a_full_gpu():
    model = untrained()
    with FullGpu():
        moved = tokenseg.segmentation.stages._on_cpu(model)
    images = torch.randn(1, 1, 16, 16, 16)
    with torch.inference_mode():
        assert torch.equal(moved.network(images).logits, model.network(images).logits)
    assert moved.network is not model.network
    names = [{name for name, _ in network.named_parameters()} for network in (moved.network, model.network)]
    assert names[0] == names[1]
