"""Two masks that are compared: what each may be, and that they fit together."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from jaxtyping import Bool
from scipy import ndimage

from tokenseg.errors import GeometryError
from tokenseg.shapes import BoolMask

# Three axes; that they are as long as the reference's is checked here, since types are only checked in tests.
PredictionMask: TypeAlias = Bool[np.ndarray, "_ _ _"]
SpacingMm: TypeAlias = tuple[float, float, float]


def check_same_shape(reference: BoolMask, prediction: PredictionMask) -> None:
    """Refuse masks on different grids.

    Raises:
        GeometryError: Their shapes differ.
    """
    if reference.shape != prediction.shape:
        raise GeometryError(
            f"reference mask has shape {reference.shape}, prediction {prediction.shape}; "
            "both must be on one grid, resample the prediction to the reference"
        )


def check_spacing(spacing_mm: SpacingMm) -> None:
    """Refuse a spacing that is none.

    Raises:
        GeometryError: A side is not positive and finite.
    """
    if not all(np.isfinite(size) and size > 0 for size in spacing_mm):
        raise GeometryError(f"voxel spacing is {spacing_mm} mm; all three must be positive, mend the image's header")


def bounding_box(mask: BoolMask) -> tuple[slice, slice, slice]:
    """Smallest box with all of the mask; an empty box for an empty mask."""
    boxes = ndimage.find_objects(mask.astype(np.uint8))
    return boxes[0] if boxes else (slice(0), slice(0), slice(0))


def ratio(part: int, whole: int) -> float:
    """Share of a whole; NaN where there is none."""
    return part / whole if whole else float("nan")
