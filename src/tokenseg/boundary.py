"""How near the kept tokens lie to a boundary: the paper's "over 60 % of the kept lie near the tumour boundary".

The paper does not define near. Here a token is near when its cell meets the surface dilated by a radius in mm. Cells
are large and the share alone says little, so it comes with three companions: the base rate over all candidates, the
enrichment (share / base rate), and the ceiling (what a perfect choice of K could reach).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from scipy.ndimage import binary_erosion, distance_transform_edt

from tokenseg.errors import DataError
from tokenseg.losses import cell_foreground
from tokenseg.model.network import TokenRecord
from tokenseg.shapes import BoolMask


class NearBoundary(NamedTuple):
    """Kept tokens near a boundary; fractions 0..1."""

    share: float
    """Of the kept tokens, those near the boundary."""
    base_rate: float
    """Of all candidates, those near the boundary."""
    enrichment: float
    """share / base_rate; 1 is chance. NaN where nothing is near."""
    ceiling: float
    """Highest share that K kept tokens could have: min(1, near candidates / K)."""


def near_boundary(
    tokens: TokenRecord, mask: BoolMask, spacing_mm: tuple[float, float, float], radius_mm: float
) -> NearBoundary:
    """Measure one volume.

    Args:
        tokens: Record of a forward pass of one volume; only its first batch element is used.
        mask: Foreground on the network's input grid, reference or predicted.
        spacing_mm: Voxel spacing of that grid.
        radius_mm: Distance up to which a cell is near; 0 asks that the surface passes through it.

    Raises:
        DataError: The mask is empty or fills the volume, so there is no boundary.
    """
    surface = mask & ~binary_erosion(mask, border_value=1)
    if not surface.any():
        raise DataError("the mask has no boundary: it is empty or fills the whole volume")
    within = distance_transform_edt(~surface, sampling=spacing_mm) <= radius_mm
    inside, _ = cell_foreground(torch.from_numpy(np.ascontiguousarray(within))[None], tokens.boxes_vox)
    near = inside[0] > 0
    kept = tokens.kept[0].cpu()
    share = float(near[kept].float().mean())
    base_rate = float(near.float().mean())
    return NearBoundary(share, base_rate, share / base_rate, min(1.0, int(near.sum()) / int(kept.sum())))
