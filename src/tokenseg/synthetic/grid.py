"""The voxel grid of a synthetic scan, and what depends on nothing else: shares of voxels, and smooth random textures.

Positions are in mm from the outer corner of the field of view, along left, posterior and superior (the order in which
the voxels are stored).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from jaxtyping import Float

Field: TypeAlias = Float[np.ndarray, "X Y Z"]
Mesh: TypeAlias = Float[np.ndarray, "#X #Y #Z"]
"""One coordinate of an open mesh: broadcasts to X Y Z."""
Mesh3: TypeAlias = tuple[Mesh, Mesh, Mesh]
Triple: TypeAlias = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class ScanGrid:
    """Where the voxels of a scan are."""

    shape_vox: tuple[int, int, int]
    spacing_mm: Triple

    @property
    def extent_mm(self) -> Triple:
        """Size of the field of view."""
        x, y, z = (size * step for size, step in zip(self.shape_vox, self.spacing_mm, strict=True))
        return x, y, z

    @property
    def voxel_ml(self) -> float:
        """Volume of one voxel."""
        return math.prod(self.spacing_mm) / 1000

    def centres_mm(self) -> Mesh3:
        """Positions of the voxel centres as an open mesh: three arrays that broadcast to the shape of the scan."""
        axes = [
            (np.arange(size, dtype=np.float32) + 0.5) * np.float32(step)
            for size, step in zip(self.shape_vox, self.spacing_mm, strict=True)
        ]
        return axes[0][:, None, None], axes[1][None, :, None], axes[2][None, None, :]


def coverage(level: Field) -> Field:
    """Share of each voxel that lies where `level` is negative, as if `level` were linear inside the voxel.

    Args:
        level: Signed field whose zero is the surface, in any unit; only its zero and its slope there matter.

    Returns:
        Shares from 0 to 1; a voxel cut through its centre gives 0.5.
    """
    reach = np.zeros_like(level)
    for axis in range(3):
        reach += np.abs(np.gradient(level, axis=axis))
    shares: Field = np.clip(0.5 - level / np.maximum(reach, np.float32(1e-6)), 0, 1)
    return shares


def slope_per_mm(level: Field, grid: ScanGrid) -> Field:
    """Length of the gradient of a field; `level / slope` is about the distance in mm to its zero."""
    squares = np.zeros_like(level)
    for axis, step in enumerate(grid.spacing_mm):
        squares += np.gradient(level, np.float32(step), axis=axis) ** 2
    slope: Field = np.sqrt(squares)
    return slope


def smooth_noise(rng: np.random.Generator, grid: ScanGrid, length_mm: float | Triple) -> Field:
    """Random texture: normal values on a lattice, joined by cubic B-splines.

    Values look alike up to a distance of about `length_mm`, whatever the size of the voxels.

    Args:
        rng: Source of the lattice values.
        grid: Where to evaluate it.
        length_mm: Distance of the lattice points, one number or one an axis.

    Returns:
        Values with mean 0 and variance 1 at every voxel.
    """
    lengths = (length_mm,) * 3 if isinstance(length_mm, float) else length_mm
    weights = [_spline_weights(*axis) for axis in zip(grid.shape_vox, grid.spacing_mm, lengths, strict=True)]
    values: Field = rng.standard_normal([weight.shape[1] for weight in weights], dtype=np.float32)
    for weight in weights:
        # Contracts the first axis and appends the finer one at the end; after three turns the order is X Y Z again.
        values = np.tensordot(values, weight, axes=(0, 1))
    return values


def _spline_weights(size: int, spacing_mm: float, length_mm: float) -> Float[np.ndarray, "n m"]:
    position = (np.arange(size) + 0.5) * spacing_mm / length_mm
    nodes = np.arange(-1, math.floor(position[-1]) + 3)
    distance = np.abs(position[:, None] - nodes)
    near = 2 / 3 - distance**2 + distance**3 / 2
    far = np.maximum(2 - distance, 0) ** 3 / 6
    weights = np.where(distance < 1, near, far)
    scaled: Float[np.ndarray, "n m"] = weights / np.sqrt((weights**2).sum(axis=1, keepdims=True))
    return scaled.astype(np.float32)
