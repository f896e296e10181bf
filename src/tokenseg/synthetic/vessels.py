"""Blood vessels as bent tubes, put into voxels by counting points spread evenly over their volume."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from jaxtyping import Float

from tokenseg.synthetic.anatomy import Anatomy
from tokenseg.synthetic.grid import Field, ScanGrid

Position: TypeAlias = Float[np.ndarray, " 3"]

_POINTS_PER_VOXEL = 120
_STEP_MM = 0.4


@dataclass(frozen=True, eq=False)
class Vessel:
    """A tube along a bent line.

    Attributes:
        line_mm: Points along its middle, evenly spaced, along left, posterior, superior.
        radius_mm: Radius at each point.
    """

    line_mm: Float[np.ndarray, "n 3"]
    radius_mm: Float[np.ndarray, " n"]


def draw_vessels(rng: np.random.Generator, anatomy: Anatomy, side: Literal["left", "right"]) -> tuple[Vessel, ...]:
    """Draw the vessels of a breast: from both edges of the chest wall to the nipple, and two behind the breast bone."""
    outwards = 1.0 if side == "left" else -1.0
    nipple = np.array(anatomy.nipple_mm)
    vessels = []
    for _ in range(rng.integers(4, 8)):
        trunk = _to_nipple(rng, nipple, outwards * (1 if rng.random() < 0.6 else -1))
        vessels += [trunk, *(_branch(rng, trunk, nipple) for _ in range(rng.integers(0, 3)))]
    for offset_mm in (0.0, 5.0):
        start = nipple + np.array([-outwards * (56 + offset_mm), rng.uniform(78, 82), -70])
        vessels.append(_wriggle(rng, start, start + np.array([0, 0, 140]), 1.5, radius_mm=(1.7, 1.7)))
    return tuple(vessels)


def vessel_share(rng: np.random.Generator, vessels: tuple[Vessel, ...], grid: ScanGrid) -> Field:
    """Share of each voxel that vessels fill; what leaves the grid is cut off.

    Args:
        rng: Source of the points; about 120 a voxel, so shares have an error of a few percent.
        vessels: The tubes.
        grid: Where to put them.
    """
    point_mm3 = 1000 * grid.voxel_ml / _POINTS_PER_VOXEL
    counts = np.zeros(math.prod(grid.shape_vox), dtype=np.float32)
    for vessel in vessels:
        indices = np.floor(_points_inside(rng, vessel, point_mm3) / np.array(grid.spacing_mm)).astype(np.int64)
        kept = ((indices >= 0) & (indices < grid.shape_vox)).all(axis=1)
        flat = np.ravel_multi_index(tuple(indices[kept].T), grid.shape_vox)
        counts += np.bincount(flat, minlength=counts.size).astype(np.float32)
    return np.minimum(counts.reshape(grid.shape_vox) / _POINTS_PER_VOXEL, 1)


def _to_nipple(rng: np.random.Generator, nipple: Position, sideways: float) -> Vessel:
    angle = rng.uniform(-1.2, 1.2)
    away = np.array([sideways * math.cos(angle), 0.0, math.sin(angle)])
    start = nipple + rng.uniform(30, 46) * away + np.array([0, rng.uniform(52, 72), 0])
    end = nipple + rng.uniform(4, 24) * away + np.array([0, rng.uniform(8, 28), 0])
    thick = rng.uniform(0.8, 1.6)
    return _wriggle(rng, start, end, 9.0, radius_mm=(thick, 0.5 * thick), bow=rng.uniform(-4, 10) * away)


def _branch(rng: np.random.Generator, trunk: Vessel, nipple: Position) -> Vessel:
    index = int(rng.integers(len(trunk.line_mm) // 5, 4 * len(trunk.line_mm) // 5))
    start, thick = trunk.line_mm[index], 0.75 * float(trunk.radius_mm[index])
    end = start + 0.5 * (nipple - start) + rng.normal(0, 14, 3)
    return _wriggle(rng, start, end, 6.0, radius_mm=(thick, 0.5 * thick))


def _wriggle(
    rng: np.random.Generator,
    start: Position,
    end: Position,
    wriggle_mm: float,
    *,
    radius_mm: tuple[float, float],
    bow: Position | None = None,
) -> Vessel:
    """A line from start to end with a bow and three random waves, the radius going from one to the other."""
    along = np.linspace(0, 1, math.ceil(1.3 * float(np.linalg.norm(end - start)) / _STEP_MM))[:, None]
    line = start + (end - start) * along
    if bow is not None:
        line += bow * np.sin(np.pi * along)
    for wave in (1, 2, 3, 5):  # all are zero at both ends
        line += rng.normal(0, wriggle_mm / (2 * wave), 3) * np.sin(np.pi * wave * along)
    return Vessel(line, np.interp(along[:, 0], (0, 1), radius_mm))


def _points_inside(rng: np.random.Generator, vessel: Vessel, point_mm3: float) -> Float[np.ndarray, "n 3"]:
    """Points spread evenly over the volume: as many a piece as it holds multiples of `point_mm3`, in random discs."""
    steps = np.gradient(vessel.line_mm, axis=0)
    lengths = np.linalg.norm(steps, axis=1)
    wanted = np.cumsum(np.pi * vessel.radius_mm**2 * lengths / point_mm3)
    pieces = np.repeat(np.arange(len(lengths)), np.diff(np.floor(wanted).astype(np.int64), prepend=0))
    directions = (steps / lengths[:, None])[pieces]
    # Any direction that is not along the vessel will do to span its cross-section.
    across = np.cross(directions, np.eye(3)[np.abs(directions).argmin(axis=1)])
    across /= np.linalg.norm(across, axis=1, keepdims=True)
    upright = np.cross(directions, across)
    radius = (vessel.radius_mm[pieces] * np.sqrt(rng.random(len(pieces))))[:, None]
    angle = rng.uniform(0, 2 * np.pi, (len(pieces), 1))
    forwards = rng.uniform(-0.5, 0.5, (len(pieces), 1)) * steps[pieces]
    points: Float[np.ndarray, "n 3"] = (
        vessel.line_mm[pieces] + forwards + radius * (np.cos(angle) * across + np.sin(angle) * upright)
    )
    return points
