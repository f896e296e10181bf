"""From a DICOM study to a scan: which series is which channel, the phases of a DCE exam in their order, the voxels.

What was not asked for is never guessed: where two series could be meant, the list of them is the error.
"""
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Shaped

from tokenseg.config import Plan
from tokenseg.data.dicom_files import DicomFile, read_dataset
from tokenseg.data.dicom_grid import SAME_POSITION_MM, heights_mm, stack_slices
from tokenseg.data.dicom_series import PHASE_TAGS, Frame, Series, list_series
from tokenseg.data.formats import DicomSlices
from tokenseg.data.phases import phase_name
from tokenseg.data.volume import Volume, check_same_grid
from tokenseg.errors import DataError, FileError, GeometryError
from tokenseg.shapes import ImageArray

_LEFT_OUT_TYPES = ("SUBTRACT", "SUB", "SUBTRACTION", "PROJECTION IMAGE", "MIP", "MIN IP", "MPR")


@dataclass(frozen=True, slots=True)
class Exam:
    """The image series of one study."""

    name: str
    """Of its folder or archive; names the output."""
    series: tuple[Series, ...]
    wanted: str = ""
    """UID of a series, or a part of its description; empty leaves the choice to the model's needs."""


class Channel(NamedTuple):
    """What becomes one channel of a scan."""

    name: str
    series: Series
    frames: tuple[Frame, ...]
    """In any order; all of the series, or one phase of it."""


class _Phase(NamedTuple):
    started: str
    order: float
    series: Series
    frames: tuple[Frame, ...]


def list_exams(root: Path, wanted: str = "") -> list[Exam]:
    """All studies below a folder, in a zip archive or in one file, by name.

    Raises:
        FileError: A DICOM file cannot be read.
        ConfigError: pydicom is not installed.
    """
    studies: dict[str, list[Series]] = defaultdict(list)
    for series in list_series(root):
        studies[series.study_uid].append(series)
    names = _study_names(root, list(studies.values()))
    exams = [Exam(name, tuple(series), wanted) for name, series in zip(names, studies.values(), strict=True)]
    return sorted(exams, key=lambda exam: exam.name)


def choose_channels(exam: Exam, plan: Plan) -> tuple[Channel, ...]:
    """Choose the series, or the phases, that a model needs.

    Raises:
        DataError: None fits, or several do: the message lists what there is.
        GeometryError: Phases are on different grids.
    """
    candidates = _candidates(exam)
    if plan.joint_zscore:
        return _choose_phases(exam, candidates, plan)
    if len(plan.source_channels) == 1:
        chosen = [_the_one(exam, candidates, plan.source_channels[0])]
    else:
        chosen = [
            _the_one(exam, [each for each in candidates if _says(each, name)], name) for name in plan.source_channels
        ]
    return tuple(
        Channel(name, series, _single_phase(series)) for name, series in zip(plan.source_channels, chosen, strict=True)
    )


def read_exam(exam: Exam, plan: Plan) -> Volume:
    """Read the channels that a model needs, rescaled as the files say, on the grid of the first.

    Raises:
        FileError: A file is truncated or damaged.
        DataError: See `choose_channels`; or a compression that cannot be decoded.
        GeometryError: Slices make no regular grid, or channels are on different ones.
    """
    channels = choose_channels(exam, plan)
    volumes = [read_frames(channel.frames, channel.name, str(channel.series)) for channel in channels]
    first = volumes[0]
    for channel, volume in zip(channels[1:], volumes[1:], strict=True):
        check_same_grid(first, volume, (str(channels[0].series), str(channel.series)))
    arrays = [volume.array for volume in volumes]
    array = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
    return Volume(array, first.affine, tuple(channel.name for channel in channels), first.header)


def read_frames(frames: Sequence[Frame], channel: str, what: str) -> Volume:
    """Read slices as one volume: axes column, row, slice, in the order of their positions.

    Args:
        frames: In any order.
        channel: Name of the volume's channel.
        what: How messages name the slices.

    Raises:
        FileError: A file is truncated or damaged.
        GeometryError: The slices make no regular grid.
    """
    placements = [frame.placement for frame in frames if frame.placement is not None]
    if len(placements) < len(frames) or not placements:
        raise GeometryError(f"{what}: slices have no ImagePositionPatient; a scan cannot be built from them")
    try:
        grid = stack_slices(placements)
    except GeometryError as error:
        raise GeometryError(f"{what}: {error}") from error
    ordered = [frames[index] for index in grid.order]
    header = DicomSlices(grid.affine, tuple((frame.file, frame.number) for frame in ordered))
    return Volume(_pixels(ordered), grid.affine, (channel,), header)


def phase_table(exam: Exam, plan: Plan) -> tuple[str, ...]:
    """What was found and used, a line each, for a DCE model; else nothing.

    Raises:
        TokenSegError: See `choose_channels`.
    """
    if not plan.joint_zscore:
        return ()
    channels = choose_channels(exam, plan)
    first = _moment(channels[0].frames)
    lines = []
    for channel in channels:
        moment = _moment(channel.frames)
        later = "" if first is None or moment is None else f", {(moment - first).total_seconds():.0f} s after the first"
        series = channel.series
        lines.append(
            f"{channel.name}: series {series.number or '?'} ({series.description or 'no description'}), "
            f"{len(channel.frames)} slices{later}"
        )
    used = {channel.series.uid for channel in channels}
    return (*lines, *(f"not used: {series}" for series in exam.series if series.uid not in used))


def _candidates(exam: Exam) -> list[Series]:
    """Series that are scans, and are wanted."""
    if exam.wanted:
        chosen = [each for each in exam.series if each.uid == exam.wanted or _says(each, exam.wanted)]
        if not chosen:
            raise DataError(f"{exam.name} has no series {exam.wanted!r}. There are: {_listed(exam.series)}")
        return chosen
    scans = [each for each in exam.series if _is_scan(each)]
    if not scans:
        raise DataError(f"{exam.name} has no series of parallel slices. There are: {_listed(exam.series)}")
    return scans


def _is_scan(series: Series) -> bool:
    """Two or more slices in one orientation: no localizer, no picture of a screen."""
    places = series.placements
    if len(places) < 2 or len(places) < len(series.frames):
        return False
    return all(np.allclose(place.orientation, places[0].orientation, rtol=0, atol=1e-2) for place in places)


def _the_one(exam: Exam, candidates: Sequence[Series], channel: str) -> Series:
    if len(candidates) > 1:
        candidates = [each for each in candidates if _says(each, channel)] or candidates
    if len(candidates) == 1:
        return candidates[0]
    if not candidates:
        raise DataError(
            f"{exam.name} has no series whose description says {channel!r}. There are: {_listed(exam.series)}"
        )
    raise DataError(
        f"{exam.name} has {len(candidates)} series that could be {channel!r}; name one with --series, by its UID or a "
        f"part of its description: {_listed(candidates)}"
    )


def _says(series: Series, text: str) -> bool:
    return text.casefold() in series.description.casefold()


def _listed(series: Sequence[Series]) -> str:
    return "".join(f"\n  {each}" for each in series) or "none"


def _single_phase(series: Series) -> tuple[Frame, ...]:
    phases = _phases_of(series)
    if len(phases) > 1:
        raise DataError(f"{series} holds {len(phases)} phases; the model takes one: choose another series")
    return phases[0].frames


def _choose_phases(exam: Exam, candidates: Sequence[Series], plan: Plan) -> tuple[Channel, ...]:
    usable = [each for each in candidates if exam.wanted or not set(each.image_type) & set(_LEFT_OUT_TYPES)]
    phases = [phase for series in usable for phase in _phases_of(series)]
    groups: list[list[_Phase]] = []
    for phase in phases:
        # Chosen by the user, they belong together; what contradicts that is an error and not another group.
        group = next((each for each in groups if exam.wanted or _alike(each[0], phase)), None)
        if group is None:
            groups.append([phase])
        else:
            group.append(phase)
    exams = [group for group in groups if len(group) >= len(plan.source_channels)]
    if len(exams) != 1:
        found = f"{len(exams)} groups of series" if exams else "no group of series"
        raise DataError(
            f"{exam.name} has {found} with at least {len(plan.source_channels)} phases on one grid, of one protocol; "
            f"choose with --series, by a part of the description that all phases share: {_listed(exam.series)}"
        )
    ordered = sorted(exams[0], key=lambda phase: (phase.started, phase.order))
    _check_order(ordered, exam)
    return tuple(Channel(phase_name(number), phase.series, phase.frames) for number, phase in enumerate(ordered))


def _alike(first: _Phase, second: _Phase) -> bool:
    """Whether two phases may be of one exam: one protocol, and grids within a millimetre."""
    places = [[frame.placement for frame in phase.frames if frame.placement is not None] for phase in (first, second)]
    if places[0][0].size != places[1][0].size or first.frames[0].protocol != second.frames[0].protocol:
        return False
    orientations = [np.reshape(each[0].orientation, (2, 3)) for each in places]
    if not np.allclose(orientations[0], orientations[1], rtol=0, atol=1e-2):
        return False
    extents = [
        [*(orientation @ each[0].position), min(heights_mm(each)), max(heights_mm(each))]
        for orientation, each in zip(orientations, places, strict=True)
    ]
    return np.allclose(extents[0], extents[1], rtol=0, atol=1.0)


def _phases_of(series: Series) -> list[_Phase]:
    """Split a series into its phases: as many as slices share a position."""
    places = series.placements
    if len(places) < len(series.frames) or not places:
        raise GeometryError(f"{series}: slices have no ImagePositionPatient; a scan cannot be built from them")
    heights = np.sort(heights_mm(places))
    per_position = len(heights) / (1 + int((np.diff(heights) >= SAME_POSITION_MM).sum()))
    if per_position == 1 or len({frame.protocol for frame in series.frames}) > 1:
        return [_Phase(_started(series.frames), 0.0, series, series.frames)]
    for tag in PHASE_TAGS:
        groups: dict[float, list[Frame]] = defaultdict(list)
        for frame in series.frames:
            groups[_number(frame.phase_tags.get(tag, ""))].append(frame)
        if len(groups) == per_position and len({len(group) for group in groups.values()}) == 1:
            phases = [_Phase(_started(group), value, series, tuple(group)) for value, group in sorted(groups.items())]
            if [phase.started for phase in phases] != sorted(phase.started for phase in phases):
                raise DataError(f"{series}: {tag} and the times of acquisition give different orders of the phases")
            return phases
    raise DataError(
        f"{series}: positions hold {per_position:g} slices on average, and none of {', '.join(PHASE_TAGS)} tells them "
        "apart evenly: phases are incomplete, or files are duplicated"
    )


def _check_order(phases: Sequence[_Phase], exam: Exam) -> None:
    if len({phase.series.uid for phase in phases}) > 1 and not all(phase.started for phase in phases):
        unknown = [phase.series for phase in phases if not phase.started]
        raise DataError(f"{exam.name}: phases cannot be ordered, without a time of acquisition are: {_listed(unknown)}")
    for first, second in pairwise(phases):
        if (first.started, first.order) == (second.started, second.order):
            raise DataError(
                f"{exam.name}: two phases have the same time of acquisition; take one out, or choose with --series: "
                f"{_listed([first.series, second.series])}"
            )


def _started(frames: Sequence[Frame]) -> str:
    return min(frame.started for frame in frames)


def _moment(frames: Sequence[Frame]) -> datetime | None:
    digits = _started(frames)[:14]
    try:
        return datetime.strptime(digits, "%Y%m%d%H%M%S")
    except ValueError:
        return None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("-inf")


def _pixels(frames: Sequence[Frame]) -> ImageArray:
    """Rescaled intensities (1, column, row, slice)."""
    first = frames[0].placement
    assert first is not None  # noqa: S101 - the grid was found from it
    rows, columns = first.size
    array = np.empty((1, columns, rows, len(frames)), np.float32)
    by_file: dict[DicomFile, list[int]] = defaultdict(list)
    for slot, frame in enumerate(frames):
        by_file[frame.file].append(slot)
    for file, slots in by_file.items():
        for slot, stored in zip(slots, _decoded(file, [frames[slot].number for slot in slots]), strict=True):
            if stored.shape != (rows, columns):
                raise FileError(
                    f"{file} holds {stored.shape} pixels, its header says {(rows, columns)}; export it again"
                )
            frame = frames[slot]
            with np.errstate(over="ignore", invalid="ignore"):  # infinity is refused by Volume
                array[0, :, :, slot] = (stored.astype(np.float64) * frame.slope + frame.intercept).T
    return array


def _decoded(file: DicomFile, indices: Sequence[int]) -> list[Shaped[np.ndarray, "rows columns"]]:
    from pydicom.pixels.utils import iter_pixels
    from pydicom.uid import JPEGLSLossless, JPEGLSNearLossless

    dataset = read_dataset(file, pixels=True)
    syntax = dataset.file_meta.TransferSyntaxUID
    # GDCM decodes JPEG-LS of few bits wrongly.
    plugin = "pyjpegls" if syntax in (JPEGLSLossless, JPEGLSNearLossless) else ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return [
                frame.copy() for frame in iter_pixels(dataset, indices=list(indices), raw=True, decoding_plugin=plugin)
            ]
    except MemoryError:
        raise
    except Exception as error:  # whatever a decoder may raise on damaged pixels
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise FileError(f"{file}: its pixels ({syntax.name}) cannot be decoded: {reason}; export it again") from error


def _study_names(root: Path, studies: Sequence[Sequence[Series]]) -> list[str]:
    """A name for each study: that of what was given if it is the only one, else of the folders that hold it alone."""
    stem = root.name if root.is_dir() else root.name.removesuffix(".zip").removesuffix(".dcm")
    own = root.resolve().name if root.is_dir() and not stem else stem
    if len(studies) == 1:
        return [own]
    names = [_common_folder(root, study) for study in studies]
    if "" in names or len(set(names)) < len(names):
        return [f"{own}-{number}" for number in range(1, len(studies) + 1)]
    return names


def _common_folder(root: Path, study: Sequence[Series]) -> str:
    folders = {
        (Path(frame.file.member) if frame.file.member else frame.file.path.relative_to(root)).parent.parts
        for series in study
        for frame in series.frames
    }
    shared = [parts[0] for parts in zip(*folders, strict=False) if len(set(parts)) == 1]
    return "-".join(shared)
