"""Nearness of kept tokens to a boundary: the paper's "over 60 % of the kept lie near the tumour boundary".

The paper does not define near. Here a token is near when its cell meets the surface dilated by a radius in mm. Cells
are large and the share alone says little, so it comes with three companions: the base rate over all candidates, the
enrichment (share / base rate), and the ceiling (what a perfect choice of K could reach).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from tokenseg.errors import DataError
from tokenseg.shapes import BoolMask


class NearBoundary(NamedTuple):
    """Kept tokens near a boundary; fractions 0..1."""

    radius_mm: float
    """Distance up to which a cell is near; at 0 the surface passes through it."""
    share: float
    """Of the kept tokens, those near the boundary."""
    base_rate: float
    """Of the candidates with a voxel of the scan, those near the boundary."""
    enrichment: float
    """share / base_rate; 1 is chance. NaN where nothing is near."""
    ceiling: float
    """Highest share that as many kept tokens could have: near candidates / kept, at most 1 in each pass."""


def boundary_distances_mm(
    boxes_vox: Float[np.ndarray, "T N 2 3"], mask: BoolMask, spacing_mm: tuple[float, float, float], most_mm: float
) -> Float[np.ndarray, "T N"]:
    """Distance from each cell to the boundary: 0 where the surface passes through it, infinite beyond `most_mm`.

    The surface is the outermost layer of foreground voxels; distances are between voxel centres.

    Args:
        boxes_vox: Cell corners of the N candidates of each of T passes of the network, in voxel edges of `mask`: voxel
            i spans i to i + 1. A cell meets every voxel that it covers in part. An empty box is a cell wholly in
            padding, infinitely far.
        mask: Foreground, reference or predicted.
        spacing_mm: Voxel spacing of `mask`.
        most_mm: Largest distance of interest, at least 0.

    Raises:
        DataError: The mask is empty or fills the volume, so there is no boundary.
    """
    surface = _surface(mask)
    if not surface.any():
        raise DataError("the mask has no boundary: it is empty or fills the whole volume")
    # Levels share their cells, and so do overlapping windows in part.
    boxes, places = np.unique(boxes_vox.reshape(-1, 6), axis=0, return_inverse=True)
    nearest_mm = np.array([_nearest_mm(box.reshape(2, 3), surface, spacing_mm, most_mm) for box in boxes])
    return nearest_mm[places.ravel()].reshape(boxes_vox.shape[:2])


def near_boundary(
    distance_mm: Float[np.ndarray, "T N"],
    kept: Bool[np.ndarray, "T N"],
    in_scan: Bool[np.ndarray, "T N"],
    radius_mm: float,
) -> NearBoundary:
    """Count the tokens near a boundary.

    Args:
        distance_mm: Distance of each cell to it, from `boundary_distances_mm`.
        kept: Whether each candidate was kept; at least one was.
        in_scan: Whether each cell holds any of the scan. A cell in padding is not in the base rate; kept, it is in the
            share, as a token spent on nothing.
        radius_mm: Distance up to which a cell is near.
    """
    near = distance_mm <= radius_mm
    num_kept = int(kept.sum())
    share = int((near & kept).sum()) / num_kept
    base_rate = int(near.sum()) / int(in_scan.sum())
    # Each pass keeps its own K, so a pass far from the boundary cannot lend its share to another.
    ceiling = int(np.minimum(near.sum(axis=1), kept.sum(axis=1)).sum()) / num_kept
    return NearBoundary(radius_mm, share, base_rate, share / base_rate if base_rate else float("nan"), ceiling)


def _surface(mask: BoolMask) -> BoolMask:
    """Foreground voxels with background at a face; beyond the volume there is none."""
    inner = mask.copy()
    for axis in range(3):
        along, kept = np.moveaxis(mask, axis, 0), np.moveaxis(inner, axis, 0)
        kept[1:] &= along[:-1]
        kept[:-1] &= along[1:]
    surface: BoolMask = mask & ~inner
    return surface


def _nearest_mm(
    box_vox: Float[np.ndarray, "2 3"], surface: BoolMask, spacing_mm: tuple[float, float, float], most_mm: float
) -> float:
    """Distance from the voxels of a box to the surface, looked for no further than `most_mm` around it.

    No map of distances: for a whole scan that takes ten times the memory of the mask.
    """
    if not (box_vox[1] > box_vox[0]).all():
        return math.inf
    inside = _voxels(box_vox)
    if surface[inside].any():
        return 0.0
    around = tuple(
        slice(max(0, side.start - reach), side.stop + reach)
        for side, reach in zip(inside, (int(most_mm / spacing) for spacing in spacing_mm), strict=True)
    )
    squares = np.zeros(np.count_nonzero(surface[around]))
    for side, start, found, spacing in zip(inside, around, surface[around].nonzero(), spacing_mm, strict=True):
        at = found + start.start
        squares += (np.maximum(np.maximum(side.start - at, at - (side.stop - 1)), 0) * spacing) ** 2
    nearest = math.sqrt(squares.min(initial=math.inf))
    return nearest if nearest <= most_mm else math.inf


def _voxels(box_vox: Float[np.ndarray, "2 3"]) -> tuple[slice, slice, slice]:
    """Voxels that a box meets; a part before voxel 0 is cut off."""
    # Corners that were resampled miss whole numbers by rounding.
    low = np.maximum(np.floor(box_vox[0] + 1e-6).astype(int), 0)
    high = np.maximum(np.ceil(box_vox[1] - 1e-6).astype(int), 0)
    x, y, z = (slice(int(first), int(last)) for first, last in zip(low, high, strict=True))
    return x, y, z
