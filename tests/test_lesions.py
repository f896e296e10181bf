"""Lesions: volumes that are exact, forms and uptake that differ as their names say, places with room."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.ndimage import binary_erosion, label

from tokenseg.synthetic.anatomy import Anatomy, build_anatomy, draw_breast
from tokenseg.synthetic.grid import ScanGrid
from tokenseg.synthetic.kinetics import Exchange
from tokenseg.synthetic.lesions import LARGEST_MM, SMALLEST_MM, Lesion, draw_lesions, lesion_maps

GRID = ScanGrid(shape_vox=(60, 60, 40), spacing_mm=(1.5, 1.5, 2.5))
BREAST = ScanGrid(shape_vox=(72, 72, 40), spacing_mm=(2.0, 2.0, 3.0))


def make(diameter_mm, shape="lobulated", uptake="heterogeneous", seed=0):
    return Lesion(
        centre_mm=(45.3, 44.1, 50.9),
        diameter_mm=float(diameter_mm),
        shape=shape,
        uptake=uptake,
        exchange=Exchange(transfer_per_min=0.2, extracellular=0.25),
        form_seed=seed,
    )


def maps(lesion, seed=0):
    return lesion_maps(np.random.default_rng(seed), lesion, GRID)


def anatomy(seed=0):
    return build_anatomy(np.random.default_rng(seed), draw_breast(np.random.default_rng(seed)), BREAST)


@pytest.mark.parametrize("shape", ["lobulated", "spiculated"])
@pytest.mark.parametrize("diameter_mm", [5, 12, 25, 40])
def test_the_volume_is_that_of_the_ball(shape, diameter_mm):
    share = maps(make(diameter_mm, shape)).share
    assert share.sum() * GRID.voxel_ml == pytest.approx(math.pi / 6 * (diameter_mm / 10) ** 3, rel=0.01)
    assert 0 <= share.min() <= share.max() <= 1


@pytest.mark.parametrize("shape", ["lobulated", "spiculated"])
@pytest.mark.parametrize("seed", range(4))
def test_the_mask_is_one_piece_around_the_centre(shape, seed):
    share = maps(make(20, shape, seed=seed)).share
    pieces, count = label(share >= 0.5, np.ones((3, 3, 3)))
    assert np.bincount(pieces.ravel())[1:].max() > 0.98 * (share >= 0.5).sum()
    assert count <= 4, "crumbs at the tips of spicules"
    assert share[30, 29, 20] == 1
    assert (share >= 0.5).sum() * GRID.voxel_ml == pytest.approx(share.sum() * GRID.voxel_ml, rel=0.1)


def test_spicules_reach_farther_than_lobes():
    x, y, z = GRID.centres_mm()
    distance = np.sqrt((x - 45.3) ** 2 + (y - 44.1) ** 2 + (z - 50.9) ** 2)

    def reach_mm(shape):
        return np.mean([distance[maps(make(24, shape, seed=seed)).share > 0.15].max() for seed in range(6)])

    assert reach_mm("spiculated") > reach_mm("lobulated") + 1
    assert reach_mm("spiculated") < 1.8 * 12


def test_neither_form_is_a_ball():
    x, y, z = GRID.centres_mm()
    distance = np.sqrt((x - 45.3) ** 2 + (y - 44.1) ** 2 + (z - 50.9) ** 2)
    for shape in ("lobulated", "spiculated"):
        mask = maps(make(30, shape)).share >= 0.5
        outside = (mask & (distance > 15)).sum() / mask.sum()
        assert 0.05 < outside < 0.4, shape


def test_the_form_depends_on_its_seed_alone():
    first, again, other = maps(make(20, seed=1), 5), maps(make(20, seed=1), 6), maps(make(20, seed=2), 5)
    assert (first.share == again.share).all()
    assert (first.share != other.share).any()


def test_a_rim_takes_up_more_than_its_core():
    both = maps(make(30, uptake="rim"))
    inside = both.share >= 0.5
    core = binary_erosion(inside, iterations=5)
    rim = inside & ~binary_erosion(inside, iterations=1)
    assert core.sum() > 50
    assert both.uptake[rim].mean() > 2 * both.uptake[core].mean()


def test_heterogeneous_uptake_varies_without_a_rim():
    ratios = []
    for seed in range(6):
        both = maps(make(30, seed=seed), seed)
        inside = both.share >= 0.5
        core = binary_erosion(inside, iterations=4)
        assert both.uptake[inside].std() > 0.15
        ratios.append(both.uptake[inside & ~core].mean() / both.uptake[core].mean())
    assert np.mean(ratios) == pytest.approx(1, abs=0.25)
    assert (both.uptake[~inside & (both.share == 0)][:100] == 1).all()


@pytest.mark.parametrize("seed", range(5))
def test_lesions_lie_in_the_breast_apart_from_each_other(seed):
    breast = anatomy(seed)
    lesions = draw_lesions(np.random.default_rng(seed), 2, breast, BREAST)
    assert len(lesions) == 2
    for lesion in lesions:
        voxel = tuple(np.floor(np.array(lesion.centre_mm) / BREAST.spacing_mm).astype(int))
        assert breast.depth_mm[voxel] > 1.2 * lesion.diameter_mm / 2
        assert breast.above_chest_mm[voxel] > 1.1 * lesion.diameter_mm / 2
        assert SMALLEST_MM <= lesion.diameter_mm <= LARGEST_MM
        assert lesion.uptake == "heterogeneous" or lesion.diameter_mm > 14
    first, second = lesions
    gap = math.dist(first.centre_mm, second.centre_mm) - (first.diameter_mm + second.diameter_mm) / 2
    assert gap > 4


def test_most_lesions_are_of_10_to_40_mm():
    breast = anatomy()
    sizes = [draw_lesions(np.random.default_rng(seed), 1, breast, BREAST)[0].diameter_mm for seed in range(120)]
    assert 0.8 < np.mean(np.array(sizes) >= 10) < 1
    assert np.median(sizes) == pytest.approx(20, abs=4)


def test_a_breast_without_room_gets_a_smaller_lesion_or_none():
    breast = anatomy()
    shallow = replace(breast, depth_mm=np.minimum(breast.depth_mm, 8.0).astype(np.float32))
    assert all(lesion.diameter_mm < 8.4 for lesion in draw_lesions(np.random.default_rng(0), 2, shallow, BREAST))
    none = Anatomy(breast.shares, np.full_like(breast.depth_mm, -1), breast.above_chest_mm, breast.nipple_mm)
    assert draw_lesions(np.random.default_rng(0), 2, none, BREAST) == ()


def test_lesions_prefer_gland():
    breast = anatomy(3)
    centres = [draw_lesions(np.random.default_rng(seed), 1, breast, BREAST)[0].centre_mm for seed in range(60)]
    voxels = np.floor(np.array(centres) / BREAST.spacing_mm).astype(int)
    room = (breast.depth_mm > 12) & (breast.above_chest_mm > 12)
    assert breast.shares["gland"][tuple(voxels.T)].mean() > 1.2 * breast.shares["gland"][room].mean()
