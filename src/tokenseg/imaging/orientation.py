"""Orders of axes, stored, RAS+ and that of rows: turning arrays from one to another and back, as views."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float, Shaped
from nibabel.orientations import io_orientation
from torch import Tensor

from tokenseg.shapes import Affine

Shape3: TypeAlias = tuple[int, int, int]


def orientation(affine: Affine) -> tuple[Shape3, tuple[bool, bool, bool]]:
    """For each stored axis, the RAS+ axis that it runs along, and whether it runs against it."""
    found = io_orientation(affine)  # type: ignore[no-untyped-call]
    flips = found[:, 1] < 0
    return shape3(found[:, 0]), (bool(flips[0]), bool(flips[1]), bool(flips[2]))


def turn_to_ras(
    array: Shaped[np.ndarray, "X Y Z"], axes: Shape3, flipped: tuple[bool, bool, bool]
) -> Shaped[np.ndarray, "X2 Y2 Z2"]:
    """Turn stored axes to RAS+ (a view)."""
    steps = [slice(None, None, -1 if flip else 1) for flip in flipped]
    return array[tuple(steps)].transpose(np.argsort(axes))


def to_canonical(
    array: Shaped[np.ndarray, "X Y Z"], affine: Affine
) -> tuple[Shaped[np.ndarray, "X2 Y2 Z2"], tuple[float, float, float]]:
    """Turn stored axes to the closest RAS+ order, for showing.

    Returns:
        The array with axes along right, anterior and superior (a view), and its spacing in mm in that order. Of an
        oblique scan the axes only lie closest to these directions.
    """
    axes, flipped = orientation(affine)
    right, anterior, superior = (float(np.linalg.norm(affine[:3, stored])) for stored in np.argsort(axes))
    return turn_to_ras(array, axes, flipped), (right, anterior, superior)


def row_order(shape: Shape3) -> Shape3:
    """Axes from the one with most voxels to the one with fewest: rows are planes across the first."""
    return shape3(sorted(range(3), key=lambda axis: -shape[axis]))


def in_row_order(sizes: Shape3, order: Shape3) -> Shape3:
    """Three numbers along X, Y, Z in the order of the rows."""
    return shape3(sizes[axis] for axis in order)


def from_row_order(sizes: Shape3, order: Shape3) -> Shape3:
    """Three numbers in the order of the rows along X, Y, Z again."""
    return shape3(sizes[order.index(axis)] for axis in range(3))


def to_rows(image: Float[Tensor, "C X Y Z"], order: Shape3) -> Float[Tensor, "C a b c"]:
    """Turn an image so that its rows come first (a view)."""
    return image.permute(0, *(axis + 1 for axis in order))


def from_rows(rows: Float[Tensor, "C a b c"], order: Shape3) -> Float[Tensor, "C X Y Z"]:
    """Undo `to_rows` (a view)."""
    return rows.permute(0, *(order.index(axis) + 1 for axis in range(3)))


def shape3(sizes: Iterable[Any]) -> Shape3:
    """Three numbers of any kind as the tuple that shapes are."""
    x, y, z = (int(size) for size in sizes)
    return x, y, z
