"""Both breasts of a patient in one field of view; the back of the chest is left empty."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
from jaxtyping import Float

from tokenseg.synthetic.anatomy import NIPPLE_FROM_MIDDLE_MM, Anatomy, BreastShape, build_anatomy, draw_breast
from tokenseg.synthetic.grid import Field, ScanGrid, Triple
from tokenseg.synthetic.kinetics import TissueName

_FRONT_MM = 144.0  # depth of the field of view of a single breast
_OVERLAP_MM = 12.0


def draw_both(rng: np.random.Generator, grid: ScanGrid) -> tuple[Anatomy, Triple]:
    """Draw two breasts on one chest wall: each has its own size and gland, chest and skin are of one patient.

    Each half is built by itself, somewhat beyond the middle, and there one fades into the other.

    Args:
        rng: Source of the draws.
        grid: The field of view, with an even number of voxels from left to right; about 340 mm wide, at least 144 deep.

    Returns:
        The anatomy, whose nipple is that of the left breast, and the position of the right one.
    """
    overlap = round(_OVERLAP_MM / grid.spacing_mm[0])
    shape = replace(draw_breast(rng), behind_mm=grid.extent_mm[1] - _FRONT_MM)
    right = _build_half(rng, _sided(rng, shape, "right", overlap, grid), overlap, grid)
    left = _build_half(rng, _sided(rng, shape, "left", overlap, grid), overlap, grid)
    anatomy = Anatomy(
        shares={name: _joined(right.shares.get(name), left.shares.get(name), overlap) for name in _names(right, left)},
        depth_mm=_joined(right.depth_mm, left.depth_mm, overlap),
        above_chest_mm=_joined(right.above_chest_mm, left.above_chest_mm, overlap),
        nipple_mm=(grid.extent_mm[0] / 2 + NIPPLE_FROM_MIDDLE_MM, *left.nipple_mm[1:]),
    )
    return anatomy, (grid.extent_mm[0] / 2 - NIPPLE_FROM_MIDDLE_MM, *right.nipple_mm[1:])


def _sided(
    rng: np.random.Generator, shape: BreastShape, side: Literal["left", "right"], overlap: int, grid: ScanGrid
) -> BreastShape:
    """One breast of the patient, placed in the field of view of its half."""
    own = draw_breast(rng)
    from_middle_mm = NIPPLE_FROM_MIDDLE_MM + (overlap * grid.spacing_mm[0] - grid.extent_mm[0] / 2) / 2
    return replace(
        shape,
        side=side,
        half_width_mm=own.half_width_mm,
        half_height_mm=own.half_height_mm,
        depth_mm=own.depth_mm,
        off_centre_mm=from_middle_mm if side == "left" else -from_middle_mm,
    )


def _build_half(rng: np.random.Generator, shape: BreastShape, overlap: int, grid: ScanGrid) -> Anatomy:
    x, y, z = grid.shape_vox
    return build_anatomy(rng, shape, replace(grid, shape_vox=(x // 2 + overlap, y, z)))


def _names(right: Anatomy, left: Anatomy) -> list[TissueName]:
    """Tissues of both, each once: the heart is on the left, the liver on the right."""
    return list(dict.fromkeys([*right.shares, *left.shares]))


def _joined(right: Float[np.ndarray, "n Y Z"] | None, left: Float[np.ndarray, "n Y Z"] | None, overlap: int) -> Field:
    """Put the halves side by side (voxels run from right to left), the overlap going evenly from one to the other."""
    empty = np.zeros_like(next(half for half in (right, left) if half is not None))
    right, left = (empty if half is None else half for half in (right, left))
    share = ((np.arange(2 * overlap, dtype=np.float32) + 0.5) / (2 * overlap))[:, None, None]
    middle = right[-2 * overlap :] * (1 - share) + left[: 2 * overlap] * share
    joined: Field = np.concatenate([right[: -2 * overlap], middle, left[2 * overlap :]])
    return joined
