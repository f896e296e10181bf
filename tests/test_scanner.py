"""The scanner: noise with Rice's statistics, motion that moves, affines that a second library reads alike."""

from __future__ import annotations

import math
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

from tokenseg.synthetic.grid import ScanGrid
from tokenseg.synthetic.scanner import coil_shading, draw_protocol, measure, move, stored_affine, suppress_fat


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.fixture
def protocol():
    grid = ScanGrid(shape_vox=(40, 36, 30), spacing_mm=(1.5, 1.5, 2.5))
    return replace(draw_protocol(rng(), "internal"), grid=grid, gain=1e5, noise=0.1)


def test_noise_in_air_follows_rayleigh(protocol):
    stored = measure(rng(), np.zeros((60, 60, 60), np.float32), protocol)
    deviation = 1e5 * 0.1 * 0.026
    assert stored.dtype == np.int16
    assert stored.mean() == pytest.approx(deviation * math.sqrt(math.pi / 2), rel=0.01)
    assert stored.std() == pytest.approx(deviation * math.sqrt(2 - math.pi / 2), rel=0.01)


def test_noise_on_strong_signal_is_gaussian_about_it(protocol):
    stored = measure(rng(), np.full((60, 60, 60), 0.1, np.float32), protocol).astype(float)
    assert stored.std() == pytest.approx(1e5 * 0.1 * 0.026, rel=0.02)
    assert stored.mean() == pytest.approx(1e4, rel=0.005)


def test_what_does_not_fit_is_cut_at_the_largest_number(protocol):
    assert (measure(rng(), np.full((2, 2, 2), 1.0, np.float32), protocol) == 32767).all()


def test_motion_shifts_by_about_its_size(protocol):
    x, y, z = protocol.grid.centres_mm()
    ramp = (x + 0 * y + 0 * z).astype(np.float32)
    shifts = [(move(rng(seed), ramp, replace(protocol, motion_mm=0.6)) - ramp)[8:-8].mean() for seed in range(40)]
    assert np.std(shifts) == pytest.approx(0.65, rel=0.35)
    assert (move(rng(), ramp, replace(protocol, motion_mm=0.0)) == ramp).all()


def test_shading_falls_to_the_back_and_stays_positive(protocol):
    fields = np.stack([coil_shading(rng(seed), protocol) for seed in range(30)])
    assert fields.min() > 0
    assert fields.mean(axis=0)[:, 0].mean() > 1.2 * fields.mean(axis=0)[:, -1].mean()


def test_fat_suppression_leaves_its_share_and_fails_in_places(protocol):
    fields = np.stack([suppress_fat(rng(seed), protocol) for seed in range(40)])
    assert fields.min() == pytest.approx(protocol.fat_left)
    assert np.median(fields) == pytest.approx(protocol.fat_left)
    assert 1.3 * protocol.fat_left < fields.max() <= 1


@pytest.mark.parametrize("tilt", [-6.0, 0.0, 5.0])
def test_affine_is_axial_with_its_spacing(protocol, tilt):
    affine = stored_affine(replace(protocol, tilt_degrees=tilt), (70.0, 60.0, -40.0))
    assert nib.orientations.aff2axcodes(affine) == ("L", "P", "S")
    np.testing.assert_allclose(nib.affines.voxel_sizes(affine), (1.5, 1.5, 2.5))
    assert np.linalg.det(affine[:3, :3]) == pytest.approx(1.5 * 1.5 * 2.5)
    assert nib.affines.obliquity(affine).max() == pytest.approx(math.radians(abs(tilt)))
    assert affine[:3, 3].tolist() == [70, 60, -40]


def test_centres_differ_in_field_contrast_noise_and_resolution():
    internal = [draw_protocol(rng(seed), "internal") for seed in range(20)]
    external = [draw_protocol(rng(seed), "external") for seed in range(20)]
    for one, two in zip(internal, external, strict=True):
        assert (one.sequence.field_strength_t, two.sequence.field_strength_t) == (1.5, 3.0)
        assert one.grid.spacing_mm[0] > two.grid.spacing_mm[0]
        assert one.grid.spacing_mm[2] < two.grid.spacing_mm[2]
        assert one.noise < two.noise
        assert one.sequence.post_contrast_s[0] > two.sequence.post_contrast_s[0]
        assert all(110 < extent < 150 for protocol in (one, two) for extent in protocol.grid.extent_mm)
    assert len({protocol.grid.shape_vox for protocol in internal}) > 5
