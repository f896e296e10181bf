"""Tubes keep their volume, whatever their direction; drawn vessels run where they should."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tokenseg.synthetic.anatomy import build_anatomy, draw_breast
from tokenseg.synthetic.grid import ScanGrid
from tokenseg.synthetic.vessels import Vessel, draw_vessels, vessel_share

GRID = ScanGrid(shape_vox=(40, 40, 24), spacing_mm=(1.5, 1.5, 2.5))


def tube(start, end, radius_mm):
    along = np.linspace(0, 1, 101)[:, None]
    line = np.array(start) + (np.array(end) - np.array(start)) * along
    return Vessel(line, np.full(101, float(radius_mm)))


@pytest.mark.parametrize("end", [(40, 30, 30), (30, 30, 50), (45, 20, 45), (30, 48, 30)])
def test_a_tube_keeps_its_volume_in_every_direction(end):
    start = (20, 30, 30) if end != (30, 30, 50) else (30, 30, 20)
    share = vessel_share(np.random.default_rng(0), (tube(start, end, 1.2),), GRID)
    volume_ml = math.pi * 1.2**2 * math.dist(start, end) / 1000
    assert share.sum() * GRID.voxel_ml == pytest.approx(volume_ml, rel=0.03)


def test_a_wide_tube_fills_the_voxels_around_its_line():
    share = vessel_share(np.random.default_rng(0), (tube((30, 30, 10), (30, 30, 50), 6),), GRID)
    assert share[20, 20, 12] > 0.8
    assert share[20, 26, 12] == 0, "9 mm beside the line"
    assert share.max() <= 1


def test_what_leaves_the_grid_is_cut_off():
    share = vessel_share(np.random.default_rng(0), (tube((-30, 30, 30), (30, 30, 30), 1.2),), GRID)
    assert share.sum() * GRID.voxel_ml == pytest.approx(math.pi * 1.2**2 * 30 / 1000, rel=0.05)
    assert not vessel_share(np.random.default_rng(0), (), GRID).any()


@pytest.mark.parametrize("side", ["left", "right"])
def test_drawn_vessels_are_thin_many_and_in_the_breast(side):
    grid = ScanGrid(shape_vox=(72, 72, 40), spacing_mm=(2.0, 2.0, 3.0))
    anatomy = build_anatomy(np.random.default_rng(0), draw_breast(np.random.default_rng(0)), grid)
    vessels = draw_vessels(np.random.default_rng(0), anatomy, side)
    assert len(vessels) >= 6
    assert all(vessel.radius_mm.min() > 0.2 and vessel.radius_mm.max() < 2 for vessel in vessels)
    in_breast = vessel_share(np.random.default_rng(0), vessels, grid)[(anatomy.depth_mm > 0)]
    assert 0.3 < in_breast.sum() * grid.voxel_ml < 8
    inner = np.array([vessel.line_mm[0, 0] for vessel in vessels[-2:]]) - anatomy.nipple_mm[0]
    assert (inner * (1 if side == "left" else -1) < -50).all(), "the two behind the breast bone"
