"""Phases of a DCE exam in DICOM: which slices make one, which belong together, and in which order.

Phases share their grid and their protocol and have times that differ. A series that might be a phase and cannot be used
as one is an error and not left out, since all phases count in the intensities that the network sees.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime, timedelta
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from tokenseg.data.dicom_grid import SAME_POSITION_MM, Placement, heights_mm
from tokenseg.data.dicom_series import PHASE_TAGS, Frame, Series
from tokenseg.errors import DataError, GeometryError

_COMPUTED_TYPES = ("SUB", "MIP", "MINIP", "MIN IP", "PROJECTION", "MPR", "PEI", "MAP")
_PROTOCOL_TOLERANCE = 0.01
_SIMILAR_ECHO = 2.0
_LONGEST_UNDATED = timedelta(hours=12)


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
    places = _places(series.frames)
    if len(places) < len(series.frames) or not places:
        raise GeometryError(f"{series}: {len(series.frames) - len(places)} slice(s) have no ImagePositionPatient")
    per_position = len(places) / _num_positions(places)
    if per_position == 1:
        return [Phase(_acquired(series.frames), 0.0, series, series.frames)]
    if len({frame.protocol[:2] for frame in series.frames}) > 1:
        raise DataError(f"{series}: holds several echo times, which are no phases; choose another series")
    for tag in PHASE_TAGS:
        phases = _split_by(tag, series, per_position)
        if phases:
            return phases
    raise DataError(
        f"{series}: positions hold {per_position:g} slices on average, and none of {', '.join(PHASE_TAGS)} tells them "
        "apart evenly: phases are incomplete, or files are duplicated"
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
    originals = [each for each in plain if "DERIVED" not in each.image_type] or plain
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


def _split_by(tag: str, series: Series, per_position: float) -> list[Phase]:
    """Phases by the values of a tag; none where it does not give each phase every position once."""
    groups: dict[str, list[Frame]] = defaultdict(list)
    for frame in series.frames:
        groups[frame.phase_tags.get(tag, "")].append(frame)
    size = len(series.frames) / per_position
    if len(groups) != per_position or "" in groups:
        return []
    if any(len(group) != size or _num_positions(_places(group)) != size for group in groups.values()):
        return []
    ordered = sorted(groups.items(), key=lambda item: (_as_number(item[0]), item[0]))
    phases = [Phase(_acquired(group), float(place), series, tuple(group)) for place, (_, group) in enumerate(ordered)]
    times = [phase.acquired for phase in phases if phase.acquired is not None]
    if times != sorted(times):
        raise DataError(f"{series}: {tag} and the times of acquisition give different orders of the phases")
    return phases


def _belong_together(first: Phase, second: Phase) -> bool:
    return _on_one_grid(first.frames, second.frames) and _of_one_protocol(first.frames[0], second.frames[0])


def _of_one_protocol(first: Frame, second: Frame) -> bool:
    if first.options != second.options:
        return False
    return all(
        one is None or other is None or abs(one - other) <= _PROTOCOL_TOLERANCE * max(abs(one), abs(other))
        for one, other in zip(first.protocol, second.protocol, strict=True)
    )


def _on_one_grid(first: Sequence[Frame], second: Sequence[Frame]) -> bool:
    """Whether slices fill the same box, within a millimetre."""
    places = [_places(frames) for frames in (first, second)]
    if not all(places) or places[0][0].size != places[1][0].size:
        return False
    orientations = [np.reshape(each[0].orientation, (2, 3)) for each in places]
    if not np.allclose(orientations[0], orientations[1], rtol=0, atol=1e-2):
        return False
    extents = [
        [*(orientation @ each[0].position), min(heights_mm(each)), max(heights_mm(each))]
        for orientation, each in zip(orientations, places, strict=True)
    ]
    return np.allclose(extents[0], extents[1], rtol=0, atol=1.0)


def _check_none_left_out(
    exam: Sequence[Phase], others: Sequence[Phase], unusable: Sequence[tuple[Series, DataError]]
) -> None:
    """Refuse to go on without a series that may be a phase: same grid, and an echo time that is not far off."""
    for series, error in unusable:
        if _on_one_grid(exam[0].frames, series.frames) and _echoes_alike(exam[0].frames[0], series.frames[0]):
            raise error
    for phase in others:
        if _on_one_grid(exam[0].frames, phase.frames) and _echoes_alike(exam[0].frames[0], phase.frames[0]):
            raise DataError(f"{phase.series} may be a phase or not: it has the grid of the others and another protocol")


def _echoes_alike(first: Frame, second: Frame) -> bool:
    one, other = first.protocol[0] or first.protocol[1], second.protocol[0] or second.protocol[1]
    return not one or not other or max(one, other) < _SIMILAR_ECHO * min(one, other)


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


def _places(frames: Sequence[Frame]) -> list[Placement]:
    return [frame.placement for frame in frames if frame.placement is not None]


def _num_positions(places: Sequence[Placement]) -> int:
    heights = np.sort(heights_mm(places))
    return 1 + int((np.diff(heights) >= SAME_POSITION_MM).sum())


def _as_number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("inf")
