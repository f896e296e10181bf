"""DICOM series: what a folder holds, each slice with its place, its time and its rescaling.

A classic file is one frame, an enhanced multi-frame file many; from here on both are frames of a series.
"""
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tokenseg.errors import FileError
from tokenseg.imaging.dicom.grid import Placement
from tokenseg.imaging.dicom_files import Damaged, DicomFile, find_dicom, is_directory_file, noted, read_dataset
from tokenseg.messages import times

if TYPE_CHECKING:
    from pydicom import Dataset

MAX_SIDE = 8192
"""Most rows or columns of a slice; more is a corrupt header."""

PHASE_TAGS = (
    "TemporalPositionIdentifier",
    "TemporalPositionIndex",
    "TriggerTime",
    "NominalCardiacTriggerDelayTime",
    "AcquisitionNumber",
    "FrameAcquisitionDateTime",
    "AcquisitionDateTime",
    "AcquisitionTime",
)
"""Tags that may tell the phases of one series apart, the most telling first."""

PROTOCOL_TAGS = ("EchoTime", "EffectiveEchoTime", "RepetitionTime", "FlipAngle")
"""Numbers that all phases of an exam share."""

_FUNCTIONAL_GROUPS = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
_HEADER_TAGS = (
    *("SOPClassUID", "SeriesInstanceUID", "StudyInstanceUID", "SeriesNumber", "SeriesDescription", "Modality"),
    *("ImageType", "Rows", "Columns", "SamplesPerPixel", "NumberOfFrames", "ImagePositionPatient", "ScanOptions"),
    *("ImageOrientationPatient", "PixelSpacing", "SliceThickness", "SpacingBetweenSlices", "AcquisitionDate"),
    *("RescaleSlope", "RescaleIntercept", "PhotometricInterpretation", "ModalityLUTSequence", "TimezoneOffsetFromUTC"),
    *(*PROTOCOL_TAGS, *PHASE_TAGS, *_FUNCTIONAL_GROUPS),
)
_MOMENT = re.compile(r"(?P<digits>[0-9]{12,14})(\.(?P<fraction>[0-9]{1,6}))?(?P<zone>[+-][0-9]{4})?")
_TIME_GROUPS = (
    *("FrameContentSequence", "CardiacSynchronizationSequence", "MREchoSequence"),
    "MRTimingAndRelatedParametersSequence",
)
_NO_SCANS = ("SEG", "RTSTRUCT", "RTDOSE", "RTPLAN", "SR", "PR", "KO", "REG", "DOC")


class Frame(NamedTuple):
    """One slice of a series."""

    file: DicomFile
    number: int
    """Its number in the file, from 0."""
    placement: Placement | None
    """None where the file does not say where the slice is."""
    slope: float
    intercept: float
    phase_tags: dict[str, str]
    """Those of `PHASE_TAGS` that are there."""
    protocol: tuple[float | None, ...]
    """Values of `PROTOCOL_TAGS`."""
    options: str
    """ScanOptions, such as fat saturation."""
    acquired: datetime | None
    """When; on day 1 of year 1 where only the time is known, None where not even that."""
    fault: str
    """Why its stored values are no plain intensities; empty where they are."""


PLACE_TAGS = "ImagePositionPatient, ImageOrientationPatient or PixelSpacing is missing"


@dataclass(frozen=True, slots=True)
class Series:
    """Frames that share a SeriesInstanceUID."""

    uid: str
    study_uid: str
    number: str
    description: str
    modality: str
    image_type: tuple[str, ...]
    frames: tuple[Frame, ...]

    @property
    def placements(self) -> list[Placement]:
        """Place of each frame that has one."""
        return placements_of(self.frames)

    def __str__(self) -> str:
        """One line of a list to choose from."""
        size = f"{len(self.frames)} slices" + (f" of {times(self.placements[0].size)}" if self.placements else "")
        name = f"series {self.number or '?'}: {self.description or '(no description)'}"
        return f"{name}, {self.modality}, {size}, {self.uid}"


def placements_of(frames: Iterable[Frame]) -> list[Placement]:
    """Place of each frame that has one."""
    return [frame.placement for frame in frames if frame.placement is not None]


def list_series(root: Path) -> tuple[list[Series], list[Damaged]]:
    """All image series below a folder, in a zip archive or in one file, by study and series number; damaged files.

    Segmentations, reports and other objects without slices of a scan are passed over.

    Raises:
        FileError: A folder or the archive cannot be read.
        ConfigError: pydicom is not installed.
    """
    frames: dict[tuple[str, str], list[Frame]] = {}
    heads: dict[tuple[str, str], Dataset] = {}
    found, damaged = find_dicom(root)
    for file in found:
        with noted(file, damaged):
            dataset = read_dataset(file, _HEADER_TAGS)
            if _is_of_a_scan(file, dataset):
                key = _text(dataset, "StudyInstanceUID"), _text(dataset, "SeriesInstanceUID")
                if not all(key):
                    raise FileError(f"{file} does not say which study and series it belongs to; export it again")
                own = list(_frames(file, dataset))
                heads.setdefault(key, dataset)
                frames.setdefault(key, []).extend(own)
    series = [_series(key, heads[key], frames[key]) for key in heads if frames[key]]
    return sorted(series, key=lambda each: (each.study_uid, _as_number(each.number), each.uid)), damaged


def _is_of_a_scan(file: DicomFile, dataset: Dataset) -> bool:
    if is_directory_file(dataset) or _text(dataset, "Modality") in _NO_SCANS:
        return False
    if "Rows" not in dataset:
        _check_no_image(file, dataset)
        return False
    return True


def _check_no_image(file: DicomFile, dataset: Dataset) -> None:
    """Refuse an image without pixels: the file was cut off, which the parser forgives."""
    kind = dataset.file_meta.get("MediaStorageSOPClassUID") or dataset.get("SOPClassUID")
    if kind is None or "Image Storage" in kind.name:
        raise FileError(f"{file} is truncated: it says nothing of its pixels; copy or export it again")


def _series(key: tuple[str, str], dataset: Dataset, frames: Iterable[Frame]) -> Series:
    return Series(
        uid=key[1],
        study_uid=key[0],
        number=_text(dataset, "SeriesNumber"),
        description=_text(dataset, "SeriesDescription"),
        modality=_text(dataset, "Modality"),
        image_type=tuple(str(part).upper() for part in _several(dataset, "ImageType")),
        frames=tuple(frames),
    )


def _frames(file: DicomFile, dataset: Dataset) -> Iterator[Frame]:
    try:
        size = int(dataset.Rows), int(dataset.Columns)
        if not 1 <= min(size) <= max(size) <= MAX_SIDE:
            raise FileError(f"{file} declares {times(size)} pixels; a slice has at most {MAX_SIDE} a side")
        if _samples_per_pixel(file, dataset) != 1:
            return  # colours: a screenshot or a rendered picture
        shared, groups = (dataset.get(name) for name in _FUNCTIONAL_GROUPS)
        levels = [[dataset]] if groups is None else [[own, *(shared or ()), dataset] for own in groups]
        declared = int(dataset.get("NumberOfFrames") or 1)
        if declared > 1 and groups is None and "ImagePositionPatient" not in dataset:
            return  # a film of pictures
        if declared != len(levels):
            raise FileError(f"{file} declares {declared} frames and describes {len(levels)}; export it again")
        for number, frame_levels in enumerate(levels):
            yield _frame(file, number, size, frame_levels)
    except FileError:
        raise
    except (TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise FileError(f"{file} has values that are none ({error}); export it again") from error


def _samples_per_pixel(file: DicomFile, dataset: Dataset) -> int:
    samples = int(dataset.get("SamplesPerPixel") or 1)
    if samples not in (1, 3, 4):
        raise FileError(f"{file} declares {samples} values a pixel; export it again")
    return samples


def _frame(file: DicomFile, number: int, size: tuple[int, int], levels: list[Dataset]) -> Frame:
    """Make a frame from its own description, that of all frames, and the file's, the nearest first."""
    slope = _find(levels, "PixelValueTransformationSequence", "RescaleSlope")
    intercept = _find(levels, "PixelValueTransformationSequence", "RescaleIntercept")
    found = {name: _find_in(levels, _TIME_GROUPS, name) for name in (*PHASE_TAGS, *PROTOCOL_TAGS)}
    return Frame(
        file=file,
        number=number,
        placement=_placement(levels, size),
        slope=1.0 if slope is None else float(slope),
        intercept=0.0 if intercept is None else float(intercept),
        phase_tags={name: str(found[name]) for name in PHASE_TAGS if found[name] is not None},
        protocol=tuple(_float_or_none(found[name]) for name in PROTOCOL_TAGS),
        options=_text(levels[-1], "ScanOptions"),
        acquired=_acquired(levels),
        fault=_fault(levels[-1]),
    )


def _placement(levels: list[Dataset], size: tuple[int, int]) -> Placement | None:
    position = _find(levels, "PlanePositionSequence", "ImagePositionPatient")
    orientation = _find(levels, "PlaneOrientationSequence", "ImageOrientationPatient")
    spacing = _find(levels, "PixelMeasuresSequence", "PixelSpacing")
    if position is None or orientation is None or spacing is None:
        return None
    x, y, z = (float(value) for value in position)
    rows, columns = (float(value) for value in spacing)
    distance, thickness = (
        _find(levels, "PixelMeasuresSequence", name) for name in ("SpacingBetweenSlices", "SliceThickness")
    )
    cosines = tuple(float(value) for value in orientation)
    if len(cosines) != 6:
        raise ValueError(f"ImageOrientationPatient has {len(cosines)} numbers, not 6")
    return Placement((x, y, z), cosines, (rows, columns), size, float(distance or thickness or 0))


def _fault(dataset: Dataset) -> str:
    kind = _text(dataset, "PhotometricInterpretation")
    if kind not in ("", "MONOCHROME2"):
        return f"its pixels are {kind}, not MONOCHROME2"
    return "its intensities go through a table (Modality LUT Sequence)" if "ModalityLUTSequence" in dataset else ""


def _acquired(levels: list[Dataset]) -> datetime | None:
    """When the frame was acquired; the time of its file or series being written is another thing and not taken."""
    dataset = levels[-1]
    moment = _find(levels, "FrameContentSequence", "FrameAcquisitionDateTime") or dataset.get("AcquisitionDateTime")
    match = _MOMENT.fullmatch(str(moment or "").strip())
    if match is None:  # absent, or a date without a time
        time = _text(dataset, "AcquisitionTime")
        match = _MOMENT.fullmatch((_text(dataset, "AcquisitionDate") or "00010102") + time)
    if match is None:
        return None
    zone = match["zone"] or _text(dataset, "TimezoneOffsetFromUTC")
    digits = match["digits"].ljust(14, "0")
    fraction = (match["fraction"] or "").ljust(6, "0")[:6]
    try:
        return datetime.strptime(f"{digits}{fraction}{zone or '+0000'}", "%Y%m%d%H%M%S%f%z")
    except ValueError:  # a month of 13
        return None


def _find(levels: list[Dataset], group: str, name: str) -> Any:  # noqa: ANN401 - a DICOM value
    return _find_in(levels, (group,), name)


def _find_in(levels: list[Dataset], groups: Iterable[str], name: str) -> Any:  # noqa: ANN401
    """The first value of an element, in a functional group or beside it; None where it is absent or empty."""
    for level in levels:
        inner = [item for group in groups for item in level.get(group) or ()]
        for holder in (*inner, level):
            value = holder.get(name)
            if value is not None and value != "":
                return value
    return None


def _text(dataset: Dataset, name: str) -> str:
    value = dataset.get(name)
    return "" if value is None else str(value).strip()


def _several(dataset: Dataset, name: str) -> Iterable[object]:
    value = dataset.get(name)
    return () if value is None else [value] if isinstance(value, str) else value


def _float_or_none(value: object) -> float | None:
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):  # absent, or several values
        return None


def _as_number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("inf")
