"""The breast: shares that add up, layers as thick as drawn, the organs of its side."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tokenseg.synthetic.anatomy import build_anatomy, draw_breast
from tokenseg.synthetic.grid import ScanGrid

GRID = ScanGrid(shape_vox=(72, 72, 40), spacing_mm=(2.0, 2.0, 3.0))
FINE = ScanGrid(shape_vox=(144, 144, 12), spacing_mm=(1.0, 1.0, 10.0))


def build(side="left", seed=0, grid=GRID, **sizes):
    shape = replace(draw_breast(np.random.default_rng(seed)), side=side, **sizes)
    return shape, build_anatomy(np.random.default_rng(seed), shape, grid)


@pytest.mark.parametrize("seed", range(4))
def test_shares_are_shares(seed):
    _, anatomy = build(seed=seed)
    total = sum(anatomy.shares.values())
    assert min(share.min() for share in anatomy.shares.values()) > -1e-5
    assert total.max() < 1 + 1e-5
    assert total[:, 0].max() == 0, "air in front of the nipple"
    assert total[36, 36, 20] == pytest.approx(1, abs=1e-5), "tissue in the middle of the breast"


def test_the_heart_is_behind_the_left_breast_and_the_liver_below_the_right():
    left, right = build("left")[1].shares, build("right")[1].shares
    assert left["blood"].sum() * GRID.voxel_ml > 10
    assert left["heart"].sum() * GRID.voxel_ml > 10
    assert right["liver"].sum() * GRID.voxel_ml > 10
    assert right["liver"][:, :, :10].sum() > 5 * right["liver"][:, :, -20:].sum()
    assert right["blood"].sum() == 0
    assert "liver" not in left
    assert "heart" not in right


def test_the_chest_wall_falls_back_to_the_outer_side():
    for side, outwards in (("left", 1), ("right", -1)):
        muscle = build(side)[1].shares["muscle"][:, :, 20]
        front = (muscle > 0.5).argmax(axis=1)[::outwards]  # first posterior voxel of muscle, from the inside out
        assert front[10] < front[36]
        assert front[36] < front[55] - 4


@pytest.mark.parametrize("skin_mm", [1.6, 2.4])
def test_skin_is_as_thick_as_drawn(skin_mm):
    _, anatomy = build(grid=FINE, skin_mm=skin_mm)
    beside_nipple = anatomy.shares["skin"][58:64, :, 6]
    assert beside_nipple.sum(axis=1).mean() == pytest.approx(skin_mm, rel=0.2)


@pytest.mark.parametrize("gland_share", [0.08, 0.3, 0.55])
def test_gland_fills_about_the_drawn_share_of_the_breast(gland_share):
    shape, anatomy = build(gland_share=gland_share)
    inside = (anatomy.depth_mm > shape.skin_mm) & (anatomy.above_chest_mm > 0)
    assert (anatomy.shares["gland"][inside] > 0.5).mean() == pytest.approx(gland_share, rel=0.15)


def test_gland_keeps_away_from_the_skin():
    _, anatomy = build(gland_share=0.3)
    deep, shallow = anatomy.depth_mm > 12, (anatomy.depth_mm > 3) & (anatomy.depth_mm < 6)
    breast = anatomy.above_chest_mm > 5
    assert anatomy.shares["gland"][deep & breast].mean() > 4 * anatomy.shares["gland"][shallow & breast].mean()


def test_depth_is_in_mm_near_the_skin():
    _, anatomy = build(grid=FINE)
    column = anatomy.depth_mm[60, :, 6]
    surface = int((column > 0).argmax())
    steps = np.diff(column[surface : surface + 8])
    # Straight below the surface a step of 1 mm goes a little less than 1 mm deeper, where the skin is inclined.
    assert ((steps > 0.7) & (steps < 1.1)).all()


def test_the_nipple_is_skin_at_the_tip():
    _, anatomy = build(grid=FINE, centre_up_mm=5.0)
    x, y, z = anatomy.nipple_mm
    assert (x, z) == (72, 65)
    column = anatomy.shares["skin"][int(x), :, 6]
    assert abs(column.argmax() - y) < 8
    assert column[int(y)] > 0.9


def test_breasts_differ():
    assert draw_breast(np.random.default_rng(1)) != draw_breast(np.random.default_rng(2))
    assert draw_breast(np.random.default_rng(1)) == draw_breast(np.random.default_rng(1))
