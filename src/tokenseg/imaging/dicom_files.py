"""DICOM files, in nested folders or a zip archive: finding them, and reading what is in one.

Nothing is unpacked to disk, and of an archive no more is read than it declares. What cannot be read is never passed
over: it might be the end of a scan.
"""
# pydicom's functions carry few types:
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import lzma
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from io import BufferedIOBase
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

from tokenseg.errors import ConfigError, FileError
from tokenseg.files import check_no_device

if TYPE_CHECKING:
    from pydicom import Dataset

MAX_MEMBER_BYTES = 1 << 31
"""Largest DICOM file in an archive; an enhanced exam of 500 frames of 512 x 512 takes an eighth."""

MAX_UNPACKED, SMALL_BYTES = 200, 1 << 26
"""Times its own size that an archive may hold, and what any may; scans are packed to a half, blank ones to less."""

_MARK = b"DICM"
_MARK_AT = 128
_DIRECTORY_CLASS = "1.2.840.10008.1.3.10"
_DEFLATED_SYNTAX = "1.2.840.10008.1.2.1.99"
_BROKEN_MEMBER = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError)
_UNREADABLE_MEMBER = (NotImplementedError, RuntimeError, ValueError, struct.error)
"""What opening a member raises: an unknown compression, a password, a directory that says what cannot be."""


@dataclass(frozen=True, slots=True)
class DicomFile:
    """One DICOM file: on disk, or a member of a zip archive."""

    path: Path
    member: str = ""
    archive: zipfile.ZipFile | None = field(default=None, compare=False, repr=False)
    """Open, for a member; opening it anew for each would read its directory each time."""

    def __str__(self) -> str:
        return f"{self.path}/{self.member}" if self.member else str(self.path)

    @contextmanager
    def opened(self) -> Iterator[BufferedIOBase]:
        """Open it for reading, seekable.

        Raises:
            FileError: It cannot be read.
        """
        try:
            with self._stream() as stream:
                yield stream
        except OSError as error:
            raise FileError(f"{self} cannot be read: {error.strerror or error}; check the path") from error
        except _BROKEN_MEMBER as error:
            raise FileError(f"{self} is damaged ({error}); copy it again") from error

    def _stream(self) -> BufferedIOBase:
        if self.archive is None:
            check_no_device(self.path)
            return self.path.open("rb")
        try:
            return cast("BufferedIOBase", self.archive.open(self.member))
        except _UNREADABLE_MEMBER as error:
            raise FileError(f"{self} cannot be read ({error}); unpack the archive and give the folder") from error


class Damaged(NamedTuple):
    """A file that cannot be read, and why."""

    file: DicomFile
    problem: str


def find_dicom(root: Path) -> tuple[list[DicomFile], list[Damaged]]:
    """All DICOM files of a folder and the folders in it, of a zip archive, or one file; sorted by name.

    A file counts by its content, whatever it is called; others are passed over. Links are followed, each folder once.
    Damaged is what cannot be read, is called .dcm and is none, or is cut off within the first 132 bytes.

    Raises:
        FileError: A folder or the archive cannot be read.
    """
    if root.is_dir():
        files = [DicomFile(path) for path in _files_below(root)]
    elif zipfile.is_zipfile(root):
        files = _members(root)
    else:
        files = [DicomFile(root)]
    # A pipe or a device would wait for ever.
    starts: dict[DicomFile, bytes] = {}
    damaged: list[Damaged] = []
    for file in files:
        if file.member or file.path.is_file():
            with noted(file, damaged):
                starts[file] = _start(file)
    found = [file for file, start in starts.items() if start[_MARK_AT:] == _MARK]
    folders = {_folder(file) for file in found}
    for file, start in starts.items():
        with noted(file, damaged):
            _check_no_dicom(file, start, among_dicom=_folder(file) in folders)
    return found, damaged


@contextmanager
def noted(file: DicomFile, damaged: list[Damaged]) -> Iterator[None]:
    """Note a file that cannot be read, and go on."""
    try:
        yield
    except FileError as error:
        damaged.append(Damaged(file, str(error)))


def folders_below(root: Path, file: DicomFile) -> tuple[str, ...]:
    """Names of the folders from what was given down to a file; of an archive, those in it."""
    return (Path(file.member) if file.member else file.path.relative_to(root)).parent.parts


def may_be_dicom(path: Path) -> bool:
    """Whether to look for DICOM: a folder, a zip archive, or a file with its mark."""
    return path.is_dir() or zipfile.is_zipfile(path) or _start(DicomFile(path))[_MARK_AT:] == _MARK


def paths_in_text(path: Path, text: str) -> list[str]:
    """What a message about a folder or a zip archive names below it: files, folders on the way, members."""
    named: list[str] = []
    with suppress(OSError, *_BROKEN_MEMBER, *_UNREADABLE_MEMBER):
        if not path.is_dir():
            with zipfile.ZipFile(path) as archive:
                return [name for name in archive.namelist() if name in text]
        # A step down at a time; each makes what was found longer, so links that loop do not matter.
        while below := [each for each in path.iterdir() if str(each) in text]:
            path = max(below, key=lambda each: len(each.name))
            named.append(str(path))
    return named


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
            if _syntax(stream) == _DEFLATED_SYNTAX:  # pydicom would inflate it to any size
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


def _syntax(stream: BufferedIOBase) -> str:
    """Transfer syntax, from the file's first group alone."""
    from pydicom.filereader import read_dataset as parse

    stream.seek(_MARK_AT + len(_MARK))
    meta = parse(stream, False, True, stop_when=lambda tag, *_: tag >> 16 != 2)  # type: ignore[arg-type]
    return str(meta.get("TransferSyntaxUID", ""))


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
    visited = set[tuple[int, int]]()
    # Not by recursion: folders may be nested deeper than Python calls.
    waiting = [root]
    while waiting:
        path = waiting.pop()
        try:
            if not path.is_dir():
                yield path
                continue
            facts = path.stat()
            if (facts.st_dev, facts.st_ino) in visited:
                continue
            visited.add((facts.st_dev, facts.st_ino))
            waiting += sorted((each for each in path.iterdir() if not each.name.startswith(".")), reverse=True)
        except OSError as error:
            raise FileError(
                f"folder {path} cannot be read: {error.strerror or error}; check its permissions"
            ) from error


def _members(archive_path: Path) -> list[DicomFile]:
    try:
        archive = zipfile.ZipFile(archive_path)
    except (OSError, *_BROKEN_MEMBER, *_UNREADABLE_MEMBER) as error:
        raise FileError(f"{archive_path} is not an intact zip archive ({error}); copy it again") from error
    members = sorted(archive.infolist(), key=lambda member: member.filename)
    # macOS puts a second, hidden file beside each.
    members = [each for each in members if not _is_hidden(each.filename)]
    large = [member.filename for member in members if member.file_size >= MAX_MEMBER_BYTES]
    if large:
        raise FileError(f"{archive_path} has a member of 2 GiB or more ({large[0]}); unpack it and give the folder")
    num_bytes = sum(member.file_size for member in members)
    if num_bytes > max(SMALL_BYTES, MAX_UNPACKED * archive_path.stat().st_size):
        raise FileError(
            f"{archive_path} would be {num_bytes >> 20} MiB unpacked, over {MAX_UNPACKED} times its size; "
            "unpack it and give the folder"
        )
    return [DicomFile(archive_path, member.filename, archive) for member in members if not member.is_dir()]


def _check_no_dicom(file: DicomFile, start: bytes, *, among_dicom: bool) -> None:
    """Refuse what has no mark of DICOM and must have had one."""
    if start[_MARK_AT:] == _MARK:
        return
    named_so = (file.member or file.path.name).lower().endswith(".dcm")
    cut_off = 0 < len(start) < _MARK_AT + len(_MARK) and not any(start[:_MARK_AT])
    if named_so or cut_off:
        raise FileError(f"{file} is truncated, or not DICOM although it is named so; copy it again, or take it out")
    # Empty, zeros, or elements without the preamble before them.
    if among_dicom and (not any(start) or start[:2] in (b"\x02\x00", b"\x08\x00")):
        raise FileError(f"{file} is empty or has lost its beginning, among DICOM files; copy it again, or take it out")


def _is_hidden(name: str) -> bool:
    return any(part.startswith((".", "__MACOSX")) and part != ".." for part in Path(name).parts)


def _folder(file: DicomFile) -> Path:
    return Path(file.member).parent if file.member else file.path.parent


def _start(file: DicomFile) -> bytes:
    with file.opened() as stream:
        return stream.read(_MARK_AT + len(_MARK))


def _reason(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
