"""Voxel shares against exact volumes; textures against their statistics."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenseg.synthetic.grid import ScanGrid, coverage, slope_per_mm, smooth_noise

GRID = ScanGrid(shape_vox=(40, 36, 20), spacing_mm=(1.5, 1.5, 2.5))


def ball(grid, centre_mm, radius_mm):
    squares = [(axis - middle) ** 2 for axis, middle in zip(grid.centres_mm(), centre_mm, strict=True)]
    return np.sqrt(sum(squares)).astype(np.float32) - np.float32(radius_mm)


def test_grid_places_voxel_centres_half_a_voxel_from_the_corner():
    x, y, z = GRID.centres_mm()
    assert (x.shape, y.shape, z.shape) == ((40, 1, 1), (1, 36, 1), (1, 1, 20))
    assert [x[0, 0, 0], y[0, -1, 0], z[0, 0, 1]] == pytest.approx([0.75, 53.25, 3.75])
    assert GRID.extent_mm == (60, 54, 50)
    assert GRID.voxel_ml == pytest.approx(0.005625)


@settings(max_examples=25, deadline=None)
@given(edge_mm=st.floats(6, 54))
def test_coverage_of_a_half_space_is_exact(edge_mm):
    level = np.broadcast_to(GRID.centres_mm()[0] - np.float32(edge_mm), GRID.shape_vox).copy()
    filled_mm = coverage(level)[:, 5, 5].sum() * 1.5
    assert filled_mm == pytest.approx(edge_mm, abs=1e-3)


def test_coverage_keeps_the_volume_of_a_ball_on_anisotropic_voxels():
    share = coverage(ball(GRID, (31, 26, 24), 15))
    assert share.sum() * GRID.voxel_ml == pytest.approx(4 / 3 * math.pi * 1.5**3, rel=0.01)
    assert (share.min(), share.max()) == (0, 1)


def test_coverage_of_a_constant_field_is_all_or_nothing():
    assert (coverage(np.full((3, 3, 3), -2, np.float32)) == 1).all()
    assert (coverage(np.full((3, 3, 3), 2, np.float32)) == 0).all()


def test_slope_is_per_mm_on_anisotropic_voxels():
    x, y, z = GRID.centres_mm()
    slope = slope_per_mm((2 * x - 3 * y + 6 * z).astype(np.float32), GRID)
    np.testing.assert_allclose(slope, 7, rtol=1e-4)


def test_noise_has_unit_variance_at_every_voxel():
    grid = ScanGrid(shape_vox=(9, 8, 7), spacing_mm=(1.5, 1.5, 2.5))
    draws = np.stack([smooth_noise(np.random.default_rng(seed), grid, (5.0, 7.0, 9.0)) for seed in range(800)])
    assert np.abs(draws.mean(axis=0)).max() < 0.2
    assert draws.std(axis=0) == pytest.approx(1, abs=0.15)


def test_noise_is_smooth_within_its_length_and_independent_beyond():
    grid = ScanGrid(shape_vox=(64, 64, 64), spacing_mm=(1.0, 1.0, 1.0))
    noise = smooth_noise(np.random.default_rng(0), grid, 6.0)

    def correlation(steps):
        return np.corrcoef(noise[steps:].ravel(), noise[:-steps].ravel())[0, 1]

    assert correlation(1) > 0.9
    assert abs(correlation(30)) < 0.15


def test_noise_lengths_go_with_their_axes():
    grid = ScanGrid(shape_vox=(48, 48, 48), spacing_mm=(1.0, 1.0, 1.0))
    noise = smooth_noise(np.random.default_rng(0), grid, (3.0, 30.0, 3.0))
    along, across = np.diff(noise, axis=1).std(), np.diff(noise, axis=0).std()
    assert along < across / 5
    assert noise.shape == (48, 48, 48)
