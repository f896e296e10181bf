"""Lesions: masses that are lobulated or spiculated and take up contrast at the rim or heterogeneously.

Words as in the BI-RADS lexicon for breast MRI (American College of Radiology, 5th edition, 2013).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from jaxtyping import Float
from scipy.ndimage import distance_transform_edt

from tokenseg.synthetic.anatomy import Anatomy
from tokenseg.synthetic.grid import Field, Mesh3, ScanGrid, Triple, smooth_noise
from tokenseg.synthetic.kinetics import Exchange

LesionShape: TypeAlias = Literal["lobulated", "spiculated"]
Uptake: TypeAlias = Literal["rim", "heterogeneous"]
Points: TypeAlias = Float[np.ndarray, "n 3"]

SMALLEST_MM, LARGEST_MM = 5.0, 40.0
_SMALL_MM = 10.0
_REACH = 1.8  # of the radius: no part of a lesion is farther from its centre
_UNEVENNESS: dict[LesionShape, float] = {"lobulated": 0.03, "spiculated": 0.05}
_COARSE_SAMPLES = 44
_FINE_MM = 0.9
_FINE_SHARE = 0.09  # of the radius: small lesions are sampled more finely


@dataclass(frozen=True, kw_only=True)
class Lesion:
    """The drawn properties of one lesion."""

    centre_mm: Triple
    """Along left, posterior, superior from the corner of the field of view."""
    diameter_mm: float
    """Of the ball with the volume of the lesion."""
    shape: LesionShape
    uptake: Uptake
    exchange: Exchange
    form_seed: int
    """Seed of its outline."""


@dataclass(frozen=True, eq=False)
class LesionMaps:
    """A lesion on a grid.

    Attributes:
        share: Share of each voxel that the lesion fills.
        uptake: Factor of its uptake in each voxel, about 1 on average; 1 outside.
    """

    share: Field
    uptake: Field


def draw_lesions(
    rng: np.random.Generator, count: int, anatomy: Anatomy, grid: ScanGrid, num_small: int = 0
) -> tuple[Lesion, ...]:
    """Draw lesions and their places: inside the breast, apart from skin, chest wall and each other, rather in gland.

    A lesion that is too large for its breast is made smaller; where not even the smallest has room there are fewer.

    Args:
        rng: Source of the draws.
        count: Lesions of any size.
        anatomy: Where they may lie.
        grid: Of the anatomy.
        num_small: Further lesions, of 5 to 10 mm.
    """
    lesions: list[Lesion] = []
    for number in range(count + num_small):
        if number >= count:
            diameter = rng.uniform(SMALLEST_MM, _SMALL_MM)
        else:
            diameter = SMALLEST_MM + (LARGEST_MM - SMALLEST_MM) * float(rng.beta(2.6, 2.2))
        if lesions and number < count:  # a satellite is the smaller one
            diameter = min(diameter, rng.uniform(10, 18))
        while diameter >= SMALLEST_MM:
            centre = _draw_centre(rng, diameter, lesions, anatomy, grid)
            if centre is not None:
                lesions.append(_draw_lesion(rng, centre, diameter))
                break
            diameter *= 0.85
    return tuple(lesions)


def lesion_maps(rng: np.random.Generator, lesion: Lesion, grid: ScanGrid) -> LesionMaps:
    """Put a lesion on a grid; its volume is that of the ball with its diameter.

    The outline is sampled several times a voxel, so thin spicules keep their volume. The lesion should be inside the
    grid, as those of `draw_lesions` are.

    Args:
        rng: Source of the texture of its uptake.
        lesion: What to put.
        grid: Where.
    """
    radius = lesion.diameter_mm / 2
    start, counts = _box(lesion, grid)
    fine_mm = min(_FINE_MM, max(_FINE_SHARE * radius, 0.35))
    splits = [math.ceil(step / fine_mm) for step in grid.spacing_mm]
    level = _level(lesion, _fine_positions(lesion, grid, start, counts, splits))
    # What is missing or too much after scaling is a hair's breadth all over the surface.
    level -= _level_of_volume(level, math.pi / 6 * lesion.diameter_mm**3 * math.prod(splits) / (1000 * grid.voxel_ml))
    parts = level.reshape([size for pair in zip(counts, splits, strict=True) for size in pair])
    box = tuple(slice(first, first + count) for first, count in zip(start, counts, strict=True))
    share = np.zeros(grid.shape_vox, dtype=np.float32)
    uptake = np.ones(grid.shape_vox, dtype=np.float32)
    share[box] = (parts < 0).mean(axis=(1, 3, 5))
    depth = distance_transform_edt(share[box] >= 0.5, sampling=grid.spacing_mm).astype(np.float32) / radius
    patches = smooth_noise(rng, grid, max(0.7 * radius, 3.0))[box]
    uptake[box] = _uptake(lesion, depth, patches)
    return LesionMaps(share, uptake)


def _draw_lesion(rng: np.random.Generator, centre: Triple, diameter_mm: float) -> Lesion:
    extracellular = rng.uniform(0.3, 0.4)
    return Lesion(
        centre_mm=centre,
        diameter_mm=diameter_mm,
        shape="lobulated" if rng.random() < 0.5 else "spiculated",
        # A rim around a core that is poorly perfused takes a lesion of some size.
        uptake="rim" if diameter_mm > 14 and rng.random() < 0.5 else "heterogeneous",
        exchange=Exchange(
            transfer_per_min=extracellular * rng.uniform(0.8, 1.2), extracellular=extracellular, plasma=0.04
        ),
        form_seed=int(rng.integers(2**31)),
    )


def _draw_centre(
    rng: np.random.Generator, diameter_mm: float, others: list[Lesion], anatomy: Anatomy, grid: ScanGrid
) -> Triple | None:
    """Draw a voxel whose surroundings have room, gland preferred; None where no voxel has."""
    radius = diameter_mm / 2
    room = (anatomy.depth_mm > 1.2 * radius + 3) & (anatomy.above_chest_mm > 1.1 * radius + 2)
    edge_mm = 1.15 * radius
    for axis, (size, step) in enumerate(zip(grid.shape_vox, grid.spacing_mm, strict=True)):
        edge = np.arange(size) * step
        room &= np.expand_dims(
            (edge > edge_mm) & (edge[::-1] > edge_mm), [other for other in range(3) if other != axis]
        )
    for other in others:
        squares = [(axis - centre) ** 2 for axis, centre in zip(grid.centres_mm(), other.centre_mm, strict=True)]
        room &= sum(squares) > (1.3 * (radius + other.diameter_mm / 2) + 4) ** 2
    candidates = np.flatnonzero(room)
    if not candidates.size:
        return None
    weights = 0.1 + anatomy.shares["gland"].ravel()[candidates].astype(np.float64)
    chosen = np.unravel_index(rng.choice(candidates, p=weights / weights.sum()), grid.shape_vox)
    x, y, z = (float((index + rng.random()) * step) for index, step in zip(chosen, grid.spacing_mm, strict=True))
    return x, y, z


def _box(lesion: Lesion, grid: ScanGrid) -> tuple[list[int], list[int]]:
    """First voxel and number of voxels along each axis of a box that holds the lesion."""
    reach = _REACH * lesion.diameter_mm / 2
    axes = list(zip(lesion.centre_mm, grid.shape_vox, grid.spacing_mm, strict=True))
    start = [max(math.floor((centre - reach) / step), 0) for centre, _, step in axes]
    stop = [min(math.ceil((centre + reach) / step), size) for centre, size, step in axes]
    return start, [last - first for first, last in zip(start, stop, strict=True)]


def _fine_positions(lesion: Lesion, grid: ScanGrid, start: list[int], counts: list[int], splits: list[int]) -> Mesh3:
    """Sample positions relative to the lesion's centre in radii, as an open mesh."""
    axes = [
        ((first + (np.arange(count * split) + 0.5) / split) * step - centre) * 2 / lesion.diameter_mm
        for first, count, split, step, centre in zip(
            start, counts, splits, grid.spacing_mm, lesion.centre_mm, strict=True
        )
    ]
    x, y, z = (axis.astype(np.float32) for axis in axes)
    return x[:, None, None], y[None, :, None], z[None, None, :]


def _level(lesion: Lesion, position: Mesh3) -> Field:
    """Signed field of the outline in radii, negative inside, of about a unit ball's volume."""
    make = _lobulated if lesion.shape == "lobulated" else _spiculated
    coarse = np.linspace(-_REACH, _REACH, _COARSE_SAMPLES, dtype=np.float32)
    cube = coarse[:, None, None], coarse[None, :, None], coarse[None, None]
    # A plain number: an np.float64 would turn the arrays to double precision.
    share = float((make(np.random.default_rng(lesion.form_seed), cube, _bumps(lesion, cube)) < 0).mean())
    scale = (share * (2 * _REACH) ** 3 / (4 * math.pi / 3)) ** (1 / 3)
    x, y, z = position
    return make(np.random.default_rng(lesion.form_seed), (x * scale, y * scale, z * scale), _bumps(lesion, position))


def _bumps(lesion: Lesion, position: Mesh3) -> Field:
    """Small unevenness of the surface, in radii."""
    size_x, size_y, size_z = (axis.size for axis in position)
    step_x, step_y, step_z = (float(axis.ravel()[1] - axis.ravel()[0]) for axis in position)
    grid = ScanGrid(shape_vox=(size_x, size_y, size_z), spacing_mm=(step_x, step_y, step_z))
    noise = smooth_noise(np.random.default_rng(lesion.form_seed + 1), grid, 0.45)
    return noise * np.float32(_UNEVENNESS[lesion.shape])


def _stretched(rng: np.random.Generator, position: Mesh3) -> Mesh3:
    x, y, z = (axis * np.float32(rng.uniform(0.85, 1.2)) for axis in position)
    return x, y, z


def _lobulated(rng: np.random.Generator, position: Mesh3, bumps: Field) -> Field:
    """A body and four to six lobes that bulge out of it, joined with soft furrows."""
    position = _stretched(rng, position)
    level = _ball(position, np.zeros(3), 0.7)
    for direction in _spread_directions(rng, int(rng.integers(4, 7))):
        lobe = _ball(position, direction * rng.uniform(0.5, 0.65), rng.uniform(0.38, 0.5))
        blend = np.maximum(0.12 - np.abs(level - lobe), 0)
        level = np.minimum(level, lobe) - blend**2 / 0.48
    level += bumps
    return level


def _spiculated(rng: np.random.Generator, position: Mesh3, bumps: Field) -> Field:
    """An uneven body and tapering spicules that radiate from it."""
    position = _stretched(rng, position)
    level = _ball(position, np.zeros(3), 0.75)
    for direction in _spread_directions(rng, 4):
        level = np.minimum(level, _ball(position, direction * 0.4, rng.uniform(0.35, 0.5)))
    level += bumps  # on the body alone: on a spicule they would cut off its tip
    squares = sum(axis**2 for axis in position)
    for direction in _spread_directions(rng, int(rng.integers(10, 16))):
        length, thickness = rng.uniform(1.25, 1.55), rng.uniform(0.16, 0.25)
        along = sum(axis * np.float32(part) for axis, part in zip(position, direction, strict=True))
        across = np.sqrt(np.maximum(squares - along**2, 0))
        spicule = np.maximum(across - np.float32(thickness) * (1 - along / np.float32(length)), -along)
        np.minimum(level, spicule, out=level)
    return level


def _ball(position: Mesh3, centre: Float[np.ndarray, " 3"], radius: float) -> Field:
    squares = [(axis - np.float32(middle)) ** 2 for axis, middle in zip(position, centre, strict=True)]
    distance: Field = np.sqrt(squares[0] + squares[1] + squares[2])
    return distance - np.float32(radius)


def _spread_directions(rng: np.random.Generator, count: int) -> Points:
    """Unit vectors in all directions: a spiral over the sphere, turned at random and jittered."""
    turn, _ = np.linalg.qr(rng.standard_normal((3, 3)))
    up = 1 - 2 * (np.arange(count) + 0.5) / count
    angle = np.pi * (1 + math.sqrt(5)) * np.arange(count)
    flat = np.sqrt(1 - up**2)
    points = np.stack([flat * np.cos(angle), flat * np.sin(angle), up], axis=1) @ turn
    points += rng.normal(0, 0.15, points.shape)
    directions: Points = points / np.linalg.norm(points, axis=1, keepdims=True)
    return directions


def _level_of_volume(level: Field, wanted_samples: float) -> float:
    """The value below which as many samples lie as the wanted volume takes."""
    index = min(max(round(wanted_samples), 1), level.size - 1)
    return float(np.partition(level.ravel(), index)[index])


def _uptake(lesion: Lesion, depth: Field, patches: Field) -> Field:
    """Factor of the uptake, from the depth below the surface in radii and a texture."""
    if lesion.uptake == "rim":
        core = np.clip((depth + 0.1 * patches - 0.3) / 0.2, 0, 1)
        ring: Field = (1.15 - 0.85 * core) * np.exp(0.15 * patches)
        return ring
    mottled: Field = 0.95 * np.exp(0.25 * patches)
    return mottled
