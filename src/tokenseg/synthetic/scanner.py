"""The simulated scanner: ideal signal in, stored numbers out; coil shading, motion between phases, complex noise.

Noise in magnitude images follows Rice's distribution (Gudbjartsson and Patz 1995, Magn Reson Med 34:910).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from jaxtyping import Int16
from scipy.ndimage import map_coordinates

from tokenseg.shapes import Affine
from tokenseg.synthetic.grid import Field, ScanGrid, Triple, smooth_noise
from tokenseg.synthetic.kinetics import Sequence

CentreName: TypeAlias = Literal["internal", "external"]

_GLAND_SIGNAL = 0.026  # of a gland before contrast agent, about the same in all protocols


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How one exam is scanned."""

    centre: CentreName
    grid: ScanGrid
    sequence: Sequence
    fat_left: float
    """Share of the fat's signal that fat suppression leaves."""
    noise: float
    """Deviation of the noise in each of the two receiver channels, as a share of a gland's signal."""
    shading: float
    """How strongly sensitivity varies: deviation of its logarithm, towards the coil and at random."""
    motion_mm: float
    """Typical shift between two phases."""
    gain: float
    """Stored value of a signal of 1."""
    tilt_degrees: float
    """Turn of the slices about the left-right axis."""


def draw_protocol(rng: np.random.Generator, centre: CentreName, *, whole: bool = False) -> Protocol:
    """Draw the scan protocol of an exam: ranges by centre, the external one with another scanner altogether.

    Args:
        rng: Source of the draws.
        centre: Where it is scanned.
        whole: Both breasts, at about 1 mm, instead of one.
    """
    if centre == "internal":
        steps = rng.uniform(1.4, 1.6), rng.uniform(2.3, 2.7)
        sequence = Sequence(
            field_strength_t=1.5,
            repetition_ms=rng.uniform(4.8, 5.4),
            flip_degrees=rng.uniform(12, 14),
            post_contrast_s=(rng.uniform(85, 100), rng.uniform(235, 260)),
        )
        fat_left, noise, shading, motion_mm = rng.uniform(0.1, 0.2), rng.uniform(0.04, 0.08), 0.12, 0.35
    else:
        steps = rng.uniform(1.15, 1.25), rng.uniform(2.9, 3.1)
        sequence = Sequence(
            field_strength_t=3.0,
            repetition_ms=rng.uniform(4.0, 4.4),
            flip_degrees=rng.uniform(9.5, 10.5),
            post_contrast_s=(rng.uniform(65, 75), rng.uniform(290, 310)),
        )
        fat_left, noise, shading, motion_mm = rng.uniform(0.2, 0.35), rng.uniform(0.09, 0.14), 0.25, 0.5
    return Protocol(
        centre=centre,
        grid=_whole_grid(rng) if whole else _grid(rng, *steps),
        sequence=sequence,
        fat_left=fat_left,
        noise=noise,
        shading=shading,
        motion_mm=motion_mm,
        gain=rng.uniform(4000, 9000),
        tilt_degrees=rng.uniform(-6, 6),
    )


def suppress_fat(rng: np.random.Generator, protocol: Protocol) -> Field:
    """Factor on the fat's signal: what the protocol leaves of it, and more in a region where suppression fails."""
    failure = np.clip(smooth_noise(rng, protocol.grid, 70.0) - 1.5, 0, 1)
    factor: Field = np.minimum(protocol.fat_left * (1 + 2 * failure), 1)
    return factor


def coil_shading(rng: np.random.Generator, protocol: Protocol) -> Field:
    """Sensitivity of the coil, around 1: it falls from the nipple to the back, and varies slowly."""
    _, posterior, _ = protocol.grid.centres_mm()
    fall = 2.2 * (0.4 - posterior / protocol.grid.extent_mm[1])
    shading: Field = np.exp(protocol.shading * (fall + smooth_noise(rng, protocol.grid, 80.0)))
    return shading


def move(rng: np.random.Generator, image: Field, protocol: Protocol) -> Field:
    """Shift and bend an image slightly, as a patient does between two phases."""
    grid = protocol.grid
    places = np.stack(np.meshgrid(*(np.arange(size, dtype=np.float32) for size in grid.shape_vox), indexing="ij"))
    for axis, step in enumerate(grid.spacing_mm):
        shift_mm = rng.normal(0, protocol.motion_mm) + 0.5 * protocol.motion_mm * smooth_noise(rng, grid, 60.0)
        places[axis] += shift_mm / np.float32(step)
    moved: Field = map_coordinates(image, places, order=1, mode="nearest")
    return moved


def measure(rng: np.random.Generator, image: Field, protocol: Protocol) -> Int16[np.ndarray, "X Y Z"]:
    """Add complex noise, take the magnitude, and store it as whole numbers from 0 to 32767."""
    deviation = np.float32(protocol.noise * _GLAND_SIGNAL)
    real = image + deviation * rng.standard_normal(image.shape, dtype=np.float32)
    imaginary = deviation * rng.standard_normal(image.shape, dtype=np.float32)
    magnitude = protocol.gain * np.hypot(real, imaginary)
    stored: Int16[np.ndarray, "X Y Z"] = np.clip(np.rint(magnitude), 0, np.iinfo(np.int16).max).astype(np.int16)
    return stored


def stored_affine(protocol: Protocol, origin_mm: Triple) -> Affine:
    """Affine to RAS+ of voxels stored along left, posterior, superior, the slices tilted about the first axis.

    Args:
        protocol: Spacing and tilt.
        origin_mm: World position of the centre of the first voxel.
    """
    angle = math.radians(protocol.tilt_degrees)
    turn = np.array([[1, 0, 0], [0, math.cos(angle), -math.sin(angle)], [0, math.sin(angle), math.cos(angle)]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag(np.array([-1, -1, 1]) * protocol.grid.spacing_mm)
    affine[:3, 3] = origin_mm
    return affine


def _grid(rng: np.random.Generator, in_plane_mm: float, slices_mm: float) -> ScanGrid:
    """About 144 x 144 x 120 mm, in even numbers of voxels, so that exams differ a little in shape."""
    extents = 144 * rng.uniform(0.98, 1.02), 144.0, 120 * rng.uniform(0.96, 1.04)
    return _grid_of(extents, (in_plane_mm, in_plane_mm, slices_mm))


def _whole_grid(rng: np.random.Generator) -> ScanGrid:
    """About 346 x 340 x 176 mm at 1 x 1 x 1.7 mm: at least 320 x 320 x 96 voxels."""
    extents = 346 * rng.uniform(0.98, 1.02), 340.0, 176 * rng.uniform(0.99, 1.02)
    in_plane_mm = rng.uniform(0.99, 1.05)
    return _grid_of(extents, (in_plane_mm, in_plane_mm, rng.uniform(1.65, 1.8)))


def _grid_of(extents_mm: Triple, spacing_mm: Triple) -> ScanGrid:
    spacing = tuple(round(float(step), 3) for step in spacing_mm)
    x, y, z = (2 * round(extent / step / 2) for extent, step in zip(extents_mm, spacing, strict=True))
    return ScanGrid(shape_vox=(x, y, z), spacing_mm=(spacing[0], spacing[1], spacing[2]))
