"""Distances between the surfaces of two masks, in millimetres."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import ndimage
from scipy.spatial import cKDTree

from tokenseg.evaluation.mask_pairs import PredictionMask, SpacingMm, bounding_box, check_same_shape, check_spacing
from tokenseg.shapes import BoolMask


class SurfaceDistances(NamedTuple):
    """For each surface voxel of one mask the distance to the nearest surface voxel of the other, in mm, unsorted."""

    reference_to_prediction_mm: Float[np.ndarray, " n"]
    prediction_to_reference_mm: Float[np.ndarray, " m"]


def surface_distances_mm(reference: BoolMask, prediction: PredictionMask, spacing_mm: SpacingMm) -> SurfaceDistances:
    """Distances between the two surfaces, both ways, between voxel centres.

    A surface voxel is a mask voxel with one of its 6 neighbours outside the mask; beyond the border of the volume is
    outside. If one of the masks is empty, the distances from the other are infinite.

    Raises:
        GeometryError: The masks differ in shape, or a spacing is not positive.
    """
    check_same_shape(reference, prediction)
    check_spacing(spacing_mm)
    box = bounding_box(reference | prediction)
    reference_mm = _surface_points_mm(reference[box], spacing_mm)
    prediction_mm = _surface_points_mm(prediction[box], spacing_mm)
    return SurfaceDistances(_nearest_mm(reference_mm, prediction_mm), _nearest_mm(prediction_mm, reference_mm))


def _surface_points_mm(mask: BoolMask, spacing_mm: SpacingMm) -> Float[np.ndarray, "n 3"]:
    inner = ndimage.binary_erosion(mask)  # 6-neighbourhood; beyond the array counts as outside
    return np.argwhere(mask & ~inner) * np.asarray(spacing_mm, dtype=np.float64)


def _nearest_mm(from_mm: Float[np.ndarray, "n 3"], to_mm: Float[np.ndarray, "m 3"]) -> Float[np.ndarray, " n"]:
    if len(from_mm) == 0 or len(to_mm) == 0:
        return np.full(len(from_mm), np.inf)
    distances_mm, _ = cKDTree(to_mm).query(from_mm)
    return np.asarray(distances_mm)
