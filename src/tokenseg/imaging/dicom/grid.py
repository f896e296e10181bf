"""The grid of DICOM slices: order and affine from their positions, and every reason why there is none.

InstanceNumber counts in whatever direction the scanner liked; only ImagePositionPatient, projected on the normal of the
slices, says where a slice is.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Float

from tokenseg.errors import GeometryError
from tokenseg.messages import times
from tokenseg.shapes import LPS_TO_RAS, Affine

Vector: TypeAlias = Float[np.ndarray, " 3"]

DIRECTION_TOLERANCE = 1e-4
SPACING_TOLERANCE_MM = 1e-3
SAME_POSITION_MM = 1e-2
STEP_TOLERANCE_MM = 0.02
"""Positions are written with few digits by some scanners, so distances between slices may differ by so much..."""
STEP_TOLERANCE = 0.02
"""...or by this share of the distance, whichever is more."""
TILT_TOLERANCE_DEGREES = 0.1
LINE_TOLERANCE_MM = 0.1
"""How far a slice may lie from its place in the even grid between the first and the last..."""
LINE_TOLERANCE = 0.05
"""...or this share of the distance of slices, whichever is more."""


class Placement(NamedTuple):
    """Where one slice is, in mm, LPS+."""

    position: tuple[float, float, float]
    """Of the centre of its first pixel."""
    orientation: tuple[float, ...]
    """Cosines along a row (to the right in the picture), then down a column."""
    spacing_mm: tuple[float, float]
    """Distance between rows, then between columns."""
    size: tuple[int, int]
    """Rows, columns."""
    thickness_mm: float
    """Of the slice, or its distance to the next; 0 where unknown. Only for a single slice."""


class SliceGrid(NamedTuple):
    """The order and the grid of the slices of one volume.

    Attributes:
        order: For each slice of the grid, its number in what was given.
        affine: From indices (column, row, slice) to mm in RAS+ world coordinates.
    """

    order: tuple[int, ...]
    affine: Affine


def stack_slices(placements: Sequence[Placement]) -> SliceGrid:
    """Order slices along their normal and find their grid.

    Args:
        placements: At least one.

    Raises:
        GeometryError: There is no one regular grid: mixed orientations, sizes or spacings, several slices in one
            place, missing slices, uneven distances, or a tilted gantry. The message says which, and where.
    """
    _check_alike(placements)
    first = placements[0]
    row, column = np.array(first.orientation[:3]), np.array(first.orientation[3:])
    normal = _normal(row, column)
    positions = np.array([placement.position for placement in placements])
    heights = positions @ normal
    order = np.argsort(heights, kind="stable")
    positions, heights = positions[order], heights[order]
    _check_distances(heights)
    if len(placements) == 1:
        step = normal * (first.thickness_mm or 1.0)
    else:
        step = (positions[-1] - positions[0]) / (len(placements) - 1)
        _check_tilt(step, normal)
        _check_line(positions, step)
    lps = np.eye(4)
    lps[:3, 0] = row * first.spacing_mm[1]
    lps[:3, 1] = column * first.spacing_mm[0]
    lps[:3, 2] = step
    lps[:3, 3] = positions[0]
    return SliceGrid(tuple(int(index) for index in order), LPS_TO_RAS @ lps)


def heights_mm(placements: Sequence[Placement]) -> list[float]:
    """Position of each slice along the normal of the first."""
    orientation = np.array(placements[0].orientation)
    normal = _normal(orientation[:3], orientation[3:])
    return [float(np.dot(placement.position, normal)) for placement in placements]


def _normal(row: Vector, column: Vector) -> Vector:
    normal: Vector = np.cross(row, column)
    length = float(np.linalg.norm(normal))
    if not math.isfinite(length) or abs(length - 1) > 1e-2 or abs(float(row @ column)) > 1e-2:
        raise GeometryError(
            f"ImageOrientationPatient is {times([*row, *column])}: rows and columns are no two perpendicular "
            "directions; export the series again"
        )
    return normal / length


def _check_alike(placements: Sequence[Placement]) -> None:
    first = placements[0]
    if not np.isfinite([*first.position, *first.orientation, *first.spacing_mm]).all() or min(first.spacing_mm) <= 0:
        raise GeometryError("position, orientation or PixelSpacing is not a number above 0; export the series again")
    other = [
        placement
        for placement in placements
        if not np.allclose(placement.orientation, first.orientation, rtol=0, atol=DIRECTION_TOLERANCE)
    ]
    if other:
        counts = Counter(_plane(placement.orientation) for placement in placements)
        named = ", ".join(f"{count} {plane}" for plane, count in counts.items())
        raise GeometryError(f"slices have mixed orientations ({named}), as a localizer has; choose another series")
    for what, values in (
        ("sizes", {times(placement.size) for placement in placements}),
        ("spacings in mm", _distinct([placement.spacing_mm for placement in placements])),
    ):
        if len(values) > 1:
            raise GeometryError(f"slices have mixed {what} ({', '.join(sorted(values))}); choose another series")


def _distinct(spacings: Sequence[tuple[float, float]]) -> set[str]:
    first = spacings[0]
    other = [each for each in spacings if not np.allclose(each, first, rtol=0, atol=SPACING_TOLERANCE_MM)]
    return {times(each) for each in (first, *other)}


def _check_distances(heights: Float[np.ndarray, " n"]) -> None:
    steps = np.diff(heights)
    if len(steps) == 0:
        return
    doubled = np.flatnonzero(steps < SAME_POSITION_MM)
    if len(doubled):
        raise GeometryError(
            f"{len(doubled)} slice(s) are where another one is (first at {heights[doubled[0]]:.2f} mm along the "
            "normal): duplicated files, or several phases; take the duplicates out"
        )
    usual = float(np.sort(steps)[(len(steps) - 1) // 2])  # one of the steps, also of an even number
    tolerance = max(STEP_TOLERANCE_MM, STEP_TOLERANCE * usual)
    wrong = np.flatnonzero(np.abs(steps - usual) > tolerance)
    if not len(wrong):
        return
    multiples = np.rint(steps[wrong] / usual)
    if (multiples >= 2).all() and (np.abs(steps[wrong] - multiples * usual) <= multiples * tolerance).all():
        places = ", ".join(f"{heights[at]:.2f} and {heights[at + 1]:.2f} mm" for at in wrong[:3])
        raise GeometryError(
            f"{int((multiples - 1).sum())} slice(s) are missing (between {places} along the normal); "
            "export the series again, complete"
        )
    raise GeometryError(
        f"distances between slices differ: {steps.min():.3f} to {steps.max():.3f} mm, mostly {usual:.3f}; a grid needs "
        "even distances: choose another series, or resample it"
    )


def _check_tilt(step: Vector, normal: Vector) -> None:
    sine = float(np.linalg.norm(np.cross(step, normal))) / float(np.linalg.norm(step))
    degrees = math.degrees(math.asin(min(1.0, sine)))
    if degrees > TILT_TOLERANCE_DEGREES:
        raise GeometryError(
            f"slices are shifted sideways, as by a gantry tilted by {degrees:.1f} degrees; resample the series to an "
            "upright grid first"
        )


def _check_line(positions: Float[np.ndarray, "n 3"], step: Vector) -> None:
    """Each slice where an even grid has it; small steps of one kind may add up, and one slice may lie aside."""
    away = np.linalg.norm(positions - (positions[0] + np.arange(len(positions))[:, None] * step), axis=1)
    allowed = max(LINE_TOLERANCE_MM, LINE_TOLERANCE * float(np.linalg.norm(step)))
    if away.max() > allowed:
        raise GeometryError(
            f"slice {int(away.argmax()) + 1} of {len(positions)} lies {away.max():.2f} mm from its place in an even "
            f"grid, allowed {allowed:.2f}; choose another series, or resample it"
        )


def _plane(orientation: tuple[float, ...]) -> str:
    normal = np.abs(np.cross(orientation[:3], orientation[3:]))
    name = ("sagittal", "coronal", "axial")[int(normal.argmax())]
    return name if normal.max() > 0.99 else f"oblique {name}"
