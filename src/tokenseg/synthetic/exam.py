"""One synthetic exam: a breast, its lesions and vessels, scanned once before and twice after contrast agent."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Float, Int16, UInt8
from scipy.ndimage import gaussian_filter, label

from tokenseg.shapes import Affine
from tokenseg.synthetic.anatomy import Anatomy, Shares, build_anatomy, draw_breast
from tokenseg.synthetic.both_breasts import draw_both
from tokenseg.synthetic.grid import Field, ScanGrid, Triple, smooth_noise
from tokenseg.synthetic.kinetics import BLOOD, Exchange, TissueName, signal, tissue_concentration_mm
from tokenseg.synthetic.lesions import Lesion, LesionMaps, draw_lesions, lesion_maps
from tokenseg.synthetic.scanner import (
    CentreName,
    Protocol,
    coil_shading,
    draw_protocol,
    measure,
    move,
    stored_affine,
    suppress_fat,
)
from tokenseg.synthetic.vessels import Vessel, draw_vessels, vessel_share

NUM_PHASES = 3

_EXCHANGE: dict[TissueName, Exchange] = {
    "fat": Exchange(transfer_per_min=0.004, extracellular=0.1, plasma=0.003),
    "muscle": Exchange(transfer_per_min=0.04, extracellular=0.15, plasma=0.01),
    "heart": Exchange(transfer_per_min=0.5, extracellular=0.25, plasma=0.08),
    "liver": Exchange(transfer_per_min=0.4, extracellular=0.3, plasma=0.05),
    "blood": BLOOD,
    "skin": Exchange(transfer_per_min=0.05, extracellular=0.3, plasma=0.01),
    "bone": Exchange(transfer_per_min=0.02, extracellular=0.1, plasma=0.01),
}
# K^trans of gland per minute for minimal, mild, moderate and marked background enhancement, and how often each comes.
_GLAND_TRANSFER = (0.006, 0.015, 0.027, 0.04)
_GLAND_CHANCE = (0.25, 0.35, 0.25, 0.15)
_FOCUS_MM = 1.4
_FOCUS_UPTAKE = 3.0

_Nipples: TypeAlias = dict[Literal["left", "right"], Triple]
Voxels: TypeAlias = Float[np.ndarray, " n"]


@dataclass(frozen=True, kw_only=True)
class LesionRecord:
    """One lesion as it stands in the images."""

    diameter_mm: float
    """Of the ball with the lesion's volume."""
    volume_ml: float
    """Before the voxels cut it; the mask's own volume differs by partial volume."""
    shape: str
    enhancement: str
    centre_mm: Triple
    """World position (RAS+)."""


@dataclass(frozen=True, eq=False)
class Exam:
    """A finished exam.

    Attributes:
        phases: Scan before contrast agent and two after it, in stored order (left, posterior, superior).
        mask: 1 where a lesion fills at least half a voxel; each lesion is one piece.
        affine: From voxel indices to mm in RAS+ world coordinates.
        protocol: How it was scanned.
        lesions: What was put in.
    """

    phases: tuple[Int16[np.ndarray, "X Y Z"], ...]
    mask: UInt8[np.ndarray, "X Y Z"]
    affine: Affine
    protocol: Protocol
    lesions: tuple[LesionRecord, ...]


class _Enhancing(NamedTuple):
    """A tissue whose uptake differs from voxel to voxel."""

    tissue: TissueName
    share: Field
    exchange: Exchange
    uptake: Field


def make_exam(rng: np.random.Generator, centre: CentreName, num_lesions: int, *, whole: bool = False) -> Exam:
    """Make an exam.

    Args:
        rng: Source of everything random in it; the same state gives the same exam.
        centre: Where it is scanned.
        num_lesions: How many lesions it has.
        whole: Both breasts at about 1 mm instead of one; where there are lesions, as many small ones come on top.
    """
    protocol = draw_protocol(rng, centre, whole=whole)
    grid = protocol.grid
    anatomy, nipples = _draw_both(rng, grid) if whole else _draw_one(rng, grid)
    lesions = draw_lesions(rng, num_lesions, anatomy, grid, num_small=num_lesions if whole else 0)
    vessels = vessel_share(rng, _draw_vessels(rng, anatomy, nipples), grid)
    shares = dict(anatomy.shares)
    vessels = np.minimum(vessels, np.sum(list(shares.values()), axis=0))  # none outside the body
    _displace(shares, vessels)
    shares["blood"] += vessels
    body = np.sum(list(shares.values()), axis=0)
    maps = [_inside(lesion_maps(rng, lesion, grid), body) for lesion in lesions]
    for one in maps:
        _displace(shares, one.share)
    enhancing = [
        _Enhancing("gland", shares["gland"], _draw_background(rng), _gland_uptake(rng, shares["gland"], grid)),
        *(
            _Enhancing("lesion", one.share, lesion.exchange, one.uptake)
            for lesion, one in zip(lesions, maps, strict=True)
        ),
    ]
    affine = stored_affine(protocol, _draw_origin(rng, grid))
    return Exam(
        phases=_scan(rng, protocol, shares, enhancing),
        mask=_mask(maps, grid),
        affine=affine,
        protocol=protocol,
        lesions=tuple(_record(lesion, one, grid, affine) for lesion, one in zip(lesions, maps, strict=True)),
    )


def _draw_one(rng: np.random.Generator, grid: ScanGrid) -> tuple[Anatomy, _Nipples]:
    breast = draw_breast(rng)
    anatomy = build_anatomy(rng, breast, grid)
    return anatomy, {breast.side: anatomy.nipple_mm}


def _draw_both(rng: np.random.Generator, grid: ScanGrid) -> tuple[Anatomy, _Nipples]:
    anatomy, right_mm = draw_both(rng, grid)
    return anatomy, {"left": anatomy.nipple_mm, "right": right_mm}


def _draw_vessels(rng: np.random.Generator, anatomy: Anatomy, nipples: _Nipples) -> tuple[Vessel, ...]:
    sides = [draw_vessels(rng, replace(anatomy, nipple_mm=place), side) for side, place in nipples.items()]
    return tuple(vessel for vessels in sides for vessel in vessels)


def _inside(maps: LesionMaps, body: Field) -> LesionMaps:
    """Cut off what would stick out of the skin, such as the tip of a spicule."""
    return replace(maps, share=np.minimum(maps.share, body))


def _mask(maps: list[LesionMaps], grid: ScanGrid) -> UInt8[np.ndarray, "X Y Z"]:
    """Mark the voxels that lesions fill by half, in one piece a lesion: no crumbs where a spicule thins out."""
    mask = np.zeros(grid.shape_vox, np.uint8)
    for one in maps:
        pieces, _ = label(one.share >= 0.5, np.ones((3, 3, 3)))
        sizes = np.bincount(pieces.ravel())[1:]
        mask[pieces == sizes.argmax() + 1] = 1
    return mask


def _displace(shares: Shares, share: Field) -> None:
    """Make room for something that is put over all tissues."""
    for name in shares:
        shares[name] = shares[name] * (1 - share)


def _scan(
    rng: np.random.Generator, protocol: Protocol, shares: Shares, enhancing: list[_Enhancing]
) -> tuple[Int16[np.ndarray, "X Y Z"], ...]:
    """Scan all phases; the patient lies still in the first one after contrast agent, and otherwise a bit elsewhere."""
    shading = coil_shading(rng, protocol)
    shares = shares | {"fat": shares["fat"] * suppress_fat(rng, protocol)}
    phases = []
    for phase in range(NUM_PHASES):
        image = np.zeros(protocol.grid.shape_vox, dtype=np.float32)
        for tissue, exchange in _EXCHANGE.items():
            if tissue in shares:
                image += shares[tissue] * _signal(protocol, phase, tissue, exchange, np.ones(1, dtype=np.float32))
        for part in enhancing:
            inside = part.share > 0
            strength = _signal(protocol, phase, part.tissue, part.exchange, part.uptake[inside])
            image[inside] += part.share[inside] * strength
        still = image if phase == 1 else move(rng, image, protocol)
        phases.append(measure(rng, still * shading, protocol))
    return tuple(phases)


def _signal(protocol: Protocol, phase: int, tissue: TissueName, exchange: Exchange, uptake: Voxels) -> Voxels:
    amount_mm = tissue_concentration_mm(exchange, protocol.sequence.post_contrast_s)[phase - 1] if phase else 0.0
    return signal(protocol.sequence, tissue, np.float32(amount_mm) * uptake)


def _draw_background(rng: np.random.Generator) -> Exchange:
    transfer = float(rng.choice(_GLAND_TRANSFER, p=_GLAND_CHANCE)) * rng.uniform(0.8, 1.2)
    return Exchange(transfer_per_min=transfer, extracellular=0.4, plasma=0.01)


def _gland_uptake(rng: np.random.Generator, gland: Field, grid: ScanGrid) -> Field:
    """Background enhancement: patchy over centimetres, with foci of 3 to 5 mm where there is gland."""
    patches: Field = np.exp(0.3 * smooth_noise(rng, grid, 16.0) + 0.2 * smooth_noise(rng, grid, 6.0) - 0.07)
    places = np.flatnonzero(gland > 0.5)
    foci = np.zeros(grid.shape_vox, dtype=np.float32)
    if places.size:
        foci.ravel()[rng.choice(places, size=rng.integers(0, 16))] = 1
    sigma_vox = [_FOCUS_MM / step for step in grid.spacing_mm]
    peak = np.prod(sigma_vox) * (2 * np.pi) ** 1.5
    result: Field = patches + _FOCUS_UPTAKE * np.float32(peak) * gaussian_filter(foci, sigma_vox)
    return result


def _draw_origin(rng: np.random.Generator, grid: ScanGrid) -> Triple:
    """World position of the first voxel that puts the field of view about the middle of the scanner."""
    x, y, z = (
        float(sign * extent / 2 + rng.uniform(-20, 20)) for sign, extent in zip((1, 1, -1), grid.extent_mm, strict=True)
    )
    return x, y, z


def _record(lesion: Lesion, maps: LesionMaps, grid: ScanGrid, affine: Affine) -> LesionRecord:
    index = np.array(lesion.centre_mm) / grid.spacing_mm - 0.5
    x, y, z = (round(float(value), 2) for value in affine[:3, :3] @ index + affine[:3, 3])
    return LesionRecord(
        diameter_mm=round(lesion.diameter_mm, 2),
        volume_ml=round(float(maps.share.sum(dtype=np.float64)) * grid.voxel_ml, 4),
        shape=lesion.shape,
        enhancement=lesion.uptake,
        centre_mm=(x, y, z),
    )
