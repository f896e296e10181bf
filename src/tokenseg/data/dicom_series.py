"""DICOM series: what a folder holds, each slice with its place, its time and its rescaling.

A classic file is one frame, an enhanced multi-frame file many; from here on both are frames of a series.
"""
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tokenseg.data.dicom_files import DicomFile, find_dicom, is_directory_file, read_dataset
from tokenseg.data.dicom_grid import Placement
from tokenseg.errors import FileError
from tokenseg.shapes import times

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
    "AcquisitionDateTime",
    "AcquisitionTime",
    "ContentTime",
)
"""Tags that may tell the phases of one series apart, the most telling first."""

PROTOCOL_TAGS = ("EchoTime", "EffectiveEchoTime", "RepetitionTime", "FlipAngle")

_FUNCTIONAL_GROUPS = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
_HEADER_TAGS = (
    *("SOPClassUID", "SeriesInstanceUID", "StudyInstanceUID", "SeriesNumber", "SeriesDescription", "Modality"),
    *("ImageType", "Rows", "Columns", "SamplesPerPixel", "NumberOfFrames", "ImagePositionPatient", "SeriesDate"),
    *("ImageOrientationPatient", "PixelSpacing", "SliceThickness", "SpacingBetweenSlices", "AcquisitionDate"),
    *(
        "RescaleSlope",
        "RescaleIntercept",
        "SeriesTime",
        "ContentDate",
        *PROTOCOL_TAGS,
        *PHASE_TAGS,
        *_FUNCTIONAL_GROUPS,
    ),
)
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
    protocol: tuple[str, ...]
    """Values of `PROTOCOL_TAGS`, which all phases of an exam share."""
    started: str
    """Date and time of acquisition as digits, `YYYYMMDDHHMMSS.ffffff`, empty where unknown."""


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
        return [frame.placement for frame in self.frames if frame.placement is not None]

    def __str__(self) -> str:
        """One line of a list to choose from."""
        size = f"{len(self.frames)} slices" + (f" of {times(self.placements[0].size)}" if self.placements else "")
        name = f"series {self.number or '?'}: {self.description or '(no description)'}"
        return f"{name}, {self.modality}, {size}, {self.uid}"


def list_series(root: Path) -> list[Series]:
    """All image series below a folder, in a zip archive or in one file, by study and series number.

    Segmentations, reports and other objects without slices of a scan are passed over.

    Raises:
        FileError: A DICOM file cannot be read. One that is passed over might be the end of a scan.
        ConfigError: pydicom is not installed.
    """
    frames: dict[str, list[Frame]] = {}
    heads: dict[str, Dataset] = {}
    for file in find_dicom(root):
        dataset = read_dataset(file, _HEADER_TAGS)
        if is_directory_file(dataset) or "Rows" not in dataset or _text(dataset, "Modality") in _NO_SCANS:
            continue
        uid = _text(dataset, "SeriesInstanceUID")
        heads.setdefault(uid, dataset)
        frames.setdefault(uid, []).extend(_frames(file, dataset))
    series = [_series(uid, heads[uid], frames[uid]) for uid in heads]
    return sorted(series, key=lambda each: (each.study_uid, _as_number(each.number), each.uid))


def _series(uid: str, dataset: Dataset, frames: Iterable[Frame]) -> Series:
    return Series(
        uid=uid,
        study_uid=_text(dataset, "StudyInstanceUID"),
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
        if int(dataset.get("SamplesPerPixel", 1)) != 1:
            return  # colours: a screenshot or a rendered picture
        shared, frames = (dataset.get(name) for name in _FUNCTIONAL_GROUPS)
        if frames is None:
            yield _frame(file, 0, size, [dataset])
            return
        for number, groups in enumerate(frames):
            yield _frame(file, number, size, [groups, *(shared or ()), dataset])
    except (TypeError, ValueError, AttributeError, OverflowError, RecursionError, NotImplementedError) as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"{file} has values that are none ({error}); export it again") from error


def _frame(file: DicomFile, number: int, size: tuple[int, int], levels: list[Dataset]) -> Frame:
    """Make a frame from its own description, that of all frames, and the file's, the nearest first."""
    position = _find(levels, "PlanePositionSequence", "ImagePositionPatient")
    orientation = _find(levels, "PlaneOrientationSequence", "ImageOrientationPatient")
    spacing = _find(levels, "PixelMeasuresSequence", "PixelSpacing")
    placement = None
    if position is not None and orientation is not None and spacing is not None:
        x, y, z = (float(value) for value in position)
        rows, columns = (float(value) for value in spacing)
        thickness = _find(levels, "PixelMeasuresSequence", "SpacingBetweenSlices") or _find(
            levels, "PixelMeasuresSequence", "SliceThickness"
        )
        cosines = tuple(float(value) for value in orientation)
        if len(cosines) != 6:
            raise ValueError(f"ImageOrientationPatient has {len(cosines)} numbers, not 6")
        placement = Placement((x, y, z), cosines, (rows, columns), size, float(thickness or 0))
    slope = _find(levels, "PixelValueTransformationSequence", "RescaleSlope")
    intercept = _find(levels, "PixelValueTransformationSequence", "RescaleIntercept")
    found = {name: _find_in(levels, _TIME_GROUPS, name) for name in (*PHASE_TAGS, *PROTOCOL_TAGS)}
    texts = {name: "" if value is None else str(value) for name, value in found.items()}
    return Frame(
        file=file,
        number=number,
        placement=placement,
        slope=1.0 if slope is None else float(slope),
        intercept=0.0 if intercept is None else float(intercept),
        phase_tags={name: texts[name] for name in PHASE_TAGS if texts[name]},
        protocol=tuple(texts[name] for name in PROTOCOL_TAGS),
        started=_started(levels[-1], levels),
    )


def _started(dataset: Dataset, levels: list[Dataset]) -> str:
    moment = _find(levels, "FrameContentSequence", "FrameAcquisitionDateTime") or dataset.get("AcquisitionDateTime")
    if moment:
        return str(moment).split("+")[0].split("-")[0]
    for name in ("Acquisition", "Content", "Series"):
        if dataset.get(f"{name}Time"):
            return f"{dataset.get(f'{name}Date') or ''}{dataset.get(f'{name}Time')}"
    return ""


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


def _as_number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("inf")
