"""Phases of a DCE exam in DICOM: which slices make one, which belong together, and in which order.

Phases share their grid and their protocol and have times that differ. A series that might be a phase and cannot be used
as one is an error and not left out, since all phases count in the intensities that the network sees.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from tokenseg.errors import DataError, GeometryError
from tokenseg.imaging.dicom.grid import SAME_POSITION_MM, heights_mm
from tokenseg.imaging.dicom.series import PHASE_TAGS, PLACE_TAGS, Frame, Series, placements_of

_COMPUTED_TYPES = ("SUB", "MIP", "MINIP", "MIN IP", "PROJECTION", "MPR", "PEI", "MAP")
_PROTOCOL_TOLERANCE = 0.01
_SIMILAR_ECHO = 3.0
_LONGEST_UNDATED = timedelta(hours=12)
_CLOCK_TAGS = ("FrameAcquisitionDateTime", "AcquisitionDateTime", "AcquisitionTime")
_FIRST_MOMENT = datetime(1, 1, 2, tzinfo=UTC)


class Phase(NamedTuple):
    """Slices of one moment."""

    acquired: datetime | None
    """When the first of them was acquired."""
    order: float
    """Among the phases of its series."""
    series: Series
    frames: tuple[Frame, ...]


def split_phases(series: Series) -> list[Phase]:
    """Split a series into its phases, in order: as many as slices share a position.

    Raises:
        GeometryError: A slice has no position.
        DataError: Phases are incomplete or cannot be told apart, or tags contradict each other.
    """
    places = placements_of(series.frames)
    if len(places) < len(series.frames) or not places:
        count = len(series.frames) - len(places)
        raise GeometryError(f"{series}: {count} slice(s) do not say where they are ({PLACE_TAGS}); export it again")
    positions = _by_position(series.frames)
    if len(places) == len(positions):
        return [Phase(_acquired(series.frames), 0.0, series, series.frames)]
    if len({frame.protocol[:2] for frame in series.frames}) > 1:
        raise DataError(f"{series}: holds several echo times, which are no phases; choose another series")
    if len({len(frames) for frames in positions}) == 1:
        for tag in PHASE_TAGS:
            phases = _split_by(tag, series, len(positions[0]))
            if phases:
                return phases
    raise DataError(
        f"{series}: {_doubled(positions)}, and none of {', '.join(PHASE_TAGS)} tells them "
        "apart evenly: phases are incomplete, or files are duplicated"
    )


def _doubled(positions: Sequence[Sequence[Frame]]) -> str:
    """Say where slices share a position."""
    shared = [frames for frames in positions if len(frames) > 1]
    (height,) = heights_mm(placements_of(shared[0][:1]))
    return (
        f"{len(shared)} of {len(positions)} positions hold several slices (first at {height:.2f} mm along the normal)"
    )


def choose_phases(series: Sequence[Series], least: int, *, by_user: bool) -> list[Phase]:
    """Find the phases of the one DCE exam that there is, in order.

    Args:
        series: Candidates.
        least: Phases that an exam has at least.
        by_user: The user chose these series, so all belong together.

    Raises:
        DataError: There is no such exam or several, a series may or may not belong to it, or times give no order.
    """
    plain = [each for each in series if not is_computed(each)]
    # Phases may have been registered to each other, but not beside those that they were made of.
    originals = plain if by_user else [each for each in plain if "DERIVED" not in each.image_type] or plain
    phases, unusable = _split_all(originals)
    if by_user and unusable:
        raise unusable[0][1]
    groups: list[list[Phase]] = []
    for phase in phases:
        group = next((each for each in groups if by_user or _belong_together(each[0], phase)), None)
        if group is None:
            groups.append([phase])
        else:
            group.append(phase)
    exams = [group for group in groups if len(group) >= least]
    if len(exams) > 1:  # contrast is followed with a short echo time; diffusion and T2 series have long ones
        shortest = min(exams, key=lambda group: _echo(group[0].frames[0]) or math.inf)
        exams = [group for group in exams if _echoes_alike(shortest[0].frames[0], group[0].frames[0])]
    if not exams and unusable:
        raise unusable[0][1]
    if len(exams) != 1:
        found = f"{len(exams)} groups of series" if exams else "no group of series"
        raise DataError(f"{found} with at least {least} phases on one grid, of one protocol")
    others = [phase for group in groups if group is not exams[0] for phase in group]
    _check_none_left_out(exams[0], others, unusable)
    return _in_order(exams[0])


def is_computed(series: Series) -> bool:
    """Whether a series was computed from several others: a subtraction, a projection, a map."""
    return any(part.startswith(_COMPUTED_TYPES) for part in series.image_type)


def _split_all(series: Sequence[Series]) -> tuple[list[Phase], list[tuple[Series, DataError]]]:
    phases: list[Phase] = []
    unusable: list[tuple[Series, DataError]] = []
    for each in series:
        try:
            phases += split_phases(each)
        except DataError as error:
            unusable.append((each, error))
    return phases, unusable


def _split_by(tag: str, series: Series, count: int) -> list[Phase]:
    """Phases by the order of a tag's values at each position; none where phases would overlap in it.

    Slices of one phase may differ in it, as trigger times do from slice to slice.
    """
    ranked: list[list[tuple[float, Frame]]] = [[] for _ in range(count)]
    for frames in _by_position(series.frames):
        values = [(value, frame) for frame in frames if (value := _value(frame, tag)) is not None]
        if len(values) != count:
            return []
        for rank, each in zip(ranked, sorted(values, key=lambda value: value[0]), strict=True):
            rank.append(each)
    extremes = [(min(value for value, _ in rank), max(value for value, _ in rank)) for rank in ranked]
    if any(latest >= earliest for (_, latest), (earliest, _) in pairwise(extremes)):
        return []
    groups = [tuple(frame for _, frame in rank) for rank in ranked]
    phases = [Phase(_acquired(group), float(place), series, group) for place, group in enumerate(groups)]
    times = [phase.acquired for phase in phases if phase.acquired is not None]
    if times != sorted(times):
        raise DataError(f"{series}: {tag} and the times of acquisition give different orders of the phases")
    if tag in _CLOCK_TAGS and times[0].year == 1 and times[-1] - times[0] > _LONGEST_UNDATED:
        raise DataError(f"{series}: phases cannot be ordered: the date of acquisition is missing around midnight")
    return phases


def _value(frame: Frame, tag: str) -> float | None:
    """A number that grows with the tag; None where it is absent."""
    if tag in _CLOCK_TAGS:
        return None if frame.acquired is None else (frame.acquired - _FIRST_MOMENT).total_seconds()
    try:
        return float(frame.phase_tags[tag])
    except (KeyError, ValueError):
        return None


def _by_position(frames: Sequence[Frame]) -> list[list[Frame]]:
    """Frames of each position along the normal."""
    heights = heights_mm(placements_of(frames))
    groups: list[list[Frame]] = []
    last = -math.inf
    for height, frame in sorted(zip(heights, frames, strict=True), key=lambda each: each[0]):
        if height - last >= SAME_POSITION_MM:
            groups.append([])
        groups[-1].append(frame)
        last = height
    return groups


def _belong_together(first: Phase, second: Phase) -> bool:
    return _on_one_grid(first.frames, second.frames) and _of_one_protocol(first.frames[0], second.frames[0])


def _of_one_protocol(first: Frame, second: Frame) -> bool:
    if first.options and second.options and first.options != second.options:
        return False
    return all(
        one is None or other is None or abs(one - other) <= _PROTOCOL_TOLERANCE * max(abs(one), abs(other))
        for one, other in zip(first.protocol, second.protocol, strict=True)
    )


def _on_one_grid(first: Sequence[Frame], second: Sequence[Frame]) -> bool:
    """Whether slices fill the same box, within a millimetre."""
    boxes = _box_mm(first), _box_mm(second)
    if boxes[0] is None or boxes[1] is None or placements_of(first)[0].size != placements_of(second)[0].size:
        return False
    return np.allclose(boxes[0], boxes[1], rtol=0, atol=1.0)


def _overlap(first: Sequence[Frame], second: Sequence[Frame]) -> bool:
    """Whether slices of one orientation fill more than half of the smaller box together."""
    boxes = _box_mm(first), _box_mm(second)
    if boxes[0] is None or boxes[1] is None:
        return False
    turned = np.asarray(placements_of(first)[0].orientation) - np.asarray(placements_of(second)[0].orientation)
    low, high = np.maximum(boxes[0][0], boxes[1][0]), np.minimum(boxes[0][1], boxes[1][1])
    sizes = [np.maximum(box[1] - box[0], 1.0) for box in boxes if box is not None]
    shared = np.maximum(high - low, 0.0) / np.minimum(*sizes)
    return bool(np.abs(turned).max() <= 1e-2 and (shared > 0.5).all())


def _box_mm(frames: Sequence[Frame]) -> Float[np.ndarray, "2 3"] | None:
    """Lowest and highest place along rows, columns and normal; None where a slice has no place."""
    places = placements_of(frames)
    if not places or len(places) < len(frames):
        return None
    first = places[0]
    corner = np.reshape(first.orientation, (2, 3)) @ first.position
    rows, columns = first.size
    extent = (columns * first.spacing_mm[1], rows * first.spacing_mm[0])
    heights = heights_mm(places)
    return np.array([[*corner, min(heights)], [*(corner + extent), max(heights)]], dtype=np.float64)


def _check_none_left_out(
    exam: Sequence[Phase], others: Sequence[Phase], unusable: Sequence[tuple[Series, DataError]]
) -> None:
    """Refuse to go on without a series that may be a phase: same place, and an echo time that is not far off."""
    for series, error in unusable:
        if _may_belong(exam[0].frames, series.frames):
            raise error
    for phase in others:
        if _may_belong(exam[0].frames, phase.frames):
            raise DataError(f"{phase.series} may be a phase or not: same place as the others, another grid or protocol")


def _may_belong(exam: Sequence[Frame], frames: Sequence[Frame]) -> bool:
    return _overlap(exam, frames) and _echoes_alike(exam[0], frames[0])


def _echoes_alike(first: Frame, second: Frame) -> bool:
    one, other = _echo(first), _echo(second)
    return not one or not other or max(one, other) < _SIMILAR_ECHO * min(one, other)


def _echo(frame: Frame) -> float | None:
    return frame.protocol[0] or frame.protocol[1]


def _in_order(phases: Sequence[Phase]) -> list[Phase]:
    if len({phase.series.uid for phase in phases}) == 1:
        return sorted(phases, key=lambda phase: phase.order)
    times: list[tuple[datetime, Phase]] = []
    for phase in phases:
        if phase.acquired is None:
            raise DataError(f"{phase.series} has no time of acquisition, so that the phases cannot be ordered")
        times.append((phase.acquired, phase))
    dated = {moment.year > 1 for moment, _ in times}
    times.sort(key=lambda each: (each[0], each[1].order))
    if len(dated) > 1 or (dated == {False} and times[-1][0] - times[0][0] > _LONGEST_UNDATED):
        raise DataError("phases cannot be ordered: some lack the date of acquisition, or all do around midnight")
    for (first_time, first), (second_time, second) in pairwise(times):
        if first_time == second_time and first.series.uid != second.series.uid:
            raise DataError(f"two phases have the same time of acquisition: {first.series}; {second.series}")
    return [phase for _, phase in times]


def _acquired(frames: Sequence[Frame]) -> datetime | None:
    times = [frame.acquired for frame in frames if frame.acquired is not None]
    return min(times) if len(times) == len(frames) else None
