"""Files are written whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tokenseg.errors import FileError
from tokenseg.files import (
    check_writable,
    remove_leftovers,
    remove_leftovers_of,
    replaced_on_success,
    temporary_beside,
    write_atomically,
)


def test_writes_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write_atomically(path, b"first")
    assert path.read_bytes() == b"first"
    write_atomically(path, b"second")
    assert path.read_bytes() == b"second"
    assert os.listdir(tmp_path) == ["a.bin"]  # noqa: PTH208


def test_missing_folders_are_made(tmp_path: Path) -> None:
    path = tmp_path / "x" / "y" / "a.txt"
    write_atomically(path, b"")
    assert path.read_bytes() == b""


def test_old_content_stays_when_the_writer_fails(tmp_path: Path) -> None:
    path = tmp_path / "mask.nii.gz"
    write_atomically(path, b"old")

    def fail_halfway() -> None:
        with replaced_on_success(path) as temporary:
            temporary.write_bytes(b"half of the n")
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        fail_halfway()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_shows_under_the_name_before_the_end(tmp_path: Path) -> None:
    path = tmp_path / "mask.nii.gz"
    with replaced_on_success(path) as temporary:
        temporary.write_bytes(b"new")
        assert not path.exists()
        assert temporary.parent == tmp_path
        assert temporary.name.endswith(".nii.gz")
        assert temporary.name.startswith(".")
    assert list(tmp_path.iterdir()) == [path]


def test_full_disk_is_said_and_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write_atomically(path, b"old")

    def run_out_of_space() -> None:
        with replaced_on_success(path) as temporary:
            temporary.write_bytes(b"x")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(FileError) as caught:
        run_out_of_space()
    assert str(caught.value) == f"cannot write {path}: No space left on device; nothing was changed there"
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_writer_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    with (
        pytest.raises(FileError, match=r"cannot write .*a\.bin: No such file or directory; nothing was changed there"),
        replaced_on_success(path),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_bytes(b"in the way")
    path = blocker / "below" / "a.bin"
    with pytest.raises(FileError) as caught:
        write_atomically(path, b"x")
    assert str(caught.value) == f"cannot write {path}: Not a directory; nothing was changed there"
    assert blocker.read_bytes() == b"in the way"


def test_a_folder_in_place_of_the_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "taken"
    (path / "inside").mkdir(parents=True)
    with pytest.raises(FileError, match=r"cannot write .*taken: Is a directory; nothing was changed there"):
        write_atomically(path, b"x")
    assert (path / "inside").is_dir()
    assert list(tmp_path.iterdir()) == [path]


def test_leftovers_of_one_file_are_removed_and_no_others(tmp_path: Path) -> None:
    odd, other = tmp_path / "scan[1]_seg.dcm", tmp_path / "scan1_seg.dcm"
    left = [temporary_beside(path) for path in (odd, other)]
    for path in (odd, other, *left):
        path.write_text("x")
    remove_leftovers_of(odd)
    assert sorted(tmp_path.iterdir()) == sorted([odd, other, left[1]])


def test_leftovers_of_a_killed_process_are_removed_and_nothing_else(tmp_path: Path) -> None:
    stale = temporary_beside(tmp_path / "state.safetensors")
    assert stale.name.endswith("-state.safetensors")
    stale.write_text("half")
    folder = temporary_beside(tmp_path / "model")
    (folder / "below").mkdir(parents=True)
    (tmp_path / f".old{folder.name}").mkdir()
    (tmp_path / "state.safetensors").write_text("whole")
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["state.safetensors"]


def test_trying_to_write_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    for folder in (tmp_path / "new" / "run", tmp_path / "old"):
        check_writable(folder, folder)
    assert [path.name for path in tmp_path.rglob("*")] == ["old"]
