"""DICOM segmentation objects (SEG) on the grid of the scan's own slices, through highdicom.

No array is flipped or turned here: slice n of the mask belongs to slice n of the scan, which knows where it is.
"""
# highdicom's and pydicom's functions carry few types:
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Shaped

from tokenseg.config import Code, Coding, Label
from tokenseg.errors import ConfigError, DataError, FileError, GeometryError
from tokenseg.files import replaced_on_success, write_atomically
from tokenseg.imaging.dicom_files import DicomFile, read_dataset
from tokenseg.imaging.formats import DicomSlices
from tokenseg.imaging.volume import Mask, Volume
from tokenseg.messages import times
from tokenseg.shapes import LPS_TO_RAS, BoolMask

if TYPE_CHECKING:
    from pydicom import Dataset

SEG_ENDING = "_seg.dcm"
NO_FINDINGS_ENDING = "_seg.json"
NOT_CLINICAL = "not for clinical use"

_TISSUE = Code(value="85756007", meaning="Tissue")
_UNKNOWN = Coding(category=_TISSUE, type=_TISSUE)
# highdicom copies these from the scan and fails where they are absent or malformed; empty they may be.
_NEEDED = {
    "PatientID": r"[^\\]{0,64}",
    "PatientName": r".*",
    "PatientBirthDate": r"[0-9]{8}|",
    "PatientSex": r"[MFO]|",
    "AccessionNumber": r"[^\\]{0,16}",
    "StudyID": r"[^\\]{0,16}",
    "StudyDate": r"[0-9]{8}|",
    "StudyTime": r"[0-9]{2,6}(\.[0-9]{1,6})?|",
}
_UNICODE = "ISO_IR 192"
_INDEX_TOLERANCE = 0.01
_SERIES_NUMBER_OFFSET = 1000
_LARGEST_NUMBER = 2**31 - 1
_MAX_TEXT = 64


class Segment(NamedTuple):
    """One label of a mask."""

    label: Label
    voxels: BoolMask
    """On the grid of the scan; must not be empty everywhere unless an empty object is wanted."""


def write_seg(path: Path, segments: Sequence[Segment], like: Volume, *, model_name: str, version: str) -> None:
    """Write segments as one DICOM SEG, all or nothing. Segments may overlap; frames without a voxel are left out.

    Args:
        path: Where.
        segments: At least one; they are numbered in this order.
        like: The scan, read from DICOM.
        model_name: For the algorithm's identification and the series description.
        version: Of this software.

    Raises:
        DataError: The scan was not read from DICOM.
        FileError: The file cannot be written, or the scan's files are gone.
        ConfigError: highdicom is not installed.
    """
    library = _library()
    if not isinstance(like.header, DicomSlices):
        raise DataError(f"{path}: the scan was not read from DICOM; write the mask as .nii.gz")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what pydicom and highdicom forgive
            seg = _make(library, segments, like, like.header, model_name, version)
    except (MemoryError, FileError):
        raise
    except Exception as error:  # whatever of the scan's own tags the libraries do not take
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise DataError(
            f"{path}: no DICOM segmentation can be made with this scan's headers ({reason}); name the mask .nii.gz"
        ) from error
    with replaced_on_success(path) as temporary:
        seg.save_as(temporary)


def _make(
    library: Any,  # noqa: ANN401 - a module
    segments: Sequence[Segment],
    like: Volume,
    slices: DicomSlices,
    model_name: str,
    version: str,
) -> Any:  # noqa: ANN401
    sources = _sources(slices, like.spacing_mm[2])
    # Axes column, row, slice become slice, row, column; the segments come last.
    pixels = np.stack([segment.voxels.transpose(2, 1, 0) for segment in segments], axis=-1)
    names = _segment_names([segment.label for segment in segments])
    descriptions = [
        _description(number, name, segment.label.coding or _UNKNOWN, model_name, version)
        for number, (name, segment) in enumerate(zip(names, segments, strict=True), start=1)
    ]
    # Slice by slice where files are slices, or one file has them in this order; else the mask says itself where it is.
    slice_by_slice = not any(map(_is_enhanced, sources)) or (
        len(sources) == 1 and [number for _, number in slices.frames] == list(range(_num_frames(sources[0])))
    )
    seg = library.seg.Segmentation(
        source_images=sources if slice_by_slice else sources[:1],
        pixel_array=pixels if slice_by_slice else _volume(pixels, like, sources[0]),
        segmentation_type="BINARY",
        segment_descriptions=descriptions,
        series_instance_uid=library.UID(),
        series_number=_series_number(sources[0]),
        sop_instance_uid=library.UID(),
        instance_number=1,
        manufacturer="TokenSeg",
        manufacturer_model_name="tokenseg",
        software_versions=version,
        device_serial_number="0",
        series_description=_text(f"TokenSeg, {NOT_CLINICAL}: {model_name}"),
        content_description=_text(f"Automatic segmentation, {NOT_CLINICAL}"),
    )
    seg.SpecificCharacterSet = _UNICODE
    return seg


def write_no_findings(path: Path, labels: Sequence[Label], *, model_name: str, version: str) -> None:
    """Write that nothing was found, where a segment without a voxel would confuse viewers.

    Raises:
        FileError: The file cannot be written.
    """
    found = {
        "findings": "none",
        "looked_for": [label.name for label in labels],
        "model": model_name,
        "software": f"TokenSeg {version}",
        "note": f"Research software: not a medical device, {NOT_CLINICAL}",
    }
    write_atomically(path, (json.dumps(found, indent=2) + "\n").encode())


def is_no_findings(path: Path) -> bool:
    """Whether `write_no_findings` wrote this file."""
    try:
        return "findings" in json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def read_seg(path: Path, labels: Sequence[Label], like: Volume) -> Mask:
    """Read a SEG that `write_seg` wrote back as a label map; each frame goes where its own position says.

    Args:
        path: The object.
        labels: Those that it was written with; segments are recognised by their names and painted in this order.
        like: The scan that it belongs to.

    Raises:
        FileError: It is damaged.
        DataError: It has a segment that is none of the labels.
        GeometryError: A frame is not on a slice of the scan.
    """
    frames = _read_frames(path)
    values = dict(zip(_segment_names(labels), (label.output_value for label in labels), strict=True))
    unknown = sorted({frame.segment for frame in frames} - set(values))
    if unknown:
        raise DataError(f"{path} has the segments {', '.join(unknown)}; known are {', '.join(values)}")
    mask = np.zeros(like.array.shape[1:], np.uint8 if max(values.values()) < 256 else np.int32)
    to_index = np.linalg.inv(LPS_TO_RAS @ like.affine)
    for name, value in values.items():
        for frame in frames:
            if frame.segment != name:
                continue
            index = to_index @ [*frame.position, 1.0]
            slot = round(index[2])
            if np.abs(index[:3] - (0, 0, slot)).max() > _INDEX_TOLERANCE or not 0 <= slot < like.array.shape[3]:
                raise GeometryError(f"{path} has a frame at {times(frame.position)} mm, which is no slice of its scan")
            if frame.pixels.T.shape != mask.shape[:2]:
                raise GeometryError(f"{path} has frames of {times(frame.pixels.T.shape)} pixels, unlike its scan")
            mask[:, :, slot][frame.pixels.T > 0] = value
    return Mask(mask, like.affine)


class _Frame(NamedTuple):
    segment: str
    position: list[float]
    pixels: Shaped[np.ndarray, "rows columns"]


def _read_frames(path: Path) -> list[_Frame]:
    dataset = read_dataset(DicomFile(path), pixels=True)
    try:
        names = {int(item.SegmentNumber): str(item.SegmentLabel) for item in dataset.SegmentSequence}
        pixels = dataset.pixel_array.reshape(-1, dataset.Rows, dataset.Columns)
        shared = dataset.SharedFunctionalGroupsSequence[0]
        frames = []
        for frame, own in zip(pixels, dataset.PerFrameFunctionalGroupsSequence, strict=True):
            # What all frames have in common stands in one place for all.
            segment = own.get("SegmentIdentificationSequence") or shared.SegmentIdentificationSequence
            place = own.get("PlanePositionSequence") or shared.PlanePositionSequence
            position = [float(value) for value in place[0].ImagePositionPatient]
            frames.append(_Frame(names[int(segment[0].ReferencedSegmentNumber)], position, frame))
        return frames
    except (AttributeError, KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        raise FileError(f"{path} is damaged, or no DICOM segmentation ({error}); segment again") from error


def _library() -> Any:  # noqa: ANN401 - a module
    try:
        import highdicom
        import highdicom.seg
    except ImportError as error:
        raise ConfigError("DICOM segmentations need the extra 'dicom': pip install 'tokenseg[dicom]'") from error
    return highdicom


def _sources(slices: DicomSlices, distance_mm: float) -> list[Dataset]:
    """Headers of the scan's files, in the order of the slices, with what must be there and as it must be."""
    sources = [read_dataset(file) for file in dict.fromkeys(file for file, _ in slices.frames)]
    frame_of_reference = sources[0].get("FrameOfReferenceUID") or _library().UID()
    for source in sources:
        source.decode()  # text of any character set, which is then written as Unicode
        source.SpecificCharacterSet = _UNICODE
        for name, form in _NEEDED.items():
            if name not in source or re.fullmatch(form, str(source.get(name) or "")) is None:
                setattr(source, name, "")
        source.FrameOfReferenceUID = frame_of_reference
        source.Modality = source.get("Modality") or "OT"
        if not _is_enhanced(source) and not source.get("SliceThickness"):
            source.SliceThickness = f"{distance_mm:.6g}"
        # Some scanners write the gap between slices here; readers of the SEG take it for their distance.
        for measures in _pixel_measures(source):
            measures.SpacingBetweenSlices = f"{distance_mm:.6g}"
    return sources


def _pixel_measures(source: Dataset) -> list[Dataset]:
    """What holds the spacing: the file itself, or in an enhanced one the groups of all frames and of each."""
    if not _is_enhanced(source):
        return [source]
    groups = [*source.get("SharedFunctionalGroupsSequence", ()), *source.PerFrameFunctionalGroupsSequence]
    return [measures for group in groups for measures in group.get("PixelMeasuresSequence", ())]


def _is_enhanced(source: Dataset) -> bool:
    return "PerFrameFunctionalGroupsSequence" in source


def _num_frames(source: Dataset) -> int:
    return int(source.get("NumberOfFrames") or 1)


def _series_number(source: Dataset) -> int:
    try:
        number = int(source.get("SeriesNumber") or 0)
    except (TypeError, ValueError):
        number = 0
    return _SERIES_NUMBER_OFFSET + min(max(number, 0), _LARGEST_NUMBER - _SERIES_NUMBER_OFFSET)


def _segment_names(labels: Sequence[Label]) -> list[str]:
    """A name for each label that DICOM can hold, none twice."""
    names: list[str] = []
    for label in labels:
        name = _text(label.name)
        names.append(name if name not in names else f"{name[: _MAX_TEXT - 4]} {len(names) + 1}")
    return names


def _volume(pixels: Any, like: Volume, source: Dataset) -> Any:  # noqa: ANN401
    """A mask that says itself where it is: for an enhanced file of which not all frames in their order were used."""
    library = _library()
    affine = (LPS_TO_RAS @ like.affine)[:, [2, 1, 0, 3]]
    return library.Volume(
        np.ascontiguousarray(pixels),
        affine=affine,
        coordinate_system="PATIENT",
        frame_of_reference_uid=source.FrameOfReferenceUID,
        channels={"SegmentNumber": list(range(1, pixels.shape[-1] + 1))},
    )


def _description(number: int, name: str, coding: Coding, model_name: str, version: str) -> Any:  # noqa: ANN401
    library = _library()
    algorithm = library.AlgorithmIdentificationSequence(
        name=_text(f"TokenSeg {model_name}"), family=_coded("123110", "Artificial Intelligence", "DCM"), version=version
    )
    return library.seg.SegmentDescription(
        segment_number=number,
        segment_label=name,
        segmented_property_category=_concept(coding.category),
        segmented_property_type=_concept(coding.type),
        algorithm_type="AUTOMATIC",
        algorithm_identification=algorithm,
        anatomic_regions=[_concept(coding.region)] if coding.region else None,
    )


def _concept(code: Code) -> Any:  # noqa: ANN401
    return _coded(code.value, code.meaning, code.scheme)


def _coded(value: str, meaning: str, scheme: str) -> Any:  # noqa: ANN401
    from pydicom.sr.coding import Code as Concept

    return Concept(value, scheme, meaning)


def _text(text: str) -> str:
    """Text as a long string of DICOM: no backslash, no control characters, at most 64 characters."""
    return re.sub(r"[\\\x00-\x1f]", "_", text)[:_MAX_TEXT].strip() or "_"
