"""DICOM files, in nested folders or a zip archive: finding them, and reading what is in one.

Nothing is unpacked to disk, links to folders are not followed, and of an archive no more is read than it declares.
"""
# pydicom's functions carry few types:
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import os
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from tokenseg.errors import ConfigError, FileError

if TYPE_CHECKING:
    from pydicom import Dataset

MAX_MEMBER_BYTES = 1 << 31
"""Largest DICOM file in an archive; an enhanced exam of 500 frames of 512 x 512 takes an eighth."""

_MARK = b"DICM"
_MARK_AT = 128
_DIRECTORY_CLASS = "1.2.840.10008.1.3.10"
_DEFLATED_SYNTAX = b"1.2.840.10008.1.2.1.99"
_META_BYTES = 2048
"""The transfer syntax stands within these first bytes."""
_BROKEN_ZIP = (zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True, slots=True)
class DicomFile:
    """One DICOM file: on disk, or a member of a zip archive."""

    path: Path
    member: str = ""

    def __str__(self) -> str:
        return f"{self.path}/{self.member}" if self.member else str(self.path)

    @contextmanager
    def opened(self) -> Iterator[BinaryIO]:
        """Open it for reading, seekable.

        Raises:
            FileError: It cannot be read.
        """
        try:
            if self.member:
                with zipfile.ZipFile(self.path) as archive, archive.open(self.member) as stream:
                    yield stream  # type: ignore[misc]
            else:
                with self.path.open("rb") as stream:
                    yield stream
        except OSError as error:
            raise FileError(f"{self} cannot be read: {error.strerror or error}; check the path") from error
        except _BROKEN_ZIP as error:
            raise FileError(f"{self} is damaged ({error}); copy it again") from error


def find_dicom(root: Path) -> list[DicomFile]:
    """All DICOM files of a folder and the folders in it, of a zip archive, or one file; sorted by name.

    A file counts by its content, whatever it is called; other files are passed over.

    Raises:
        FileError: The path or an archive cannot be read, or an archive has a member of 2 GiB or more.
    """
    if root.is_dir():
        files = [DicomFile(path) for path in _files_below(root)]
    elif zipfile.is_zipfile(root):
        files = _members(root)
    else:
        files = [DicomFile(root)]
    return [file for file in files if _is_dicom(file)]


def may_be_dicom(path: Path) -> bool:
    """Whether to look for DICOM: a folder, a zip archive, or a file with its mark."""
    return path.is_dir() or zipfile.is_zipfile(path) or _is_dicom(DicomFile(path))


def read_dataset(file: DicomFile, tags: Sequence[str] | None = None, *, pixels: bool = False) -> Dataset:
    """Parse one file.

    Args:
        file: Which.
        tags: Keywords of the elements wanted; None reads all.
        pixels: Read the pixels too.

    Raises:
        FileError: It is truncated or damaged.
        ConfigError: pydicom is not installed.
    """
    check_installed()
    from pydicom import dcmread

    try:
        with file.opened() as stream, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom tells on stderr what it forgives
            if _DEFLATED_SYNTAX in stream.read(_META_BYTES):  # pydicom would inflate it to any size
                raise FileError(f"{file} is a deflated DICOM file, which is not read; export it uncompressed")
            stream.seek(0)
            dataset = dcmread(stream, stop_before_pixels=not pixels, specific_tags=None if tags is None else [*tags])
            _decode(dataset, all_elements=tags is not None)
            return dataset
    except (FileError, MemoryError):
        raise
    except Exception as error:  # whatever a parser may raise on bytes that somebody made up
        raise FileError(f"{file} is a damaged DICOM file ({_reason(error)}); copy or export it again") from error


def is_directory_file(dataset: Dataset) -> bool:
    """Whether it is a DICOMDIR, a list of other files."""
    return str(dataset.file_meta.get("MediaStorageSOPClassUID", "")) == _DIRECTORY_CLASS


def check_installed() -> None:
    """Refuse DICOM without its libraries.

    Raises:
        ConfigError: With the line that installs them.
    """
    try:
        import pydicom  # noqa: F401
    except ImportError as error:
        raise ConfigError("DICOM needs the extra 'dicom': pip install 'tokenseg[dicom]'") from error


def _decode(dataset: Dataset, *, all_elements: bool) -> None:
    """Turn bytes into values here, where whatever is wrong with them is caught, and not when they are asked for."""
    for _ in dataset.file_meta:
        pass
    if not dataset.file_meta.TransferSyntaxUID:
        raise ValueError("no transfer syntax")
    if all_elements:
        for _ in dataset.iterall():
            pass


def _files_below(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(folder, name) for name in sorted(names) if not name.startswith("."))


def _members(archive_path: Path) -> list[DicomFile]:
    try:
        with zipfile.ZipFile(archive_path) as archive:
            members = sorted(archive.infolist(), key=lambda member: member.filename)
    except (OSError, NotImplementedError, *_BROKEN_ZIP) as error:
        raise FileError(f"{archive_path} is not an intact zip archive ({error}); copy it again") from error
    large = [member.filename for member in members if member.file_size >= MAX_MEMBER_BYTES]
    if large:
        raise FileError(f"{archive_path} has a member of 2 GiB or more ({large[0]}); unpack it and give the folder")
    if any(member.flag_bits & 1 for member in members):
        raise FileError(f"{archive_path} is encrypted; unpack it and give the folder")
    return [DicomFile(archive_path, member.filename) for member in members if not member.is_dir()]


def _is_dicom(file: DicomFile) -> bool:
    if not file.member and not file.path.is_file():  # a pipe or a device would wait for ever
        return False
    with file.opened() as stream:
        start = stream.read(_MARK_AT + len(_MARK))
    return start[_MARK_AT:] == _MARK


def _reason(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
