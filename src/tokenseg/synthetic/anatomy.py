"""One breast, lying prone, as shares of tissues in voxels: outline, skin, fat, gland, chest wall, heart or liver.

Lengths and positions are in mm. `lateral` grows towards the outer side of the breast, `height` from the back edge of
the field of view towards the nipple, `up` towards the head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from tokenseg.synthetic.grid import Field, Mesh, ScanGrid, Triple, coverage, slope_per_mm, smooth_noise
from tokenseg.synthetic.kinetics import TissueName

Shares: TypeAlias = dict[TissueName, Field]

NIPPLE_FROM_MIDDLE_MM = 58
"""Distance from the breast bone to the nipple, along left."""

_BLEND_MM = 14.0
_NIPPLE_RADIUS_MM = 6.5
_MUSCLE_MM = 10.0
_RIBS_MM = 11.0
_SUBCUTANEOUS_MM = 7.0
_RETROMAMMARY_MM = 6.0
_HEART_WALL_MM = 9.0


@dataclass(frozen=True, kw_only=True)
class BreastShape:
    """The drawn sizes of one breast."""

    side: Literal["left", "right"]
    half_width_mm: float
    half_height_mm: float
    depth_mm: float
    """From the chest wall to the nipple."""
    centre_up_mm: float
    """Height of the nipple above the middle of the field of view."""
    chest_mm: float
    """Height of the chest wall at the breast bone."""
    chest_radius_mm: float
    """How strongly the chest wall falls back to the side."""
    padding_mm: float
    """Skin and fat over the chest wall beside the breast."""
    skin_mm: float
    gland_share: float
    """Of the breast without its skin; the four density classes of BI-RADS lie in 0.05 to 0.6."""
    off_centre_mm: float = 0.0
    """How far to the left of the middle of the field of view the nipple stands."""
    behind_mm: float = 0.0
    """Depth of the field of view behind where that of a single breast ends."""


@dataclass(frozen=True, eq=False)
class Anatomy:
    """A breast on a grid, before any lesion.

    Attributes:
        shares: Share of each tissue in each voxel; they add to at most 1, and the rest is air, lung or void of signal.
        depth_mm: Distance to the skin's surface, negative outside; good near the surface, rough deep inside.
        above_chest_mm: Height above the chest wall.
        nipple_mm: Position of the nipple along left, posterior, superior.
    """

    shares: Shares
    depth_mm: Field
    above_chest_mm: Field
    nipple_mm: Triple


@dataclass(frozen=True, eq=False)
class _Frame:
    """Positions relative to the breast, as an open mesh."""

    lateral: Mesh
    height: Mesh
    up: Mesh


def draw_breast(rng: np.random.Generator) -> BreastShape:
    """Draw the sizes of a breast."""
    return BreastShape(
        side="left" if rng.random() < 0.5 else "right",
        half_width_mm=rng.uniform(46, 56),
        half_height_mm=rng.uniform(40, 50),
        depth_mm=rng.uniform(62, 82),
        centre_up_mm=rng.uniform(-5, 5),
        chest_mm=rng.uniform(48, 54),
        chest_radius_mm=rng.uniform(140, 180),
        padding_mm=rng.uniform(7, 12),
        skin_mm=rng.uniform(1.5, 2.4),
        gland_share=float(rng.choice([0.07, 0.18, 0.32, 0.5], p=[0.1, 0.4, 0.4, 0.1])) * rng.uniform(0.8, 1.2),
    )


def build_anatomy(rng: np.random.Generator, shape: BreastShape, grid: ScanGrid) -> Anatomy:
    """Fill a grid with the tissues of a breast.

    Args:
        rng: Source of the textures and of small irregularities.
        shape: Sizes of the breast.
        grid: Where to put it.
    """
    frame = _frame(shape, grid)
    chest = frame.height - _chest_height(shape, frame.lateral) + 1.5 * smooth_noise(rng, grid, (30.0, 30.0, 16.0))
    outline, nipple = _outline(shape, frame, chest)
    outline += 1.3 * smooth_noise(rng, grid, 28.0)
    depth = -outline / np.clip(slope_per_mm(outline, grid), 0.3, None)
    body = coverage(outline)
    inner = np.minimum(body, coverage(shape.skin_mm - depth))
    inner -= np.minimum(inner, coverage(nipple))
    wall = coverage(chest)
    shares = _chest_wall(rng, shape, frame, chest, grid)
    shares = {name: share * inner for name, share in shares.items()}
    shares["skin"] = body - inner
    breast = inner * (1 - wall)
    shares["gland"] = breast * _gland(rng, shape, frame, depth, chest, grid)
    shares["fat"] += breast - shares["gland"]
    tip = _nipple_height(shape)
    nipple_mm = (_nipple_left(shape, grid), grid.extent_mm[1] - shape.behind_mm - tip, _centre_up(shape, grid))
    return Anatomy(shares, depth, chest, nipple_mm)


def _frame(shape: BreastShape, grid: ScanGrid) -> _Frame:
    left, posterior, superior = grid.centres_mm()
    lateral = left - np.float32(_nipple_left(shape, grid))
    return _Frame(
        lateral=lateral if shape.side == "left" else -lateral,
        height=np.float32(grid.extent_mm[1] - shape.behind_mm) - posterior,
        up=superior - np.float32(_centre_up(shape, grid)),
    )


def _nipple_left(shape: BreastShape, grid: ScanGrid) -> float:
    return grid.extent_mm[0] / 2 + shape.off_centre_mm


def _centre_up(shape: BreastShape, grid: ScanGrid) -> float:
    return grid.extent_mm[2] / 2 + shape.centre_up_mm


def _chest_height(shape: BreastShape, lateral: Mesh) -> Mesh:
    height: Mesh = shape.chest_mm - (lateral + NIPPLE_FROM_MIDDLE_MM) ** 2 / (2 * shape.chest_radius_mm)
    return height


def _base_height(shape: BreastShape) -> float:
    return shape.chest_mm - NIPPLE_FROM_MIDDLE_MM**2 / (2 * shape.chest_radius_mm)


def _nipple_height(shape: BreastShape) -> float:
    return _base_height(shape) + shape.depth_mm


def _outline(shape: BreastShape, frame: _Frame, chest: Field) -> tuple[Field, Field]:
    """Signed fields in about mm, negative inside: of the whole body, and of the nipple."""
    across = (frame.lateral / shape.half_width_mm) ** 2 + (frame.up / shape.half_height_mm) ** 2
    along = (frame.height - _base_height(shape)) / shape.depth_mm
    radius = np.sqrt(across**1.25 + np.abs(along) ** 2.5) ** 0.8
    breast = (radius - 1) * min(shape.half_width_mm, shape.half_height_mm, shape.depth_mm)
    trunk = chest - shape.padding_mm
    overlap = np.maximum(_BLEND_MM - np.abs(breast - trunk), 0)
    body = np.minimum(breast, trunk) - overlap**2 / (4 * _BLEND_MM)
    from_tip = frame.height - _nipple_height(shape) + 1.5
    nipple = np.sqrt(frame.lateral**2 + from_tip**2 + frame.up**2) - _NIPPLE_RADIUS_MM
    return np.minimum(body, nipple), nipple


def _gland(
    rng: np.random.Generator, shape: BreastShape, frame: _Frame, depth: Field, chest: Field, grid: ScanGrid
) -> Field:
    """Share of gland in what is neither skin nor chest wall: strands towards the nipple, and thin ligaments."""
    axis = np.sqrt((frame.lateral / shape.half_width_mm) ** 2 + (frame.up / shape.half_height_mm) ** 2)
    texture = (
        0.8 * smooth_noise(rng, grid, (24.0, 36.0, 24.0))
        + 0.9 * smooth_noise(rng, grid, (11.0, 20.0, 11.0))
        + 0.8 * smooth_noise(rng, grid, (5.0, 10.0, 5.0))
        + 0.5 * smooth_noise(rng, grid, (2.5, 4.0, 2.5))
    )
    envelope = np.minimum(depth - _SUBCUTANEOUS_MM, chest - _RETROMAMMARY_MM) / 7
    score = texture + 2.6 * np.minimum(envelope, 1) - 1.8 * axis
    inside = (depth > shape.skin_mm) & (chest > 0)
    threshold = np.quantile(score[inside], 1 - shape.gland_share)
    gland = np.clip(0.5 + (score - threshold) / 2.2, 0, 1)
    ligament = np.zeros_like(gland)
    for length_mm, strength in ((18.0, 0.4), (9.0, 0.3)):
        sheet = smooth_noise(rng, grid, (length_mm, 2 * length_mm, length_mm)) * (length_mm / 2)
        np.maximum(ligament, strength * np.exp(-(sheet**2)), out=ligament)
    ligament *= np.clip(chest / 8, 0, 1)
    share: Field = np.maximum(gland, ligament)
    return share


def _chest_wall(rng: np.random.Generator, shape: BreastShape, frame: _Frame, chest: Field, grid: ScanGrid) -> Shares:
    """Shares of what lies behind the breast: pectoral muscle, ribs, lung, and the heart or the dome of the liver."""
    wall = coverage(chest)
    behind_muscle = coverage(chest + _MUSCLE_MM)
    cavity = coverage(chest + _MUSCLE_MM + _RIBS_MM)
    turns = (frame.up + 0.35 * frame.lateral + rng.uniform(0, 26)) * (2 * np.pi / 26)
    middle = chest + _MUSCLE_MM + _RIBS_MM / 2
    rib = coverage(np.hypot(1.5 * (1 - np.cos(turns)), middle / 4) - 1.2) * (behind_muscle - cavity)
    gaps = coverage(np.abs(chest + _MUSCLE_MM) - 1.0)  # fat between the muscle and the ribs
    organ, chambers = np.zeros_like(wall), np.zeros_like(wall)
    bumps = 1.5 * smooth_noise(rng, grid, 18.0)
    if shape.side == "left":
        surface = _ellipsoid(frame, centre_mm=(-34.0, 1.0, -8.0), radii_mm=(40.0, 26.0, 42.0)) + bumps
        chambers = coverage(surface + _HEART_WALL_MM) * cavity
        organ = coverage(surface) * cavity - chambers
    else:
        organ = (
            coverage(_ellipsoid(frame, centre_mm=(-26.0, -6.0, -48.0), radii_mm=(60.0, 36.0, 50.0)) + bumps) * cavity
        )
    return {
        "muscle": (wall - cavity - rib) * (1 - gaps),
        "bone": rib,
        "heart" if shape.side == "left" else "liver": organ,
        "blood": chambers,
        "fat": (wall - cavity - rib) * gaps,
    }


def _ellipsoid(frame: _Frame, *, centre_mm: Triple, radii_mm: Triple) -> Field:
    """Signed field in about mm, negative inside; the axes are lateral, height and up."""
    axes = zip((frame.lateral, frame.height, frame.up), centre_mm, radii_mm, strict=True)
    squares = [((axis - centre) / radius) ** 2 for axis, centre, radius in axes]
    level: Field = (np.sqrt(squares[0] + squares[1] + squares[2]) - 1) * min(radii_mm)
    return level
