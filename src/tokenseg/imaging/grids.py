"""Relations of two grids: the same, the same but for rounding, other voxels of the same space, or somewhere else."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Bool, Float, Shaped
from scipy.ndimage import affine_transform

from tokenseg.imaging.volume import Grid, affine_differences
from tokenseg.messages import times
from tokenseg.shapes import Affine

GridKind: TypeAlias = Literal["identical", "rounding", "other grid", "disjoint"]

_SAME_BOX_MM = 0.01
_EDGE_VOXELS = 1e-3
"""What rounding of affines may put beyond the edge of a grid."""
LEAST_OVERLAP = 0.1
"""Grids whose boxes share less than this of the smaller one are of different places."""


class GridRelation(NamedTuple):
    """How a grid relates to a first one."""

    kind: GridKind
    difference: str
    """In what they differ, in words; empty where they do not."""


def relate_grids(first: Grid, second: Grid) -> GridRelation:
    """Compare two grids.

    Rounding is up to 0.001 mm in the position of the first voxel and in spacing, and 0.0001 in a direction cosine; what
    is within it counts as the same everywhere in this program.
    """
    if first.shape == second.shape and np.array_equal(first.affine, second.affine):
        return GridRelation("identical", "")
    differences = affine_differences(first.affine, second.affine)
    if first.shape != second.shape:
        differences.insert(0, f"{times(second.shape)} voxels instead of {times(first.shape)}")
    if not differences:
        return GridRelation("rounding", "")
    kind: GridKind = "disjoint" if _overlap(first, second) < LEAST_OVERLAP else "other grid"
    return GridRelation(kind, "; ".join(differences))


def fill_one_box(first: Grid, second: Grid) -> bool:
    """Whether the voxels of two grids fill one box in the world: finer, coarser, flipped, turned by right angles."""
    boxes = _box_mm(first), _box_mm(second)
    return bool(np.allclose(boxes[0], boxes[1], rtol=0, atol=_SAME_BOX_MM))


def is_lost_header(first: Grid, second: Grid) -> bool:
    """Whether, of two other grids, the second more likely has a wrong header, or its axes swapped, than other voxels.

    That many voxels, exactly, of another box are hardly chosen.
    """
    return math.prod(first.shape) == math.prod(second.shape) and not fill_one_box(first, second)


def resample(
    values: Shaped[np.ndarray, "X Y Z"], grid: Grid, target: Grid, *, order: Literal[0, 1]
) -> Shaped[np.ndarray, "X2 Y2 Z2"]:
    """Values at the voxels of another grid of the same world.

    Args:
        values: On `grid`.
        grid: Where they are; voxels reach half a voxel beyond their centres.
        target: Where they are wanted.
        order: 1 interpolates, to float32, with the lowest value beyond the grid; 0 takes the nearest, 0 beyond it.
    """
    to_source = np.linalg.inv(grid.affine) @ target.affine
    source = values if order == 0 else values.astype(np.float32)
    resampled: Shaped[np.ndarray, "X2 Y2 Z2"] = affine_transform(
        source, to_source[:3, :3], to_source[:3, 3], output_shape=target.shape, order=order, mode="nearest"
    )
    resampled[_beyond(to_source, grid.shape, target.shape)] = 0 if order == 0 else values.min()
    return resampled


def _beyond(
    to_source: Affine, shape: tuple[int, int, int], target_shape: tuple[int, int, int]
) -> Bool[np.ndarray, "X2 Y2 Z2"]:
    """Target voxels whose centre is in no voxel of the source."""
    x, y, z = np.ogrid[: target_shape[0], : target_shape[1], : target_shape[2]]
    beyond = np.zeros(target_shape, dtype=bool)
    for row, size in zip(to_source[:3], shape, strict=True):
        index = row[0] * x + row[1] * y + row[2] * z + row[3]
        beyond |= (index < -0.5 - _EDGE_VOXELS) | (index > size - 0.5 + _EDGE_VOXELS)
    return beyond


def _overlap(first: Grid, second: Grid) -> float:
    """Volume of the smaller bounding box, in the world, that the other one shares."""
    boxes = [_box_mm(grid) for grid in (first, second)]
    shared = np.minimum(boxes[0][1], boxes[1][1]) - np.maximum(boxes[0][0], boxes[1][0])
    volumes = [float(np.prod(high - low)) for low, high in boxes]
    return float(np.prod(np.maximum(shared, 0))) / min(volumes)


def _box_mm(grid: Grid) -> tuple[Float[np.ndarray, " 3"], Float[np.ndarray, " 3"]]:
    """Lowest and highest world coordinate of the outer edges of the voxels."""
    edges = np.stack(np.meshgrid(*((-0.5, size - 0.5) for size in grid.shape), indexing="ij"), axis=-1).reshape(-1, 3)
    corners = edges @ grid.affine[:3, :3].T + grid.affine[:3, 3]
    return corners.min(axis=0), corners.max(axis=0)
