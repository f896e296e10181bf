"""The file `status.jsonl`: what became of each case, a line each, so that a second run does only what is left.

A case is done if its input, the weights and the settings are what they were, and its mask is as it was written. Each
part of a cohort (`--shard`) has a file of its own.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from tokenseg.config import Settings
from tokenseg.datasets.cases import Case
from tokenseg.errors import FileError
from tokenseg.imaging.dicom_files import DicomFile
from tokenseg.imaging.formats import voxel_files

_CHUNK_BYTES = 1 << 22


class CaseStatus(Settings):
    """One line."""

    case: str
    """A hash of its name, or the name where names were asked for."""
    state: Literal["done", "failed"]
    key: str
    """Fingerprint of input, weights and settings; empty where the input could not be read. Where the mask of an earlier
    call stays, it is that mask's, as are the next two."""
    input_sha256: str = ""
    """Over the content of its files."""
    mask_sha256: str = ""
    shape_vox: tuple[int, ...] = ()
    """Of the scan as stored."""
    affine: tuple[tuple[float, ...], ...] = ()
    """From voxel indices to mm in RAS+ world coordinates."""
    plan_shape_vox: tuple[int, ...] = ()
    """On the plan's grid, along RAS+."""
    slabs: int = 0
    """In how many slabs it was computed, which does not show in the mask."""
    volumes_ml: dict[str, float] = Field(default_factory=dict)
    windows_run: int = 0
    windows_full: int = 0
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    error: str = ""
    seconds: dict[str, float] = Field(default_factory=dict)
    """By stage."""
    peak_mib: float | None = None
    """Highest memory of the process up to then; None where the system does not tell."""


def read_statuses(folder: Path) -> dict[str, CaseStatus]:
    """The newest status of each case, of all parts; lines that a killed process left unfinished are passed over."""
    newest: dict[str, CaseStatus] = {}
    for path in sorted(folder.glob("status*.jsonl"), key=lambda path: path.stat().st_mtime):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                status = CaseStatus.model_validate_json(line)
            except ValidationError:
                continue
            newest[status.case] = status
    return newest


def append_status(path: Path, status: CaseStatus) -> None:
    """Add a line and have it on disk before the next case begins.

    Raises:
        FileError: It cannot be written.
    """
    try:
        with path.open("a+b") as file:
            ends_whole = file.tell() == 0 or _last_byte(path) == b"\n"
            file.write((b"" if ends_whole else b"\n") + status.model_dump_json().encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise FileError(f"cannot write {path}: {error.strerror or error}") from error


def current_mask(status: CaseStatus | None, key: str, places: Iterable[Path]) -> Path | None:
    """The mask of a case that need not be done again, in one of the places where it may be; else None."""
    if status is None or status.state != "done" or not key or status.key != key:
        return None
    for mask in places:
        if mask.is_file() and file_digest([DicomFile(mask)]) == status.mask_sha256:
            return mask
    return None


def case_digest(case: Case) -> str:
    """SHA-256 over the content of a case's files; empty where one cannot be read."""
    files = [DicomFile(path) for image in case.images for path in voxel_files(image)]
    if case.exam is not None:
        files = list(case.exam.files)  # damaged ones too: a study that another file came to is another study
    try:
        return file_digest(files)
    except FileError:
        return ""


def case_key(case: Case, content: str, settings: Iterable[str]) -> str:
    """Fingerprint of a case's content and of all else that its mask depends on; empty where there is no content."""
    if not content:
        return ""
    return hashlib.sha256("\n".join([content, *case.channels, *settings]).encode()).hexdigest()


def file_digest(files: Iterable[DicomFile]) -> str:
    """SHA-256 over the content of files, in their order.

    Raises:
        FileError: One cannot be read.
    """
    digest = hashlib.sha256()
    for file in files:
        with file.opened() as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()


def peak_mib() -> float | None:
    """Highest resident memory of this process so far; None on Windows."""
    if sys.platform == "win32":  # pragma: no cover - windows
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1 << 20 if sys.platform == "darwin" else 1 << 10), 1)


def _last_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1)
