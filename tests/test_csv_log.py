from __future__ import annotations

import csv
import resource
from pathlib import Path

import pytest

from tokenseg.errors import FileError
from tokenseg.training.csv_log import COLUMNS, CsvLog, read_log


def write_rows(path: Path, *steps: int, resume_step: int = 0, **values: float) -> None:
    log = CsvLog(path, resume_step)
    for step in steps:
        log.write({"step": step, "loss": 1 / step, **values})
    log.close()


def steps(path: Path) -> list[int]:
    return [int(row["step"]) for row in read_log(path)]


def test_the_file_is_plain_csv_with_seven_digits(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    write_rows(path, 3, learning_rate=0.00012345678)
    header, row = list(csv.reader(path.read_text().splitlines()))
    assert header == list(COLUMNS)
    assert dict(zip(header, row, strict=True)) == dict.fromkeys(COLUMNS, "") | {
        "step": "3",
        "loss": "0.3333333",
        "learning_rate": "0.0001234568",
    }


def test_each_row_is_on_disk_at_once(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    log = CsvLog(path)
    for step in (1, 2):
        log.write({"step": step, "loss": 0.5})
        assert steps(path)[-1] == step
    log.close()


def test_a_new_run_starts_a_new_file(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    write_rows(path, 1, 2)
    write_rows(path, 1)
    assert steps(path) == [1]


def test_a_resumed_run_drops_the_steps_that_run_again(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    write_rows(path, 1, 2, 3, 4, 5)
    before = path.read_text().splitlines()
    write_rows(path, 4, resume_step=3)
    assert steps(path) == [1, 2, 3, 4]
    assert path.read_text().splitlines()[:4] == before[:4]


@pytest.mark.parametrize("tail", ["4,0.25", "4,0.25\n", "4,0.25,,,,,,,,,,9,9\n", "4", "\n", "garbage\n"])
def test_a_row_that_a_kill_cut_short_is_left_out(tmp_path: Path, tail: str) -> None:
    path = tmp_path / "log.csv"
    write_rows(path, 1, 2, 3)
    with path.open("a") as file:
        file.write(tail)
    assert steps(path) == [1, 2, 3]
    write_rows(path, 4, resume_step=3)
    assert steps(path) == [1, 2, 3, 4]
    assert all(len(row) == len(COLUMNS) for row in csv.reader(path.read_text().splitlines()))


@pytest.mark.parametrize("content", ["", "step,loss", "something else\n1\n"])
def test_a_file_without_usable_rows_counts_as_empty(tmp_path: Path, content: str) -> None:
    path = tmp_path / "log.csv"
    path.write_text(content)
    assert read_log(path) == []
    write_rows(path, 8, resume_step=7)
    assert steps(path) == [8]


@pytest.mark.parametrize("content", [None, b"\xff\xfe\n"])
def test_an_unreadable_file_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "log.csv"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(FileError, match=r"log .*log\.csv cannot be read: .*; move it away and resume"):
        CsvLog(path)


def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(FileError, match=r"cannot write .*log\.csv: File exists"):
        CsvLog(tmp_path / "run" / "log.csv")


def test_a_full_disk_is_said_once(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    log = CsvLog(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size, hard))
    try:
        with pytest.raises(FileError, match=r"cannot write .*log\.csv: File too large"):
            log.write({"step": 1})
        log.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
